"""What an ELF file asks of its launch, in notes with the owner ``kvmlaunch``.

| type | descriptor                | means                                                   |
|------|---------------------------|---------------------------------------------------------|
| 1    | u64 GPA, u32 page type    | launch this page as SECRETS (5) or CPUID (6), not ZERO   |
| 2    | none                      | the guest starts its vCPUs but the first by GHCB AP      |
|      |                           | creation: they are held in reset until then              |
| 3    | none                      | the guest runs other VMPLs than 0, which needs a host     |
|      |                           | that has them                                             |

The page is one that the file has no bytes for (bss), so that a loader that doesn't know
these notes, or a plain VM, gives the guest a page of zeroes there. What types 2 and 3 say is
nothing that is measured.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.images.notes import Note
from kvmlaunch.images.source import ImageSource

__all__ = ["LaunchNotes", "SpecialPage", "launch_notes"]

_OWNER = b"kvmlaunch\0"
_PAGE, _AP_CREATION, _VMPLS = 1, 2, 3
_DESCRIPTOR = struct.Struct("<QI")
_TYPES = (PageType.SECRETS, PageType.CPUID)


class SpecialPage(NamedTuple):
    """A page to launch with ``type``; ``offset`` is that of its note."""

    gpa: int
    type: PageType
    offset: int


class LaunchNotes(NamedTuple):
    """The special ``pages`` by GPA, whether the guest does ``ap_creation``, runs ``vmpls``."""

    pages: tuple[SpecialPage, ...]
    ap_creation: bool
    vmpls: bool


def launch_notes(source: ImageSource, notes: Iterable[Note]) -> LaunchNotes:
    """Read the notes. Raises ImageError for one that isn't in the table, or a page named twice."""
    pages: dict[int, SpecialPage] = {}
    ap_creation = vmpls = False
    for note in notes:
        if note.owner != _OWNER:
            continue
        if note.type == _AP_CREATION:
            ap_creation = True
        elif note.type == _VMPLS:
            vmpls = True
        elif note.type == _PAGE:
            page = _special_page(source, note)
            if page.gpa in pages:
                raise source.fail(f"a second note for page {page.gpa:#x}", offset=note.offset)
            pages[page.gpa] = page
        else:
            raise source.fail(f"an unknown kvmlaunch note, type {note.type}", offset=note.offset)
    return LaunchNotes(tuple(pages[gpa] for gpa in sorted(pages)), ap_creation, vmpls)


def _special_page(source: ImageSource, note: Note) -> SpecialPage:
    if len(note.descriptor) != _DESCRIPTOR.size:
        raise source.fail(
            f"a kvmlaunch note for a page has {len(note.descriptor)} bytes, not {_DESCRIPTOR.size}",
            offset=note.offset,
        )
    gpa, kind = _DESCRIPTOR.unpack(note.descriptor)
    if gpa % PAGE_SIZE:
        raise source.fail(
            f"a kvmlaunch note for {gpa:#x}, where no 4 KiB page begins", offset=note.offset
        )
    if kind not in _TYPES:
        raise source.fail(
            f"a kvmlaunch note asks for page type {kind}, not SECRETS (5) or CPUID (6)",
            offset=note.offset,
        )
    return SpecialPage(gpa, PageType(kind), note.offset)
