"""LaunchPlan: everything that a launch does, as frozen data.

Loaders make plans; measure and launch only read them. A plan holds views of the
mapped image files and never copies page contents.
"""

from __future__ import annotations

import itertools

from kvmlaunch.abi.defaults import DEFAULT_POLICY
from kvmlaunch.abi.digest import DIGEST_SIZE
from kvmlaunch.abi.enums import StrEnum
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.record import Record, read_only
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kvmlaunch.images.pieces import FilePieces

__all__ = [
    "HIGH_MEMORY",
    "LOW_MEMORY_END",
    "SYNC_VMSA_GPA",
    "LaunchPlan",
    "MemoryRegion",
    "PageRange",
    "Piece",
    "VmsaMode",
    "check_identity",
    "free_gpa",
    "ram_regions",
]

LOW_MEMORY_END = 0xC000_0000
"""RAM above this size continues at 4 GiB, as on QEMU's q35 with more than 3 GiB."""
HIGH_MEMORY = 0x1_0000_0000

SYNC_VMSA_GPA = 0xFFFF_FFFF_F000
"""GPA at which KVM has the VMSAs that it makes itself measured (INITIAL_VMSA_GPA in svm/sev.c)."""

_ZEROS = memoryview(bytes(256 * PAGE_SIZE))
_GPA_LIMIT = 1 << 52  # most physical address bits of x86-64 (APM volume 2, section 5.3)


class VmsaMode(StrEnum):
    """Who makes the VMSAs of a launch."""

    SYNC = "sync"
    """KVM, one per vCPU, at SNP_LAUNCH_FINISH (mainline)."""
    PAGE = "page"
    """User space, one page for the first vCPU (proposal v1)."""
    DIRECT = "direct"
    """User space, a page for each vCPU that shall start with the guest (proposal v2)."""


class Piece(Record):
    """Bytes inside a PageRange.

    Attributes: ``offset`` (bytes from the range's start), ``data`` (a view),
    ``origin`` (file name, or ``kvmlaunch:WHAT`` for what no file holds) and
    ``file_offset`` (of ``data`` in that file).
    """

    offset: int
    data: memoryview
    origin: str
    file_offset: int = 0

    @property
    def end(self) -> int:
        """First offset behind the piece."""
        return self.offset + len(self.data)


