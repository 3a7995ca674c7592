"""Registers of a vCPU without encrypted state: what KVM keeps, and what the CPU has."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.sim import msrs
from kvmlaunch.sim.vmcb import SAVE_SIZE
from kvmlaunch.sim.vmsa_sync import sync_vmsa

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu_state import VcpuState

__all__ = ["from_vmsa", "linear_rip", "to_vmsa"]

_FX_HEAD = struct.Struct("<HHBBHQQ")
_X87_REGISTERS = 8
_EFER_LMA, _CS_L = 1 << 10, 1 << 9


def to_vmsa(state: VcpuState) -> Vmsa:
    """The registers as the guest sees them, in the form that the CPU takes."""
    return Vmsa.decode(sync_vmsa(state, 0)).replace(
        cr0=state.cr0,
        cr2=state.cr2,
        cr4=state.cr4,
        efer=state.efer,
        dr0=state.db[0],
        dr1=state.db[1],
        dr2=state.db[2],
        dr3=state.db[3],
        tsc_aux=state.msrs[msrs.TSC_AUX] & 0xFFFFFFFF,
    )


def from_vmsa(state: VcpuState, vmsa: Vmsa, cr8: int) -> None:
    """Take the registers over from the CPU."""
    state.vmcb.save[:] = vmsa.encode()[:SAVE_SIZE]
    for name in state.regs:
        state.regs[name] = getattr(vmsa, name)
    state.cr2, state.cr8 = vmsa.cr2, cr8 & 0xF
    state.set_cr3(vmsa.cr3)
    state.set_efer(vmsa.efer)
    state.set_cr0(vmsa.cr0)
    state.set_cr4(vmsa.cr4)
    state.db = [vmsa.dr0, vmsa.dr1, vmsa.dr2, vmsa.dr3]
    state.dr6, state.dr7 = vmsa.dr6, vmsa.dr7
    state.xcr0, state.xss = vmsa.xcr0, vmsa.xss
    state.msrs[msrs.TSC_AUX] = vmsa.tsc_aux
    state.fpu.load(_fxsave(vmsa), vmsa.fpreg_ymm, vmsa.pkru)


def linear_rip(state: VcpuState) -> int:
    """kvm_get_linear_rip()."""
    cs, rip = state.vmcb.segment("cs"), state.regs["rip"]
    if state.efer & _EFER_LMA and cs.attrib & _CS_L:
        return rip
    return cs.base + rip & 0xFFFFFFFF


def _fxsave(vmsa: Vmsa) -> bytes:
    """The first 416 bytes of an FXSAVE image."""
    head = _FX_HEAD.pack(
        vmsa.x87_fcw,
        vmsa.x87_fsw,
        vmsa.x87_ftw & 0xFF,
        0,
        vmsa.x87_fop,
        vmsa.x87_rip,
        vmsa.x87_dp,
    )
    low, high = vmsa.fpreg_x87[: 8 * _X87_REGISTERS], vmsa.fpreg_x87[8 * _X87_REGISTERS :]
    registers = b"".join(
        low[8 * n : 8 * n + 8] + high[2 * n : 2 * n + 2] + bytes(6) for n in range(_X87_REGISTERS)
    )
    return head + struct.pack("<II", vmsa.mxcsr, 0) + registers + vmsa.fpreg_xmm
