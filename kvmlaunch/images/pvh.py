"""The PVH entry point in an ELF file's notes.

A note is owner size, descriptor size and type (u32 each), the owner's name and the
descriptor, each padded to the alignment of its segment. The notes are data from
strangers: sizes are checked before anything is looked at, and a file may point at the
same notes from 65535 program headers, so what is read in all has a limit.

Source: System V gABI, "Note Section"; Xen, xen/include/public/elfnote.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvmlaunch.images.source import ImageSource

__all__ = ["NoteSegment", "pvh_entry"]

_HEADER = struct.Struct("<3I")
_OWNER = b"Xen\0"
_PHYS32_ENTRY = 18
_MOST_BYTES = 1 << 20


class NoteSegment(NamedTuple):
    """A PT_NOTE header: file ``offset`` and ``size`` of the notes, and their ``align``."""

    offset: int
    size: int
    align: int


def pvh_entry(source: ImageSource, segments: Iterable[NoteSegment]) -> tuple[int, int] | None:
    """The address in the first XEN_ELFNOTE_PHYS32_ENTRY and its file offset; None without one.

    Raises ImageError where notes are outside the file or too many, and where the entry
    isn't 4 or 8 bytes.
    """
    left = _MOST_BYTES
    for segment in segments:
        left -= segment.size
        if left < 0:
            raise source.fail(f"more than {_MOST_BYTES >> 20} MiB of notes", offset=segment.offset)
        for at, owner, kind, descriptor in _notes(source, segment):
            if kind != _PHYS32_ENTRY or owner != _OWNER:
                continue
            # GRUB's rule is 4 bytes, Linux writes 8.
            if len(descriptor) not in (4, 8):
                raise source.fail(
                    f"a PVH entry point of {len(descriptor)} bytes, not 4 or 8", offset=at
                )
            return int.from_bytes(descriptor, "little"), at
    return None


def _notes(
    source: ImageSource, segment: NoteSegment
) -> Iterator[tuple[int, memoryview, int, memoryview]]:
    """(file offset, owner, type, descriptor) of each note; bytes that hold none end it."""
    data = source.slice(segment.offset, segment.size, "a segment of notes")
    align = 8 if segment.align == 8 else 4
    at = 0
    while at + _HEADER.size <= len(data):
        owner_size, size, kind = _HEADER.unpack_from(data, at)
        owner = at + _HEADER.size
        descriptor = _padded(owner + owner_size, align)
        if descriptor + size > len(data):
            return
        yield (
            segment.offset + at,
            data[owner : owner + owner_size],
            kind,
            data[descriptor : descriptor + size],
        )
        at = _padded(descriptor + size, align)


def _padded(at: int, align: int) -> int:
    return -(-at // align) * align
