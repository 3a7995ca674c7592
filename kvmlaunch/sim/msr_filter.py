"""KVM_X86_SET_MSR_FILTER: MSRs that a guest doesn't reach by itself (x86.c: kvm_msr_allowed())."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim import msrs
from kvmlaunch.sim.uaccess import UserSpace, copy_in, refuse
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["MsrFilter", "set_filter"]

_RANGE_FLAGS = lib.KVM_MSR_FILTER_READ | lib.KVM_MSR_FILTER_WRITE
_U32 = 0xFFFFFFFF


@dataclass(frozen=True)
class _Range:
    flags: int
    base: int
    end: int
    bitmap: bytes


@dataclass(frozen=True)
class MsrFilter:
    """What may be accessed: by the first range that has the MSR, else by default."""

    default_allow: bool
    ranges: tuple[_Range, ...]

    def allows(self, index: int, kind: int) -> bool:
        """Whether KVM serves it; ``kind`` is KVM_MSR_FILTER_READ or _WRITE."""
        if index in msrs.X2APIC:
            return True
        for part in self.ranges:
            if part.base <= index < part.end and part.flags & kind:
                bit = index - part.base
                return bool(part.bitmap[bit // 8] >> bit % 8 & 1)
        return self.default_allow


def set_filter(vm: Vm, arg: int) -> int:
    """KVM_X86_SET_MSR_FILTER: the new filter replaces the old one."""
    user = vm.host.user
    given = copy_in(user, "kvm_msr_filter", arg)
    if given.flags & ~lib.KVM_MSR_FILTER_DEFAULT_DENY:
        refuse(errno.EINVAL)
    default_allow = not given.flags & lib.KVM_MSR_FILTER_DEFAULT_DENY
    wanted = [part for part in given.ranges if part.nmsrs]
    if not wanted and not default_allow:
        refuse(errno.EINVAL)
    vm.msr_filter = MsrFilter(default_allow, tuple(_range(user, part) for part in wanted))
    vm.update_msr_intercepts()
    return 0


def _range(user: UserSpace, part: Any) -> _Range:
    """kvm_add_msr_filter()."""
    if part.flags & ~_RANGE_FLAGS or not part.flags:
        refuse(errno.EINVAL)
    size = (part.nmsrs + 63) // 64 * 8
    if size > lib.KVM_MSR_FILTER_MAX_BITMAP_SIZE:
        refuse(errno.EINVAL)
    bitmap = user.read(int(ffi.cast("uintptr_t", part.bitmap)), size)
    return _Range(part.flags, part.base, part.base + part.nmsrs & _U32, bitmap)
