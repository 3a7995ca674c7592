"""The VMCB save area that KVM keeps for a vCPU (arch/x86/include/asm/svm.h), as bytes.

Offsets are those of ``struct vmcb_save_area``; the first 0x2E8 bytes of the VMSA have
the same ones.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["SAVE_SIZE", "SEGMENTS", "Segment", "Vmcb"]

SAVE_SIZE = 0x2E8

SEGMENTS = {
    "es": 0x000,
    "cs": 0x010,
    "ss": 0x020,
    "ds": 0x030,
    "fs": 0x040,
    "gs": 0x050,
    "gdt": 0x060,
    "ldt": 0x070,
    "idt": 0x080,
    "tr": 0x090,
}
"""Names of ``struct kvm_sregs`` -> offset of the segment in the save area."""

_FIELDS = {
    "efer": 0x0D0,
    "cr4": 0x148,
    "cr3": 0x150,
    "cr0": 0x158,
    "dr7": 0x160,
    "dr6": 0x168,
    "rflags": 0x170,
    "star": 0x200,
    "lstar": 0x208,
    "cstar": 0x210,
    "sfmask": 0x218,
    "kernel_gs_base": 0x220,
    "sysenter_cs": 0x228,
    "sysenter_esp": 0x230,
    "sysenter_eip": 0x238,
    "g_pat": 0x268,
    "dbgctl": 0x270,
    "br_from": 0x278,
    "br_to": 0x280,
    "last_excp_from": 0x288,
    "last_excp_to": 0x290,
    "spec_ctrl": 0x2E0,
}
_CPL = 0x0CB
_SEGMENT = struct.Struct("<HHIQ")

# Bits of vmcb_seg.attrib: descriptor bits 8-15 and 20-23, packed.
_S, _DPL, _P, _AVL, _L, _DB, _G = 4, 5, 7, 8, 9, 10, 11


@dataclass(frozen=True)
class Segment:
    """One segment register as the VMCB stores it."""

    selector: int
    attrib: int
    limit: int
    base: int


class Vmcb:
    """Save area with SVM's reset values (svm.c: init_vmcb, and kvm_vcpu_reset)."""

    def __init__(self) -> None:
        self.save = bytearray(SAVE_SIZE)
        self["g_pat"] = 0x0007040600070406
        self.reset()

    def reset(self) -> None:
        """What INIT sets: no MSR but the bases of FS and GS."""
        for name in ("es", "ss", "ds", "fs", "gs"):
            self.put_segment(name, Segment(0, 0x0092, 0xFFFF, 0))
        self.put_segment("cs", Segment(0xF000, 0x009A, 0xFFFF, 0xFFFF0000))
        self.put_segment("ldt", Segment(0, 0x0082, 0xFFFF, 0))
        self.put_segment("tr", Segment(0, 0x0083, 0xFFFF, 0))
        for name in ("gdt", "idt"):
            self.put_segment(name, Segment(0, 0, 0xFFFF, 0))
        self["dr6"] = 0xFFFF0FF0
        self["dr7"] = 0x400
        self["rflags"] = 0x2
        self.save[_CPL] = 0

    def __getitem__(self, field: str) -> int:
        return int.from_bytes(self.save[_FIELDS[field] : _FIELDS[field] + 8], "little")

    def __setitem__(self, field: str, value: int) -> None:
        self.save[_FIELDS[field] : _FIELDS[field] + 8] = value.to_bytes(8, "little")

    def segment(self, name: str) -> Segment:
        """The raw segment."""
        return Segment(*_SEGMENT.unpack_from(self.save, SEGMENTS[name]))

    def put_segment(self, name: str, value: Segment) -> None:
        """Store a raw segment."""
        _SEGMENT.pack_into(
            self.save,
            SEGMENTS[name],
            value.selector,
            value.attrib,
            value.limit,
            value.base,
        )

    def set_base(self, name: str, base: int) -> None:
        """Change only the base (MSR_FS_BASE, MSR_GS_BASE)."""
        old = self.segment(name)
        self.put_segment(name, Segment(old.selector, old.attrib, old.limit, base))

    def set_table(self, name: str, limit: int, base: int) -> None:
        """GDTR or IDTR."""
        self.put_segment(name, Segment(0, 0, limit, base))

    def get_kvm_segment(self, name: str) -> dict[str, int]:
        """The fields of ``struct kvm_segment`` as svm_get_segment() reports them.

        Not what was set: data segments report type | 1 (accessed) and TR busy, so that
        writing the answer back changes the VMSA.
        """
        raw = self.segment(name)
        bits = raw.attrib
        out = {
            "base": raw.base,
            "limit": raw.limit,
            "selector": raw.selector,
            "type": bits & 0xF,
            "present": bits >> _P & 1,
            "dpl": bits >> _DPL & 3,
            "db": bits >> _DB & 1,
            "s": bits >> _S & 1,
            "l": bits >> _L & 1,
            "g": int(raw.limit > 0xFFFFF),
            "avl": bits >> _AVL & 1,
        }
        out["unusable"] = 1 - out["present"]
        if name == "tr":
            out["type"] |= 2
        elif name in ("ds", "es", "fs", "gs") and not out["unusable"]:
            out["type"] |= 1
        elif name == "ss":
            out["db"] = 0 if out["unusable"] else out["db"]
            out["dpl"] = self.save[_CPL]
        return out

    def set_kvm_segment(self, name: str, value: dict[str, int]) -> None:
        """Store ``struct kvm_segment`` fields as svm_set_segment() does."""
        attrib = (
            value["type"] & 0xF
            | (value["s"] & 1) << _S
            | (value["dpl"] & 3) << _DPL
            | (value["present"] & 1 and not value["unusable"]) << _P
            | (value["avl"] & 1) << _AVL
            | (value["l"] & 1) << _L
            | (value["db"] & 1) << _DB
            | (value["g"] & 1) << _G
        )
        self.put_segment(name, Segment(value["selector"], attrib, value["limit"], value["base"]))
        if name == "ss":
            self.save[_CPL] = value["dpl"] & 3
