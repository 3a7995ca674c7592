"""Structures whose dataclass fields are the table: each says its offset and size.

What lies between the fields is reserved. A structure keeps non-zero reserved bytes as runs
(offset, bytes), at most one per gap, so that decode and encode lose nothing.
"""

from __future__ import annotations

from kvmlaunch.errors import FormatError

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, TypeAlias

__all__ = ["Gaps", "Runs", "canonical_runs", "find_gaps", "find_runs", "int_at", "raw_at"]

Gaps: TypeAlias = tuple[tuple[int, int], ...]
Runs: TypeAlias = tuple[tuple[int, bytes], ...]


def int_at(offset: int, size: int, **more: Any) -> Any:
    """Return a dataclass field for an unsigned integer; Any, for annotations to hold."""
    import dataclasses  # a VMSA, which nearly every command needs, has a table without

    default = more.pop("default", 0)
    return dataclasses.field(default=default, metadata={"at": (offset, size), **more})


def raw_at(offset: int, size: int, **more: Any) -> Any:
    """Return a dataclass field for bytes, zero by default."""
    import dataclasses

    return dataclasses.field(default=bytes(size), metadata={"at": (offset, size), **more})


def find_gaps(places: Iterable[tuple[int, int]], size: int) -> Gaps:
    """Return (start, end) of what the places (offset, size), in order, leave free."""
    gaps, at = [], 0
    for offset, length in places:
        if offset > at:
            gaps.append((at, offset))
        at = offset + length
    if at < size:
        gaps.append((at, size))
    return tuple(gaps)


def find_runs(buf: bytes, gaps: Gaps) -> Iterator[tuple[int, bytes]]:
    """Yield what is not zero in the gaps, from the first to the last non-zero byte of each."""
    for start, end in gaps:
        run = buf[start:end].rstrip(b"\0")
        if run:
            first = len(run) - len(run.lstrip(b"\0"))
            yield start + first, run[first:]


def canonical_runs(runs: Runs, gaps: Gaps) -> Runs:
    """Return the runs as `find_runs` finds them.

    Raises:
        FormatError: a run reaches outside its gap, or bytes are given twice.
    """
    buf = bytearray(gaps[-1][1] if gaps else 0)
    written: set[int] = set()
    for offset, data in runs:
        covers = range(offset, offset + len(data))
        if not any(start <= offset and covers.stop <= end for start, end in gaps):
            raise FormatError("reserved bytes reach outside one reserved gap", offset=offset)
        if not written.isdisjoint(covers):
            raise FormatError("reserved bytes are given twice", offset=offset)
        written.update(covers)
        buf[offset : covers.stop] = data
    return tuple(find_runs(bytes(buf), gaps))
