"""The directives of an IGVM file: page ranges in the order of some loader.

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

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images.igvm import format as fmt
from kvmlaunch.images.igvm.format import DataType, HeaderType, PageFlag, PlatformType
from kvmlaunch.images.igvm.params import Launch, parameter_bytes
from kvmlaunch.images.igvm.parse import IgvmFile, Item
from kvmlaunch.images.options import PlanOptions, outside_memory
from kvmlaunch.images.pieces import FilePieces
from kvmlaunch.images.plan import PageRange, Piece

__all__ = ["RANGES_MOST", "Directives", "vcpus_of", "walk"]

RANGES_MOST = 1 << 16
"""Ranges of successive pages in a file, at most."""
_PARAMETERS_MOST = 4096

# Plain numbers: an enum's operators take longer than all else that is done with a page.
_UNMEASURED, _SHARED = int(PageFlag.UNMEASURED), int(PageFlag.SHARED)
_SHARED_OR_NOT = _UNMEASURED | _SHARED
_PAGE_TYPES = {
    int(DataType.SECRETS): PageType.SECRETS,
    int(DataType.CPUID_DATA): PageType.CPUID,
    int(DataType.CPUID_XF): PageType.CPUID,
}


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
        pieces: tuple[Piece, ...] | FilePieces = (),
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
