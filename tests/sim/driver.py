"""Ioctls by struct on a simulated (or real) platform, for the tests of the simulator."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvmlaunch.sim import KernelProfile, SimPlatform
from kvmlaunch.uapi import ARGUMENT, Result, address_of, ffi, ioctl_name, lib, peek, poke

PAGE = 4096
POLICY = 0x30000
RAM_PAGES = 16
RW = mmap.PROT_READ | mmap.PROT_WRITE
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Memory:
    """Anonymous memory of this process, with its address."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size)
        self._view = ffi.from_buffer(self._map)
        self.address = address_of(self._view)
        self.size = size

    def write(self, data: bytes, offset: int = 0) -> None:
        poke(self.address + offset, data)

    def read(self, size: int = PAGE, offset: int = 0) -> bytes:
        return peek(self.address + offset, size)


class FrozenPage:
    """A page of a file, mapped without write permission."""

    def __init__(self, data: bytes) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(data.ljust(PAGE, b"\0"))
            file.flush()
            self._map = mmap.mmap(file.fileno(), PAGE, prot=mmap.PROT_READ)
        self._view = ffi.from_buffer(self._map)
        self.address = address_of(self._view)


def struct(name: str, **fields: Any) -> Any:
    """A new ``struct NAME *`` with fields set."""
    value = ffi.new(f"struct {name} *")
    for field, content in fields.items():
        setattr(value, field, content)
    return value


class Driver:
    """A platform and short calls; every call returns Result(ret, errno)."""

    def __init__(self, platform: Any) -> None:
        self.platform = platform

    def open_kvm(self) -> int:
        return self.ok(self.platform.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))

    def open_sev(self, flags: int = os.O_RDWR) -> int:
        return self.ok(self.platform.open("/dev/sev", flags))

    def ioctl(self, fd: int, request: int, arg: Any = 0) -> Result:
        """``arg`` is a number or a cdata pointer."""
        value = arg if isinstance(arg, int) else address_of(arg)
        return self.platform.ioctl(fd, request, value)

    def get(self, fd: int, request: int) -> Any:
        """The struct that a KVM_GET_... ioctl fills; it must succeed."""
        out = struct(ARGUMENT[ioctl_name(request)])
        self.ok(self.ioctl(fd, request, out))
        return out

    @staticmethod
    def ok(result: Result) -> int:
        assert result.ret >= 0, f"errno {result.errno}: {os.strerror(result.errno)}"
        return result.ret

    def create_vm(self, vm_type: int, kvm: int | None = None) -> int:
        kvm = self.open_kvm() if kvm is None else kvm
        return self.ok(self.ioctl(kvm, lib.KVM_CREATE_VM, vm_type))

    def sev(self, vm: int, command: int, data: Any = 0, sev_fd: int = 0, error: int = 0) -> Any:
        """KVM_MEMORY_ENCRYPT_OP: (result, ``error`` word afterwards)."""
        address = data if isinstance(data, int) else address_of(data)
        cmd = struct("kvm_sev_cmd", id=command, data=address, error=error, sev_fd=sev_fd)
        result = self.ioctl(vm, lib.KVM_MEMORY_ENCRYPT_OP, cmd)
        return result, cmd.error


