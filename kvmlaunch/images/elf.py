"""ELF64 executables: segments go to their physical addresses.

| file                                      | start state of every vCPU                 |
|-------------------------------------------|-------------------------------------------|
| has a PVH note, no entry point was chosen | 32-bit at the note's, see :mod:`~.boot32` |
| any other                                 | 64-bit at the entry, see :mod:`~.boot64`  |

A page that holds bytes of the file is launched as NORMAL (the rest of it is zero); a
page that only ``p_memsz`` asks for is a ZERO page, unless a note asks for another type
(:mod:`~.launchnote`). Where zeroes of one segment meet file bytes of another, the file's
bytes win. The file is data from strangers: program
headers are read one by one with pyelftools, never its higher-level objects, which
follow more of the file's pointers than a loader needs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.errors import ImageError
from kvmlaunch.images.boot32 import boot32
from kvmlaunch.images.boot64 import boot64
from kvmlaunch.images.launchnote import SpecialPage, launch_notes
from kvmlaunch.images.notes import NoteSegment, read_notes
from kvmlaunch.images.options import PlanOptions, build_plan, outside_memory
from kvmlaunch.images.plan import LaunchPlan, MemoryRegion, PageRange, Piece
from kvmlaunch.images.pvh import pvh_entry
from kvmlaunch.images.source import ImageSource, ViewStream

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

__all__ = ["load"]

_EHDR_SIZE = 64
_PHDR_SIZE = 56
_PHDR_FIELDS = ("offset", "vaddr", "paddr", "filesz", "memsz")
_OFFSET_CLASS, _OFFSET_DATA, _OFFSET_TYPE, _OFFSET_MACHINE = 4, 5, 16, 18
_OFFSET_ENTRY, _OFFSET_PHOFF, _OFFSET_PHENTSIZE = 24, 32, 54


@dataclass(frozen=True)
class _Segment:
    """A PT_LOAD header: ``index`` in the program headers, ``header`` its file offset."""

    index: int
    header: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int

    @property
    def end(self) -> int:
        return self.paddr + self.memsz

    @property
    def file_end(self) -> int:
        return self.paddr + self.filesz

    def __str__(self) -> str:
        return f"segment {self.index} ({self.paddr:#x}..{self.end:#x})"


class _Headers(NamedTuple):
    """What counts of the headers: non-empty PT_LOAD segments, PT_NOTE segments, e_entry."""

    segments: list[_Segment]
    notes: list[NoteSegment]
    entry: int


def load(source: ImageSource, options: PlanOptions) -> LaunchPlan:
    """Plan the launch of an ELF64 executable. Raises ImageError if it breaks a rule."""
    if options.load_addr is not None:
        raise source.fail("an ELF image says itself where it is loaded, by its physical addresses")
    if bytes(source.data[:4]) != b"\x7fELF":
        raise source.fail("not an ELF file: it doesn't begin with 7f 45 4c 46", offset=0)
    source.slice(0, _EHDR_SIZE, "the ELF header")
    memory = options.ram()
    try:
        headers = _read_headers(source)
    except ImageError:
        raise
    except Exception as error:  # whatever pyelftools makes of hostile bytes
        raise source.fail(f"not a readable ELF file: {error or type(error).__name__}") from error
    _check_segments(source, headers.segments, memory)
    wanted = launch_notes(source, read_notes(source, headers.notes))
    ranges = list(_page_ranges(source, headers.segments, wanted.pages))
    pvh = None
    if options.entry is None:
        pvh = pvh_entry(source, read_notes(source, headers.notes))
    if pvh is not None:
        first, vmsa = boot32(_pvh_address(source, headers, *pvh), memory, ranges, options)
    else:
        entry = _start_address(source, headers, options.entry)
        first, vmsa = boot64(entry, memory, ranges, options)
    return build_plan(
        source,
        options,
        "elf",
        memory=memory,
        steps=(first, *ranges),
        vcpus=(vmsa,) * options.vcpus,
        paging=pvh is None,
        apic=wanted.ap_creation and options.confidential,
        vmpls=wanted.vmpls and options.confidential,
    )


def _read_headers(source: ImageSource) -> _Headers:
    from elftools.common.utils import struct_parse
    from elftools.elf.elffile import ELFFile

    stream = cast("IO[bytes]", ViewStream(source.data))
    elf = ELFFile(stream)
    _check_kind(source, elf)
    offset, count = elf["e_phoff"], elf["e_phnum"]
    if count and elf["e_phentsize"] != _PHDR_SIZE:
        raise source.fail(
            f"program headers of {elf['e_phentsize']} bytes, not {_PHDR_SIZE}",
            offset=_OFFSET_PHENTSIZE,
        )
    if offset + count * _PHDR_SIZE > len(source.data):
        raise source.fail(
            f"{count} program headers at {offset:#x} are outside the file", offset=_OFFSET_PHOFF
        )
    headers: list[tuple[int, Any]] = [
        (at, struct_parse(elf.structs.Elf_Phdr, stream, stream_pos=at))
        for at in range(offset, offset + count * _PHDR_SIZE, _PHDR_SIZE)
    ]
    segments = [
        _Segment(index, at, *(header[f"p_{name}"] for name in _PHDR_FIELDS))
        for index, (at, header) in enumerate(headers)
        if header["p_type"] == "PT_LOAD" and header["p_memsz"] | header["p_filesz"]
    ]
    if elf["e_type"] == "ET_DYN":
        _check_position(source, segments, [header["p_type"] for _, header in headers])
    notes = [
        NoteSegment(header["p_offset"], header["p_filesz"], header["p_align"])
        for _, header in headers
        if header["p_type"] == "PT_NOTE"
    ]
    return _Headers(segments, notes, elf["e_entry"])


def _check_kind(source: ImageSource, elf: ELFFile) -> None:
    if elf.elfclass != 64:
        raise source.fail("a 32-bit ELF file; only ELF64 is loaded", offset=_OFFSET_CLASS)
    if not elf.little_endian:
        raise source.fail("a big-endian ELF file; x86-64 is little-endian", offset=_OFFSET_DATA)
    if elf["e_machine"] != "EM_X86_64":
        raise source.fail(
            f"an ELF file for {elf['e_machine']}, not EM_X86_64", offset=_OFFSET_MACHINE
        )
    if elf["e_type"] not in ("ET_EXEC", "ET_DYN"):
        raise source.fail(
            f"an ELF file of type {elf['e_type']}, not an executable (ET_EXEC)",
            offset=_OFFSET_TYPE,
        )


def _check_position(source: ImageSource, segments: list[_Segment], types: list[Any]) -> None:
    """Refuse what only a dynamic linker or a relocating loader could place."""
    if "PT_INTERP" in types:
        raise source.fail(
            "a dynamically linked ELF file: it needs a dynamic linker, link it statically",
            offset=_OFFSET_TYPE,
        )
    if segments and min(segment.paddr for segment in segments) < PAGE_SIZE:
        raise source.fail(
            "a position-independent ELF file linked at physical address 0 doesn't say where it "
            "is loaded; link it at a fixed address (-no-pie)",
            offset=_OFFSET_TYPE,
        )


def _check_segments(
    source: ImageSource, segments: list[_Segment], memory: tuple[MemoryRegion, ...]
) -> None:
    if not segments:
        raise source.fail("no PT_LOAD segment, so there is nothing to load", offset=_OFFSET_PHOFF)
    for segment in segments:
        if segment.filesz > segment.memsz:
            raise source.fail(
                f"{segment} has more bytes in the file ({segment.filesz:#x}) than in memory",
                offset=segment.header,
            )
        if segment.offset + segment.filesz > len(source.data):
            raise source.fail(
                f"{segment} ends at file offset {segment.offset + segment.filesz:#x}, "
                f"the file at {len(source.data):#x}",
                offset=segment.header,
            )
        if outside := outside_memory(memory, segment.paddr, segment.end):
            raise source.fail(f"{segment} {outside}", offset=segment.header)
    filled = sorted((s for s in segments if s.filesz), key=lambda segment: segment.paddr)
    for left, right in pairwise(filled):
        if left.file_end > right.paddr:
            raise source.fail(
                f"the file's bytes of {right} overlap those of {left}", offset=right.header
            )


def _pvh_address(source: ImageSource, headers: _Headers, entry: int, offset: int) -> int:
    """The entry point of a PVH note, which is a physical address."""
    if not any(segment.paddr <= entry < segment.end for segment in headers.segments):
        raise source.fail(f"the PVH entry point {entry:#x} is in no loaded segment", offset=offset)
    return entry


def _start_address(source: ImageSource, headers: _Headers, chosen: int | None) -> int:
    """The entry point as a physical address, which is how it may be given already."""
    entry = headers.entry if chosen is None else chosen
    for segment in headers.segments:
        if segment.paddr <= entry < segment.end:
            return entry
    for segment in headers.segments:
        if segment.vaddr <= entry < segment.vaddr + segment.memsz:
            return entry - segment.vaddr + segment.paddr
    raise source.fail(
        f"the entry point {entry:#x} is in no loaded segment",
        offset=_OFFSET_ENTRY if chosen is None else None,
    )


def _page_ranges(
    source: ImageSource, segments: list[_Segment], special: Sequence[SpecialPage]
) -> Iterator[PageRange]:
    """Ranges in ascending order: file contents, special pages, and what is left as zeroes."""
    filled = list(_filled_ranges(source, segments))
    touched = list(_merge((s.paddr, s.end) for s in segments))
    bare = list(_without(touched, [(r.gpa, r.end) for r in filled]))
    _check_special(source, bare, special)
    named = [
        PageRange(page.gpa, PAGE_SIZE, page.type, page.type.name.lower(), source.basename)
        for page in special
    ]
    zero = [
        PageRange(start, end - start, PageType.ZERO, "bss", f"{source.basename} bss")
        for start, end in _without(bare, [(step.gpa, step.end) for step in named])
    ]
    yield from sorted([*filled, *named, *zero], key=lambda step: step.gpa)


def _check_special(
    source: ImageSource, bare: list[tuple[int, int]], special: Sequence[SpecialPage]
) -> None:
    starts = [start for start, _ in bare]
    for page in special:
        at = bisect_right(starts, page.gpa) - 1
        if at < 0 or page.gpa >= bare[at][1]:
            raise source.fail(
                f"the {page.type.name} page {page.gpa:#x} of a kvmlaunch note is not in a "
                "segment's memory behind the file's bytes",
                offset=page.offset,
            )


def _filled_ranges(source: ImageSource, segments: list[_Segment]) -> Iterator[PageRange]:
    """One range per run of segments that share pages."""
    run: list[_Segment] = []
    for segment in sorted((s for s in segments if s.filesz), key=lambda s: s.paddr):
        if run and _page_down(segment.paddr) >= _page_up(run[-1].file_end):
            yield _filled_range(source, run)
            run = []
        run.append(segment)
    if run:
        yield _filled_range(source, run)


def _filled_range(source: ImageSource, run: list[_Segment]) -> PageRange:
    gpa = _page_down(run[0].paddr)
    pieces = tuple(
        Piece(
            segment.paddr - gpa,
            source.data[segment.offset : segment.offset + segment.filesz],
            source.basename,
            segment.offset,
        )
        for segment in run
    )
    indices = ",".join(str(segment.index) for segment in run)
    return PageRange(
        gpa,
        _page_up(run[-1].file_end) - gpa,
        PageType.NORMAL,
        "segment",
        f"{source.basename} segment[{indices}]",
        pieces,
    )


def _merge(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The pages that ``spans`` touch, as sorted spans that don't touch each other."""
    start = end = 0
    for low, high in sorted((_page_down(low), _page_up(high)) for low, high in spans):
        if low > end:
            if start < end:
                yield start, end
            start, end = low, high
        end = max(end, high)
    if start < end:
        yield start, end


def _without(
    spans: Iterable[tuple[int, int]], taken: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """``spans`` minus ``taken``; both are sorted and free of overlaps."""
    at = 0
    for start, end in spans:
        while at < len(taken) and taken[at][0] < end:
            if start < taken[at][0]:
                yield start, taken[at][0]
            start = max(start, taken[at][1])
            at += 1
        if start < end:
            yield start, end


def _page_down(address: int) -> int:
    return address // PAGE_SIZE * PAGE_SIZE


def _page_up(address: int) -> int:
    return -(-address // PAGE_SIZE) * PAGE_SIZE
