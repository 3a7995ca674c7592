"""The TSC offsets of a VM's vCPUs (x86.c: kvm_synchronize_tsc()).

Time is what the VM's CPUs have executed. A frequency of its own doesn't scale a vCPU's TSC, which
counts ticks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlaunch.sim import msrs

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["MAX_KHZ", "TscMatching"]

MAX_KHZ = 0x7FFFFFFF
"""Frequencies are below it (max_guest_tsc_khz)."""


class TscMatching:
    """What KVM remembers, so that TSCs that are meant to be the same become the same."""

    def __init__(self) -> None:
        self._set_by_user = False
        self._last_khz = self._last_write = self._last_offset = self._last_time = 0

    def synchronize(self, vcpu: Vcpu, value: int | None) -> None:
        """Set a vCPU's TSC; None at its creation. Near to what another one has means the same."""
        now, hz = vcpu.vm.guest_ticks, vcpu.tsc_khz * 1000
        data = value or 0
        expected = self._last_write + now - self._last_time
        near = self._set_by_user and expected - hz < data < expected + hz
        self._set_by_user = self._set_by_user or value is not None
        matched = (not data or near) and vcpu.tsc_khz == self._last_khz
        self._set(vcpu, self._last_offset if matched else data - now, data)

    def set_offset(self, vcpu: Vcpu, offset: int) -> None:
        """KVM_VCPU_TSC_OFFSET."""
        self._set_by_user = True
        self._set(vcpu, offset, vcpu.vm.guest_ticks + offset & msrs.U64)

    def _set(self, vcpu: Vcpu, offset: int, written: int) -> None:
        """__kvm_synchronize_tsc()."""
        self._last_time, self._last_write = vcpu.vm.guest_ticks, written
        self._last_khz, self._last_offset = vcpu.tsc_khz, offset
        vcpu.set_tsc_offset(offset)
