"""What every backend gives."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

from kvmlaunch.abi.digest import DIGEST_SIZE, VMSA_TSC, page_info
from kvmlaunch.abi.page import PAGE_SIZE, Buffer, PageType
from kvmlaunch.errors import FormatError

__all__ = ["RECORD_SIZE", "Hasher"]

RECORD_SIZE = 2 * DIGEST_SIZE
"""Bytes of a page's record: CONTENTS, and the launch digest after the page."""

_BATCH_PAGES = 4096  # of one call of a backend (csrc/hashing.h), then Ctrl-C gets through
_THREADED_PAGES = 128  # fewer are as fast without waiting for another thread
_NO_CONTENTS = bytes(DIGEST_SIZE)
_NO_PERMS = (0, 0, 0)
_INFO = slice(0x60, 0x68)  # of PAGE_INFO: LENGTH to VMPL3_PERMS


class Hasher(ABC):
    """Adds ranges of pages to launch digests.

    Arguments that the methods share: ``digest`` (48 bytes, the launch digest so far),
    ``page_type`` (1..6), ``gpa`` of the first page, ``data`` (``npages`` whole pages in one
    buffer, any alignment; ignored, and may be None, for types without measured contents),
    ``imi_page`` and ``vmpl_perms`` (see `LaunchDigest.update`), ``as_given`` (a VMSA's TSC
    fields count, see `page_contents`) and ``threads`` (how many work at once; by default as
    many as there are CPUs, one for few pages). All threads have ended when a call returns.

    The GIL is released while a batch of pages is hashed in C, and nothing is copied.

    Attributes: ``name`` of the backend.
    """

    name: str

    def contents(self, data: Buffer, *, threads: int | None = None) -> bytes:
        """CONTENTS of each page, 48 bytes apiece. FormatError for parts of pages."""
        view = memoryview(data).cast("B")
        if view.nbytes % PAGE_SIZE:
            raise FormatError(f"{view.nbytes} bytes are not whole pages")
        out = bytearray(view.nbytes // PAGE_SIZE * DIGEST_SIZE)
        for first, count in _batches(view.nbytes // PAGE_SIZE):
            part = memoryview(out)[first * DIGEST_SIZE : (first + count) * DIGEST_SIZE]
            self._contents(_pages(view, first, count), part, _threads(threads, count))
        return bytes(out)

    def extend(
        self,
        digest: bytes,
        page_type: int,
        gpa: int,
        data: Buffer | None,
        npages: int,
        *,
        imi_page: bool = False,
        vmpl_perms: tuple[int, int, int] = _NO_PERMS,
        as_given: bool = False,
        threads: int | None = None,
    ) -> bytes:
        """The launch digest after ``npages`` more pages. Raises FormatError."""
        info = _info(digest, page_type, gpa, npages, imi_page, vmpl_perms)
        view = _measured(page_type, data, npages, as_given)
        current = bytearray(digest)
        self._add(current, info, gpa, view, npages, None, threads)
        return bytes(current)

    def records(
        self,
        digest: bytes,
        page_type: int,
        gpa: int,
        data: Buffer | None,
        npages: int,
        *,
        imi_page: bool = False,
        vmpl_perms: tuple[int, int, int] = _NO_PERMS,
        as_given: bool = False,
        threads: int | None = None,
    ) -> bytes:
        """The same, as ``RECORD_SIZE`` bytes per page: CONTENTS, and the digest after it."""
        info = _info(digest, page_type, gpa, npages, imi_page, vmpl_perms)
        view = _measured(page_type, data, npages, as_given)
        out = bytearray(npages * RECORD_SIZE)
        self._add(bytearray(digest), info, gpa, view, npages, memoryview(out), threads)
        return bytes(out)

    def extend_contents(
        self,
        digest: bytes,
        page_type: int,
        gpa: int,
        contents: Buffer,
        *,
        imi_page: bool = False,
        vmpl_perms: tuple[int, int, int] = _NO_PERMS,
    ) -> bytes:
        """The launch digest after pages whose CONTENTS, 48 bytes each, are known already."""
        npages, rest = divmod(len(contents), DIGEST_SIZE)
        if rest:
            raise FormatError(f"CONTENTS are {DIGEST_SIZE} bytes per page, not {len(contents)}")
        current = bytearray(digest)
        info = _info(digest, page_type, gpa, npages, imi_page, vmpl_perms)
        self._chain(current, info, gpa, contents, npages, None)
        return bytes(current)

    def _add(
        self,
        digest: bytearray,
        info: bytes,
        gpa: int,
        view: memoryview | None,
        npages: int,
        out: memoryview | None,
        threads: int | None,
    ) -> None:
        """Add any number of pages to ``digest``; ``out`` gets their records, if they are wanted."""
        if view is None:
            self._chain(digest, info, gpa, _NO_CONTENTS, npages, out)
            return
        if out is None:
            unwanted = memoryview(bytearray(min(npages, _BATCH_PAGES) * RECORD_SIZE))
        for first, count in _batches(npages):
            at = first * RECORD_SIZE
            self._records(
                digest,
                info,
                gpa + first * PAGE_SIZE,
                _pages(view, first, count),
                (unwanted if out is None else out[at:])[: count * RECORD_SIZE],
                _threads(threads, count),
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    @abstractmethod
    def _contents(self, data: memoryview, out: memoryview, threads: int) -> None:
        """Fill ``out`` with CONTENTS of a batch of pages."""

    @abstractmethod
    def _chain(
        self,
        digest: bytearray,
        info: bytes,
        gpa: int,
        contents: Buffer,
        npages: int,
        out: memoryview | None,
    ) -> None:
        """Add pages with known contents (of one page: the same for all) to ``digest``.

        ``out`` gets their records, for pages of the same contents.
        """

    @abstractmethod
    def _records(
        self,
        digest: bytearray,
        info: bytes,
        gpa: int,
        data: memoryview,
        out: memoryview,
        threads: int,
    ) -> None:
        """Add a batch of pages to ``digest``; ``out`` gets their records."""


def _info(
    digest: bytes,
    page_type: int,
    gpa: int,
    npages: int,
    imi_page: bool,
    vmpl_perms: tuple[int, int, int],
) -> bytes:
    """Bytes 0x60..0x67 of PAGE_INFO, with all arguments checked."""
    if npages < 0:
        raise FormatError(f"{npages} pages can't be measured")
    last = gpa + max(npages - 1, 0) * PAGE_SIZE
    for address in (last, gpa):
        info = page_info(
            digest, _NO_CONTENTS, page_type, address, imi_page=imi_page, vmpl_perms=vmpl_perms
        )
    return info[_INFO]


def _measured(
    page_type: int, data: Buffer | None, npages: int, as_given: bool
) -> memoryview | None:
    """The bytes that are hashed, or None for a type without measured contents."""
    if not PageType(page_type).measures_contents:
        return None
    if data is None:
        raise FormatError(f"a {PageType(page_type).name} page is measured by its contents")
    view = memoryview(data).cast("B")
    if view.nbytes != npages * PAGE_SIZE:
        raise FormatError(f"{npages} pages are {npages * PAGE_SIZE} bytes, not {view.nbytes}")
    if page_type == PageType.VMSA and not as_given:
        return _without_tsc(view, npages)
    return view


def _without_tsc(view: memoryview, npages: int) -> memoryview:
    fields = [
        slice(at + VMSA_TSC.start, at + VMSA_TSC.stop)
        for at in range(0, npages * PAGE_SIZE, PAGE_SIZE)
    ]
    if not any(any(view[field]) for field in fields):
        return view
    pages = bytearray(view)
    for field in fields:
        pages[field] = bytes(field.stop - field.start)
    return memoryview(pages)


def _batches(npages: int) -> list[tuple[int, int]]:
    """(first page, pages) of each call of a backend."""
    return [(at, min(_BATCH_PAGES, npages - at)) for at in range(0, npages, _BATCH_PAGES)]


def _pages(view: memoryview, first: int, count: int) -> memoryview:
    return view[first * PAGE_SIZE : (first + count) * PAGE_SIZE]


def _threads(wanted: int | None, npages: int) -> int:
    if wanted is not None:
        return max(wanted, 1)
    return 1 if npages < _THREADED_PAGES else len(os.sched_getaffinity(0))
