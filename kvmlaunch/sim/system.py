"""/dev/kvm: the system ioctls (virt/kvm/kvm_main.c, arch/x86/kvm/x86.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable

from kvmlaunch.sim import caps, mce, msrs
from kvmlaunch.sim.fdtable import File
from kvmlaunch.sim.host import Host
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.sim.vm import Vm, VmFile
from kvmlaunch.uapi import ffi, ioctl_name, lib

__all__ = ["KvmDevice"]

_MAX_CPUID_ENTRIES = 256
_CPUID_ENTRY = ffi.sizeof("struct kvm_cpuid_entry2")
_HEADER = ffi.sizeof("struct kvm_cpuid2")


class KvmDevice(File):
    """An open /dev/kvm."""

    name = "/dev/kvm"

    def __init__(self, host: Host) -> None:
        self._host = host
        self._handlers: dict[int, Callable[[int], int]] = {
            lib.KVM_GET_API_VERSION: self._api_version,
            lib.KVM_CREATE_VM: self._create_vm,
            lib.KVM_CHECK_EXTENSION: self._check_extension,
            lib.KVM_GET_VCPU_MMAP_SIZE: self._vcpu_mmap_size,
            lib.KVM_GET_SUPPORTED_CPUID: self._supported_cpuid,
            lib.KVM_GET_EMULATED_CPUID: self._emulated_cpuid,
            lib.KVM_GET_MSR_INDEX_LIST: self._msr_index_list,
            lib.KVM_GET_MSR_FEATURE_INDEX_LIST: self._msr_feature_index_list,
            lib.KVM_GET_MSRS: self._get_feature_msrs,
            lib.KVM_X86_GET_MCE_CAP_SUPPORTED: self._mce_cap_supported,
            lib.KVM_GET_DEVICE_ATTR: self._get_device_attr,
            lib.KVM_HAS_DEVICE_ATTR: self._has_device_attr,
        }

    def ioctl_names(self, request: int, arg: int) -> tuple[str, ...]:
        """The kernel's name of a system ioctl."""
        return (ioctl_name(request),)

    def ioctl(self, request: int, arg: int) -> int:
        """One system ioctl; an unknown one is EINVAL."""
        handler = self._handlers.get(request)
        if handler is None:
            refuse(errno.EINVAL)
        return handler(arg)

    def _api_version(self, arg: int) -> int:
        if arg:
            refuse(errno.EINVAL)
        return int(lib.KVM_API_VERSION)

    def _create_vm(self, arg: int) -> int:
        if arg >= 32 or not caps.VM_TYPES & 1 << arg:
            refuse(errno.EINVAL)
        return self._host.fds.install(VmFile(Vm(self._host, arg)))

    def _check_extension(self, arg: int) -> int:
        return caps.system_capability(self._host, arg)

    def _vcpu_mmap_size(self, arg: int) -> int:
        if arg:
            refuse(errno.EINVAL)
        return caps.VCPU_MMAP_SIZE

    def _supported_cpuid(self, arg: int) -> int:
        user = self._host.user
        header = copy_in(user, "kvm_cpuid2", arg)
        room = min(header.nent, _MAX_CPUID_ENTRIES)
        leaves = self._host.cpuid
        if room < max(1, len(leaves)):
            refuse(errno.E2BIG)
        entries = ffi.new("struct kvm_cpuid_entry2[]", len(leaves))
        for entry, leaf in zip(entries, leaves, strict=True):
            entry.function, entry.index, entry.flags = leaf.function, leaf.index, leaf.flags
            entry.eax, entry.ebx, entry.ecx, entry.edx = leaf.eax, leaf.ebx, leaf.ecx, leaf.edx
        user.write(arg + _HEADER, bytes(ffi.buffer(entries)))
        header.nent = len(leaves)
        copy_out(user, arg, header)
        return 0

    def _emulated_cpuid(self, arg: int) -> int:
        """Leaves that KVM would emulate: only the two empty heads 0 and 0x80000000."""
        user = self._host.user
        header = copy_in(user, "kvm_cpuid2", arg)
        room = min(header.nent, _MAX_CPUID_ENTRIES)
        if not room:
            refuse(errno.E2BIG)
        given = user.read(arg + _HEADER, room * _CPUID_ENTRY)
        padding = (given[at + 28 : at + _CPUID_ENTRY] for at in range(0, len(given), _CPUID_ENTRY))
        if any(any(words) for words in padding):
            refuse(errno.EINVAL)
        header.nent = 0
        copy_out(user, arg, header)
        return 0

    def _msr_index_list(self, arg: int) -> int:
        return self._index_list(arg, msrs.SAVED)

    def _msr_feature_index_list(self, arg: int) -> int:
        return self._index_list(arg, tuple(msrs.FEATURES))

    def _index_list(self, arg: int, indices: tuple[int, ...]) -> int:
        user = self._host.user
        header = copy_in(user, "kvm_msr_list", arg)
        room = header.nmsrs
        header.nmsrs = len(indices)
        copy_out(user, arg, header)
        if room < len(indices):
            refuse(errno.E2BIG)
        words = ffi.new("uint32_t[]", list(indices))
        user.write(arg + ffi.sizeof("struct kvm_msr_list"), bytes(ffi.buffer(words)))
        return 0

    def _get_feature_msrs(self, arg: int) -> int:
        return msrs.transfer(self._host.user, arg, msrs.FEATURES.get, write_back=True)

    def _mce_cap_supported(self, arg: int) -> int:
        self._host.user.write(arg, mce.SUPPORTED.to_bytes(8, "little"))
        return 0

    def _get_device_attr(self, arg: int) -> int:
        attr = copy_in(self._host.user, "kvm_device_attr", arg)
        value = self._attribute(attr.group, attr.attr)
        self._host.user.write(attr.addr, value.to_bytes(8, "little"))
        return 0

    def _has_device_attr(self, arg: int) -> int:
        attr = copy_in(self._host.user, "kvm_device_attr", arg)
        self._attribute(attr.group, attr.attr)
        return 0

    def _attribute(self, group: int, attr: int) -> int:
        profile = self._host.profile
        values = {
            (0, lib.KVM_X86_XCOMP_GUEST_SUPP): self._host.supported_xcr0,
            (lib.KVM_X86_GRP_SEV, lib.KVM_X86_SEV_VMSA_FEATURES): profile.vmsa_features,
        }
        if profile.policy_bits_attr:
            bits = profile.policy_mask & self._host.policy_bits
            values[lib.KVM_X86_GRP_SEV, lib.KVM_X86_SNP_POLICY_BITS] = bits
        if profile.req_certs:
            values[lib.KVM_X86_GRP_SEV, lib.KVM_X86_SEV_SNP_REQ_CERTS] = 1
        if (group, attr) not in values:
            refuse(errno.ENXIO)
        return values[group, attr]
