"""The host under test, and what all cases need of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property

from kvmlaunch.kvm import Kvm, SevDevice
from kvmlaunch.kvm.system import CpuidLeaf
from kvmlaunch.launch.cpuid import guest_cpuid, snp_cpuid_page
from kvmlaunch.launch.vmsa_mode import Offer, probe_vmsa_mode
from kvmlaunch.uapi import MeasuredPage, Platform, Proposal, lib

__all__ = ["Host"]


class Host:
    """/dev/kvm and /dev/sev of a platform. A context manager.

    ``risky``: run also what is known to crash kernels with a certain bug. Raises
    MissingCapability without SNP, and IoctlError.
    """

    def __init__(
        self, platform: Platform, *, proposal: Proposal | None = None, risky: bool = False
    ) -> None:
        self.platform = platform
        self.proposal = proposal or Proposal()
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
        """A CPUID page of what KVM supports; real firmware may correct it."""
        return snp_cpuid_page(self.cpuid)

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