class PageRange(Record):
    """Successive pages of one type, launched in ascending order.

    ``pieces`` are sorted and don't overlap; what they leave out is zero. Types
    whose contents the guest or firmware supplies (ZERO, SECRETS, CPUID) have none.
    ``origin`` names where a page without a piece comes from.
    """

    gpa: int
    size: int
    type: PageType
    label: str
    origin: str
    pieces: tuple[Piece, ...] | FilePieces = ()

    def __post_init__(self) -> None:
        """Refuse a range that no launch update could take."""
        where = f"{self.label} at GPA {self.gpa:#x}"
        if self.gpa % PAGE_SIZE or self.size % PAGE_SIZE:
            raise FormatError(f"{where}, {self.size:#x} bytes: not aligned to 4 KiB pages")
        if self.size <= 0:
            raise FormatError(f"{where} has no pages")
        if self.gpa < 0 or self.gpa + self.size > _GPA_LIMIT:
            raise FormatError(f"{where} ends beyond the 52 physical address bits of x86-64")
        end = 0
        for piece in self.pieces:
            if piece.offset < end or piece.end > self.size:
                raise FormatError(f"{where}: its pieces overlap or leave the range")
            end = piece.end

    @property
    def end(self) -> int:
        """First GPA behind the range."""
        return self.gpa + self.size

    @property
    def npages(self) -> int:
        """Number of 4 KiB pages."""
        return self.size // PAGE_SIZE

    def section(self, first: int, end: int) -> PageRange:
        """Its pages ``first`` to ``end`` - 1."""
        start, stop = first * PAGE_SIZE, end * PAGE_SIZE
        pieces = []
        for piece in self.pieces:
            low, high = max(piece.offset, start), min(piece.end, stop)
            if low < high:
                skipped = low - piece.offset
                data = piece.data[skipped : high - piece.offset]
                at = piece.file_offset + skipped
                pieces.append(piece.replace(offset=low - start, data=data, file_offset=at))
        return self.replace(gpa=self.gpa + start, size=stop - start, pieces=tuple(pieces))

    def page(self, index: int) -> memoryview:
        """The 4096 bytes of page ``index``: a view where one piece covers the page."""
        start = index * PAGE_SIZE
        page = bytearray(PAGE_SIZE)
        for piece in self._pieces_of(index):
            low, high = max(piece.offset, start), min(piece.end, start + PAGE_SIZE)
            data = piece.data[low - piece.offset : high - piece.offset]
            if len(data) == PAGE_SIZE:
                return data
            page[low - start : high - start] = data
        return memoryview(page).toreadonly()

    def runs(self, index: int, count: int) -> Iterator[memoryview]:
        """``count`` pages from ``index``, in as few buffers of whole pages as they lie in.

        Views where one piece covers pages; zeros, or single pages put together, elsewhere.
        """
        while count > 0:
            data = self._run(index, count)
            yield data
            index += len(data) // PAGE_SIZE
            count -= len(data) // PAGE_SIZE

    def _run(self, index: int, most: int) -> memoryview:
        start = index * PAGE_SIZE
        following = self._following(start)
        piece = self.pieces[following - 1] if following else None
        left = 0 if piece is None else piece.end - start
        if piece is not None and left >= PAGE_SIZE:
            size = min(left // PAGE_SIZE, most) * PAGE_SIZE
            return piece.data[start - piece.offset :][:size]
        gap = (self.pieces[following].offset if following < len(self.pieces) else self.size) - start
        if left <= 0 and gap >= PAGE_SIZE:
            return _ZEROS[: min(gap // PAGE_SIZE, most) * PAGE_SIZE]
        return self.page(index)

    def span(self, index: int, count: int) -> memoryview | None:
        """``count`` pages from ``index`` as one view, or None where no single piece has them."""
        start, end = index * PAGE_SIZE, (index + count) * PAGE_SIZE
        for piece in self._pieces_of(index):
            if piece.offset <= start and end <= piece.end:
                return piece.data[start - piece.offset : end - piece.offset]
        return None

    def origin_of(self, index: int) -> str:
        """Where page ``index`` comes from: ``FILE+0xOFFSET``, or the range's origin."""
        origin, offset, _ = next(self.origin_runs(index, 1))
        return origin if offset is None else f"{origin}+{offset:#x}"

    def origin_runs(self, index: int, count: int) -> Iterator[tuple[str, int | None, int]]:
        """Where ``count`` pages from ``index`` come from.

        As (origin, offset of the first page if that is a file, else None, pages).
        """
        end = index + count
        while index < end:
            start = index * PAGE_SIZE
            piece = next(self._pieces_of(index), None)
            if piece is None:
                following = self._following(start)
                bare = following == len(self.pieces)
                until = end if bare else self.pieces[following].offset // PAGE_SIZE
                pages = max(1, min(until, end) - index)
                yield self.origin, None, pages
            else:
                # It is the first one in all pages that begin in it, too.
                until = index + 1 if piece.offset > start else -(-piece.end // PAGE_SIZE)
                pages = max(1, min(until, end) - index)
                named = not piece.origin.startswith("kvmlaunch:")
                offset = piece.file_offset + max(start - piece.offset, 0)
                yield piece.origin, offset if named else None, pages
            index += pages

    def _following(self, offset: int) -> int:
        """Index of the first piece that begins behind ``offset``."""
        if not isinstance(self.pieces, tuple):
            return self.pieces.following(offset)
        if len(self.pieces) == 1:
            return int(self.pieces[0].offset <= offset)
        from bisect import bisect_right  # firmware is one piece

        return bisect_right(self.pieces, offset, key=lambda piece: piece.offset)

    def _pieces_of(self, index: int) -> Iterator[Piece]:
        """The pieces that have bytes in page ``index`` (an image may have 65534 of them)."""
        start, end = index * PAGE_SIZE, (index + 1) * PAGE_SIZE
        at = self._following(start) - 1
        for n in range(max(at, 0), len(self.pieces)):
            piece = self.pieces[n]
            if piece.offset >= end:
                return
            if piece.offset < piece.end and piece.end > start:
                yield piece


class MemoryRegion(Record):
    """Guest memory that is backed by RAM: ``gpa``, ``size`` in bytes, ``label``."""

    gpa: int
    size: int
    label: str

    def __post_init__(self) -> None:
        """Refuse what is not a positive number of pages."""
        if self.gpa % PAGE_SIZE or self.size % PAGE_SIZE or self.size <= 0:
            raise FormatError(
                f"memory {self.label} at GPA {self.gpa:#x}, {self.size:#x} bytes: "
                "not a positive number of 4 KiB pages"
            )

    @property
    def end(self) -> int:
        """First GPA behind the region."""
        return self.gpa + self.size


def ram_regions(size: int) -> tuple[MemoryRegion, ...]:
    """RAM of ``size`` bytes from GPA 0, with the hole below 4 GiB left free."""
    if size <= LOW_MEMORY_END:
        return (MemoryRegion(0, size, "ram"),)
    return (
        MemoryRegion(0, LOW_MEMORY_END, "ram"),
        MemoryRegion(HIGH_MEMORY, size - LOW_MEMORY_END, "ram-high"),
    )


def free_gpa(
    memory: Sequence[MemoryRegion], taken: Iterable[tuple[int, int]], size: int
) -> int | None:
    """The lowest GPA, 0x1000 or above, of ``size`` free bytes of RAM; None if there are none.

    ``taken`` holds (start, end) of what is occupied, in whole pages.
    """
    occupied = sorted(taken)
    for region in sorted(memory, key=lambda region: region.gpa):
        gpa = max(region.gpa, PAGE_SIZE)
        for start, end in occupied:
            if start < gpa + size and gpa < end:
                gpa = end
        if gpa + size <= region.end:
            return gpa
    return None


class LaunchPlan(Record, unshown=("data", "vcpus"), unhashed=("bindings",)):
    """What will be launched, in the order of the launch.

    Attributes:
        image: name of the image, for people.
        image_type: ``flat``, ``elf``, ``ovmf``, …
        data: the image's bytes (for its SHA-256 in the log header).
        memory: guest RAM, sorted by GPA.
        steps: page ranges in launch order.
        shared: memory that is shared with the host from the start, with these bytes; it is
            not launched.
        vcpus: wanted initial state of each vCPU, in creation order; what it starts with in
            mode sync.
        vmsa_mode: who makes the VMSAs; in mode sync no step is one.
        bindings: vCPU index -> GPA of the VMSA step that it starts from. Another vCPU has
            none until the guest gives it one.
        forced: the VMSAs need not keep the rules that the kernel will check.
        policy: guest policy (u64), see :mod:`kvmlaunch.abi.policy`.
        sev_features: what every VMSA's SEV_FEATURES must hold (bit 0 = SNP active).
        host_data: 32 bytes for SNP_LAUNCH_FINISH.
        id_block, id_auth: 96 and 4096 bytes, or None.
        author_key_enabled: the ID authentication holds an author key that counts.
        confidential: False for a plan made for a plain VM (no C-bit in page tables).
        cbitpos: position of the C-bit in the plan's page tables; None where it has none.
        apic: the guest expects in-kernel APICs (firmware does; then HLT waits for an
            interrupt instead of ending the run), and starts its other vCPUs itself.
        vmpls: the guest runs other VMPLs than 0, which needs a host that has them.
        vmm: name of the VMM profile whose states these are; empty for this launcher.
        as_given: in mode sync the states are measured as they are, not as mainline KVM makes
            VMSAs of them.
        vmsa_gpa: where they are measured in mode sync.
        start_digest: launch digest (48 bytes) that pages which aren't in the plan have given.
        vcek_disabled: the guest's reports may not be signed by the VCEK.
        partial: launched to ask the firmware, never run: there may be no vCPUs.
    """

    image: str
    image_type: str
    data: memoryview
    memory: tuple[MemoryRegion, ...]
    steps: tuple[PageRange, ...]
    vcpus: tuple[Vmsa, ...]
    policy: int = DEFAULT_POLICY
    sev_features: int = 1
    host_data: bytes = bytes(32)
    id_block: bytes | None = None
    id_auth: bytes | None = None
    author_key_enabled: bool = False
    confidential: bool = True
    cbitpos: int | None = None
    apic: bool = False
    vmpls: bool = False
    vcek_disabled: bool = False
    partial: bool = False
    vmsa_mode: VmsaMode = VmsaMode.SYNC
    bindings: Mapping[int, int] = read_only({})
    forced: bool = False
    vmm: str = ""
    as_given: bool = False
    vmsa_gpa: int = SYNC_VMSA_GPA
    start_digest: bytes = bytes(DIGEST_SIZE)
    shared: tuple[PageRange, ...] = ()

    def __post_init__(self) -> None:
        """Refuse parts that don't fit together."""
        if not self.vcpus and not self.partial:
            raise FormatError("a guest needs at least one vCPU")
        if len(self.start_digest) != DIGEST_SIZE:
            raise FormatError(
                f"a launch digest is {DIGEST_SIZE} bytes, the plan's first one is "
                f"{len(self.start_digest)}"
            )
        check_identity(self.host_data, self.id_block, self.id_auth)
        _check_regions(self.memory)
        _check_overlaps((*self.steps, *self.shared))
        for step in (*self.steps, *self.shared):
            if not (self.forced and step.type is PageType.VMSA):
                _check_inside(step, self.memory)
        _check_bindings(self)

    @property
    def npages(self) -> int:
        """Number of 4 KiB pages that the steps launch (without VMSAs that KVM makes)."""
        return sum(step.npages for step in self.steps)

    @property
    def vmsas(self) -> tuple[PageRange, ...]:
        """The steps that are VMSAs of user space, a page each."""
        return tuple(step for step in self.steps if step.type is PageType.VMSA)

    @property
    def without_vmsas(self) -> tuple[PageRange, ...]:
        """All other steps."""
        return tuple(step for step in self.steps if step.type is not PageType.VMSA)

    def pages(self) -> Iterator[tuple[PageRange, int]]:
        """Every page in launch order, as (range, index in it)."""
        for step in self.steps:
            for index in range(step.npages):
                yield step, index

    def vcpu_at(self, step: PageRange) -> int | None:
        """The vCPU that starts from a VMSA step; None for other steps."""
        starts = (vcpu for vcpu, gpa in self.bindings.items() if step.gpa <= gpa < step.end)
        return next(starts, None)

    def starts(self, vcpu: int) -> bool:
        """Whether the vCPU has a VMSA when the guest begins."""
        return self.vmsa_mode is VmsaMode.SYNC or vcpu in self.bindings

    def on_kvm(self) -> LaunchPlan:
        """The plan as mainline KVM launches it, whatever another VMM's VMSAs are."""
        return self.replace(as_given=False, vmsa_gpa=SYNC_VMSA_GPA)

    def step_at(self, gpa: int) -> PageRange | None:
        """The page range that holds ``gpa``, or None."""
        return next((step for step in self.steps if step.gpa <= gpa < step.end), None)

    def __str__(self) -> str:
        """One line: image, number of pages and vCPUs, memory, policy."""
        return (
            f"{self.image} ({self.image_type}): {self.npages} pages in {len(self.steps)} steps, "
            f"{len(self.vcpus)} vCPU, {sum(m.size for m in self.memory) >> 20} MiB, "
            f"policy {self.policy:#x}"
        )


def check_identity(host_data: bytes, id_block: bytes | None, id_auth: bytes | None) -> None:
    """Check the sizes of what SNP_LAUNCH_FINISH takes; FormatError if one is wrong."""
    if len(host_data) != 32:
        raise FormatError(f"host data is 32 bytes, not {len(host_data)}")
    if id_block is not None and len(id_block) != 96:
        raise FormatError(f"an ID block is 96 bytes, not {len(id_block)}")
    if id_auth is not None and len(id_auth) != PAGE_SIZE:
        raise FormatError(f"ID authentication is 4096 bytes, not {len(id_auth)}")
    if (id_block is None) != (id_auth is None):
        raise FormatError("an ID block and its ID authentication are given together")


def _check_regions(memory: tuple[MemoryRegion, ...]) -> None:
    for left, right in itertools.pairwise(memory):
        if left.end > right.gpa:
            raise FormatError(
                f"memory {left.label} ({left.gpa:#x}..{left.end:#x}) overlaps or is not sorted "
                f"before {right.label} ({right.gpa:#x}..{right.end:#x})"
            )


def _check_overlaps(steps: tuple[PageRange, ...]) -> None:
    by_gpa = sorted(steps, key=lambda step: step.gpa)
    for left, right in itertools.pairwise(by_gpa):
        if left.end > right.gpa:
            raise FormatError(
                f"{left.label} ({left.gpa:#x}..{left.end:#x}, {left.origin}) overlaps "
                f"{right.label} ({right.gpa:#x}..{right.end:#x}, {right.origin})"
            )


def _check_inside(step: PageRange, memory: tuple[MemoryRegion, ...]) -> None:
    if not any(region.gpa <= step.gpa and step.end <= region.end for region in memory):
        raise FormatError(
            f"{step.label} ({step.gpa:#x}..{step.end:#x}, {step.origin}) is outside "
            "the guest's memory"
        )


def _check_bindings(plan: LaunchPlan) -> None:
    vmsas = plan.vmsas
    for step in vmsas:
        if step.npages != 1:
            raise FormatError(f"{step.label} has {step.npages} pages, a VMSA is one")
    if plan.vmsa_mode is VmsaMode.SYNC:
        if vmsas or plan.bindings:
            raise FormatError(
                "VMSA pages are for modes page and direct; in mode sync KVM makes them"
            )
        return
    if not plan.confidential:
        raise FormatError(f"VMSA mode {plan.vmsa_mode} is for SNP guests, a plain VM has no VMSAs")
    for vcpu, gpa in plan.bindings.items():
        if not 0 <= vcpu < len(plan.vcpus):
            raise FormatError(f"a VMSA is for vCPU {vcpu}, but there are {len(plan.vcpus)} vCPUs")
        if not any(step.gpa <= gpa < step.end for step in vmsas):
            raise FormatError(f"vCPU {vcpu} starts at GPA {gpa:#x}, where no VMSA is")
    if len({*plan.bindings.values()}) < len(plan.bindings):
        raise FormatError("two vCPUs start from one VMSA")
    if (
        plan.vmsa_mode is VmsaMode.PAGE
        and not (plan.forced or plan.partial)
        and (len(vmsas) != 1 or set(plan.bindings) != {0})
    ):
        raise FormatError("VMSA mode page takes one VMSA, which is for vCPU 0")
