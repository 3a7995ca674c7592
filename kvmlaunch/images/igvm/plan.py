"""An IGVM file becomes a LaunchPlan: its directives in file order, its VMSAs among them.

What a directive launches:

| directive                              | launched as                                          |
|----------------------------------------|------------------------------------------------------|
| PAGE_DATA NORMAL, with data or without | NORMAL (without data: a page of zeros)               |
| PAGE_DATA NORMAL, unmeasured           | UNMEASURED, also if it is shared, too                |
| PAGE_DATA NORMAL, shared               | nothing: shared memory with these bytes              |
| PAGE_DATA SECRETS                      | SECRETS                                              |
| PAGE_DATA CPUID_DATA, CPUID_XF         | CPUID, with the leaves of the launch at hand         |
| PARAMETER_INSERT                       | UNMEASURED, every page of the area                   |
| VP_CONTEXT                             | VMSA                                                 |
| ERROR_RANGE                            | nothing: shared memory                               |

The same table is that of Microsoft's measuring tool (see image-formats 1.10 for where others
differ). ``native_zero`` launches pages without data as ZERO, as Cloud Hypervisor does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kvmlaunch.abi.kvm_sync import not_carried
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.abi.reset import BSP_EIP, qemu_reset
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images.igvm import format as fmt
from kvmlaunch.images.igvm.format import DataType, HeaderType, PageFlag, PlatformType
from kvmlaunch.images.igvm.idblock import id_block_of
from kvmlaunch.images.igvm.params import Launch, parameter_bytes
from kvmlaunch.images.igvm.parse import IgvmFile, Item, parse, single
from kvmlaunch.images.igvm.pieces import FilePieces
from kvmlaunch.images.options import PlanOptions, build_plan, outside_memory
from kvmlaunch.images.plan import (
    LOW_MEMORY_END,
    SYNC_VMSA_GPA,
    LaunchPlan,
    MemoryRegion,
    PageRange,
    Piece,
    Pieces,
    VmsaMode,
)
from kvmlaunch.images.source import ImageSource
from kvmlaunch.images.vmsas import check_vmsas, to_sync

__all__ = ["RANGES_MOST", "Directives", "load", "plan_of", "vcpus_of", "walk"]

RANGES_MOST = 1 << 16
"""Ranges of successive pages in a file, at most."""
_PARAMETERS_MOST = 4096
_REGIONS_MOST = 64
_ADDED_MOST = 1 << 30

# Plain numbers: an enum's operators take longer than all else that is done with a page.
_UNMEASURED, _SHARED = int(PageFlag.UNMEASURED), int(PageFlag.SHARED)
_SHARED_OR_NOT = _UNMEASURED | _SHARED
_PAGE_TYPES = {
    int(DataType.SECRETS): PageType.SECRETS,
    int(DataType.CPUID_DATA): PageType.CPUID,
    int(DataType.CPUID_XF): PageType.CPUID,
}

_RESET_CS_BASE, _RESET_RIP = 0xFFFF_0000, 0xFFF0


@dataclass(frozen=True)
class Directives:
    """What the directives for one platform launch, in the order of some loader.

    Attributes: ``steps`` with the number of the header that begins each (``numbers``),
    ``shared``, ``contexts`` (VP_CONTEXT headers by vCPU), ``policy`` and ``id_block`` headers.
    """

    steps: tuple[PageRange, ...]
    numbers: tuple[int, ...]
    shared: tuple[PageRange, ...]
    contexts: dict[int, Item]
    policy: Item | None
    id_block: Item | None


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
    memory = _memory(file, found, options)
    _check_overlaps(file, found)
    vmsas = [step for step in found.steps if step.type is PageType.VMSA]
    states = [Vmsa.decode(step.page(0)) for step in vmsas]
    features = _sev_features(file, found, states, options)
    policy = _policy(file, found, options)
    id_block, id_auth, author = _identity(file, found, options, policy)
    starts = {vcpu: item.value.gpa for vcpu, item in found.contexts.items()}
    reset = qemu_reset(BSP_EIP, signature=options.signature, sev_features=features)
    together = len(set(starts.values())) < len(starts)
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
        memory=memory,
        steps=[step for step in found.steps if step.type is not PageType.VMSA],
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


def walk(file: IgvmFile, options: PlanOptions, *, batched: bool = False) -> Directives:
    """Follow the directives for SEV-SNP.

    ``batched``: as QEMU does, which keeps pages back until the next page that doesn't continue
    them, while it inserts parameters at once (backends/igvm.c, qigvm_directive_page_data).
    """
    return _Walk(file, options, batched).run()


def vcpus_of(file: IgvmFile) -> int:
    """How many vCPUs the guest has at least: one more than the last with a VP_CONTEXT."""
    mask = file.platform(PlatformType.SEV_SNP).mask
    indices = (i.value.vp_index for i in file.runs_for(mask) if i.kind == HeaderType.VP_CONTEXT)
    return max(indices, default=0) + 1


class _Use(NamedTuple):
    """A value in a parameter area."""

    offset: int
    data: bytes
    item: Item


@dataclass
class _Run:
    """Pages that will be one range."""

    key: tuple[int, ...]
    first: Item
    type: PageType
    shared: bool
    gpa: int
    end: int
    last: int
    pieces: FilePieces


@dataclass
class _Walk:
    file: IgvmFile
    options: PlanOptions
    batched: bool
    steps: list[PageRange] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    shared: list[PageRange] = field(default_factory=list)
    contexts: dict[int, Item] = field(default_factory=dict)
    areas: dict[int, tuple[Item, list[_Use]]] = field(default_factory=dict)
    values: dict[int, bytes] = field(default_factory=dict)
    parameters: int = 0
    pending: _Run | None = None
    policy: Item | None = None
    id_block: Item | None = None

    def run(self) -> Directives:
        mask = self.file.platform(PlatformType.SEV_SNP).mask
        rules: dict[int, Any] = {
            HeaderType.GUEST_POLICY: self._policy,
            HeaderType.PARAMETER_AREA: self._area,
            HeaderType.PAGE_DATA: self._page,
            HeaderType.PARAMETER_INSERT: self._insert,
            HeaderType.VP_CONTEXT: self._context,
            HeaderType.ERROR_RANGE: self._error_range,
            HeaderType.SNP_ID_BLOCK: self._id_block,
            HeaderType.SUPPORTED_PLATFORM: None,
            HeaderType.REQUIRED_MEMORY: None,
            **dict.fromkeys(fmt.PARAMETERS, self._parameter),
        }
        for item in self.file.runs_for(mask):
            if item.kind not in rules:
                raise self.file.fail(item, "is nothing that SEV-SNP on KVM has")
            rule = rules[item.kind]
            if rule is not None:
                try:
                    rule(item)
                except ImageError:
                    raise
                except FormatError as error:
                    raise self.file.fail(item, error.rule) from error
        self._flush()
        return Directives(
            tuple(self.steps),
            tuple(self.numbers),
            tuple(self.shared),
            self.contexts,
            self.policy,
            self.id_block,
        )

    def _policy(self, item: Item) -> None:
        self._once(item, self.policy)
        self.policy = item

    def _id_block(self, item: Item) -> None:
        self._once(item, self.id_block)
        self.id_block = item

    def _once(self, item: Item, before: Item | None) -> None:
        if before is not None:
            raise self.file.fail(item, f"the platform has one already, header {before.number}")

    def _page(self, item: Item) -> None:
        page: fmt.PageData = item.value
        gpa, mask, file_offset, flags, data_type, _ = page
        pages = item.repeat * page.size // PAGE_SIZE
        type_ = self._page_type(file_offset, flags, data_type)
        shared = flags & _SHARED_OR_NOT == _SHARED
        key = (mask, flags, data_type, file_offset != 0) if self.batched else (type_, shared)
        run = self.pending
        if (
            run is None
            or gpa != run.end
            or key != run.key
            or (self.batched and item.number != run.last + 1)
        ):
            self._flush()
            pieces = FilePieces(self.file.source)
            run = _Run(key, item, type_, shared, gpa, gpa, item.number, pieces)
            self.pending = run
        if file_offset and data_type == DataType.NORMAL:
            run.pieces.add((gpa - run.gpa) // PAGE_SIZE, file_offset, pages)
        run.end = gpa + pages * PAGE_SIZE
        run.last = item.number + item.repeat - 1

    def _page_type(self, file_offset: int, flags: int, data_type: int) -> PageType:
        if data_type != DataType.NORMAL:
            return _PAGE_TYPES[data_type]
        if flags & _UNMEASURED:
            return PageType.UNMEASURED
        native = self.options.native_zero and not file_offset and not flags & _SHARED_OR_NOT
        return PageType.ZERO if native else PageType.NORMAL

    def _flush(self) -> None:
        run, self.pending = self.pending, None
        if run is None:
            return
        label = "shared" if run.shared else run.type.name.lower()
        pieces = run.pieces if len(run.pieces) else ()
        made = self._range(run.first, run.gpa, run.end - run.gpa, run.type, label, pieces)
        if run.shared:
            self.shared.append(made)
        else:
            self._launch(run.first, made)

    def _range(
        self,
        item: Item,
        gpa: int,
        size: int,
        type_: PageType,
        label: str,
        pieces: tuple[Piece, ...] | Pieces = (),
    ) -> PageRange:
        if len(self.steps) + len(self.shared) >= RANGES_MOST:
            raise self.file.fail(item, f"more than {RANGES_MOST} ranges of successive pages")
        origin = f"{self.file.source.basename} header[{item.number}]"
        try:
            return PageRange(gpa, size, type_, label, origin, pieces)
        except FormatError as error:
            raise self.file.fail(item, error.rule) from error

    def _launch(self, item: Item, step: PageRange) -> None:
        self.steps.append(step)
        self.numbers.append(item.number)

    def _act_now(self) -> None:
        """Something else than a page follows; QEMU keeps the pages back all the same."""
        if not self.batched:
            self._flush()

    def _area(self, item: Item) -> None:
        self.areas[item.value.area] = (item, [])

    def _parameter(self, item: Item) -> None:
        self.parameters += 1
        if self.parameters > _PARAMETERS_MOST:
            raise self.file.fail(item, f"more than {_PARAMETERS_MOST} parameters")
        area, uses = self.areas[item.value.area]
        if item.kind not in self.values:
            launch = Launch(self.options.vcpus, self.options.ram(), self.options.append or "")
            self.values[item.kind] = parameter_bytes(item.kind, launch)
        use = _Use(item.value.byte_offset, self.values[item.kind], item)
        end, size = use.offset + len(use.data), area.value.number_of_bytes
        if end > size:
            raise self.file.fail(
                item,
                f"{len(use.data)} bytes at offset {use.offset:#x} end beyond parameter area "
                f"{item.value.area} of {size:#x} bytes",
            )
        for other in uses:
            if other.offset < end and use.offset < other.offset + len(other.data):
                raise self.file.fail(item, f"its value overlaps that of {other.item}")
        uses.append(use)

    def _insert(self, item: Item) -> None:
        self._act_now()
        area, uses = self.areas.pop(item.value.area)
        size = area.value.number_of_bytes
        ram = self.options.ram()
        if outside := outside_memory(ram, item.value.gpa, item.value.gpa + size):
            raise self.file.fail(
                item, f"parameter area {item.value.area} of {size:#x} bytes {outside}"
            )
        pieces = tuple(self._area_pieces(area, sorted(uses)))
        label = f"parameters {item.value.area}"
        made = self._range(item, item.value.gpa, size, PageType.UNMEASURED, label, pieces)
        self._launch(item, made)

    def _area_pieces(self, area: Item, uses: list[_Use]) -> Iterator[Piece]:
        """The values, and between them the area's bytes in the file where it has some."""
        source, base, at = self.file.source, area.value.file_offset, 0
        for offset, data, item in (*uses, _Use(area.value.number_of_bytes, b"", area)):
            if base and offset > at:
                view = source.data[base + at : base + offset]
                yield Piece(at, view, source.basename, base + at)
            if data:
                name = fmt.name_of(item.kind).lower().replace("_", "-")
                yield Piece(offset, memoryview(data), f"kvmlaunch:{name}")
            at = offset + len(data)

    def _context(self, item: Item) -> None:
        self._act_now()
        gpa, _, file_offset, vcpu, _ = item.value
        if vcpu in self.contexts:
            raise self.file.fail(
                item, f"vCPU {vcpu} has a VP_CONTEXT already, {self.contexts[vcpu]}"
            )
        if vcpu >= self.options.vcpus:
            raise self.file.fail(
                item, f"it is for vCPU {vcpu}, but the guest has {self.options.vcpus} (--vcpus)"
            )
        if not file_offset:
            raise self.file.fail(item, "a VP_CONTEXT of SEV-SNP needs a VMSA in the file's data")
        pieces = FilePieces(self.file.source)
        pieces.add(0, file_offset, 1)
        self.contexts[vcpu] = item
        label = f"vmsa {vcpu}"
        self._launch(item, self._range(item, gpa, PAGE_SIZE, PageType.VMSA, label, pieces))

    def _error_range(self, item: Item) -> None:
        self._act_now()
        gpa, _, size = item.value
        self.shared.append(self._range(item, gpa, size, PageType.NORMAL, "error-range"))


