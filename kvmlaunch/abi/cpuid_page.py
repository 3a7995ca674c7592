"""CPUID page: the table that the host proposes and firmware checks (4096 bytes).

| offset | size | field                                           |
|--------|------|-------------------------------------------------|
| 0x00   | 4    | COUNT, at most 64                               |
| 0x04   | 12   | reserved, 0                                     |
| 0x10   | 48   | entry 0, then the next                          |

| entry offset | size | field      |
|--------------|------|------------|
| 0x00         | 4    | EAX_IN     |
| 0x04         | 4    | ECX_IN     |
| 0x08         | 8    | XCR0_IN    |
| 0x10         | 8    | XSS_IN     |
| 0x18         | 16   | EAX EBX ECX EDX, 4 each |
| 0x28         | 8    | reserved, 0 |

Source: AMD 56860, CPUID page structures; Linux `struct snp_cpuid_table`. The contents are
not measured. Firmware answers INVALID_PARAM to values it doesn't like and leaves a table it
would take: `diff_pages` says what it changed.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable

from kvmlaunch.errors import FormatError

from ._check import exact_size, uint, zeros
from .page import PAGE_SIZE, Buffer

__all__ = ["MAX_ENTRIES", "CpuidDiff", "CpuidEntry", "decode", "diff_pages", "encode"]

MAX_ENTRIES = 64
"""Entries that firmware takes; some VMMs' structs have room for more."""

_WHAT = "the CPUID page"
_HEADER_SIZE = 0x10
_COUNT = struct.Struct("<I12x")
_ENTRY = struct.Struct("<IIQQIIII8x")
_RESERVED_IN_ENTRY = 0x28
_OUTPUTS = ("eax", "ebx", "ecx", "edx")


@dataclasses.dataclass(frozen=True)
class CpuidEntry:
    """Answer to one CPUID query: leaf `eax_in`, index `ecx_in`. Registers are u32.

    `xcr0_in` and `xss_in` (u64) are the XCR0 and XSS for which leaf 0xD is answered.
    """

    eax_in: int
    ecx_in: int = 0
    xcr0_in: int = 0
    xss_in: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    def __post_init__(self) -> None:
        """Refuse a value that is too large."""
        for field in dataclasses.fields(self):
            bits = 64 if field.name in ("xcr0_in", "xss_in") else 32
            uint(field.name, getattr(self, field.name), bits)

    def __repr__(self) -> str:
        """Return an expression with the values that are not 0."""
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        shown = (f"{name}={v:#x}" for name, v in values if v or name == "eax_in")
        return f"CpuidEntry({', '.join(shown)})"


def encode(entries: Iterable[CpuidEntry]) -> bytes:
    """Return the page, 4096 bytes.

    Raises:
        FormatError: more than 64 entries.
    """
    table = tuple(entries)
    if len(table) > MAX_ENTRIES:
        raise FormatError(f"a CPUID page has at most {MAX_ENTRIES} entries, not {len(table)}")
    body = b"".join(_ENTRY.pack(*dataclasses.astuple(entry)) for entry in table)
    return (_COUNT.pack(len(table)) + body).ljust(PAGE_SIZE, b"\0")


def decode(buf: Buffer) -> tuple[CpuidEntry, ...]:
    """Read a page; what stands behind the last entry is skipped.

    Raises:
        FormatError: not 4096 bytes, COUNT above 64, or a reserved byte that isn't zero.
    """
    page = exact_size(_WHAT, buf, PAGE_SIZE)
    (count,) = _COUNT.unpack_from(page)
    if count > MAX_ENTRIES:
        raise FormatError(f"COUNT {count} is above {MAX_ENTRIES}", offset=0)
    zeros(_WHAT, page, _COUNT.size - 12, _COUNT.size)
    starts = range(_HEADER_SIZE, _HEADER_SIZE + count * _ENTRY.size, _ENTRY.size)
    for start in starts:
        zeros(_WHAT, page, start + _RESERVED_IN_ENTRY, start + _ENTRY.size)
    return tuple(CpuidEntry(*_ENTRY.unpack_from(page, start)) for start in starts)


@dataclasses.dataclass(frozen=True)
class CpuidDiff:
    """One value that firmware changed; `register` is as in `CpuidEntry`."""

    leaf: int
    index: int
    register: str
    sent: int
    corrected: int

    @property
    def bits(self) -> tuple[int, ...]:
        """Numbers of the bits that differ."""
        return tuple(b for b in range(64) if (self.sent ^ self.corrected) >> b & 1)

    def __str__(self) -> str:
        """Explain the change on one line."""
        return (
            f"leaf {self.leaf:#x} index {self.index:#x} {self.register.upper()}: "
            f"sent {self.sent:#x}, corrected {self.corrected:#x}, "
            f"differing bits {', '.join(map(str, self.bits))}"
        )


def diff_pages(sent: Buffer, corrected: Buffer) -> list[CpuidDiff]:
    """Return what differs between the page sent and the page that came back.

    Entries are compared place by place, under the leaf and index that were sent. An entry
    that only one page has differs from one that is all zero.

    Raises:
        FormatError: one of the two isn't a CPUID page.
    """
    before, after = decode(sent), decode(corrected)
    found: list[CpuidDiff] = []
    for place in range(max(len(before), len(after))):
        old = before[place] if place < len(before) else None
        new = after[place] if place < len(after) else None
        named = old or new
        assert named is not None  # one of the two is as long as the range
        query = ("eax_in", "ecx_in", "xcr0_in", "xss_in") if old and new else ()
        for register in (*query, *_OUTPUTS):
            a = getattr(old, register, 0)
            b = getattr(new, register, 0)
            if a != b:
                found.append(CpuidDiff(named.eax_in, named.ecx_in, register, a, b))
    return found
