"""32-bit start state: protected mode without paging, as the PVH boot protocol says.

EBX holds the GPA of an ``hvm_start_info`` with the memory map behind it. There are no page
tables, and without paging every access of an SNP guest is private: nothing that is
measured depends on the position of the C-bit, which the guest learns from its host.

Source: Xen, docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h. SS and
the empty GDTR are ours (PVH leaves them open), and CR4 holds MCE, which KVM adds anyway.
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

__all__ = ["boot32"]

_REACHED_END = 1 << 32
_MAGIC = 0x336EC578
_VERSION = 1
_RAM = 1
_HEADER = struct.Struct("<4I4Q2I")
_ENTRY = struct.Struct("<2Q2I")
_ORIGIN = "kvmlaunch:start-info"

_CODE = Segment(selector=0x08, attrib=0xC9B, limit=0xFFFF_FFFF, base=0)
_DATA = Segment(selector=0x10, attrib=0xC93, limit=0xFFFF_FFFF, base=0)
_TASK = Segment(selector=0, attrib=0x8B, limit=0x67, base=0)
_EMPTY_TABLE = Segment(selector=0, attrib=0, limit=0, base=0)


def boot32(
    entry: int,
    memory: Sequence[MemoryRegion],
    taken: Iterable[PageRange],
    options: PlanOptions,
) -> tuple[PageRange, Vmsa]:
    """The start info in free RAM beside ``taken``, and the vCPU state that refers to it.

    Raises FormatError if 32-bit code can't reach ``entry`` or there is no room.
    """
    low = [region for region in memory if region.gpa < _REACHED_END]
    if not any(region.gpa <= entry < region.end for region in low):
        raise FormatError(f"the 32-bit entry point {entry:#x} is not in the low 4 GiB of memory")
    gpa = free_gpa(low, [(step.gpa, step.end) for step in taken], PAGE_SIZE)
    if gpa is None:
        raise FormatError("no page of memory is left for the PVH start info")
    info = memoryview(_start_info(gpa, memory))
    step = PageRange(
        gpa, PAGE_SIZE, PageType.NORMAL, "start-info", _ORIGIN, (Piece(0, info, _ORIGIN),)
    )
    return step, _protected_mode(entry, gpa, options.features)


def _start_info(gpa: int, memory: Sequence[MemoryRegion]) -> bytes:
    """``struct hvm_start_info`` at ``gpa``, and the memory map behind it."""
    header = _HEADER.pack(_MAGIC, _VERSION, 0, 0, 0, 0, 0, gpa + _HEADER.size, len(memory), 0)
    entries = [_ENTRY.pack(region.gpa, region.size, _RAM, 0) for region in memory]
    return header + b"".join(entries)


def _protected_mode(entry: int, info: int, sev_features: int) -> Vmsa:
    # Whatever isn't named here (PAT, debug and x87 registers, LDTR) is as after a reset.
    reset = qemu_reset(BSP_EIP, signature=0, sev_features=sev_features)
    return replace(
        reset,
        cs=_CODE,
        ds=_DATA,
        es=_DATA,
        ss=_DATA,
        fs=_DATA,
        gs=_DATA,
        tr=_TASK,
        gdtr=_EMPTY_TABLE,
        idtr=_EMPTY_TABLE,
        cr0=0x11,  # ET, PE
        rip=entry,
        rbx=info,
        rdx=0,
    )
