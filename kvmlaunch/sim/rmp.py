"""Reverse map table: who owns each page of physical memory.

RMPUPDATE is the host's instruction; `store` is for the secure processor and the CPU, which
obey their own rules. Page states are derived from an entry's bits:

| state         | assigned | ASID  | immutable | validated | VMSA | GPA |
|---------------|----------|-------|-----------|-----------|------|-----|
| Hypervisor    | 0        | 0     | 0         | 0         | 0    | 0   |
| Reclaim       | 1        | 0     | 0         | 0         | -    | -   |
| Firmware      | 1        | 0     | 1         | 0         | 0    | 0   |
| Context       | 1        | 0     | 1         | 0         | 1    | 0   |
| Metadata      | 1        | 0     | 1         | 0         | 0    | > 0 |
| Pre-Guest     | 1        | guest | 1         | 0         | -    | any |
| Pre-Swap      | 1        | guest | 1         | 1         | -    | any |
| Guest-Invalid | 1        | guest | 0         | 0         | -    | any |
| Guest-Valid   | 1        | guest | 0         | 1         | -    | any |

Source: AMD 56860, page states; APM 3, RMP entry. What Linux's RMPUPDATE calls show is
certain (Hypervisor, Firmware, Pre-Guest, Guest-Invalid). GEN, to be checked against the
documents: the bits that tell Context, Metadata and Pre-Swap from their neighbours. HV-Fixed
is left out.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Callable

from kvmlaunch.abi.page import PAGE_SIZE

__all__ = [
    "LARGE_PAGE_SIZE",
    "PERMS_ALL",
    "RMPUPDATE_FAIL_INPUT",
    "RMPUPDATE_FAIL_OVERLAP",
    "RMPUPDATE_FAIL_PERMISSION",
    "PageState",
    "Rmp",
    "RmpEntry",
]

LARGE_PAGE_SIZE = 2 << 20
"""Bytes of a page whose RMP entry says `page_size` 1."""
PERMS_ALL = 0xF
"""VMPL permissions read, write, user execute, supervisor execute."""

# APM 3, RMPUPDATE, return codes in EAX [GEN].
RMPUPDATE_FAIL_INPUT = 1
"""The new entry, or the address, can't be."""
RMPUPDATE_FAIL_PERMISSION = 2
"""The page is immutable: the secure processor has it."""
RMPUPDATE_FAIL_OVERLAP = 4
"""Pages of the two sizes would overlap."""


class PageState(enum.Enum):
    """Page states; the values are the names in 56860."""

    HYPERVISOR = "Hypervisor"
    RECLAIM = "Reclaim"
    FIRMWARE = "Firmware"
    CONTEXT = "Context"
    METADATA = "Metadata"
    PRE_GUEST = "Pre-Guest"
    PRE_SWAP = "Pre-Swap"
    GUEST_INVALID = "Guest-Invalid"
    GUEST_VALID = "Guest-Valid"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class RmpEntry:
    """One entry. `gpa` is a byte address, `page_size` 0 (4 KiB) or 1 (2 MiB).

    `perms` are the permission bits of VMPL0..VMPL3 (read 1, write 2, user execute 4,
    supervisor execute 8).
    """

    assigned: bool = False
    asid: int = 0
    gpa: int = 0
    immutable: bool = False
    validated: bool = False
    vmsa: bool = False
    page_size: int = 0
    perms: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def state(self) -> PageState:
        """The page's state, by the table above."""
        if not self.assigned:
            return PageState.HYPERVISOR
        if self.asid:
            if self.immutable:
                return PageState.PRE_SWAP if self.validated else PageState.PRE_GUEST
            return PageState.GUEST_VALID if self.validated else PageState.GUEST_INVALID
        if not self.immutable:
            return PageState.RECLAIM
        if self.vmsa:
            return PageState.CONTEXT
        return PageState.METADATA if self.gpa else PageState.FIRMWARE

    def __repr__(self) -> str:
        owner = f" asid={self.asid} gpa={self.gpa:#x}" if self.asid else ""
        vmsa = " VMSA" if self.vmsa else ""
        return f"<RmpEntry {self.state}{owner}{vmsa} {'2M' if self.page_size else '4K'}>"


_HYPERVISOR = RmpEntry()


