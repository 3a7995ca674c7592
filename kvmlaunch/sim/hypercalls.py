"""VMMCALL: what KVM answers, and what it hands to user space (x86.c: kvm_emulate_hypercall)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim import exits, psc, pv_features
from kvmlaunch.sim.ghcb import Ghcb
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["from_cpu", "from_ghcb"]

_U32, _U64 = 0xFFFFFFFF, (1 << 64) - 1
_ENOSYS = 1000  # KVM_ENOSYS of uapi/linux/kvm_para.h; the others are those of errno
# uapi/linux/kvm_para.h: the hypercalls that stay in the kernel.
_VAPIC_POLL_IRQ, _KICK_CPU, _CLOCK_PAIRING, _SEND_IPI, _SCHED_YIELD = 1, 5, 9, 10, 11
_FEATURES = {
    _KICK_CPU: pv_features.KICK_CPU_FEATURE,
    _SEND_IPI: pv_features.SEND_IPI_FEATURE,
    _SCHED_YIELD: pv_features.SCHED_YIELD_FEATURE,
}
_EFER_LMA = 1 << 10
_SEGMENT_L = 1 << 9


def from_ghcb(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """The VMMCALL event; encrypted state counts as 64-bit mode."""
    registers = ghcb.registers
    answer = _emulate(vcpu, registers, is_64_bit=True, cpl=ghcb.cpl)
    if answer is not None:
        registers["rax"] = answer & _U64
        return 1

    def complete() -> int:
        registers["rax"] = vcpu.run.hypercall.ret
        return 1

    vcpu.running.complete = complete
    return 0


def from_cpu(vcpu: Vcpu) -> int:
    """VMMCALL of a plain guest."""
    cpu = vcpu.running.live_cpu
    state = cpu.save()
    is_64_bit = bool(state.efer & _EFER_LMA and state.cs.attrib & _SEGMENT_L)
    registers = {name: getattr(state, name) for name in ("rax", "rbx", "rcx", "rdx", "rsi")}
    mask = _U64 if is_64_bit else _U32
    answer = _emulate(vcpu, registers, is_64_bit=is_64_bit, cpl=state.cpl)
    if answer is not None:
        cpu.write("rax", answer & mask)
        return 1

    def complete() -> int:
        cpu.write("rax", vcpu.run.hypercall.ret & mask)
        return 1

    vcpu.running.complete = complete
    return 0


def _emulate(vcpu: Vcpu, registers: dict[str, int], *, is_64_bit: bool, cpl: int) -> int | None:
    """__kvm_emulate_hypercall(): RAX, or None where user space answers."""
    mask = _U64 if is_64_bit else _U32
    number, *arguments = (registers[name] & mask for name in ("rax", "rbx", "rcx", "rdx", "rsi"))
    if cpl:
        return -errno.EPERM
    if number == lib.KVM_HC_MAP_GPA_RANGE:
        return _map_gpa_range(vcpu, *arguments[:3], is_64_bit=is_64_bit)
    feature = _FEATURES.get(number)
    if feature is not None and not pv_features.guest_has(vcpu, feature):
        return -_ENOSYS
    if number in (_VAPIC_POLL_IRQ, _KICK_CPU, _SCHED_YIELD):
        return 0
    if number in (_CLOCK_PAIRING, _SEND_IPI):
        return -errno.EOPNOTSUPP  # no clocksource, no map of APICs
    return -_ENOSYS


def _map_gpa_range(
    vcpu: Vcpu, gpa: int, npages: int, attributes: int, *, is_64_bit: bool
) -> int | None:
    if not psc.is_exit_enabled(vcpu.vm):
        return -_ENOSYS
    gfn = gpa // PAGE_SIZE
    if gpa % PAGE_SIZE or not npages or gfn + npages & _U64 <= gfn:
        return -errno.EINVAL
    flags = lib.KVM_EXIT_HYPERCALL_LONG_MODE if is_64_bit else 0
    clear = vcpu.vm.host.profile.hypercall_ret_cleared
    exits.hypercall(vcpu.run, (gpa, npages, attributes), flags=flags, clear_ret=clear)
    return None
