"""Lines of a page log in C. Importing this needs the compiled extension."""

from __future__ import annotations

from kvmlaunch.hashing._ext import ffi, lib
from kvmlaunch.hashing.hasher import RECORD_SIZE

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from kvmlaunch.abi.page import Buffer

__all__ = ["page_lines"]


def page_lines(
    seq: int,
    gpa: int,
    page_type: str,
    records: Buffer,
    origin: str,
    offset: int | None,
    label: str,
) -> memoryview:
    """Page events of schema kvmlaunch.log/1 for successive pages, a line each.

    ``records`` has ``RECORD_SIZE`` bytes per page; ``origin`` and ``label`` are JSON strings,
    and ``offset`` is that of the first page in the file ``origin``.
    """
    npages = len(records) // RECORD_SIZE
    texts = [text.encode("ascii") for text in (page_type, origin, label)]
    out = bytearray(npages * (lib.KL_PAGE_LINE_BYTES + sum(map(len, texts))))
    kind, name, last = texts
    size = lib.kl_page_lines(
        *(ffi.from_buffer(out), seq, gpa, kind, ffi.from_buffer(records), npages),
        *(name, -1 if offset is None else offset, last),
    )
    return memoryview(out)[:size]