class Rmp:
    """The table. A page without an entry is the hypervisor's."""

    def __init__(self) -> None:
        self._entries: dict[int, RmpEntry] = {}
        self._large: set[int] = set()
        self._pages_of: Counter[int] = Counter()
        self.on_change: Callable[[RmpEntry, RmpEntry], object] | None = None
        """Told the entry before and after each change."""

    def lookup(self, spa: int) -> RmpEntry:
        """Return the entry of the page at `spa`; inside a 2 MiB page, that page's."""
        found = self._entries.get(spa & -PAGE_SIZE)
        if found is None and self._large:
            base = spa & -LARGE_PAGE_SIZE
            if base in self._large:
                return self._entries[base]
        return found or _HYPERVISOR

    def asid_in_use(self, asid: int) -> bool:
        """Whether any page is assigned to the guest with this ASID."""
        return asid != 0 and self._pages_of[asid] > 0

    def rmpupdate(
        self,
        spa: int,
        *,
        assigned: bool,
        asid: int = 0,
        gpa: int = 0,
        immutable: bool = False,
        page_size: int = 0,
        vmsa: bool = False,
    ) -> int:
        """RMPUPDATE: replace the entry of `spa`; return 0 or a failure code.

        Checked in this order: the new entry makes sense and fits the address (FAIL_INPUT);
        no page that the entry covers is immutable (FAIL_PERMISSION); a 2 MiB entry covers
        no assigned 4 KiB page, and the other way round (FAIL_OVERLAP). A failure changes
        nothing. Success clears `validated` and gives the page to VMPL0 alone.

        That the host can't change an immutable page is sure (it is why PAGE_RECLAIM
        exists). Guesses, to be compared with the APM: the order, which impossible entries
        are FAIL_INPUT, and that `validated` is always cleared. The hardware has no `vmsa`
        operand; it is here for tests.
        """
        step = LARGE_PAGE_SIZE if page_size else PAGE_SIZE
        if page_size not in (0, 1) or spa % step or gpa % step:
            return RMPUPDATE_FAIL_INPUT
        if not assigned and (asid or gpa or immutable or vmsa):
            return RMPUPDATE_FAIL_INPUT
        if gpa and not asid:
            return RMPUPDATE_FAIL_INPUT
        old = self.lookup(spa)
        covered = self._small_entries(spa) if page_size else []
        if old.immutable or any(entry.immutable for entry in covered):
            return RMPUPDATE_FAIL_PERMISSION
        if covered or (old.page_size and not page_size):
            return RMPUPDATE_FAIL_OVERLAP
        perms = (PERMS_ALL, 0, 0, 0) if assigned and asid else (0, 0, 0, 0)
        self.store(
            spa,
            RmpEntry(assigned, asid, gpa, immutable, False, vmsa, page_size, perms),
        )
        return 0

    def make_private(self, spa: int, gpa: int, asid: int, *, immutable: bool) -> int:
        """As Linux's rmp_make_private, 4 KiB; ASID 0 and immutable makes a Firmware page."""
        return self.rmpupdate(spa, assigned=True, asid=asid, gpa=gpa, immutable=immutable)

    def make_shared(self, spa: int) -> int:
        """As Linux's rmp_make_shared: back to the hypervisor, in the size the page has."""
        return self.rmpupdate(spa, assigned=False, page_size=self.lookup(spa).page_size)

    def store(self, spa: int, entry: RmpEntry) -> None:
        """Write an entry without asking: for the secure processor and the CPU only."""
        old = self._entries.pop(spa, _HYPERVISOR)
        if self.on_change is not None:
            self.on_change(old, entry)
        self._large.discard(spa)
        self._pages_of[old.asid] -= 1
        self._pages_of[entry.asid] += 1
        if entry.assigned:
            self._entries[spa] = entry
            if entry.page_size:
                self._large.add(spa)

    def _small_entries(self, base: int) -> list[RmpEntry]:
        """Assigned 4 KiB pages in the 2 MiB at `base`."""
        spas = range(base, base + LARGE_PAGE_SIZE, PAGE_SIZE)
        found = (self._entries.get(spa) for spa in spas)
        return [entry for entry in found if entry is not None and not entry.page_size]

    def __repr__(self) -> str:
        return f"<Rmp {len(self._entries)} pages assigned>"
