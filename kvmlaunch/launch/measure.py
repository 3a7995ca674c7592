"""Predict a plan's launch digest, page by page. Needs no host and no extension."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvmlaunch.abi.digest import LaunchDigest, sha384
from kvmlaunch.abi.kvm_sync import synced
from kvmlaunch.abi.page import PAGE_SIZE, Buffer, PageType
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images.plan import SYNC_VMSA_GPA, LaunchPlan, PageRange, VmsaMode
from kvmlaunch.launch.records import PageRecord

__all__ = ["Measurement", "Predictor", "finish_records", "measure", "page_records"]


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

    def page(self, step: PageRange, index: int, vcpu: int | None = None) -> PageRecord:
        """Add page ``index`` of a plan's page range; ``vcpu`` starts from it if it is a VMSA."""
        gpa = step.gpa + index * PAGE_SIZE
        data = step.page(index) if step.type.measures_contents else None
        return self._add(step.type, gpa, data, step.origin_of(index), step.label, vcpu)

    def synced_vmsa(self, vcpu: int, state: Vmsa, sev_features: int) -> PageRecord:
        """Add the VMSA that KVM itself makes of a vCPU's state at LAUNCH_FINISH."""
        page = synced(state, sev_features=sev_features).encode()
        return self._add(PageType.VMSA, SYNC_VMSA_GPA, page, "kvm-sync", f"vmsa {vcpu}", vcpu)

    def _add(
        self,
        type_: PageType,
        gpa: int,
        data: Buffer | None,
        origin: str,
        label: str,
        vcpu: int | None,
    ) -> PageRecord:
        contents = self._digest.update(type_, gpa, data)
        record = PageRecord(
            self._seq, gpa, type_, contents, self._digest.value, origin, label, vcpu
        )
        self._seq += 1
        return record


def finish_records(plan: LaunchPlan, predictor: Predictor) -> Iterator[PageRecord]:
    """What SNP_LAUNCH_FINISH adds: in mode ``sync`` a VMSA per vCPU, else nothing."""
    if plan.vmsa_mode is VmsaMode.SYNC:
        for vcpu, state in enumerate(plan.vcpus):
            yield predictor.synced_vmsa(vcpu, state, plan.sev_features)


def page_records(
    plan: LaunchPlan, hasher: Callable[[Buffer], bytes] = sha384
) -> Iterator[PageRecord]:
    """One record per page of the plan and per VMSA, in launch order."""
    predictor = Predictor(hasher)
    for step, index in plan.pages():
        yield predictor.page(step, index, plan.vcpu_at(step))
    yield from finish_records(plan, predictor)


def measure(plan: LaunchPlan, hasher: Callable[[Buffer], bytes] = sha384) -> Measurement:
    """The launch digest that launching ``plan`` will give.

    Raises FormatError for a vCPU state that KVM would refuse.
    """
    pages = 0
    digest = bytes(48)
    for record in page_records(plan, hasher):
        pages, digest = pages + 1, record.digest
    return Measurement(digest, pages)