def _memory(file: IgvmFile, found: Directives, options: PlanOptions) -> list[MemoryRegion]:
    """RAM, and regions for what the file has in and above the hole below 4 GiB."""
    ram = list(options.ram())
    needed: list[tuple[int, int]] = []
    for part in sorted((*found.steps, *found.shared), key=lambda part: part.gpa):
        outside = outside_memory(ram, part.gpa, part.end)
        if outside is None:
            continue
        if part.gpa < LOW_MEMORY_END or any(
            part.gpa < region.end and region.gpa < part.end for region in ram
        ):
            item = next(_users(file, options, part.gpa, part.end))
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


def _users(file: IgvmFile, options: PlanOptions, start: int, end: int) -> Iterator[Item]:
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
        first, second = itertools.islice(
            _users(file, PlanOptions(), right.gpa, right.gpa + PAGE_SIZE), 2
        )
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
    rule = f"several VP_CONTEXTs are at GPA {items[0].value.gpa:#x}, as only KVM makes them, but "
    if list(found.contexts) != list(range(len(plan.vcpus))):
        raise file.fail(items[-1], f"{rule}not one for each of {len(plan.vcpus)} vCPUs in order")
    if any(step.type is not PageType.VMSA for step in found.steps[-len(items) :]):
        raise file.fail(items[0], f"{rule}directives with pages follow")
    for item, state in zip(items, states, strict=True):
        lost = not_carried(state, sev_features=plan.sev_features)
        if lost:
            raise file.fail(item, f"{rule}KVM can't carry {lost[0]} (--order kvm leaves it out)")
    return plan
