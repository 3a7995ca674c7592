"""uAPI structs by field name: fields to bytes, and the fields that a call changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvmlaunch.uapi import ffi

__all__ = ["decode_changes", "encode"]

Resolve = Callable[[Any], int]


class _Leaf(NamedTuple):
    """A primitive in a struct; ``path`` is like ``cs.base`` or ``xcrs.0.value``."""

    path: str
    offset: int
    size: int


class _Layout(NamedTuple):
    size: int
    leaves: tuple[_Leaf, ...]
    by_path: Mapping[str, _Leaf]
    entry: str | None
    """Type of the flexible array at the end, if there is one."""


def encode(
    struct: str,
    fields: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    room: int,
    resolve: Resolve,
) -> bytes:
    """The bytes of ``struct NAME``, its entries, and ``room`` empty entries more.

    Fields that aren't named are zero; values are cut to the field. Raises KeyError.
    """
    layout = _layout(f"struct {struct}")
    out = bytearray(layout.size)
    _fill(out, 0, layout, "", fields, resolve)
    if layout.entry and (entries or room):
        entry = _layout(layout.entry)
        for values in entries:
            at = len(out)
            out += bytes(entry.size)
            _fill(out, at, entry, "", values, resolve)
        out += bytes(entry.size * min(room, 1024))
    return bytes(out)


def decode_changes(struct: str, before: bytes, after: bytes) -> dict[str, int]:
    """Value by path of each field that differs; entries are ``entries.N.field``."""
    if before == after or len(before) != len(after):
        return {}
    layout = _layout(f"struct {struct}")
    found = dict(_changed(layout, "", before, after, 0))
    if layout.entry and len(after) > layout.size:
        entry = _layout(layout.entry)
        for number, at in enumerate(range(layout.size, len(after), entry.size)):
            found.update(_changed(entry, f"entries.{number}.", before, after, at))
    return found


def _changed(
    layout: _Layout, prefix: str, before: bytes, after: bytes, base: int
) -> Iterable[tuple[str, int]]:
    if before[base : base + layout.size] == after[base : base + layout.size]:
        return
    for path, offset, size in layout.leaves:
        at = base + offset
        now = after[at : at + size]
        if now != before[at : at + size]:
            yield prefix + path, int.from_bytes(now, "little")


def _fill(
    out: bytearray, base: int, layout: _Layout, prefix: str, content: Any, resolve: Resolve
) -> None:
    if isinstance(content, dict):
        for name, value in content.items():
            _fill(out, base, layout, f"{prefix}.{name}" if prefix else name, value, resolve)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            _fill(out, base, layout, f"{prefix}.{number}", value, resolve)
    elif isinstance(content, str) and content.startswith("hex:"):
        first = layout.by_path[f"{prefix}.0"]
        data = bytes.fromhex(content.removeprefix("hex:"))
        at = base + first.offset
        data = data[: layout.size - first.offset]
        out[at : at + len(data)] = data
    else:
        leaf = layout.by_path[prefix]
        value = resolve(content) & (1 << 8 * leaf.size) - 1
        at = base + leaf.offset
        out[at : at + leaf.size] = value.to_bytes(leaf.size, "little")


@functools.cache
def _layout(ctype: str) -> _Layout:
    try:
        kind = ffi.typeof(ctype)
    except ffi.error:
        raise KeyError(ctype) from None
    leaves: list[_Leaf] = []
    entry = None
    for name, field in kind.fields or ():
        if field.type.kind == "array" and not field.type.length:
            entry = field.type.item.cname if field.type.item.kind == "struct" else None
        else:
            leaves += _leaves(name, field.type, field.offset)
    return _Layout(ffi.sizeof(kind), tuple(leaves), {leaf.path: leaf for leaf in leaves}, entry)


def _leaves(path: str, kind: Any, offset: int) -> list[_Leaf]:
    if kind.kind == "array":
        size = ffi.sizeof(kind.item)
        parts = [_leaves(f"{path}.{n}", kind.item, offset + n * size) for n in range(kind.length)]
        return [leaf for part in parts for leaf in part]
    if kind.kind in ("struct", "union"):
        parts = [_leaves(f"{path}.{n}", f.type, offset + f.offset) for n, f in kind.fields]
        return [leaf for part in parts for leaf in part]
    return [_Leaf(path, offset, ffi.sizeof(kind))]
