"""A LaunchPlan becomes an IGVM file.

The format has no page of type ZERO: a page without data is one of zeros that most loaders launch
as NORMAL (see `plan`). `for_igvm` makes of a plan what such a file can say; the file's digest is
that plan's. Equal pages share their data, and pages of zeros have none.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvmlaunch.abi.idblock import IdAuth, IdBlock
from kvmlaunch.abi.kvm_sync import synced
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.errors import FormatError
from kvmlaunch.images.igvm import format as fmt
from kvmlaunch.images.igvm.format import DataType, HeaderType, PageFlag, PlatformType
from kvmlaunch.images.igvm.idblock import header_of
from kvmlaunch.images.igvm.params import Launch, parameter_bytes
from kvmlaunch.images.options import outside_memory
from kvmlaunch.images.plan import (
    SYNC_VMSA_GPA,
    LaunchPlan,
    MemoryRegion,
    PageRange,
    Piece,
    VmsaMode,
)
from kvmlaunch.images.source import forget

__all__ = ["PARAMETER_SIZES", "ParameterChoice", "build", "for_igvm"]

PARAMETER_SIZES = {
    HeaderType.VP_COUNT_PARAMETER: 0x10,
    HeaderType.ENVIRONMENT_INFO_PARAMETER: 0x10,
    HeaderType.MMIO_RANGES: 0x20,
    HeaderType.MEMORY_MAP: 0x300,
    HeaderType.COMMAND_LINE: 0x800,
    HeaderType.SLIT: 0x100,
    HeaderType.MADT: 0x2000,
    HeaderType.SRAT: 0x2000,
    HeaderType.PPTT: 0x2000,
    HeaderType.DEVICE_TREE: 0x4000,
}
"""Room that each parameter gets in an area: for 100 vCPUs and more."""

_MASK = 1
_ZEROS = bytes(PAGE_SIZE)
_FILE_MOST = (1 << 32) - 1  # the format has 32 bits for it
_FORGET_PAGES = 2048
_DATA_TYPES = {PageType.SECRETS: DataType.SECRETS, PageType.CPUID: DataType.CPUID_DATA}
_ALIGNMENT = 16


@dataclass(frozen=True)
class ParameterChoice:
    """A parameter area at a GPA, with these parameters one behind the other."""

    gpa: int
    kinds: tuple[HeaderType, ...]

    def offsets(self) -> Iterator[tuple[HeaderType, int]]:
        """Where each parameter is."""
        at = 0
        for kind in self.kinds:
            yield kind, at
            at += -(-PARAMETER_SIZES[kind] // _ALIGNMENT) * _ALIGNMENT

    @property
    def size(self) -> int:
        """Bytes of the area."""
        room = sum(-(-PARAMETER_SIZES[kind] // _ALIGNMENT) * _ALIGNMENT for kind in self.kinds)
        return max(-(-room // PAGE_SIZE), 1) * PAGE_SIZE


def for_igvm(
    plan: LaunchPlan,
    areas: Sequence[ParameterChoice] = (),
    *,
    native_zero: bool = False,
    command_line: str = "",
) -> LaunchPlan:
    """What an IGVM file says of a plan: parameter areas first, and no page of type ZERO.

    Pages of ZERO become NORMAL, unless ``native_zero``: then they are what such a loader makes
    of pages without data. Raises FormatError for what no file can say.
    """
    if not plan.confidential:
        raise FormatError("an IGVM file for SEV-SNP is made of an SNP guest's plan")
    if plan.as_given or plan.vmsa_gpa != SYNC_VMSA_GPA:
        raise FormatError(f"the VMSAs are those of {plan.vmm}, an IGVM file is launched by KVM")
    if any(plan.start_digest):
        raise FormatError("an IGVM file needs the firmware, not only its digest")
    if plan.host_data != bytes(32):
        raise FormatError("an IGVM file has no host data: give that to the launch")
    for step in plan.steps:
        if step.type is PageType.VMSA and plan.vcpu_at(step) is None:
            raise FormatError(
                f"{step.label} at GPA {step.gpa:#x}: a VP_CONTEXT is some vCPU's, no vCPU starts "
                "from this VMSA"
            )
        if step.label.startswith("parameters"):
            raise FormatError(f"{step.label}: parameters of another IGVM file would become fixed")
    launch = Launch(len(plan.vcpus), _ram(plan), command_line)
    steps = [_area_step(plan, number, area, launch) for number, area in enumerate(areas)]
    for step in plan.steps:
        if step.type is PageType.ZERO and not native_zero:
            step = replace(step, type=PageType.NORMAL)
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def _ram(plan: LaunchPlan) -> tuple[MemoryRegion, ...]:
    return tuple(region for region in plan.memory if region.label.startswith("ram"))


def _area_step(plan: LaunchPlan, number: int, area: ParameterChoice, launch: Launch) -> PageRange:
    label = f"parameters {number}"
    pieces = []
    for kind, offset in area.offsets():
        value = parameter_bytes(kind, launch)
        if len(value) > PARAMETER_SIZES[kind]:
            raise FormatError(
                f"{label}: {kind.name} needs {len(value):#x} bytes, there are "
                f"{PARAMETER_SIZES[kind]:#x}"
            )
        name = fmt.name_of(kind).lower().replace("_", "-")
        pieces.append(Piece(offset, memoryview(value), f"kvmlaunch:{name}"))
    if outside := outside_memory(_ram(plan), area.gpa, area.gpa + area.size):
        raise FormatError(f"{label} ({area.gpa:#x}..{area.gpa + area.size:#x}) {outside}")
    return PageRange(
        area.gpa, area.size, PageType.UNMEASURED, label, "kvmlaunch:igvm", tuple(pieces)
    )


def build(
    plan: LaunchPlan,
    areas: Sequence[ParameterChoice] = (),
    *,
    version: int = 1,
    native_zero: bool = False,
) -> Iterator[bytes | memoryview]:
    """The file of a plan that comes from `for_igvm`, in parts, with the same arguments."""
    if version not in (1, 2):
        raise FormatError(f"IGVM format version {version} is neither 1 nor 2")
    return _Writer(plan, areas, version, native_zero).parts()


class _Writer:
    """Collects headers; where their data is in the file is known at the end only."""

    def __init__(
        self,
        plan: LaunchPlan,
        areas: Sequence[ParameterChoice],
        version: int,
        native_zero: bool,
    ) -> None:
        self._plan = plan
        self._areas = {area.gpa: (n, area) for n, area in enumerate(areas)}
        self._version = version
        # With native_zero a page of zeros that is NORMAL can't be left out.
        self._keep_zeros = native_zero
        # Type, values, and for each of successive pages the number of its data in the file.
        self._headers: list[tuple[HeaderType, tuple[int | bytes, ...], Sequence[int]]] = []
        # Pages that are in the file: index of their range, and their index in it.
        self._ranges: list[PageRange] = []
        self._pages = array("I")
        self._known: dict[bytes, int] = {}
        self._unforgotten = 0

    def parts(self) -> Iterator[bytes | memoryview]:
        self._add(HeaderType.SUPPORTED_PLATFORM, _MASK, 0, PlatformType.SEV_SNP, 1, 0)
        self._add(HeaderType.GUEST_POLICY, self._plan.policy, _MASK, 0)
        for part in self._plan.shared:
            if part.pieces:
                self._page_data(part, PageFlag.SHARED)
            else:
                self._add(HeaderType.ERROR_RANGE, part.gpa, _MASK, part.size)
        for step in self._plan.steps:
            self._step(step)
        if self._plan.vmsa_mode is VmsaMode.SYNC:
            for vcpu, state in enumerate(self._plan.vcpus):
                page = synced(state, sev_features=self._plan.sev_features).encode()
                self._context(SYNC_VMSA_GPA, vcpu, _made_here(page))
        self._id_block()
        return self._encoded()

    def _add(self, kind: HeaderType, *values: int | bytes, data: Sequence[int] = (0,)) -> None:
        """A header for each of ``data``: numbers of pages in the file from 1, 0 for none.

        They are for the field ``file_offset``; the GPA of each is one page further.
        """
        self._headers.append((kind, values, data))

    def _step(self, step: PageRange) -> None:
        if step.gpa in self._areas and step.type is PageType.UNMEASURED:
            number, area = self._areas[step.gpa]
            self._add(HeaderType.PARAMETER_AREA, area.size, number, 0)
            for kind, offset in area.offsets():
                self._add(kind, number, offset)
            self._add(HeaderType.PARAMETER_INSERT, step.gpa, _MASK, number)
        elif step.type is PageType.VMSA:
            vcpu = self._plan.vcpu_at(step)
            assert vcpu is not None  # for_igvm
            self._context(step.gpa, vcpu, step)
        else:
            unmeasured = step.type is PageType.UNMEASURED
            self._page_data(step, PageFlag.UNMEASURED if unmeasured else PageFlag(0))

    def _context(self, gpa: int, vcpu: int, page: PageRange) -> None:
        data = (self._data(page, 0, len(self._ranges), keep=True),)
        self._ranges.append(page)
        self._add(HeaderType.VP_CONTEXT, gpa, _MASK, 0, vcpu, 0, data=data)

    def _page_data(self, part: PageRange, flags: PageFlag) -> None:
        data_type = _DATA_TYPES.get(part.type, DataType.NORMAL)
        number = len(self._ranges)
        self._ranges.append(part)
        keep = self._must_keep(part)
        stored = keep or (bool(part.pieces) and data_type is DataType.NORMAL)
        data = array("I", bytes(4 * part.npages))
        for index in range(part.npages if stored else 0):
            data[index] = self._data(part, index, number, keep=keep)
        self._add(HeaderType.PAGE_DATA, part.gpa, _MASK, 0, flags, data_type, 0, data=data)

    def _must_keep(self, part: PageRange) -> bool:
        return self._keep_zeros and part.type is PageType.NORMAL

    def _data(self, part: PageRange, index: int, number: int, *, keep: bool) -> int:
        view = part.page(index)
        page = bytes(view)
        self._unforgotten += 1
        if self._unforgotten >= _FORGET_PAGES and forget(view):
            self._unforgotten = 0
        if page == _ZEROS and not keep:
            return 0
        key = hashlib.sha256(page).digest()
        if key not in self._known:
            self._pages.extend((number, index))
            self._known[key] = len(self._pages) // 2
        return self._known[key]

    def _id_block(self) -> None:
        plan = self._plan
        if plan.id_block is None or plan.id_auth is None:
            return
        block, auth = IdBlock.decode(plan.id_block), IdAuth.decode(plan.id_auth)
        if block.policy != plan.policy:
            raise FormatError(
                f"the ID block's policy {block.policy:#x} is not the launch's, {plan.policy:#x}, "
                "which is the only one that an IGVM file has"
            )
        header = header_of(block, auth, mask=_MASK, author_key_enabled=plan.author_key_enabled)
        self._add(HeaderType.SNP_ID_BLOCK, *header)

    def _encoded(self) -> Iterator[bytes | memoryview]:
        variable = sum(
            len(data) * (fmt.TLV.size + fmt.padded(fmt.LAYOUTS[kind][0].size))
            for kind, _, data in self._headers
        )
        fixed = (fmt.FIXED_V1 if self._version == 1 else fmt.FIXED_V2).size
        base, pages = fixed + variable, len(self._pages) // 2
        # Microsoft's parser refuses a file without data.
        filler = b"" if pages else bytes(8)
        total = base + pages * PAGE_SIZE + len(filler)
        if total > _FILE_MOST:
            raise FormatError(f"the file would have {total:#x} bytes, IGVM has 32 bits for that")
        body = b"".join(self._encode_headers(base))
        head = fmt.FixedHeader(self._version, fixed, variable, total, 0)
        yield head.encode(zlib.crc32(body, zlib.crc32(head.encode())))
        yield body
        yield from self._contents()
        yield filler

    def _encode_headers(self, base: int) -> Iterable[bytes]:
        for kind, values, data in self._headers:
            layout, make = fmt.LAYOUTS[kind]
            fields = make(*values)
            for n, page in enumerate(data):
                if page:
                    fields = fields._replace(file_offset=base + (page - 1) * PAGE_SIZE)
                elif n:
                    fields = fields._replace(file_offset=0)
                if n:
                    fields = fields._replace(gpa=fields.gpa + PAGE_SIZE)
                try:
                    raw = layout.pack(*fields)
                except struct.error as error:
                    raise FormatError(f"{kind.name} can't hold {values}: {error}") from None
                yield fmt.TLV.pack(kind, layout.size) + raw + bytes(-layout.size % 8)

    def _contents(self) -> Iterator[memoryview]:
        for at in range(0, len(self._pages), 2):
            view = self._ranges[self._pages[at]].page(self._pages[at + 1])
            yield view
            if at // 2 % _FORGET_PAGES == 0:
                forget(view)


def _made_here(page: bytes) -> PageRange:
    piece = Piece(0, memoryview(page), "kvm-sync")
    return PageRange(SYNC_VMSA_GPA, PAGE_SIZE, PageType.VMSA, "vmsa", "kvm-sync", (piece,))
