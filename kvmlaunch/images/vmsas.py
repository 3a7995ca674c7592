"""VMSA pages that user space brings along: into a plan, and out of it where KVM makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from kvmlaunch.abi.kvm_sync import not_carried, synced
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.record import Record
from kvmlaunch.abi.vmsa import FieldDiff, Vmsa
from kvmlaunch.errors import FormatError
from kvmlaunch.images.plan import LaunchPlan, MemoryRegion, PageRange, Piece, VmsaMode, free_gpa

__all__ = [
    "BUILT",
    "SyncFallback",
    "VmsaChoice",
    "check_vmsas",
    "supply_vmsas",
    "to_sync",
]

BUILT = "kvmlaunch:vmsa"
"""Origin of a VMSA that was built from a vCPU's state."""

_LARGE_PAGE = 2 << 20


class VmsaChoice(Record):
    """One VMSA page that somebody wants in the launch.

    Attributes: ``vcpu`` that starts from it, None to have it measured only; ``gpa``, None for
    the lowest free page; ``page`` (4096 bytes), None to build it from the vCPU's state as KVM
    would; ``origin`` of the page; ``edits``, (field, value) in order: see `Vmsa.with_field`.
    """

    vcpu: int | None = 0
    gpa: int | None = None
    page: bytes | None = None
    origin: str = BUILT
    edits: tuple[tuple[str, int | bytes], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no page."""
        if self.page is not None and len(self.page) != PAGE_SIZE:
            raise FormatError(f"{self.origin}: a VMSA page is 4096 bytes, not {len(self.page)}")

    @property
    def label(self) -> str:
        """What the page is for."""
        return "vmsa" if self.vcpu is None else f"vmsa {self.vcpu}"


def supply_vmsas(
    plan: LaunchPlan, mode: VmsaMode, choices: Iterable[VmsaChoice], *, forced: bool = False
) -> LaunchPlan:
    """The plan with these VMSAs as its last steps, for mode ``page`` or ``direct``.

    ``forced`` leaves it to the kernel to refuse them. Raises FormatError.
    """
    steps, bindings = list(plan.steps), dict(plan.bindings)
    chosen = tuple(choices)
    taken = [(step.gpa, step.end) for step in steps]
    taken += [_page_at(choice.gpa) for choice in chosen if choice.gpa is not None]
    for choice in chosen:
        if choice.vcpu is not None and not 0 <= choice.vcpu < len(plan.vcpus):
            raise FormatError(
                f"a VMSA is for vCPU {choice.vcpu}, but the guest has {len(plan.vcpus)}"
            )
        if choice.vcpu in bindings:
            raise FormatError(f"vCPU {choice.vcpu} has two VMSAs")
        gpa = _free_page(plan, taken) if choice.gpa is None else choice.gpa
        if gpa % PAGE_SIZE and not forced:
            raise FormatError(f"{choice.label}: GPA {gpa:#x} is not aligned to 4 KiB")
        step = _step(plan, choice, gpa & -PAGE_SIZE)
        taken.append((step.gpa, step.end))
        steps.append(step)
        if choice.vcpu is not None:
            bindings[choice.vcpu] = gpa
    supplied = replace(plan, steps=tuple(steps), bindings=bindings, vmsa_mode=mode, forced=forced)
    if not forced:
        check_vmsas(supplied)
    return supplied


def check_vmsas(plan: LaunchPlan) -> None:
    """Refuse VMSAs that the kernel would refuse, by field name and rule: FormatError."""
    for step in plan.vmsas:
        vmsa, where = Vmsa.decode(step.page(0)), f"{step.label} ({step.origin_of(0)})"
        if vmsa.vmpl:
            raise FormatError(f"{where}: vmpl is {vmsa.vmpl}, but a guest starts at VMPL 0")
        if vmsa.sev_features != plan.sev_features:
            raise FormatError(
                f"{where}: sev_features is {vmsa.sev_features:#x}, but the VM's are "
                f"{plan.sev_features:#x} (--guest-features)"
            )
        if step.gpa % _LARGE_PAGE == 0 and plan.vcpu_at(step) is not None:
            raise FormatError(
                f"{where}: GPA {step.gpa:#x} is aligned to 2 MiB, where no vCPU can start "
                "(SNP erratum)"
            )


class SyncFallback(Record):
    """A plan whose VMSAs were turned into register state.

    ``lost``: (vCPU, field) where KVM will measure (``b``) something else than the VMSA holds
    (``a``). ``dropped``: VMSA pages that no vCPU starts from.
    """

    plan: LaunchPlan
    lost: tuple[tuple[int, FieldDiff], ...]
    dropped: tuple[PageRange, ...]


def to_sync(plan: LaunchPlan) -> SyncFallback:
    """The same guest for a kernel that makes the VMSAs itself.

    Raises FormatError for a state that KVM would refuse.
    """
    states, lost, dropped = list(plan.vcpus), [], []
    for step in plan.vmsas:
        vmsa, vcpu = Vmsa.decode(step.page(0)), plan.vcpu_at(step)
        if vcpu is None:
            dropped.append(step)
            continue
        states[vcpu] = vmsa
        lost += [(vcpu, field) for field in not_carried(vmsa, sev_features=plan.sev_features)]
    return SyncFallback(
        replace(
            plan,
            memory=tuple(_without_vmsas(plan)),
            steps=plan.without_vmsas,
            vcpus=tuple(states),
            bindings={},
            vmsa_mode=VmsaMode.SYNC,
        ),
        tuple(lost),
        tuple(dropped),
    )


def _without_vmsas(plan: LaunchPlan) -> Iterator[MemoryRegion]:
    """The plan's memory but what is there for VMSAs alone."""
    vmsas = plan.vmsas
    for region in plan.memory:
        held = sum(step.size for step in vmsas if region.gpa <= step.gpa < region.end)
        if held != region.size:
            yield region


def _step(plan: LaunchPlan, choice: VmsaChoice, gpa: int) -> PageRange:
    if choice.page is None:
        state = synced(plan.vcpus[choice.vcpu or 0], sev_features=plan.sev_features)
    else:
        state = Vmsa.decode(choice.page)
    origin = choice.origin
    for name, value in choice.edits:
        state = state.with_field(name, value)
    page = choice.page if choice.page is not None and not choice.edits else state.encode()
    piece = Piece(0, memoryview(page), origin)
    return PageRange(gpa, PAGE_SIZE, PageType.VMSA, choice.label, origin, (piece,))


def _page_at(gpa: int) -> tuple[int, int]:
    start = gpa & -PAGE_SIZE
    return start, start + PAGE_SIZE


def _free_page(plan: LaunchPlan, taken: Iterable[tuple[int, int]]) -> int:
    occupied = list(taken)
    while (gpa := free_gpa(plan.memory, occupied, PAGE_SIZE)) is not None:
        if gpa % _LARGE_PAGE:
            return gpa
        occupied.append((gpa, gpa + PAGE_SIZE))
    raise FormatError("the guest's memory has no free page for a VMSA")
