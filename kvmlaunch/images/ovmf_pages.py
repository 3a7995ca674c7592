"""What OVMF and an SVSM are launched as: firmware pages and metadata sections."""

from __future__ import annotations

from itertools import pairwise

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.images.options import outside_memory
from kvmlaunch.images.ovmf_table import OvmfSection
from kvmlaunch.images.plan import HIGH_MEMORY, MemoryRegion, PageRange, Piece
from kvmlaunch.images.source import ImageSource
from kvmlaunch.images.vmm import VmmProfile

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_sections", "check_size", "firmware_range", "in_order", "section_ranges"]

MAX_SIZE = 16 << 20

_HASHES_ORIGIN = "kvmlaunch:kernel-hashes"


def firmware_range(source: ImageSource) -> PageRange:
    """The image's pages, which end at 4 GiB."""
    size, name = len(source.data), source.basename
    pieces = (Piece(0, source.data, name),)
    return PageRange(HIGH_MEMORY - size, size, PageType.NORMAL, "firmware", name, pieces)


def section_ranges(
    source: ImageSource,
    sections: tuple[OvmfSection, ...],
    vmm: VmmProfile,
    hashes: bytes | None = None,
) -> list[PageRange]:
    """The sections as page ranges; ``hashes`` is the page for those of kernel hashes."""
    steps = []
    for section in sections:
        kind = vmm.page_type(section.label)
        pieces: tuple[Piece, ...] = ()
        if hashes is not None and section.label == "kernel-hashes":
            kind, pieces = PageType.NORMAL, (Piece(0, memoryview(hashes), _HASHES_ORIGIN),)
        origin = f"{source.basename} metadata[{section.index}]"
        steps.append(PageRange(section.gpa, section.size, kind, section.label, origin, pieces))
    return steps


def in_order(
    pages: tuple[str, ...], firmware: Sequence[PageRange], sections: Sequence[PageRange]
) -> list[PageRange]:
    """All page ranges in a VMM profile's order (`VmmProfile.pages`)."""

    def part(step: PageRange) -> str:
        return "cpuid" if step.label == "cpuid" and "cpuid" in pages else "metadata"

    steps = {"firmware": list(firmware)}
    for name in ("metadata", "cpuid"):
        steps[name] = [step for step in sections if part(step) == name]
    return [step for name in pages for step in steps[name]]


def check_size(source: ImageSource) -> None:
    """Refuse what is no number of pages, or too much."""
    size = len(source.data)
    if size % PAGE_SIZE or not 0 < size <= MAX_SIZE:
        raise source.fail(
            f"firmware of {size:#x} bytes: the size must be a multiple of 4 KiB "
            f"and at most {MAX_SIZE >> 20} MiB",
            offset=size,
        )


def check_sections(
    source: ImageSource, sections: tuple[OvmfSection, ...], ram: tuple[MemoryRegion, ...]
) -> None:
    """Refuse sections that are no pages, overlap, or leave the RAM."""
    for section in sections:
        if section.gpa % PAGE_SIZE or section.size % PAGE_SIZE or not section.size:
            raise source.fail(
                f"{section} is not a positive number of 4 KiB pages", offset=section.offset
            )
        if section.type in (2, 3) and section.size != PAGE_SIZE:
            raise source.fail(f"{section} must be one page", offset=section.offset)
        if outside := outside_memory(ram, section.gpa, section.end):
            raise source.fail(f"{section} {outside}", offset=section.offset)
    by_gpa = sorted(sections, key=lambda section: section.gpa)
    for left, right in pairwise(by_gpa):
        if left.end > right.gpa:
            raise source.fail(f"{right} overlaps {left}", offset=right.offset)
