"""Pieces of a page range that are kept as numbers: a file may have one for each of its pages."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import overload

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.images.plan import Piece
from kvmlaunch.images.source import ImageSource

__all__ = ["FilePieces"]


class FilePieces(Sequence[Piece]):
    """Whole pages of a file as the pieces of a range, each made when it is asked for."""

    __slots__ = ("_name", "_pages", "_source")

    def __init__(self, source: ImageSource) -> None:
        self._source, self._name = source, source.basename
        # Three numbers for each piece: first page in the range, file offset, pages.
        self._pages = array("I")

    def add(self, page: int, file_offset: int, count: int) -> None:
        """Pages of the range, in ascending order, have these bytes of the file."""
        pages = self._pages
        if len(pages) and (page, file_offset) == (
            pages[-3] + pages[-1],
            pages[-2] + pages[-1] * PAGE_SIZE,
        ):
            pages[-1] += count
        else:
            pages.extend((page, file_offset, count))

    def following(self, offset: int) -> int:
        """Index of the first piece that begins behind ``offset`` (bytes from the range's start)."""
        first = self._pages
        return bisect_right(range(len(self)), offset // PAGE_SIZE, key=lambda n: first[3 * n])

    def __len__(self) -> int:
        return len(self._pages) // 3

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Piece, ...]: ...
    def __getitem__(self, index: int | slice) -> Piece | tuple[Piece, ...]:
        if isinstance(index, slice):
            return tuple(self[n] for n in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = 3 * (index % len(self))
        page, offset, count = self._pages[at : at + 3]
        data = self._source.data[offset : offset + count * PAGE_SIZE]
        return Piece(page * PAGE_SIZE, data, self._name, offset)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FilePieces) and other._source is self._source:
            return self._pages == other._pages
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self._pages.tobytes())
