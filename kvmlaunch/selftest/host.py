"""The host under test, and what all cases need of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.errors import IoctlError
from kvmlaunch.kvm import HostMemory, Kvm, SevDevice
from kvmlaunch.kvm.system import CpuidLeaf
from kvmlaunch.launch.cpuid import guest_cpuid, snp_cpuid_page
from kvmlaunch.launch.vmsa_mode import Offer, probe_vmsa_mode
from kvmlaunch.snp import CpuidRejected, New
from kvmlaunch.uapi import MeasuredPage, Platform, Proposal, default_proposal, lib

__all__ = ["Host"]


class Host:
    """/dev/kvm and /dev/sev of a platform. A context manager.

    ``proposal``: numbers of the VMSA proposals (else `default_proposal`); ``risky``: run also
    what is known to crash kernels with a certain bug. Raises MissingCapability without SNP, and
    IoctlError.
    """

    def __init__(
        self, platform: Platform, *, proposal: Proposal | None = None, risky: bool = False
    ) -> None:
        self.platform = platform
        self.proposal = default_proposal() if proposal is None else proposal
        self.risky = risky or platform.name != "kvm"
        with ExitStack() as stack:
            self.kvm = stack.enter_context(Kvm.open(platform))
            self.kvm.require_snp()
            self.sev = stack.enter_context(SevDevice.open(platform))
            self._stack = stack.pop_all()

    @cached_property
    def vmsa_features(self) -> int:
        """The SEV features that INIT2 takes."""
        return self.kvm.vmsa_features() or 0

    @cached_property
    def vmsa_offer(self) -> Offer:
        """The VMSA mode of this host, found by trying, and how."""
        return probe_vmsa_mode(self.platform, self.proposal)

    @property
    def vmsa_mode(self) -> str:
        """``sync`` on mainline, ``page`` or ``direct`` with a proposal."""
        return self.vmsa_offer.mode.value

    @cached_property
    def policy_mask(self) -> int | None:
        """The policy bits that START takes, where the kernel tells (6.19 and later)."""
        return self.kvm.device_attr(lib.KVM_X86_GRP_SEV, lib.KVM_X86_SNP_POLICY_BITS)

    @cached_property
    def cpuid(self) -> list[CpuidLeaf]:
        """What CPUID tells the first vCPU of a guest."""
        return guest_cpuid(self.kvm.supported_cpuid(), 0, confidential=True)

    @cached_property
    def cpuid_page(self) -> bytes:
        """A CPUID page of what KVM supports, as this host's firmware corrects it."""
        page = snp_cpuid_page(self.cpuid)
        with ExitStack() as stack:
            vm = stack.enter_context(self.kvm.create_vm(lib.KVM_X86_SNP_VM))
            memory = stack.enter_context(HostMemory(self.platform, PAGE_SIZE))
            memfd = stack.enter_context(vm.create_guest_memfd(PAGE_SIZE))
            vm.set_user_memory_region2(0, 0, PAGE_SIZE, memory.address, memfd=memfd)
            vm.set_memory_attributes(0, PAGE_SIZE, private=True)
            memory.view[:] = page
            started = New.init(vm, self.sev).start(DEFAULT_POLICY)
            try:
                started.update(0, PageType.CPUID, memory.address, PAGE_SIZE)
            except CpuidRejected as error:
                return error.corrected
            except IoctlError:
                pass  # the cases will say so
        return page

    def measured(self, vm_fd: int) -> Sequence[MeasuredPage] | None:
        """What the firmware measured; None where it can't be asked."""
        return self.platform.measured_pages(vm_fd)

    def close(self) -> None:
        """Close both devices."""
        self._stack.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
