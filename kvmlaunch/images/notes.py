"""Notes of an ELF file, one by one.

A note is owner size, descriptor size and type (u32 each), the owner's name and the
descriptor, each padded to the alignment of its segment. The notes are data from
strangers: sizes are checked before anything is looked at, and a file may point at the
same notes from 65535 program headers, so what is read in all has a limit.

Source: System V gABI, "Note Section".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvmlaunch.images.source import ImageSource

__all__ = ["Note", "NoteSegment", "read_notes"]

_HEADER = struct.Struct("<3I")
_MOST_BYTES = 1 << 20


class NoteSegment(NamedTuple):
    """A PT_NOTE header: file ``offset`` and ``size`` of the notes, and their ``align``."""

    offset: int
    size: int
    align: int


class Note(NamedTuple):
    """One note: its file ``offset``, ``owner`` with its zero byte, ``type``, ``descriptor``."""

    offset: int
    owner: memoryview
    type: int
    descriptor: memoryview


def read_notes(source: ImageSource, segments: Iterable[NoteSegment]) -> Iterator[Note]:
    """Each note of ``segments``; bytes that hold none end their segment.

    Raises ImageError where notes are outside the file or too many.
    """
    left = _MOST_BYTES
    for segment in segments:
        left -= segment.size
        if left < 0:
            raise source.fail(f"more than {_MOST_BYTES >> 20} MiB of notes", offset=segment.offset)
        yield from _notes(source, segment)


def _notes(source: ImageSource, segment: NoteSegment) -> Iterator[Note]:
    data = source.slice(segment.offset, segment.size, "a segment of notes")
    align = 8 if segment.align == 8 else 4
    at = 0
    while at + _HEADER.size <= len(data):
        owner_size, size, kind = _HEADER.unpack_from(data, at)
        owner = at + _HEADER.size
        descriptor = _padded(owner + owner_size, align)
        if descriptor + size > len(data):
            return
        yield Note(
            segment.offset + at,
            data[owner : owner + owner_size],
            kind,
            data[descriptor : descriptor + size],
        )
        at = _padded(descriptor + size, align)


def _padded(at: int, align: int) -> int:
    return -(-at // align) * align
