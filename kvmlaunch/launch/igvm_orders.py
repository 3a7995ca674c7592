"""An IGVM file's launch digest in the order of the file, of a mainline kernel, and of QEMU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import FormatError
from kvmlaunch.images import LaunchPlan, PlanOptions, VmsaMode, to_sync
from kvmlaunch.images.igvm.directives import Directives, walk
from kvmlaunch.images.igvm.parse import IgvmFile
from kvmlaunch.images.igvm.plan import plan_of
from kvmlaunch.images.plan import SYNC_VMSA_GPA
from kvmlaunch.launch.measure import Predictor, finish_batches

__all__ = ["OrderDigest", "order_digests", "overtakers"]


@dataclass(frozen=True)
class OrderDigest:
    """A launch digest (48 bytes), or None where there is none, and why it isn't the file's."""

    order: str
    digest: bytes | None
    why: tuple[str, ...] = ()


def order_digests(file: IgvmFile, options: PlanOptions) -> list[OrderDigest]:
    """The digests for the orders ``file``, ``kvm`` and ``qemu``. Raises ImageError."""
    found = walk(file, options)
    kvm_why = tuple(_kvm_differs(file, found, options))
    file_digest: bytes | None
    kvm_digest: bytes | None
    try:
        plan = plan_of(file, replace(options, order="file"))
    except FormatError as error:
        # Such a file may still have a digest on the kernels that make the VMSAs themselves.
        plan = plan_of(file, replace(options, order="kvm"))
        file_digest, kvm_digest = None, _digest(plan)
        first = OrderDigest("file", None, (error.rule,))
    else:
        file_digest, kvm_digest, problem = _both(plan)
        first = OrderDigest("file", file_digest)
        if problem:
            kvm_why = (problem,)
    same = file_digest is not None and file_digest == kvm_digest
    orders = [first, OrderDigest("kvm", kvm_digest, () if same else kvm_why)]
    batched = walk(file, options, batched=True)
    kept_back = tuple(_qemu_differs(batched))
    if kvm_digest is not None and kept_back:
        kvm_digest = _digest(plan_of(file, replace(options, order="qemu")))
    same = file_digest is not None and file_digest == kvm_digest
    orders.append(OrderDigest("qemu", kvm_digest, () if same else (*kept_back, *kvm_why)))
    return orders


def _digest(plan: LaunchPlan) -> bytes:
    predictor = Predictor()
    for step in plan.steps:
        predictor.extend(step)
    for _ in finish_batches(plan, predictor):
        pass
    return predictor.digest


def _both(plan: LaunchPlan) -> tuple[bytes, bytes | None, str]:
    """In file order and in KVM's; what both begin with is hashed once."""
    if plan.vmsa_mode is VmsaMode.SYNC:
        digest = _digest(plan)
        return digest, digest, ""
    steps = plan.steps
    first = next(n for n, step in enumerate(steps) if step.type is PageType.VMSA)
    file_order = Predictor()
    for step in steps[:first]:
        file_order.extend(step)
    kvm_order = file_order.copy()
    for step in steps[first:]:
        file_order.extend(step)
    try:
        synced = to_sync(plan).plan
        for step in synced.steps[first:]:
            kvm_order.extend(step)
        for _ in finish_batches(synced, kvm_order):
            pass
    except FormatError as error:
        return file_order.digest, None, error.rule
    return file_order.digest, kvm_order.digest, ""


def _kvm_differs(file: IgvmFile, found: Directives, options: PlanOptions) -> Iterator[str]:
    vmsas = [n for n, step in enumerate(found.steps) if step.type is PageType.VMSA]
    if not vmsas:
        return
    for n, item in zip(vmsas, found.contexts.values(), strict=True):
        if item.value.gpa != SYNC_VMSA_GPA:
            yield (
                f"{item} is measured at GPA {item.value.gpa:#x}, but KVM measures every VMSA at "
                f"{SYNC_VMSA_GPA:#x}"
            )
        after = [m for m in range(n + 1, len(found.steps)) if m not in vmsas]
        if after:
            number = found.numbers[after[0]]
            yield f"{item} is before the pages of header {number}, but KVM measures VMSAs last"
    if list(found.contexts) != sorted(found.contexts):
        yield "the VP_CONTEXTs are not in the order of the vCPUs, in which KVM measures them"
    without = [vcpu for vcpu in range(options.vcpus) if vcpu not in found.contexts]
    if without:
        yield f"vCPU {without[0]} has no VP_CONTEXT, but KVM measures a VMSA of each vCPU"
    plan = plan_of(file, replace(options, order="file")) if _separate(found) else None
    if plan is not None:
        try:
            lost = to_sync(plan).lost
        except FormatError:
            return
        for vcpu, difference in lost:
            yield f"{found.contexts[vcpu]}: KVM can't carry {difference}"


def _separate(found: Directives) -> bool:
    return len({item.value.gpa for item in found.contexts.values()}) == len(found.contexts)


def overtakers(batched: Directives) -> Iterator[tuple[int, int]]:
    """(header of an insert, header whose pages it comes before) where QEMU changes the order."""
    numbers = [
        number
        for number, step in zip(batched.numbers, batched.steps, strict=True)
        if step.type is not PageType.VMSA  # applied as registers
    ]
    for first, second in itertools.pairwise(numbers):
        if first > second:
            yield first, second


def _qemu_differs(batched: Directives) -> Iterator[str]:
    for first, second in overtakers(batched):
        yield (
            f"header {first} (PARAMETER_INSERT) is measured before the pages of header {second}, "
            "which QEMU keeps back until the next page"
        )
