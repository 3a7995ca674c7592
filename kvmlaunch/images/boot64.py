"""64-bit start state: long mode with identity page tables for the low 4 GiB.

The tables are six pages of 2 MiB mappings (PML4, PDPT, four PDs). RAM is mapped with
the C-bit when the guest is confidential, everything else without, so that device
registers stay reachable. The guest replaces both GDT and tables when it likes: the
segment registers are loaded, but GDTR and IDTR are empty, so a fault before that
shuts the guest down instead of running wild.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.reset import BSP_EIP, qemu_reset
from kvmlaunch.abi.vmsa import Segment, Vmsa
from kvmlaunch.errors import FormatError
from kvmlaunch.images.options import PlanOptions
from kvmlaunch.images.plan import MemoryRegion, PageRange, Piece, free_gpa

__all__ = ["MAPPED_END", "TABLES_SIZE", "boot64", "identity_tables", "place_page_tables"]

MAPPED_END = 1 << 32
"""First GPA that the page tables don't map."""
TABLES_SIZE = 6 * PAGE_SIZE

_LARGE = 2 << 20
_LINK = 0x3  # present, writable
_LEAF = 0x83  # present, writable, 2 MiB page
_ORIGIN = "kvmlaunch:page-tables"

_CODE = Segment(selector=0x08, attrib=0xA9B, limit=0xFFFF_FFFF, base=0)
_DATA = Segment(selector=0x10, attrib=0xC93, limit=0xFFFF_FFFF, base=0)
_EMPTY_TABLE = Segment(selector=0, attrib=0, limit=0, base=0)


def boot64(
    entry: int,
    memory: Sequence[MemoryRegion],
    taken: Iterable[PageRange],
    options: PlanOptions,
) -> tuple[PageRange, Vmsa]:
    """Page tables in free RAM beside ``taken``, and the vCPU state that uses them.

    Raises FormatError if ``entry`` isn't mapped or there is no room for the tables.
    """
    if not any(region.gpa <= entry < min(region.end, MAPPED_END) for region in memory):
        raise FormatError(f"the 64-bit entry point {entry:#x} is not in the low 4 GiB of memory")
    gpa = place_page_tables(memory, [(step.gpa, step.end) for step in taken])
    tables = memoryview(identity_tables(gpa, memory, options.c_bit))
    step = PageRange(
        gpa, TABLES_SIZE, PageType.NORMAL, "page-tables", _ORIGIN, (Piece(0, tables, _ORIGIN),)
    )
    return step, _long_mode(entry, gpa | options.c_bit, options.features)


def place_page_tables(memory: Sequence[MemoryRegion], taken: Iterable[tuple[int, int]]) -> int:
    """The lowest GPA, 0x1000 or above, of six free pages of RAM.

    ``taken`` holds (start, end) of what is occupied. Raises FormatError if there is
    no such run of pages.
    """
    gpa = free_gpa(memory, taken, TABLES_SIZE)
    if gpa is None:
        raise FormatError("no six successive pages of memory are left for the 64-bit page tables")
    return gpa


def identity_tables(gpa: int, memory: Sequence[MemoryRegion], c_bit: int) -> bytes:
    """PML4, PDPT and four PDs, to be placed at ``gpa``.

    An entry that covers any RAM counts as RAM and carries ``c_bit``.
    """
    encrypted = bytearray(MAPPED_END // _LARGE)
    for region in memory:
        first = min(region.gpa // _LARGE, len(encrypted))
        last = min(-(-region.end // _LARGE), len(encrypted))
        encrypted[first:last] = b"\1" * (last - first)
    pml4 = [gpa + PAGE_SIZE | _LINK | c_bit]
    pdpt = [gpa + (2 + n) * PAGE_SIZE | _LINK | c_bit for n in range(4)]
    leaves = [n * _LARGE | _LEAF | (c_bit if ram else 0) for n, ram in enumerate(encrypted)]
    return _table(pml4) + _table(pdpt) + struct.pack(f"<{len(leaves)}Q", *leaves)


def _table(entries: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(entries)}Q", *entries).ljust(PAGE_SIZE, b"\0")


def _long_mode(entry: int, cr3: int, sev_features: int) -> Vmsa:
    # Whatever isn't named here (PAT, debug and x87 registers, LDTR, TR) is as after a reset.
    reset = qemu_reset(BSP_EIP, signature=0, sev_features=sev_features)
    return replace(
        reset,
        cs=_CODE,
        ds=_DATA,
        es=_DATA,
        ss=_DATA,
        fs=_DATA,
        gs=_DATA,
        gdtr=_EMPTY_TABLE,
        idtr=_EMPTY_TABLE,
        cr0=0x8000_0011,  # PG, ET, PE
        cr3=cr3,
        cr4=0x60,  # MCE, PAE
        efer=0x1500,  # SVME, LMA, LME
        rip=entry,
        rdx=0,
    )
