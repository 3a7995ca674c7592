"""Assertions of a guest, as it prints them.

A guest that finds something wrong prints a line and ends with code ``CHECK_CODE``, as
``check_equal()`` of examples/guests/runtime does:

    check failed: FILE:LINE: EXPRESSION is 0xVALUE, expected 0xVALUE

What a guest prints is its own word, so that the line only adds to an end that is bad anyway.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["CHECK_CODE", "FailedCheck", "LastLine"]

CHECK_CODE = 12
"""Exit port value, or code of reason set 15, of a guest that ends for a failed check."""

_LINE = re.compile(
    rb"check failed: ([\x20-\x39\x3b-\x7e]+):([0-9]{1,9}): ([\x20-\x7e]+) "
    rb"is (0x[0-9a-f]{1,16}), expected (0x[0-9a-f]{1,16})\r?\n?"
)
_MOST = 512


@dataclass(frozen=True)
class FailedCheck:
    """``what`` at ``line`` of ``file`` had the ``value``, not the ``expected`` one."""

    file: str
    line: int
    what: str
    value: int
    expected: int

    def __str__(self) -> str:
        return (
            f"check failed: {self.file}:{self.line}: {self.what} is {self.value:#x}, "
            f"expected {self.expected:#x}"
        )


class LastLine:
    """The end of a vCPU's console: the last line that was begun there."""

    def __init__(self) -> None:
        self._line = b""

    def add(self, text: bytes) -> None:
        """The vCPU printed this."""
        start = text.rfind(b"\n", 0, len(text) - 1) + 1
        if start or self._line.endswith(b"\n"):
            self._line = b""
        # One byte more than a line may have, so that a longer one matches nothing.
        self._line = (self._line + text[start:])[: _MOST + 1]

    def failed_check(self) -> FailedCheck | None:
        """What the line says, if it is a failed check."""
        match = _LINE.fullmatch(self._line) if len(self._line) <= _MOST else None
        if match is None:
            return None
        file, line, what, value, expected = (group.decode("ascii") for group in match.groups())
        return FailedCheck(file, int(line), what, int(value, 16), int(expected, 16))
