"""The PVH entry point in an ELF file's notes.

Source: Xen, xen/include/public/elfnote.h.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmlaunch.images.notes import Note
from kvmlaunch.images.source import ImageSource

__all__ = ["pvh_entry"]

_OWNER = b"Xen\0"
_PHYS32_ENTRY = 18


def pvh_entry(source: ImageSource, notes: Iterable[Note]) -> tuple[int, int] | None:
    """The address in the first XEN_ELFNOTE_PHYS32_ENTRY and its file offset; None without one.

    Raises ImageError where the entry isn't 4 or 8 bytes.
    """
    for note in notes:
        if note.type != _PHYS32_ENTRY or note.owner != _OWNER:
            continue
        # GRUB's rule is 4 bytes, Linux writes 8.
        if len(note.descriptor) not in (4, 8):
            raise source.fail(
                f"a PVH entry point of {len(note.descriptor)} bytes, not 4 or 8",
                offset=note.offset,
            )
        return int.from_bytes(note.descriptor, "little"), note.offset
    return None
