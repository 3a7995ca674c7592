"""What KVM offers its guests of its own: MSRs and hypercalls by feature (guest_pv_has())."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmlaunch.sim import cpuid_table, msrs

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = [
    "KICK_CPU_FEATURE",
    "MSR_FEATURES",
    "NUMBER",
    "SCHED_YIELD_FEATURE",
    "SEND_IPI_FEATURE",
    "guest_has",
    "has_memory",
    "value_allowed",
]

KICK_CPU_FEATURE, SEND_IPI_FEATURE, SCHED_YIELD_FEATURE = 7, 11, 13
"""KVM_FEATURE_* (uapi/asm/kvm_para.h) that the hypercalls of these names need."""
_ASYNC_PF_VMEXIT, _ASYNC_PF_INT = 10, 14

MSR_FEATURES: Mapping[int, int] = MappingProxyType(
    {
        msrs.WALL_CLOCK: 0,  # CLOCKSOURCE
        msrs.SYSTEM_TIME: 0,
        msrs.WALL_CLOCK_NEW: 3,  # CLOCKSOURCE2
        msrs.SYSTEM_TIME_NEW: 3,
        msrs.ASYNC_PF_EN: 4,
        msrs.STEAL_TIME: 5,
        msrs.PV_EOI_EN: 6,
        msrs.POLL_CONTROL: 12,
        msrs.ASYNC_PF_INT: _ASYNC_PF_INT,
        msrs.ASYNC_PF_ACK: _ASYNC_PF_INT,
    }
)
"""MSR -> number of the feature that it belongs to."""

NUMBER: Mapping[int, int] = MappingProxyType(
    {msrs.WALL_CLOCK: msrs.WALL_CLOCK_NEW, msrs.SYSTEM_TIME: msrs.SYSTEM_TIME_NEW}
)
"""Older number of an MSR -> the one that its value is kept by."""

_RESERVED: Mapping[int, int] = MappingProxyType(
    {
        msrs.ASYNC_PF_EN: 0x30,
        msrs.STEAL_TIME: 0x3E,
        msrs.PV_EOI_EN: 0x2,
        msrs.POLL_CONTROL: ~1,
        msrs.ASYNC_PF_INT: ~0xFF,
    }
)
"""MSR -> bits that must be 0 (kvm_set_msr_common())."""
_ENABLED = 1 << 0
_AS_PF_VMEXIT, _AS_INT = 1 << 2, 1 << 3
_ASYNC_PF_FLAGS = 0x3F


def guest_has(vcpu: Vcpu, feature: int) -> bool:
    """Whether the guest may use it: always, unless user space wants CPUID to be heeded."""
    if not vcpu.enforce_pv_features:
        return True
    return bool(cpuid_table.kvm_features(vcpu.cpuid) >> feature & 1)


def value_allowed(vcpu: Vcpu, index: int, value: int) -> bool:
    """Whether KVM takes a value for one of these MSRs (kvm_set_msr_common())."""
    if value & _RESERVED.get(index, 0):
        return False
    in_kernel = vcpu.vm.irq.in_kernel
    if index == msrs.ASYNC_PF_EN:
        needs = (_AS_PF_VMEXIT, _ASYNC_PF_VMEXIT), (_AS_INT, _ASYNC_PF_INT)
        lacking = any(value & bit and not guest_has(vcpu, feature) for bit, feature in needs)
        return not lacking and (in_kernel or not value)
    if index == msrs.PV_EOI_EN and value & _ENABLED:
        return vcpu.vm.slots.writable(value & ~_ENABLED, 1)
    return index != msrs.ASYNC_PF_INT or in_kernel


def has_memory(vcpu: Vcpu, index: int, value: int) -> bool:
    """kvm_pv_enable_async_pf() looks for it once the value is kept."""
    is_on = index == msrs.ASYNC_PF_EN and value & _ENABLED and value & _AS_INT
    return not is_on or vcpu.vm.slots.writable(value & ~_ASYNC_PF_FLAGS, 8)
