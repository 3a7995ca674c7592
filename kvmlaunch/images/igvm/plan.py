"""An IGVM file becomes a LaunchPlan: its directives in file order, its VMSAs among them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvmlaunch.abi.kvm_sync import not_carried
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.abi.reset import BSP_EIP, qemu_reset
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images.igvm import format as fmt
from kvmlaunch.images.igvm.directives import Directives, walk
from kvmlaunch.images.igvm.format import HeaderType, PlatformType
from kvmlaunch.images.igvm.idblock import id_block_of
from kvmlaunch.images.igvm.parse import IgvmFile, Item, parse, single
from kvmlaunch.images.options import PlanOptions, build_plan, outside_memory
from kvmlaunch.images.plan import (
    LOW_MEMORY_END,
    SYNC_VMSA_GPA,
    LaunchPlan,
    MemoryRegion,
    PageRange,
    VmsaMode,
)
from kvmlaunch.images.source import ImageSource
from kvmlaunch.images.vmsas import check_vmsas, to_sync

__all__ = ["load", "plan_of"]

_REGIONS_MOST = 64
_ADDED_MOST = 1 << 30

_RESET_CS_BASE, _RESET_RIP = 0xFFFF_0000, 0xFFF0


def load(source: ImageSource, options: PlanOptions) -> LaunchPlan:
    """Plan the launch of an IGVM file. Raises ImageError."""
    return plan_of(parse(source), options)


def plan_of(file: IgvmFile, options: PlanOptions) -> LaunchPlan:
    """Plan the launch of a file that is parsed already, for SEV-SNP. Raises ImageError."""
    source, order = file.source, options.order or "file"
    if not options.confidential:
        raise source.fail("an IGVM file for SEV-SNP can't be launched in a plain VM")
    if options.load_addr is not None or options.entry is not None:
        raise source.fail("an IGVM file says itself where it goes and how it starts")
    found = walk(file, options, batched=order == "qemu")
    _check_overlaps(file, found)
    vmsas = [step for step in found.steps if step.type is PageType.VMSA]
    states = [Vmsa.decode(step.page(0)) for step in vmsas]
    features = _sev_features(file, found, states, options)
    policy = _policy(file, found, options)
    id_block, id_auth, author = _identity(file, found, options, policy)
    starts = {vcpu: item.value.gpa for vcpu, item in found.contexts.items()}
    reset = qemu_reset(BSP_EIP, signature=options.signature, sev_features=features)
    together = len(set(starts.values())) < len(starts)
    pages = [step for step in found.steps if step.type is not PageType.VMSA]
    parts = [*(pages if together else found.steps), *found.shared]
    plan = build_plan(
        source,
        replace(
            options,
            policy=policy,
            sev_features=features,
            id_block=id_block,
            id_auth=id_auth,
            author_key_enabled=author,
        ),
        "igvm",
        memory=_memory(file, parts, options),
        steps=pages,
        vcpus=(reset,) * options.vcpus,
        apic=_wants_apic(file, states),
    )
    plan = replace(plan, shared=found.shared, forced=options.forced)
    if together:
        plan = _kvm_makes_them(file, plan, found, states, order)
    elif starts:
        plan = replace(plan, steps=found.steps, vmsa_mode=VmsaMode.DIRECT, bindings=starts)
        if not options.forced:
            check_vmsas(plan)
    return plan if order == "file" else to_sync(plan).plan


def _memory(file: IgvmFile, parts: Sequence[PageRange], options: PlanOptions) -> list[MemoryRegion]:
    """RAM, and regions for what the file has in and above the hole below 4 GiB."""
    ram = list(options.ram())
    needed: list[tuple[int, int]] = []
    for part in sorted(parts, key=lambda part: part.gpa):
        outside = outside_memory(ram, part.gpa, part.end)
        if outside is None:
            continue
        if part.gpa < LOW_MEMORY_END or any(
            part.gpa < region.end and region.gpa < part.end for region in ram
        ):
            inside = [r.end for r in ram if r.gpa <= part.gpa < r.end]
            item = next(_users(file, max(part.gpa, *inside, 0), part.end))
            raise file.fail(item, f"{part.label} ({part.gpa:#x}..{part.end:#x}) {outside}")
        if needed and needed[-1][1] >= part.gpa:
            needed[-1] = (needed[-1][0], max(needed[-1][1], part.end))
        else:
            needed.append((part.gpa, part.end))
    if len(needed) > _REGIONS_MOST or sum(end - gpa for gpa, end in needed) > _ADDED_MOST:
        raise file.source.fail(
            f"pages outside RAM, at {needed[0][0]:#x} and above, take more than {_REGIONS_MOST} "
            f"memory regions or {_ADDED_MOST >> 20} MiB"
        )
    regions = ram + [MemoryRegion(gpa, end - gpa, "igvm") for gpa, end in needed]
    if file.counts.get(HeaderType.REQUIRED_MEMORY):
        _check_required(file, regions)
    return regions


def _check_required(file: IgvmFile, memory: Sequence[MemoryRegion]) -> None:
    for item in file.runs_for(file.platform(PlatformType.SEV_SNP).mask):
        if item.kind == HeaderType.REQUIRED_MEMORY:
            gpa, size = item.value.gpa, item.value.number_of_bytes
            if outside := outside_memory(memory, gpa, gpa + size):
                raise file.fail(item, f"required memory {gpa:#x}..{gpa + size:#x} {outside}")


def _users(file: IgvmFile, start: int, end: int) -> Iterator[Item]:
    """The headers that launch or share a page in ``start..end``, for messages."""
    areas: dict[int, int] = {}
    for item in file.runs_for(file.platform(PlatformType.SEV_SNP).mask):
        size = 0
        if item.kind == HeaderType.PARAMETER_AREA:
            areas[item.value.area] = item.value.number_of_bytes
        elif item.kind == HeaderType.PAGE_DATA:
            size = item.value.size
        elif item.kind == HeaderType.VP_CONTEXT:
            size = PAGE_SIZE
        elif item.kind == HeaderType.PARAMETER_INSERT:
            size = areas[item.value.area]
        elif item.kind == HeaderType.ERROR_RANGE:
            size = item.value.size_bytes
        if size and item.value.gpa < end and start < item.value.gpa + size * item.repeat:
            for one in single(item):
                if one.value.gpa < end and start < one.value.gpa + size:
                    yield one


def _check_overlaps(file: IgvmFile, found: Directives) -> None:
    parts = sorted((*found.steps, *found.shared), key=lambda part: part.gpa)
    for left, right in itertools.pairwise(parts):
        if left.end <= right.gpa:
            continue
        if left.type is right.type is PageType.VMSA and right.gpa == SYNC_VMSA_GPA:
            continue  # where KVM measures every VMSA
        first, second = itertools.islice(_users(file, right.gpa, right.gpa + PAGE_SIZE), 2)
        raise file.fail(
            second, f"GPA {right.gpa:#x} is taken by {first} already: firmware takes a page once"
        )


def _sev_features(
    file: IgvmFile, found: Directives, states: Sequence[Vmsa], options: PlanOptions
) -> int:
    """SEV_FEATURES of the VM: those of the file's VMSAs, else what was asked for."""
    if not states:
        return options.features
    items = list(found.contexts.values())
    features = states[0].sev_features
    for item, state in zip(items, states, strict=True):
        if state.sev_features != features:
            raise file.fail(
                item,
                f"SEV features {state.sev_features:#x} are not those of {items[0]}, "
                f"{features:#x}: a VM has one word for all its vCPUs",
            )
    if options.sev_features not in (None, features | 1):
        raise file.fail(
            items[0],
            f"the VMSA has SEV features {features:#x}, but --guest-features says "
            f"{options.sev_features:#x}",
        )
    return features | 1


