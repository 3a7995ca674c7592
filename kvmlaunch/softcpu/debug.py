"""Debug registers that a plain guest's owner has set for itself: the guest doesn't see them.

Source: AMD APM volume 2, 13.1.1 (debug registers) and 13.1.3 (breakpoints).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .engine import READ, WRITE

__all__ = ["NO_DEBUG", "DebugControl"]

_PAGE = 0x1000
_EXECUTE, _WRITE, _ACCESS = 0, 1, 3
_LENGTHS = (1, 2, 8, 4)
_GENERAL_DETECT = 1 << 13


@dataclasses.dataclass(frozen=True)
class DebugControl:
    """What the owner wants to be told of.

    Args:
        addresses: DR0 to DR3.
        dr7: DR7.
        breakpoints: INT3 is an event.
    """

    addresses: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr7: int = 0
    breakpoints: bool = False

    @property
    def general_detect(self) -> bool:
        """Whether an access to a debug register is an event."""
        return bool(self.dr7 & _GENERAL_DETECT)

    def code_places(self) -> frozenset[int]:
        """Where instruction breakpoints are."""
        return frozenset(address for _, kind, address, _ in self._enabled() if kind == _EXECUTE)

    def hits_code(self, linear: int) -> int:
        """Bits of DR6 for an instruction."""
        found = (n for n, kind, at, _ in self._enabled() if kind == _EXECUTE and at == linear)
        return sum(1 << number for number in found)

    def hits_data(self, linear: int, size: int, *, write: bool) -> int:
        """Bits of DR6 for an access."""
        hit = 0
        for number, kind, at, length in self._enabled():
            wanted = kind == _ACCESS or (kind == _WRITE and write)
            if wanted and linear < at + length and at < linear + size:
                hit |= 1 << number
        return hit

    def watched_pages(self) -> dict[int, int]:
        """Page -> kinds of access that have to be looked at."""
        pages: dict[int, int] = {}
        for _, kind, at, _ in self._enabled():
            if kind in (_WRITE, _ACCESS):
                page = at & -_PAGE
                pages[page] = pages.get(page, 0) | (WRITE if kind == _WRITE else READ | WRITE)
        return pages

    def _enabled(self) -> Iterator[tuple[int, int, int, int]]:
        """Number, kind, address and length."""
        for number, address in enumerate(self.addresses):
            if self.dr7 >> 2 * number & 3:
                fields = self.dr7 >> 16 + 4 * number
                length = _LENGTHS[fields >> 2 & 3]
                yield number, fields & 3, address & -length, length


NO_DEBUG = DebugControl()
