"""KVM_ENABLE_CAP on a VM and on a vCPU (x86.c: kvm_vm_ioctl_enable_cap() and its twin)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim import caps, irq
from kvmlaunch.sim.dirty_log import enable_manual_protect
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu
    from kvmlaunch.sim.vm import Vm

__all__ = ["enable_cap", "enable_vcpu_cap"]

_MSR_EXIT_REASONS = (
    lib.KVM_MSR_EXIT_REASON_INVAL | lib.KVM_MSR_EXIT_REASON_UNKNOWN | lib.KVM_MSR_EXIT_REASON_FILTER
)


def enable_cap(vm: Vm, cap: Any) -> int:
    """Enable ``struct kvm_enable_cap``; an unknown one is EINVAL, as are flags."""
    if cap.flags:
        refuse(errno.EINVAL)
    rules = vm.host.profile.vmsa
    if rules.direct and cap.cap == rules.proposal.direct_vmsa:
        _direct_vmsa(vm, cap.args)
        return 0
    handler = {
        lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: enable_manual_protect,
        lib.KVM_CAP_SPLIT_IRQCHIP: _split_irqchip,
        lib.KVM_CAP_EXIT_HYPERCALL: _exit_hypercall,
        lib.KVM_CAP_DISABLE_QUIRKS2: _disable_quirks,
        lib.KVM_CAP_X86_USER_SPACE_MSR: _user_space_msr,
        lib.KVM_CAP_MSR_PLATFORM_INFO: _platform_info,
        lib.KVM_CAP_X86_DISABLE_EXITS: _disable_exits,
        lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE: _exit_on_emulation_failure,
        lib.KVM_CAP_MAX_VCPU_ID: _max_vcpu_id,
        lib.KVM_CAP_X86_APIC_BUS_CYCLES_NS: _apic_bus_cycles,
    }.get(cap.cap)
    if handler is None:
        refuse(errno.EINVAL)
    handler(vm, cap.args[0])
    return 0


def enable_vcpu_cap(vcpu: Vcpu, cap: Any) -> int:
    """The only capability of a vCPU is to have no more of KVM's own features than CPUID says."""
    if cap.flags or cap.cap != lib.KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
        refuse(errno.EINVAL)
    vcpu.enforce_pv_features = bool(cap.args[0])
    return 0


def _direct_vmsa(vm: Vm, args: Any) -> None:
    """The whole VM's VMSAs come from user space: KVM makes none."""
    sev, rules = vm.sev, vm.host.profile.vmsa
    snp = sev.is_snp if rules.enable_needs_init else vm.is_snp_type
    if not snp or any(args) or vm.vcpus:
        refuse(errno.EINVAL)
    if sev.direct_vmsa and rules.enable_twice_errno:
        refuse(rules.enable_twice_errno)
    sev.direct_vmsa = True


def _split_irqchip(vm: Vm, routes: int) -> None:
    if routes > irq.MAX_ROUTES:
        refuse(errno.EINVAL)
    if vm.irq.in_kernel or vm.vcpus:
        refuse(errno.EEXIST)
    vm.irq.split = True


def _exit_hypercall(vm: Vm, hypercalls: int) -> None:
    if hypercalls & ~(1 << lib.KVM_HC_MAP_GPA_RANGE):
        refuse(errno.EINVAL)
    vm.hypercall_exits = hypercalls


def _disable_quirks(vm: Vm, quirks: int) -> None:
    if quirks & ~vm.host.profile.quirks:
        refuse(errno.EINVAL)
    vm.disabled_quirks |= quirks


def _user_space_msr(vm: Vm, reasons: int) -> None:
    if reasons & ~_MSR_EXIT_REASONS:
        refuse(errno.EINVAL)
    vm.msr_exits = reasons


def _exit_on_emulation_failure(vm: Vm, on: int) -> None:
    if on & ~1:
        refuse(errno.EINVAL)
    vm.exit_on_emulation_failure = bool(on)


def _disable_exits(vm: Vm, exits: int) -> None:
    """Of these only HLT makes a difference: the others never leave KVM here."""
    if exits & ~caps.DISABLED_EXITS:
        refuse(errno.EINVAL)
    vm.hlt_in_guest = vm.hlt_in_guest or bool(exits & lib.KVM_X86_DISABLE_EXITS_HLT)


def _platform_info(vm: Vm, readable: int) -> None:
    vm.platform_info_readable = bool(readable)


def _max_vcpu_id(vm: Vm, limit: int) -> None:
    # 0 means "not chosen yet" as a limit, too, as in the kernel.
    if limit > caps.MAX_VCPU_ID or vm.bsp_id > limit or vm.max_vcpu_ids not in (0, limit):
        refuse(errno.EINVAL)
    vm.max_vcpu_ids = limit


def _apic_bus_cycles(vm: Vm, nanoseconds: int) -> None:
    if not nanoseconds:
        refuse(errno.EINVAL)
    if not vm.irq.in_kernel:
        refuse(errno.ENXIO)
    if vm.vcpus:
        refuse(errno.EINVAL)
    vm.irq.bus_cycle_ns = nanoseconds
