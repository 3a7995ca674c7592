"""An SNP VM on a simulated host with one slot per given range, and memory to send from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from kvmlaunch.errors import IoctlError
from kvmlaunch.kvm import GuestMemfd, HostMemory, Kvm, SevDevice, Vcpu, Vm
from kvmlaunch.sim import SimPlatform
from kvmlaunch.snp import New, Started
from kvmlaunch.uapi import Call, Platform, Recorder, lib
from tests.abi import vectors

PAGE = 4096
GPA = 0x100000
SLOT_PAGES = 8
POLICY = 0x30000
NORMAL, VMSA, ZERO, UNMEASURED, SECRETS, CPUID = 1, 2, 3, 4, 5, 6
LD = bytes.fromhex(vectors.SINGLE_PAGE["V3"][3])
"""Launch digest of `one_page`."""
OTHER = bytes(range(48))


class Rig:
    """``kvm``, ``sev``, ``vm``, its guest_memfds, ``source`` (pages), and every ``call`` made."""

    def __init__(
        self,
        host: Platform,
        stack: ExitStack,
        *,
        slots: Sequence[tuple[int, int]] = ((GPA, SLOT_PAGES),),
        private: bool = True,
        vm_type: int | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.host = host
        self._stack = stack
        platform = Recorder(host, self.calls.append)
        self.kvm = stack.enter_context(Kvm.open(platform))
        self.sev = stack.enter_context(SevDevice.open(platform))
        kind = lib.KVM_X86_SNP_VM if vm_type is None else vm_type
        self.vm: Vm = stack.enter_context(self.kvm.create_vm(kind))
        self.source = stack.enter_context(HostMemory(platform, 2 * SLOT_PAGES * PAGE))
        self.memfds: list[GuestMemfd] = []
        for number, (gpa, npages) in enumerate(slots):
            size = npages * PAGE
            memory = stack.enter_context(HostMemory(platform, size))
            memfd = stack.enter_context(self.vm.create_guest_memfd(size))
            self.memfds.append(memfd)
            self.vm.set_user_memory_region2(number, gpa, size, memory.address, memfd=memfd)
            if private:
                self.vm.set_memory_attributes(gpa, size, private=True)

    def new(self, *, vmsa_features: int = 0, ghcb_version: int = 0) -> New:
        return New.init(self.vm, self.sev, vmsa_features=vmsa_features, ghcb_version=ghcb_version)

    def started(self, policy: int = POLICY) -> Started:
        return self.new().start(policy)

    def add_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        return self._stack.enter_context(self.vm.create_vcpu(vcpu_id))

    def page(self, number: int, data: bytes) -> int:
        """Put a page into the source; its address."""
        at = number * PAGE
        self.source.view[at : at + PAGE] = data.ljust(PAGE, b"\0")
        return self.source.address + at

    def count(self, name: str) -> int:
        """How often a call of that name was made."""
        return sum(call.name == name for call in self.calls)

    def measured(self) -> list[tuple[int, int]]:
        """Type and GPA of what the simulated firmware has measured."""
        pages = self.host.measured_pages(self.vm.fd)
        assert pages is not None
        return [(page.type, page.gpa) for page in pages]


@contextmanager
def snp_vm(
    profile: str = "6.12",
    faults: Sequence[str] = (),
    *,
    slots: Sequence[tuple[int, int]] = ((GPA, SLOT_PAGES),),
    private: bool = True,
    vm_type: int | None = None,
) -> Iterator[Rig]:
    """An SNP VM before INIT2; nothing may be left of it afterwards."""
    host = SimPlatform(profile, faults=faults)
    with ExitStack() as stack:
        yield Rig(host, stack, slots=slots, private=private, vm_type=vm_type)
    assert host.open_fds == ()


@contextmanager
def refused(kind: type[IoctlError] = IoctlError) -> Iterator[Any]:
    with pytest.raises(kind) as caught:
        yield caught


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def one_page(rig: Rig) -> Started:
    """Launched so far: one ZERO page at GPA 0, whose digest is V3 of the fact sheet."""
    state = rig.started()
    state.update(0, ZERO, 0, PAGE)
    return state


def other_fd(rig: Rig) -> SevDevice:
    """Something open that isn't /dev/sev; whoever made it closes it."""
    return SevDevice(rig.kvm.platform, rig.kvm.fd, "/dev/sev")
