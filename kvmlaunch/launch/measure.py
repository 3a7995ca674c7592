"""Predict a plan's launch digest. Needs no host and no compiled extension."""

from __future__ import annotations

from kvmlaunch import hashing
from kvmlaunch.abi.digest import DIGEST_SIZE
from kvmlaunch.abi.page import PAGE_SIZE, Buffer, PageType
from kvmlaunch.abi.record import Record
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError
from kvmlaunch.images.plan import LaunchPlan, PageRange
from kvmlaunch.images.source import forget
from kvmlaunch.images.sync_vmsas import finish_vmsas

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmlaunch.launch.records import PageRecord, RecordBatch

__all__ = [
    "Measurement",
    "Predictor",
    "finish_batches",
    "firmware_digest",
    "measure",
    "page_records",
    "record_batches",
]

_RECORD_PAGES = 512  # whose records exist at a time
_FAULT_PAGES = 128  # for each place: where one page is touched, the kernel maps up to 2 MiB
_CHUNK_PAGES = 2048  # hashed in one go: what of a mapped file is in memory at a time


class Measurement(Record):
    """A predicted launch digest: ``digest`` (48 bytes) and the number of ``pages``."""

    digest: bytes
    pages: int

    def __str__(self) -> str:
        return self.digest.hex()


class Predictor:
    """The running launch digest of one launch, and its records.

    ``hasher``: else the best; ``start``: digest (48 bytes) to go on from.
    """

    def __init__(
        self, hasher: hashing.Hasher | None = None, *, start: bytes = bytes(DIGEST_SIZE)
    ) -> None:
        self._hasher = hasher or hashing.hasher()
        self._digest = start
        self._seq = 0
        self._unforgotten = 0

    def copy(self) -> Predictor:
        """A second one that goes on from here."""
        other = Predictor(self._hasher, start=self._digest)
        other._seq, other._unforgotten = self._seq, self._unforgotten
        return other

    @property
    def digest(self) -> bytes:
        """The launch digest so far."""
        return self._digest

    @property
    def pages(self) -> int:
        """Number of pages so far."""
        return self._seq

    def extend(self, step: PageRange) -> None:
        """Add all pages of a plan's page range, and leave no records."""
        for first, data, count in self._runs(step, 0, step.npages):
            gpa = step.gpa + first * PAGE_SIZE
            self._digest = self._hasher.extend(self._digest, step.type, gpa, data, count)
            self._seq += count

    def extend_vmsa(self, plan: LaunchPlan, vmsa: Vmsa) -> None:
        """Add a VMSA that SNP_LAUNCH_FINISH measures, and leave no record."""
        self._digest = self._hasher.extend(
            self._digest, PageType.VMSA, plan.vmsa_gpa, vmsa.encode(), 1
        )
        self._seq += 1

    def batches(
        self, step: PageRange, index: int, count: int, vcpu: int | None = None
    ) -> Iterator[RecordBatch]:
        """Add ``count`` pages from ``index``; yields the records of what is hashed in one go.

        ``vcpu`` starts from them if that is a VMSA.
        """
        for first, data, npages in self._runs(step, index, count):
            origins = tuple(step.origin_runs(first, npages))
            gpa = step.gpa + first * PAGE_SIZE
            yield self._add(step.type, gpa, data, npages, origins, step.label, vcpu)

    def finish_vmsa(self, plan: LaunchPlan, vcpu: int, vmsa: Vmsa) -> RecordBatch:
        """Add a VMSA that SNP_LAUNCH_FINISH measures."""
        origins = ((f"vmm:{plan.vmm}" if plan.as_given else "kvm-sync", None, 1),)
        page, label = vmsa.encode(), f"vmsa {vcpu}"
        return self._add(PageType.VMSA, plan.vmsa_gpa, page, 1, origins, label, vcpu)

    def _runs(
        self, step: PageRange, index: int, count: int
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        """(first page, bytes if they are measured, pages) of what can be hashed in one go."""
        if not step.type.measures_contents:
            yield index, None, count
            return
        for at in range(index, index + count, _CHUNK_PAGES):
            first = at
            for data in step.runs(at, min(_CHUNK_PAGES, index + count - at)):
                npages = len(data) // PAGE_SIZE
                yield first, data, npages
                first += npages
                self._unforgotten += max(npages, _FAULT_PAGES)
                if self._unforgotten >= _CHUNK_PAGES and forget(data):
                    self._unforgotten = 0

    def _add(
        self,
        type_: PageType,
        gpa: int,
        data: Buffer | None,
        npages: int,
        origins: tuple[tuple[str, int | None, int], ...],
        label: str,
        vcpu: int | None,
    ) -> RecordBatch:
        from kvmlaunch.launch.records import RecordBatch  # the digest alone needs none

        found = self._hasher.records(self._digest, type_, gpa, data, npages)
        batch = RecordBatch(self._seq, gpa, type_, found, origins, label, vcpu)
        self._digest = batch.digest
        self._seq += npages
        return batch


def finish_batches(plan: LaunchPlan, predictor: Predictor) -> Iterator[RecordBatch]:
    """What SNP_LAUNCH_FINISH adds: in mode ``sync`` a VMSA per vCPU, else nothing."""
    for vcpu, vmsa in finish_vmsas(plan):
        yield predictor.finish_vmsa(plan, vcpu, vmsa)


def page_records(plan: LaunchPlan) -> Iterator[PageRecord]:
    """One record per page of the plan and per VMSA, in launch order."""
    for batch in record_batches(plan):
        yield from batch.records


def record_batches(plan: LaunchPlan) -> Iterator[RecordBatch]:
    """The same, in batches of a few hundred at most."""
    predictor = Predictor(start=plan.start_digest)
    for step in plan.steps:
        vcpu = plan.vcpu_at(step)
        for index in range(0, step.npages, _RECORD_PAGES):
            count = min(_RECORD_PAGES, step.npages - index)
            yield from predictor.batches(step, index, count, vcpu)
    yield from finish_batches(plan, predictor)


def measure(plan: LaunchPlan) -> Measurement:
    """The launch digest that launching ``plan`` will give.

    Raises FormatError for a vCPU state that KVM would refuse.
    """
    predictor = Predictor(start=plan.start_digest)
    for step in plan.steps:
        predictor.extend(step)
    for _, vmsa in finish_vmsas(plan):
        predictor.extend_vmsa(plan, vmsa)
    return Measurement(predictor.digest, predictor.pages)


def firmware_digest(plan: LaunchPlan) -> bytes:
    """The launch digest after the firmware's pages alone: `PlanOptions.firmware_digest`.

    Raises FormatError for a plan without firmware.
    """
    predictor = Predictor()
    for step in plan.steps:
        if step.label == "firmware":
            predictor.extend(step)
    if not predictor.pages:
        raise FormatError(f"{plan.image} ({plan.image_type}) has no pages of firmware")
    return predictor.digest