def _policy(file: IgvmFile, found: Directives, options: PlanOptions) -> int:
    if found.policy is None:
        return DEFAULT_POLICY if options.policy is None else options.policy
    policy = int(found.policy.value.policy)
    if options.policy not in (None, policy):
        raise file.fail(
            found.policy, f"the policy is {policy:#x}, but --policy says {options.policy:#x}"
        )
    return policy


def _identity(
    file: IgvmFile, found: Directives, options: PlanOptions, policy: int
) -> tuple[bytes | None, bytes | None, bool]:
    """ID block, ID authentication, and whether its author key counts."""
    if found.id_block is None:
        return options.id_block, options.id_auth, options.author_key_enabled
    header: fmt.IdBlockHeader = found.id_block.value
    block, auth = id_block_of(header, policy)
    if options.id_block not in (None, block.encode()) or options.id_auth not in (
        None,
        auth.encode(),
    ):
        raise file.fail(
            found.id_block,
            f"the ID block is {block.encode().hex()}, but --id-block says "
            f"{(options.id_block or b'').hex()} (or --id-auth differs)",
        )
    return block.encode(), auth.encode(), bool(header.author_key_enabled)


def _wants_apic(file: IgvmFile, states: Sequence[Vmsa]) -> bool:
    """Firmware at its reset vector, or a guest that asks which vCPUs there are."""
    if any(s.cs.base == _RESET_CS_BASE and s.rip == _RESET_RIP for s in states):
        return True
    asked = (HeaderType.MADT, HeaderType.VP_COUNT_PARAMETER, HeaderType.DEVICE_TREE)
    return any(file.counts.get(kind) for kind in asked)


def _kvm_makes_them(
    file: IgvmFile, plan: LaunchPlan, found: Directives, states: Sequence[Vmsa], order: str
) -> LaunchPlan:
    """Several VMSAs at the GPA where KVM measures its own: a plan of mode sync, if it is one."""
    vcpus = list(plan.vcpus)
    for vcpu, state in zip(found.contexts, states, strict=True):
        vcpus[vcpu] = state
    plan = replace(plan, vcpus=tuple(vcpus))
    if order != "file":
        return plan
    items = list(found.contexts.values())
    rule = f"several VP_CONTEXTs are at GPA {SYNC_VMSA_GPA:#x}, as only KVM makes them, but "
    for item in items:
        if item.value.gpa != SYNC_VMSA_GPA:
            raise file.fail(item, f"{rule}this one is at {item.value.gpa:#x}")
    if list(found.contexts) != list(range(len(plan.vcpus))):
        raise file.fail(items[-1], f"{rule}not one for each of {len(plan.vcpus)} vCPUs in order")
    if any(step.type is not PageType.VMSA for step in found.steps[-len(items) :]):
        raise file.fail(items[0], f"{rule}directives with pages follow")
    for item, state in zip(items, states, strict=True):
        lost = not_carried(state, sev_features=plan.sev_features)
        if lost:
            raise file.fail(item, f"{rule}KVM can't carry {lost[0]} (--order kvm leaves it out)")
    return plan
