"""A VM without encrypted state that runs code, for the tests of its exits."""

from __future__ import annotations

from typing import Any

from kvmlaunch.uapi import ffi, lib
from tests.host import require_simulated_cpu

from .driver import PAGE, Driver, Memory, struct

CODE = 0x1000


class Vm(Driver):
    """A plain VM: 16 pages at 0, code at 0x1000 that starts there in real mode."""

    def __init__(self, code: bytes, *, code32: bool = False, platform: Any = None) -> None:
        super().__init__(require_simulated_cpu() if platform is None else platform)
        self.kvm = self.open_kvm()
        self.vm = self.create_vm(0, self.kvm)
        self.ram = Memory(16 * PAGE)
        self.ram.write(code, CODE)
        region = struct(
            "kvm_userspace_memory_region",
            memory_size=16 * PAGE,
            userspace_addr=self.ram.address,
        )
        self.ok(self.ioctl(self.vm, lib.KVM_SET_USER_MEMORY_REGION, region))
        self.vcpu = self.ok(self.ioctl(self.vm, lib.KVM_CREATE_VCPU, 0))
        size = self.ok(self.ioctl(self.kvm, lib.KVM_GET_VCPU_MMAP_SIZE))
        address = self.ok(self.platform.mmap(self.vcpu, size, 3, 1))
        self.run = ffi.cast("struct kvm_run *", address)
        sregs = self.get(self.vcpu, lib.KVM_GET_SREGS)
        sregs.cs.base = sregs.cs.selector = 0
        if code32:
            sregs.cr0 |= 1
            for name in ("cs", "ds", "es", "ss"):
                segment = getattr(sregs, name)
                segment.base, segment.limit, segment.db, segment.g = 0, 0xFFFFFFFF, 1, 1
        self.ok(self.ioctl(self.vcpu, lib.KVM_SET_SREGS, sregs))
        self.set_regs(rip=CODE)

    def set_regs(self, **values: int) -> None:
        regs = self.get(self.vcpu, lib.KVM_GET_REGS)
        for name, value in values.items():
            setattr(regs, name, value)
        self.ok(self.ioctl(self.vcpu, lib.KVM_SET_REGS, regs))

    @property
    def regs(self):
        return self.get(self.vcpu, lib.KVM_GET_REGS)

    def enter(self):
        """KVM_RUN's result and the exit reason."""
        return tuple(self.ioctl(self.vcpu, lib.KVM_RUN)), self.run.exit_reason
