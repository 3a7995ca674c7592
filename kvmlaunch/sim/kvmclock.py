"""kvmclock: a VM's time for user space, and in a page of each vCPU's (x86.c).

It goes on while guest code runs, as the TSC does. The wall clock's page is left to the guest: a
date would make two runs of the same guest differ.
"""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim import msrs
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu
    from kvmlaunch.sim.vm import Vm

__all__ = ["FLAGS", "Kvmclock"]

FLAGS = lib.KVM_CLOCK_TSC_STABLE | lib.KVM_CLOCK_REALTIME | lib.KVM_CLOCK_HOST_TSC
"""KVM_CLOCK_VALID_FLAGS."""

_ENABLED = 1
# struct pvclock_vcpu_time_info (asm/pvclock-abi.h): version, TSC, time, multiplier, shift, flags.
_INFO = struct.Struct("<I4xQQIbB2x")
_TSC_STABLE, _GUEST_STOPPED = 1 << 0, 1 << 1
_NS = 1_000_000_000
_U32 = (1 << 32) - 1


class Kvmclock:
    """The clock of one VM, in nanoseconds."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._offset = 0
        self._seen: dict[int, tuple[int, ...]] = {}

    def get(self) -> Any:
        """KVM_GET_CLOCK's ``struct kvm_clock_data``."""
        clock = ffi.new("struct kvm_clock_data *")
        clock.clock, clock.flags = self._now & msrs.U64, FLAGS
        clock.realtime, clock.host_tsc = time.time_ns(), self._vm.guest_ticks
        return clock

    def set(self, data: Any) -> None:
        """KVM_SET_CLOCK. Raises OSError(EINVAL)."""
        if data.flags & ~FLAGS:
            refuse(errno.EINVAL)
        now = int(data.clock)
        if data.flags & lib.KVM_CLOCK_REALTIME:
            now += max(0, time.time_ns() - data.realtime)
        self._offset += now - self._now

    def update(self, vcpu: Vcpu) -> None:
        """kvm_guest_time_update(), where the vCPU's page isn't as it must be."""
        place = vcpu.state.msrs[msrs.SYSTEM_TIME_NEW]
        if not place & _ENABLED:
            self._seen.pop(vcpu.id, None)
            return
        tsc = vcpu.guest_tsc()
        now = (place, self._offset, vcpu.tsc_khz, tsc - self._vm.guest_ticks)
        if self._seen.get(vcpu.id) == now:
            return
        self._seen[vcpu.id] = now
        gpa = place & ~_ENABLED
        if gpa % PAGE_SIZE + _INFO.size > PAGE_SIZE:
            return
        memory = self._vm.memory
        shift, multiplier = _time_scale(_NS, vcpu.tsc_khz * 1000)
        try:
            version, *_, flags = _INFO.unpack(memory.read(gpa, _INFO.size))
            version = (version + 1 | 1) + 1 & _U32
            flags = _TSC_STABLE | flags & _GUEST_STOPPED
            now_ns = self._now & msrs.U64
            memory.write(gpa, _INFO.pack(version, tsc, now_ns, multiplier, shift, flags))
        except OSError:
            return

    @property
    def _now(self) -> int:
        return self._vm.guest_ticks * 1_000_000 // self._vm.tsc_khz + self._offset


def _time_scale(scaled: int, base: int) -> tuple[int, int]:
    """kvm_get_time_scale(): shift and 32-bit fraction that make ``scaled`` Hz of ``base`` Hz."""
    shift = 0
    while base > 2 * scaled or base >> 32:
        base >>= 1
        shift -= 1
    while base <= scaled or scaled >> 32:
        if scaled >> 32 or base >> 31:
            scaled >>= 1
        else:
            base <<= 1
        shift += 1
    return shift, (scaled << 32) // base
