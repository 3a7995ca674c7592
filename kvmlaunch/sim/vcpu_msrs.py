"""MSRs of a vCPU as user space and its guest access them (x86.c: kvm_set_msr_common(), ...)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlaunch.sim import cpuid_table, msrs, pv_features

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["is_known", "read", "write"]

_FEATURE_TSC_ADJUST = 1 << 1  # CPUID leaf 7 EBX
_STATUS_WRITES = 1 << 18  # McStatusWrEn of HWCR


def is_known(vcpu: Vcpu, index: int) -> bool:
    """Whether KVM has the MSR at all, whatever it says to a value or to who asks."""
    if _lacks_feature(vcpu, index):
        return False
    return index in msrs.APIC or vcpu.state.get_msr(index) is not None or index == msrs.TSC


def _lacks_feature(vcpu: Vcpu, index: int) -> bool:
    feature = pv_features.MSR_FEATURES.get(index)
    return feature is not None and not pv_features.guest_has(vcpu, feature)


def read(vcpu: Vcpu, index: int, *, by_guest: bool) -> int | None:
    """The value; None where KVM refuses."""
    if index in msrs.APIC:
        return vcpu.apic.read_msr(index)
    if index == msrs.TSC:
        return vcpu.guest_tsc()
    if _lacks_feature(vcpu, index):
        return None if by_guest else 0  # user space may read whatever KVM lists
    hidden = index == msrs.PLATFORM_INFO and not vcpu.vm.platform_info_readable
    if by_guest and (hidden or index == msrs.SMBASE):
        return None
    if by_guest and not vcpu.state.machine_check.guest_may_access(index):
        return None
    index = pv_features.NUMBER.get(index, index)
    return vcpu.vm.wall_clock if index == msrs.WALL_CLOCK_NEW else vcpu.state.get_msr(index)


def write(vcpu: Vcpu, index: int, value: int, *, by_guest: bool) -> bool:
    """Store a value; False where KVM refuses."""
    if index in msrs.APIC:
        return vcpu.apic.write_msr(index, value)
    if index == msrs.APIC_BASE:
        return _set_apic_base(vcpu, value, by_guest)
    if index == msrs.TSC:
        _set_tsc(vcpu, value, by_guest)
        return True
    if index == msrs.TSC_ADJUST:
        _set_tsc_adjust(vcpu, value, by_guest)
        return True
    if by_guest and index in msrs.HOST_WRITTEN:
        return False
    if by_guest and not _machine_check_allows(vcpu, index, value):
        return False
    if _lacks_feature(vcpu, index):
        return not by_guest and not value
    if index in pv_features.MSR_FEATURES:
        return _set_pv(vcpu, pv_features.NUMBER.get(index, index), value)
    return vcpu.state.set_msr(index, value)


def _set_pv(vcpu: Vcpu, index: int, value: int) -> bool:
    """An MSR of KVM itself."""
    if not pv_features.value_allowed(vcpu, index, value):
        return False
    if index == msrs.WALL_CLOCK_NEW:
        vcpu.vm.wall_clock = value
        return True
    if index == msrs.ASYNC_PF_ACK:
        return True  # it isn't kept
    return vcpu.state.set_msr(index, value) and pv_features.has_memory(vcpu, index, value)


def _machine_check_allows(vcpu: Vcpu, index: int, value: int) -> bool:
    """set_msr_mce() and can_set_mci_status(), for a guest."""
    state = vcpu.state
    if state.machine_check.makes_up_error(index, value):
        return state.guest.amd and bool(state.msrs[msrs.HWCR] & _STATUS_WRITES)
    return state.machine_check.guest_may_access(index)


def _set_apic_base(vcpu: Vcpu, value: int, by_guest: bool) -> bool:
    if by_guest:
        return vcpu.apic.guest_sets_base(value)
    return vcpu.state.apic_base_valid(value) and vcpu.apic.set_base(value)


def _set_tsc(vcpu: Vcpu, value: int, by_guest: bool) -> None:
    """A guest moves its own TSC, and sees that in TSC_ADJUST; user space moves the offset."""
    if not by_guest:
        vcpu.vm.tsc.synchronize(vcpu, value)
        return
    moved = value - vcpu.guest_tsc()
    vcpu.set_tsc_offset(vcpu.tsc_offset + moved)
    vcpu.state.msrs[msrs.TSC_ADJUST] += moved
    vcpu.state.msrs[msrs.TSC_ADJUST] &= msrs.U64


def _set_tsc_adjust(vcpu: Vcpu, value: int, by_guest: bool) -> None:
    """Without the feature a write has no effect."""
    features = cpuid_table.find_leaf(vcpu.cpuid, 7)
    if features is None or not features.ebx & _FEATURE_TSC_ADJUST:
        return
    if by_guest:
        moved = value - vcpu.state.msrs[msrs.TSC_ADJUST]
        vcpu.set_tsc_offset(vcpu.tsc_offset + moved)
    vcpu.state.msrs[msrs.TSC_ADJUST] = value
