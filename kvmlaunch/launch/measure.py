"""Predict a plan's launch digest, page by page. Needs no host and no extension."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvmlaunch.abi.digest import LaunchDigest, sha384
from kvmlaunch.abi.kvm_sync import synced
from kvmlaunch.abi.page import Buffer, PageType
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images.plan import LaunchPlan, PageRange
from kvmlaunch.launch.records import PageRecord

__all__ = ["KVM_VMSA_GPA", "Measurement", "Predictor", "measure", "page_records"]

KVM_VMSA_GPA = 0xFFFF_FFFF_F000
"""GPA at which KVM has its own VMSAs measured (INITIAL_VMSA_GPA in svm/sev.c)."""


@dataclass(frozen=True)
class Measurement:
    """A predicted launch digest: ``digest`` (48 bytes) and the number of ``pages``."""

    digest: bytes
    pages: int

    def __str__(self) -> str:
        return self.digest.hex()


class Predictor:
    """The running launch digest of one launch, and its records."""

    def __init__(self, hasher: Callable[[Buffer], bytes] = sha384) -> None:
        self._digest = LaunchDigest(sha384=hasher)
        self._seq = 0

    def copy(self) -> Predictor:
        """A second one that goes on from here."""
        return copy.deepcopy(self)

    @property
    def digest(self) -> bytes:
        """The launch digest so far."""
        return self._digest.value

    @property
    def pages(self) -> int:
        """Number of pages so far."""
        return self._seq

    def page(self, step: PageRange, index: int) -> PageRecord:
        """Add page ``index`` of a plan's page range."""
        gpa = step.gpa + index * 4096
        data = step.page(index) if step.type is PageType.NORMAL else None
        contents = self._digest.update(step.type, gpa, data)
        return self._record(gpa, step.type, contents, step.origin_of(index), step.label)

    def vmsa(self, vcpu: int, page: bytes, gpa: int, origin: str) -> PageRecord:
        """Add the VMSA page of a vCPU."""
        contents = self._digest.update(PageType.VMSA, gpa, page)
        return self._record(gpa, PageType.VMSA, contents, origin, f"vmsa {vcpu}", vcpu)

    def synced_vmsa(self, vcpu: int, state: Vmsa, sev_features: int) -> PageRecord:
        """Add the VMSA that KVM itself makes of a vCPU's state at LAUNCH_FINISH."""
        page = synced(state, sev_features=sev_features).encode()
        return self.vmsa(vcpu, page, KVM_VMSA_GPA, "kvm-sync")

    def _record(
        self,
        gpa: int,
        type_: PageType,
        contents: bytes,
        origin: str,
        label: str,
        vcpu: int | None = None,
    ) -> PageRecord:
        record = PageRecord(
            self._seq, gpa, type_, contents, self._digest.value, origin, label, vcpu
        )
        self._seq += 1
        return record


def page_records(
    plan: LaunchPlan, hasher: Callable[[Buffer], bytes] = sha384
) -> Iterator[PageRecord]:
    """One record per page of the plan and per VMSA, in launch order (mode ``sync``)."""
    predictor = Predictor(hasher)
    for step, index in plan.pages():
        yield predictor.page(step, index)
    for vcpu, state in enumerate(plan.vcpus):
        yield predictor.synced_vmsa(vcpu, state, plan.sev_features)


def measure(plan: LaunchPlan, hasher: Callable[[Buffer], bytes] = sha384) -> Measurement:
    """The launch digest that launching ``plan`` will give.

    Raises FormatError for a vCPU state that KVM would refuse.
    """
    pages = 0
    digest = bytes(48)
    for record in page_records(plan, hasher):
        pages, digest = pages + 1, record.digest
    return Measurement(digest, pages)
