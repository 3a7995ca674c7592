"""A VM with one vCPU, for the tests of vCPU ioctls."""

from __future__ import annotations

import errno
import mmap

from kvmlaunch.uapi import ffi, lib

from .driver import RW, Driver, struct

EINVAL = (-1, errno.EINVAL)
EFAULT = (-1, errno.EFAULT)
E2BIG = (-1, errno.E2BIG)
OK = (0, 0)
ENTRY = 40


class Machine(Driver):
    """A VM of any type with one vCPU."""

    def __init__(self, platform, vm_type=0, split=False, vcpu_id=0):
        super().__init__(platform)
        self.kvm = self.open_kvm()
        self.vm = self.create_vm(vm_type, self.kvm)
        if split:
            cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_SPLIT_IRQCHIP)
            self.ok(self.ioctl(self.vm, lib.KVM_ENABLE_CAP, cap))
        self.vcpu = self.ok(self.ioctl(self.vm, lib.KVM_CREATE_VCPU, vcpu_id))

    def call(self, name, args=0):
        return self.ioctl(self.vcpu, getattr(lib, name), args)

    def run_page(self):
        size = self.ok(self.ioctl(self.kvm, lib.KVM_GET_VCPU_MMAP_SIZE))
        address = self.ok(self.platform.mmap(self.vcpu, size, RW, mmap.MAP_SHARED))
        return ffi.cast("struct kvm_run *", address)

    def set_cpuid(self, *entries):
        keep = ffi.new("char[]", 8 + ENTRY * max(1, len(entries)))
        header = ffi.cast("struct kvm_cpuid2 *", keep)
        header.nent = len(entries)
        for at, (function, index, flags, *registers) in enumerate(entries):
            entry = header.entries[at]
            entry.function, entry.index, entry.flags = function, index, flags
            entry.eax, entry.ebx, entry.ecx, entry.edx = registers
        return self.call("KVM_SET_CPUID2", header)
