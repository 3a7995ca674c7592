"""Instructions that a guest asks KVM to do for it (svm.c: svm_invoke_exit_handler, x86.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmlaunch.abi.ghcb import GhcbExit
from kvmlaunch.sim import cpuid_table, exits, hypercalls, msrs
from kvmlaunch.sim.ghcb import Ghcb
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["cpuid", "handle", "read_msr", "write_msr"]

_UD, _GP = 6, 13
_U32 = 0xFFFFFFFF
_PERFORMANCE_COUNTERS, _CORE_COUNTERS = 4, 6  # AMD64_NUM_COUNTERS, AMD64_NUM_COUNTERS_CORE
_PERFMON_LEAF, _PERFMON_V2, _PERFMON_COUNTERS = 0x80000022, 1 << 0, 0xF
_FEATURE_PERFCTR_CORE = 1 << 23  # CPUID leaf 0x80000001 ECX
_CR4_PCE = 1 << 8
_FEATURE_MWAIT = 1 << 3  # CPUID leaf 1 ECX


def handle(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """An event with the exit code of an intercepted instruction."""
    registers, code = ghcb.registers, ghcb.exit_code
    if code == GhcbExit.CPUID:
        answers = cpuid(vcpu, registers["rax"] & _U32, registers["rcx"] & _U32)
        registers.update(zip(("rax", "rbx", "rcx", "rdx"), answers, strict=True))
    elif code == GhcbExit.MSR:
        return _msr(vcpu, ghcb)
    elif code == GhcbExit.VMMCALL:
        return hypercalls.from_ghcb(vcpu, ghcb)
    elif code == GhcbExit.RDPMC:
        _rdpmc(vcpu, ghcb)
    elif code == GhcbExit.RDTSCP:
        vcpu.running.exception = (_UD, None)
    elif code in (GhcbExit.MONITOR, GhcbExit.MWAIT):
        _monitor_mwait(vcpu)
    elif code not in _NOTHING_TO_DO:
        # RDTSC is a known event, but KVM has no handler for it.
        exits.unexpected_exit(vcpu.run, code)
        return 0
    return 1


_NOTHING_TO_DO = (GhcbExit.READ_DR7, GhcbExit.WRITE_DR7, GhcbExit.INVD, GhcbExit.WBINVD)


def cpuid(vcpu: Vcpu, function: int, index: int) -> tuple[int, int, int, int]:
    """kvm_emulate_cpuid(). KVM knows CR4 of a guest with encrypted state by its write trap."""
    cr4 = vcpu.running.live_cpu.read("cr4")
    return cpuid_table.answer(vcpu, function, index, cr4=cr4, xcr0=vcpu.state.xcr0)


def read_msr(vcpu: Vcpu, index: int) -> int | None:
    """RDMSR by the guest; None is #GP."""
    if index in msrs.APIC:
        return vcpu.apic.read_msr(index)
    if index == msrs.TSC:
        return vcpu.guest_tsc()
    return vcpu.state.get_msr(index)


def write_msr(vcpu: Vcpu, index: int, value: int) -> bool:
    """WRMSR by the guest; False is #GP."""
    if index in msrs.APIC:
        return vcpu.apic.write_msr(index, value)
    if index == msrs.APIC_BASE:
        return vcpu.apic.guest_sets_base(value)
    if not vcpu.state.machine_check.guest_may_set(index, value):
        return False
    return vcpu.state.set_msr(index, value)


def _msr(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """kvm_emulate_rdmsr() and kvm_emulate_wrmsr(), svm_complete_emulated_msr()."""
    registers = ghcb.registers
    index = registers["rcx"] & _U32
    # What the processor lets the guest access itself is not KVM's to know.
    is_guests = vcpu.state.passes_through(index)
    if ghcb.info_1:
        if is_guests:
            refuse(errno.EINVAL)
        value = registers["rdx"] << 32 & _U32 << 32 | registers["rax"] & _U32
        return 1 if write_msr(vcpu, index, value) else ghcb.raise_exception(_GP)
    answer = None if is_guests else read_msr(vcpu, index)
    if answer is None:
        return ghcb.raise_exception(_GP)
    registers["rax"], registers["rdx"] = answer & _U32, answer >> 32
    return 1


def _rdpmc(vcpu: Vcpu, ghcb: Ghcb) -> None:
    """kvm_emulate_rdpmc(): the counters are there, and count nothing."""
    counter = ghcb.registers["rcx"] & _U32
    user_may = vcpu.running.live_cpu.read("cr4") & _CR4_PCE
    if counter >= _counters(vcpu) or (ghcb.cpl and not user_may):
        vcpu.running.exception = (_GP, 0)
    else:
        ghcb.registers["rax"] = ghcb.registers["rdx"] = 0


def _counters(vcpu: Vcpu) -> int:
    """amd_pmu_refresh(): how many the vCPU's CPUID table says; this host has six."""
    perfmon = cpuid_table.find_leaf(vcpu.cpuid, _PERFMON_LEAF)
    if perfmon is not None and perfmon.eax & _PERFMON_V2:
        return min(int(perfmon.ebx) & _PERFMON_COUNTERS, _CORE_COUNTERS)
    extended = cpuid_table.find_leaf(vcpu.cpuid, 0x80000001)
    has_core = extended is not None and extended.ecx & _FEATURE_PERFCTR_CORE
    return _CORE_COUNTERS if has_core else _PERFORMANCE_COUNTERS


def _monitor_mwait(vcpu: Vcpu) -> None:
    """kvm_emulate_monitor_mwait(): nothing, or #UD once user space has turned the quirk off."""
    quirk_off = vcpu.vm.disabled_quirks & lib.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
    leaf = cpuid_table.find_leaf(vcpu.cpuid, 1)
    if quirk_off and not (leaf is not None and leaf.ecx & _FEATURE_MWAIT):
        vcpu.running.exception = (_UD, None)
