"""``struct kvm_regs`` and ``kvm_sregs`` of a vCPU whose state is open (x86.c: __set_regs())."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.sim.vcpu_state import SEGMENTS
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["fill_regs", "fill_sregs", "take_regs", "take_sregs"]

_REGS = tuple(name for name, _ in ffi.typeof("struct kvm_regs").fields)
_SEGMENT_FIELDS = tuple(
    name for name, _ in ffi.typeof("struct kvm_segment").fields if name != "padding"
)


def fill_regs(vcpu: Vcpu, out: Any) -> None:
    """__get_regs()."""
    for name, value in vcpu.state.get_regs().items():
        setattr(out, name, value)


def take_regs(vcpu: Vcpu, regs: Any) -> None:
    """__set_regs()."""
    vcpu.state.set_regs({name: getattr(regs, name) for name in _REGS})


def fill_sregs(vcpu: Vcpu, out: Any) -> None:
    """__get_sregs()."""
    state = vcpu.state
    for name, fields in state.segments().items():
        for field, value in fields.items():
            setattr(getattr(out, name), field, value)
    for name in ("gdt", "idt"):
        table = state.vmcb.segment(name)
        getattr(out, name).base, getattr(out, name).limit = table.base, table.limit & 0xFFFF
    for name in ("cr0", "cr2", "cr3", "cr4", "efer", "apic_base"):
        setattr(out, name, getattr(state, name))
    out.cr8 = vcpu.cr8


def take_sregs(vcpu: Vcpu, sregs: Any) -> None:
    """__set_sregs(). EINVAL."""
    state = vcpu.state
    if not state.sregs_valid(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, sregs.cs.l):
        refuse(errno.EINVAL)
    if not state.apic_base_valid(sregs.apic_base):
        refuse(errno.EINVAL)
    vcpu.apic.set_base(sregs.apic_base)
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        state.vmcb.set_table(name, table.limit, table.base)
    state.cr2 = sregs.cr2
    if not sregs.cr8 & ~0xF:  # kvm_set_cr8() refuses, and nobody looks
        vcpu.cr8 = sregs.cr8
    state.set_cr3(sregs.cr3)
    state.set_efer(sregs.efer)
    state.clear_cd_nw = not vcpu.vm.disabled_quirks & lib.KVM_X86_QUIRK_CD_NW_CLEARED
    state.set_cr0(sregs.cr0)
    state.set_cr4(sregs.cr4)
    state.set_segments(
        {
            name: {field: getattr(getattr(sregs, name), field) for field in _SEGMENT_FIELDS}
            for name in SEGMENTS
        }
    )
    # Older user space doesn't wake a vCPU that it resets.
    at_reset = sregs.cs.selector == 0xF000 and sregs.cs.base == 0xFFFF0000
    if vcpu.id == vcpu.vm.bsp_id and at_reset and state.regs["rip"] == 0xFFF0 and not sregs.cr0 & 1:
        vcpu.mp_state = lib.KVM_MP_STATE_RUNNABLE