class Guest(Driver):
    """An SNP VM on the way to its launch. Steps are methods, nothing is done twice."""

    GPA = 0x100000

    def __init__(self, platform: Any, *, init: bool = True, vm_type: int | None = None) -> None:
        super().__init__(platform)
        self.kvm = self.open_kvm()
        self.sev_fd = self.open_sev()
        self.vm = self.create_vm(lib.KVM_X86_SNP_VM if vm_type is None else vm_type, self.kvm)
        self.ram = Memory(RAM_PAGES * PAGE)
        self.source = Memory(RAM_PAGES * PAGE)
        self.gmem = -1
        self.vcpus: list[int] = []
        if init:
            self.ok(self.init2()[0])

    def init2(self, error: int = 0, **fields: Any) -> Any:
        return self.sev(self.vm, lib.KVM_SEV_INIT2, struct("kvm_sev_init", **fields), error=error)

    def create_gmem(self, size: int = RAM_PAGES * PAGE, flags: int = 0) -> Result:
        args = struct("kvm_create_guest_memfd", size=size, flags=flags)
        return self.ioctl(self.vm, lib.KVM_CREATE_GUEST_MEMFD, args)

    def set_region(self, **fields: Any) -> Result:
        region = struct("kvm_userspace_memory_region2", **fields)
        return self.ioctl(self.vm, lib.KVM_SET_USER_MEMORY_REGION2, region)

    def set_attributes(
        self, address: int, size: int, attributes: int = 8, flags: int = 0
    ) -> Result:
        args = struct(
            "kvm_memory_attributes",
            address=address,
            size=size,
            attributes=attributes,
            flags=flags,
        )
        return self.ioctl(self.vm, lib.KVM_SET_MEMORY_ATTRIBUTES, args)

    def add_ram(self, slot: int = 0, gpa: int | None = None, private: bool = True) -> None:
        """A slot of RAM_PAGES pages at GPA with a guest_memfd."""
        gpa = self.GPA if gpa is None else gpa
        self.gmem = self.ok(self.create_gmem())
        region = {
            "slot": slot,
            "flags": lib.KVM_MEM_GUEST_MEMFD,
            "guest_phys_addr": gpa,
            "memory_size": RAM_PAGES * PAGE,
            "userspace_addr": self.ram.address,
            "guest_memfd": self.gmem,
        }
        self.ok(self.set_region(**region))
        if private:
            self.ok(self.set_attributes(gpa, RAM_PAGES * PAGE))

    def add_vcpu(self, vcpu_id: int = 0) -> int:
        fd = self.ok(self.ioctl(self.vm, lib.KVM_CREATE_VCPU, vcpu_id))
        self.vcpus.append(fd)
        return fd

    def start(self, error: int = 0, sev_fd: int | None = None, **fields: Any) -> Any:
        fields.setdefault("policy", POLICY)
        args = struct("kvm_sev_snp_launch_start", **fields)
        fd = self.sev_fd if sev_fd is None else sev_fd
        return self.sev(self.vm, lib.KVM_SEV_SNP_LAUNCH_START, args, fd, error)

    def update_args(self, page: int = 0, npages: int = 1, **fields: Any) -> Any:
        fields.setdefault("gfn_start", self.GPA // PAGE + page)
        fields.setdefault("uaddr", self.source.address + page * PAGE)
        fields.setdefault("len", npages * PAGE)
        fields.setdefault("type", lib.KVM_SEV_SNP_PAGE_TYPE_NORMAL)
        return struct("kvm_sev_snp_launch_update", **fields)

    def update(self, args: Any, error: int = 0, sev_fd: int | None = None) -> Any:
        fd = self.sev_fd if sev_fd is None else sev_fd
        return self.sev(self.vm, lib.KVM_SEV_SNP_LAUNCH_UPDATE, args, fd, error)

    def update_pages(self, page: int = 0, npages: int = 1, **fields: Any) -> Any:
        return self.update(self.update_args(page, npages, **fields))

    def finish(self, error: int = 0, sev_fd: int | None = None, **fields: Any) -> Any:
        args = struct("kvm_sev_snp_launch_finish", **fields)
        fd = self.sev_fd if sev_fd is None else sev_fd
        return self.sev(self.vm, lib.KVM_SEV_SNP_LAUNCH_FINISH, args, fd, error)

    def mmap_run(self, vcpu: int) -> Any:
        size = self.ok(self.ioctl(self.kvm, lib.KVM_GET_VCPU_MMAP_SIZE))
        address = self.ok(self.platform.mmap(vcpu, size, RW, mmap.MAP_SHARED))
        return ffi.cast("struct kvm_run *", address)

    @property
    def digest(self) -> bytes:
        found = self.platform.launch_digest(self.vm)
        assert found is not None
        return bytes(found)


def zeros(size: int) -> bytes:
    """What the simulator's keys are made of in tests."""
    return bytes(size)


@contextmanager
def simulated(
    profile: str | KernelProfile = "6.12", faults: Any = (), **options: Any
) -> Iterator[SimPlatform]:
    """A SimPlatform with predictable keys that is shut down, and left no fd, at the end."""
    options.setdefault("random", zeros)
    with SimPlatform(profile, faults=faults, **options) as platform:
        yield platform
    assert platform.open_fds == ()


def launched(platform: Any, vcpus: int = 1) -> Guest:
    """A guest with RAM, vCPUs and START done; nothing measured yet."""
    guest = Guest(platform)
    guest.add_ram()
    for vcpu_id in range(vcpus):
        guest.add_vcpu(vcpu_id)
    guest.ok(guest.start()[0])
    return guest
