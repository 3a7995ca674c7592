"""Descriptor tables, gates and page tables, written by hand for tests."""

from __future__ import annotations

import struct

from kvmlaunch.abi.segment import Segment
from tests.softcpu.model import PAGE, Guest

# Selectors of the GDT below.
CODE32, DATA, CODE64, USER_CODE32, USER_DATA, USER_CODE64, TSS = 8, 16, 24, 32, 40, 48, 56
GDT_AT, IDT_AT, TSS_AT, HANDLER = 0x2000, 0x2800, 0x3800, 0x4000
PML4, PDPT, PD, PT = 0x10000, 0x11000, 0x12000, 0x13000

_GDT = (
    0,
    0x00CF9B000000FFFF,  # CODE32
    0x00CF93000000FFFF,  # DATA
    0x00AF9B000000FFFF,  # CODE64
    0x00CFFB000000FFFF,  # USER_CODE32
    0x00CFF3000000FFFF,  # USER_DATA
    0x00AFFB000000FFFF,  # USER_CODE64
    0x0000890038000067,  # TSS, available, base TSS_AT
    0,
)
GDTR = Segment(0, 0, 8 * len(_GDT) - 1, GDT_AT)
IDTR = Segment(0, 0, 0xFFF, IDT_AT)
TR = Segment(TSS, 0x8B, 0x67, TSS_AT)
USER = {
    "cs": Segment(USER_CODE32 | 3, 0xCFB, 0xFFFFFFFF, 0),
    "ss": Segment(USER_DATA | 3, 0xCF3, 0xFFFFFFFF, 0),
    "ds": Segment(USER_DATA | 3, 0xCF3, 0xFFFFFFFF, 0),
    "es": Segment(USER_DATA | 3, 0xCF3, 0xFFFFFFFF, 0),
    "cpl": 3,
}
"""Changes to `vmsa` for ring 3, 32-bit code."""
USER64 = {**USER, "cs": Segment(USER_CODE64 | 3, 0xAFB, 0xFFFFFFFF, 0)}

P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
NX = 1 << 63
ALL = P | W | U
LONG = {"efer": 0x1D01, "cr0": 0x80010011, "cr4": 0x620}
"""Changes to `vmsa` for long mode, without CS and CR3: SCE, LME, LMA, NXE, SVME, WP, PAE."""


def put_gdt(guest: Guest) -> None:
    guest.put(GDT_AT, struct.pack(f"<{len(_GDT)}Q", *_GDT))


def gate32(guest: Guest, vector: int, handler: int = HANDLER, kind: int = 0x8E) -> None:
    """A gate of protected mode, to CODE32."""
    raw = (handler & 0xFFFF) | CODE32 << 16 | kind << 40 | handler >> 16 << 48
    guest.put(IDT_AT + 8 * vector, struct.pack("<Q", raw))


def gate64(
    guest: Guest, vector: int, handler: int = HANDLER, kind: int = 0x8E, ist: int = 0
) -> None:
    """A gate of long mode, to CODE64."""
    low = (handler & 0xFFFF) | CODE64 << 16 | ist << 32 | kind << 40
    low |= (handler >> 16 & 0xFFFF) << 48
    guest.put(IDT_AT + 16 * vector, struct.pack("<QQ", low, handler >> 32))


def frame32(guest: Guest, count: int) -> tuple[int, ...]:
    """The topmost double words of the stack."""
    at = guest.cpu.read("rsp")
    return struct.unpack(f"<{count}I", guest.memory.main[at : at + 4 * count])


def frame64(guest: Guest, count: int) -> tuple[int, ...]:
    """The topmost quad words of the stack."""
    at = guest.cpu.read("rsp")
    return struct.unpack(f"<{count}Q", guest.memory.main[at : at + 8 * count])


def entry(guest: Guest, table: int, index: int, value: int) -> None:
    guest.put(table + 8 * index, struct.pack("<Q", value))


def identity_map(guest: Guest, flags: int = ALL, c_bit: int = 51) -> int:
    """Long mode: the first 2 MiB by 4 KiB pages, private in an SNP guest. Returns CR3."""
    private = 1 << c_bit if guest.snp else 0
    entry(guest, PML4, 0, PDPT | ALL | private)
    entry(guest, PDPT, 0, PD | ALL | private)
    entry(guest, PD, 0, PT | ALL | private)
    for page in range(512):
        entry(guest, PT, page, page * PAGE | flags | private)
    return PML4 | private


def start_long(guest: Guest, code: bytes, **changes: object) -> None:
    """64-bit code at 0x1000, with GDT, IDT and identity map."""
    cr3 = identity_map(guest)
    put_gdt(guest)
    fields: dict[str, object] = {
        "gdtr": GDTR,
        "idtr": IDTR,
        "cs": Segment(CODE64, 0xA9B, 0xFFFFFFFF, 0),
        "cr3": cr3,
        **LONG,
        **changes,
    }
    guest.start(code, **fields)


def start_protected(guest: Guest, code: bytes, **changes: object) -> None:
    """32-bit code at 0x1000 without paging, with GDT and IDT."""
    put_gdt(guest)
    guest.start(code, **{"gdtr": GDTR, "idtr": IDTR, **changes})
