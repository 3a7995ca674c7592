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
    "SCHED_YIELD_FEATURE",
    "SEND_IPI_FEATURE",
    "guest_has",
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

_AS_PF_VMEXIT, _AS_INT = 1 << 2, 1 << 3


def guest_has(vcpu: Vcpu, feature: int) -> bool:
    """Whether the guest may use it: always, unless user space wants CPUID to be heeded."""
    if not vcpu.enforce_pv_features:
        return True
    return bool(cpuid_table.kvm_features(vcpu.cpuid) >> feature & 1)


def value_allowed(vcpu: Vcpu, index: int, value: int) -> bool:
    """Whether KVM takes a value for one of these MSRs, whose reserved bits are another matter."""
    in_kernel = vcpu.vm.irq.in_kernel
    if index == msrs.ASYNC_PF_EN:
        needs = (_AS_PF_VMEXIT, _ASYNC_PF_VMEXIT), (_AS_INT, _ASYNC_PF_INT)
        lacking = any(value & bit and not guest_has(vcpu, feature) for bit, feature in needs)
        return not lacking and (in_kernel or not value)
    return index != msrs.ASYNC_PF_INT or in_kernel
