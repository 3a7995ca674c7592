"""VMSA pages from user space: what the unmerged proposals make of them, as data.

Generations: "page" is proposal v1 (June 2026: one VMSA page, for the first vCPU), "direct" v2
(a capability, any number of pages, a vCPU command that binds one). What was seen of them in
public and doesn't vary is in the code that acts on it; here is what trees, generations or
guesses differ in.

Tags: [V] seen in the source named, [I] inferred, [?] nobody said. Sources: *v1*, the mails of the
series of 11 June 2026; *test*, sev_snp_direct_vmsa_test.c of intel-lab-lkp/linux @416bd4f57e5f;
*branch*, sev.c of coconut-svsm/linux @64f383649857, one step before v2, without its capability.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvmlaunch.uapi import Proposal

__all__ = ["DIRECT_VMSA", "VMSA_PAGE", "VmsaRules"]


@dataclass(frozen=True)
class VmsaRules:
    """What one kernel does with VMSA pages and with commands on a vCPU fd.

    The defaults are mainline's: it knows neither.

    Attributes:
        vcpu_op_errno: KVM_MEMORY_ENCRYPT_OP on a vCPU without commands for it. EINVAL as any
            unknown ioctl [V 6.12]; ENOTTY since 6.16, where TDX has commands [V x86.c].
        generation: the proposal that this kernel has.
        proposal: its numbers, which trees disagree on.
        page_capability: number that v1 reports pages with; None for none. One exists [I v1's
            diffstat], nobody named it [?].
        page_needs_capability: v2 takes pages only once KVM_CAP_SNP_DIRECT_VMSA is enabled. The
            branch, without the capability, always takes them [I].
        one_page_per_update: an UPDATE of VMSA pages has exactly one [V test]; in v1 [?].
        bad_page_errno: the page has VMPL other than 0 or not the VM's SEV_FEATURES: EINVAL
            [V test]; in v1, which checks both [V], [I].
        second_page_errno: another VMSA page is measured. 0 in v2 [V test]; v1 is for one only [V],
            what a second one gets [?]. 0 in v1: the last one counts.
        enable_needs_init: enabling KVM_CAP_SNP_DIRECT_VMSA comes after INIT2. The test does so, and
            the kernel's other switches ask sev_snp_guest() [I].
        enable_twice_errno: enabling it once more before the first vCPU: 0 [?].
        get_needs_capability: GET_VCPU_STATE wants the capability, as SET does [V test]. The branch
            has no such check in either, and nothing speaks against reading [I].
        no_guest_memfd_errno: SET with a VMSA in a slot without a guest_memfd (also one that was
            closed): that of kvm_gmem_get_pfn(), EFAULT [V branch and 6.12's guest_memfd.c; no
            test].
        finish_without_page_errno: v1's FINISH where no VMSA page was measured; 0: as in mainline
            [I]. Not for v2, whose capability decides.
        finish_protects_all: FINISH with VMSAs from user space marks every vCPU as protected
            [V branch]; v1 deals with the first vCPU only [V].
        ap_create_protects: AP creation marks a vCPU as protected that FINISH hasn't [V branch]; in
            v1 [I], which relies on it for each AP. Mainline doesn't.
    """

    vcpu_op_errno: int = errno.ENOTTY
    generation: Literal["none", "page", "direct"] = "none"
    proposal: Proposal = field(default_factory=Proposal)
    page_capability: int | None = None
    page_needs_capability: bool = False
    one_page_per_update: bool = True
    bad_page_errno: int = errno.EINVAL
    second_page_errno: int = 0
    enable_needs_init: bool = True
    enable_twice_errno: int = 0
    get_needs_capability: bool = False
    no_guest_memfd_errno: int = errno.EFAULT
    finish_without_page_errno: int = 0
    finish_protects_all: bool = True
    ap_create_protects: bool = False

    @property
    def direct(self) -> bool:
        """Whether this is v2."""
        return self.generation == "direct"

    @property
    def capabilities(self) -> frozenset[int]:
        """Capabilities that KVM_CHECK_EXTENSION has because of the proposal; each is worth 1."""
        if self.direct:
            return frozenset({self.proposal.vcpu_state, self.proposal.direct_vmsa})
        return frozenset() if self.page_capability is None else frozenset({self.page_capability})

    @property
    def vcpu_commands(self) -> Mapping[int, str]:
        """Commands of KVM_MEMORY_ENCRYPT_OP on a vCPU: number -> name without KVM_SEV_."""
        if not self.direct:
            return {}
        return {
            self.proposal.get_vcpu_state: "SNP_GET_VCPU_STATE",
            self.proposal.set_vcpu_state: "SNP_SET_VCPU_STATE",
        }

    def is_vmsa(self, page_type: int) -> bool:
        """Whether SNP_LAUNCH_UPDATE knows ``page_type`` as that of VMSA pages."""
        return self.generation != "none" and page_type == self.proposal.page_type_vmsa


VMSA_PAGE = VmsaRules(
    generation="page",
    second_page_errno=errno.EINVAL,
    finish_protects_all=False,
    ap_create_protects=True,
)
"""Proposal v1."""

DIRECT_VMSA = VmsaRules(generation="direct", ap_create_protects=True)
"""Proposal v2."""
