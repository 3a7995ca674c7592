"""/dev/kvm."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from kvmlaunch.errors import MissingCapability
from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.kvm.descriptor import Descriptor, struct_to_dict
from kvmlaunch.kvm.vm import Vm
from kvmlaunch.uapi import Platform, address_of, ffi, lib

__all__ = ["CpuidLeaf", "Kvm", "cbitpos"]

CpuidLeaf = dict[str, int]
"""One CPUID entry: function, index, flags, eax, ebx, ecx, edx."""

_CREATE_VM_TRIES = 5
_SEV_LEAF = 0x8000001F
_CBITPOS = 0x3F  # of EBX


class Kvm(Descriptor):
    """The system descriptor (open /dev/kvm)."""

    @classmethod
    def open(cls, platform: Platform, path: str = "/dev/kvm") -> Kvm:
        """Open the device. Raises IoctlError with what to do about it."""
        result = platform.open(path, os.O_RDWR | os.O_CLOEXEC)
        if result.ret < 0:
            raise ioctl_error(f"open {path}", result.errno)
        return cls(platform, result.ret, path)

    def api_version(self) -> int:
        """The API version, 12 (KVM_GET_API_VERSION)."""
        return self.ioctl("KVM_GET_API_VERSION")

    def check_extension(self, cap: int) -> int:
        """Value of a capability, 0 where it is missing (KVM_CHECK_EXTENSION)."""
        return self.ioctl("KVM_CHECK_EXTENSION", cap, fields={"cap": cap})

    def vm_types(self) -> int:
        """Bitmap of the VM types that can be created (KVM_CHECK_EXTENSION)."""
        return self.check_extension(lib.KVM_CAP_VM_TYPES) or 1

    def supports_snp(self) -> bool:
        """True where SNP guests can be created (KVM_CHECK_EXTENSION)."""
        return bool(self.vm_types() >> lib.KVM_X86_SNP_VM & 1)

    def require_snp(self) -> None:
        """Raise MissingCapability unless SNP guests can be created (KVM_CHECK_EXTENSION)."""
        if not self.supports_snp():
            raise MissingCapability("SEV-SNP (VM type 4 in KVM_CAP_VM_TYPES)", "an SNP guest")

    def vcpu_mmap_size(self) -> int:
        """Bytes of a vCPU's run page (KVM_GET_VCPU_MMAP_SIZE)."""
        return self.ioctl("KVM_GET_VCPU_MMAP_SIZE")

    def create_vm(self, vm_type: int = 0) -> Vm:
        """Create a VM of a KVM_X86_*_VM type (KVM_CREATE_VM)."""
        # A pending signal makes KVM_CREATE_VM fail with EINTR while it sets up
        # MMU notifiers; the call has no effect then and may be repeated.
        for _ in range(_CREATE_VM_TRIES):
            result = self.ioctl_raw("KVM_CREATE_VM", vm_type)
            if result.errno != errno.EINTR:
                break
        if result.ret < 0:
            explanation = ""
            if result.errno == errno.EINVAL:
                explanation = (
                    f"This host can create VM types {_bits(self.vm_types())}; "
                    f"SNP is {lib.KVM_X86_SNP_VM}."
                )
            raise ioctl_error(
                "KVM_CREATE_VM", result.errno, fields={"type": vm_type}, explanation=explanation
            )
        return Vm(self.platform, result.ret, vm_type, self.vcpu_mmap_size)

    def supported_cpuid(self) -> list[CpuidLeaf]:
        """The CPUID that KVM can give a guest (KVM_GET_SUPPORTED_CPUID)."""
        count = 128
        while True:
            table = ffi.new("struct kvm_cpuid2 *", {"nent": count, "entries": count})
            result = self.ioctl_raw("KVM_GET_SUPPORTED_CPUID", table)
            if result.ret >= 0:
                return [_leaf(table.entries[i]) for i in range(table.nent)]
            if result.errno != errno.E2BIG or count > 4096:
                raise ioctl_error("KVM_GET_SUPPORTED_CPUID", result.errno, fields={"nent": count})
            count *= 2

    def device_attr(self, group: int, attr: int) -> int | None:
        """A system attribute, None where the host lacks it (KVM_GET_DEVICE_ATTR)."""
        value = ffi.new("uint64_t *")
        request = ffi.new(
            "struct kvm_device_attr *", {"group": group, "attr": attr, "addr": address_of(value)}
        )
        result = self.ioctl_raw("KVM_GET_DEVICE_ATTR", request)
        if result.ret >= 0:
            return int(value[0])
        if result.errno in (errno.ENXIO, errno.EINVAL, errno.ENOTTY):
            return None
        raise ioctl_error(
            "KVM_GET_DEVICE_ATTR", result.errno, fields={"group": group, "attr": attr}
        )

    def vmsa_features(self) -> int | None:
        """Mask that INIT2 accepts as vmsa_features (KVM_GET_DEVICE_ATTR)."""
        return self.device_attr(lib.KVM_X86_GRP_SEV, lib.KVM_X86_SEV_VMSA_FEATURES)


def cbitpos(leaves: Iterable[CpuidLeaf]) -> int | None:
    """The C-bit position in a host's supported CPUID; None where it doesn't tell."""
    for leaf in leaves:
        if leaf["function"] == _SEV_LEAF:
            return leaf["ebx"] & _CBITPOS or None
    return None


def _leaf(entry: Any) -> CpuidLeaf:
    values = struct_to_dict(entry)
    values.pop("padding")
    return values


def _bits(value: int) -> str:
    return ", ".join(str(bit) for bit in range(value.bit_length()) if value >> bit & 1)
