"""One virtual machine."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Any

from kvmlaunch.errors import VmDeadError
from kvmlaunch.kvm.calls import dead_error, ioctl_error
from kvmlaunch.kvm.descriptor import Descriptor
from kvmlaunch.kvm.guest_memfd import GuestMemfd
from kvmlaunch.kvm.sev_command import SevResult, sev_command
from kvmlaunch.kvm.vcpu import Vcpu
from kvmlaunch.uapi import Platform, ffi, lib

__all__ = ["Vm"]


class Vm(Descriptor):
    """A VM descriptor (KVM_CREATE_VM). ``vm_type`` is its KVM_X86_*_VM number."""

    def __init__(
        self, platform: Platform, fd: int, vm_type: int, vcpu_mmap_size: Callable[[], int]
    ) -> None:
        super().__init__(platform, fd, f"VM (type {vm_type})")
        self.vm_type = vm_type
        self._vcpu_mmap_size = vcpu_mmap_size

    def _failed(self, name: str, err: int, fields: Mapping[str, Any] | None) -> Exception:
        if err == errno.EIO and self.is_dead():
            return self.dead_error(name, fields)
        return ioctl_error(name, err, fields=fields)

    def is_dead(self) -> bool:
        """True after KVM_BUG: a call that can't fail gives EIO (KVM_CHECK_EXTENSION)."""
        probe = self.ioctl_raw("KVM_CHECK_EXTENSION", lib.KVM_CAP_USER_MEMORY)
        return probe.ret < 0 and probe.errno == errno.EIO

    def dead_error(
        self, name: str, fields: Mapping[str, Any] | None, fw_error: int | None = None
    ) -> VmDeadError:
        """The error to raise once is_dead()."""
        return dead_error(name, fields, fw_error=fw_error)

    def check_extension(self, cap: int) -> int:
        """Value of a capability for this VM (KVM_CHECK_EXTENSION)."""
        return self.ioctl("KVM_CHECK_EXTENSION", cap, fields={"cap": cap})

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """Enable a capability (KVM_ENABLE_CAP)."""
        values = {"cap": cap, "flags": flags, "args": list(args)}
        self.ioctl(
            "KVM_ENABLE_CAP",
            ffi.new("struct kvm_enable_cap *", values),
            fields={"cap": cap},
        )

    def create_irqchip(self) -> None:
        """Create the in-kernel interrupt controllers (KVM_CREATE_IRQCHIP)."""
        self.ioctl("KVM_CREATE_IRQCHIP")

    def split_irqchip(self, routes: int = 24) -> None:
        """In-kernel APICs, the rest in user space (KVM_ENABLE_CAP)."""
        self.enable_cap(lib.KVM_CAP_SPLIT_IRQCHIP, routes)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """Create a vCPU; its run page is mapped here and unmapped by close() (KVM_CREATE_VCPU)."""
        fields = {"vcpu": vcpu_id}
        fd = self.ioctl("KVM_CREATE_VCPU", vcpu_id, fields=fields)
        vcpu = Vcpu(self.platform, fd, vcpu_id)
        try:
            vcpu.map_run(self._vcpu_mmap_size())
        except BaseException:
            vcpu.close()
            raise
        return vcpu

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """Create private memory of ``size`` bytes (KVM_CREATE_GUEST_MEMFD)."""
        request = ffi.new("struct kvm_create_guest_memfd *", {"size": size, "flags": flags})
        fields = {"size": size}
        fd = self.ioctl("KVM_CREATE_GUEST_MEMFD", request, fields=fields)
        return GuestMemfd(self.platform, fd, size)

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, address: int, *, flags: int = 0
    ) -> None:
        """Map memory of this process at ``gpa``; size 0 deletes (KVM_SET_USER_MEMORY_REGION)."""
        values = {
            "slot": slot,
            "flags": flags,
            "guest_phys_addr": gpa,
            "memory_size": size,
            "userspace_addr": address,
        }
        region = ffi.new("struct kvm_userspace_memory_region *", values)
        fields = {"slot": slot, "gpa": gpa, "size": size, "flags": flags}
        self.ioctl("KVM_SET_USER_MEMORY_REGION", region, fields=fields)

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        address: int,
        *,
        memfd: GuestMemfd,
        memfd_offset: int = 0,
    ) -> None:
        """Map shared memory and its private side at ``gpa`` (KVM_SET_USER_MEMORY_REGION2)."""
        values = {
            "slot": slot,
            "flags": lib.KVM_MEM_GUEST_MEMFD,
            "guest_phys_addr": gpa,
            "memory_size": size,
            "userspace_addr": address,
            "guest_memfd": memfd.fd,
            "guest_memfd_offset": memfd_offset,
        }
        region = ffi.new("struct kvm_userspace_memory_region2 *", values)
        fields = {"slot": slot, "gpa": gpa, "size": size, "memfd_offset": memfd_offset}
        self.ioctl("KVM_SET_USER_MEMORY_REGION2", region, fields=fields)

    def set_memory_attributes(self, gpa: int, size: int, *, private: bool) -> None:
        """Make a range private or shared (KVM_SET_MEMORY_ATTRIBUTES)."""
        attributes = lib.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        values = {"address": gpa, "size": size, "attributes": attributes}
        request = ffi.new("struct kvm_memory_attributes *", values)
        fields = {"gpa": gpa, "size": size, "attributes": attributes}
        self.ioctl("KVM_SET_MEMORY_ATTRIBUTES", request, fields=fields)

    def sev_command_raw(self, command: int, data: Any = None, *, sev_fd: int = 0) -> SevResult:
        """Issue a SEV command, unchecked (KVM_MEMORY_ENCRYPT_OP; see `sev_command`)."""
        return sev_command(self, command, data, sev_fd)
