"""Instructions that a guest asks KVM to do for it (svm.c: svm_invoke_exit_handler, x86.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmlaunch.abi.ghcb import GhcbExit
from kvmlaunch.sim import cpuid_table, exits, hypercalls, vcpu_msrs
from kvmlaunch.sim.ghcb import Ghcb
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["cpuid", "handle", "rdmsr", "wrmsr"]

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
    cpu = vcpu.running.live_cpu
    # KVM sees a plain guest's XSETBV, and can't see one with encrypted state.
    xcr0 = cpu.read("xcr0") if vcpu.sev_es is None else vcpu.state.xcr0
    return cpuid_table.answer(vcpu, function, index, cr4=cpu.read("cr4"), xcr0=xcr0)


def rdmsr(vcpu: Vcpu, index: int, finish: Callable[[int | None], int]) -> int:
    """kvm_emulate_rdmsr(); ``finish`` gets the value, None for #GP, maybe after user space."""
    run = vcpu.run
    if not vcpu.vm.msr_allowed(index, lib.KVM_MSR_FILTER_READ):
        reason = lib.KVM_MSR_EXIT_REASON_FILTER
    else:
        value = None if _is_guests(vcpu, index) else vcpu_msrs.read(vcpu, index, by_guest=True)
        if value is not None:
            return finish(value)
        reason = _why_not(vcpu, index)
    if not vcpu.vm.msr_exits & reason:
        return finish(None)
    exits.msr(run, lib.KVM_EXIT_X86_RDMSR, reason, index, 0)
    vcpu.running.complete = lambda: finish(None if run.msr.error else run.msr.data)
    return 0


def wrmsr(vcpu: Vcpu, index: int, value: int, finish: Callable[[bool], int]) -> int:
    """kvm_emulate_wrmsr(); ``finish`` gets False for #GP, maybe after user space. EINVAL."""
    run, is_guests = vcpu.run, _is_guests(vcpu, index)
    if not vcpu.vm.msr_allowed(index, lib.KVM_MSR_FILTER_WRITE):
        reason, is_guests = lib.KVM_MSR_EXIT_REASON_FILTER, False
    elif not is_guests and vcpu_msrs.write(vcpu, index, value, by_guest=True):
        return finish(True)
    else:
        reason = _why_not(vcpu, index)
    if not vcpu.vm.msr_exits & reason:
        if is_guests:
            refuse(errno.EINVAL)
        return finish(False)
    exits.msr(run, lib.KVM_EXIT_X86_WRMSR, reason, index, value)
    vcpu.running.complete = lambda: finish(not run.msr.error)
    return 0


def _is_guests(vcpu: Vcpu, index: int) -> bool:
    """What the processor lets an SNP guest access itself is not KVM's to know."""
    return vcpu.sev_es is not None and vcpu.state.passes_through(index)


def _why_not(vcpu: Vcpu, index: int) -> int:
    """kvm_msr_reason()."""
    known = vcpu_msrs.is_known(vcpu, index)
    return int(lib.KVM_MSR_EXIT_REASON_INVAL if known else lib.KVM_MSR_EXIT_REASON_UNKNOWN)


def _msr(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """kvm_emulate_rdmsr() and kvm_emulate_wrmsr(), svm_complete_emulated_msr()."""
    registers = ghcb.registers
    index = registers["rcx"] & _U32

    def read(answer: int | None) -> int:
        if answer is None:
            return ghcb.raise_exception(_GP)
        registers["rax"], registers["rdx"] = answer & _U32, answer >> 32
        return 1

    def written(done: bool) -> int:
        return 1 if done else ghcb.raise_exception(_GP)

    if ghcb.info_1:
        value = registers["rdx"] << 32 & _U32 << 32 | registers["rax"] & _U32
        return wrmsr(vcpu, index, value, written)
    return rdmsr(vcpu, index, read)


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
