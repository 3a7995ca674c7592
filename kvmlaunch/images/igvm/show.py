"""What an IGVM file holds, as rows for people and for JSON. Successive pages make one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kvmlaunch.images.igvm import format as fmt
from kvmlaunch.images.igvm.format import DataType, HeaderType, PageFlag, PlatformType
from kvmlaunch.images.igvm.parse import IgvmFile, Item

__all__ = ["describe_file", "rows", "table"]

_HEX = {"gpa", "policy", "file_offset", "size", "required_zeroes", "required_ones", "byte_offset"}


def describe_file(file: IgvmFile) -> dict[str, Any]:
    """The fixed header and the platforms."""
    head = file.header
    return {
        "version": head.version,
        "architecture": fmt.Architecture(head.architecture).name,
        "page_size": head.page_size,
        "file_size": head.total_size,
        "checksum": f"{head.checksum:#010x}",
        "variable_headers": f"{head.variable_offset:#x}",
        "data": f"{file.data_start:#x}",
        "skipped": file.skipped,
        "platforms": [
            {
                "type": PlatformType(p.platform_type).name,
                "mask": f"{p.mask:#x}",
                "highest_vtl": p.highest_vtl,
                "shared_gpa_boundary": f"{p.shared_gpa_boundary:#x}",
            }
            for p in file.platforms
        ],
    }


def rows(file: IgvmFile) -> Iterator[dict[str, Any]]:
    """A row for each header but the platforms' and for each run of pages."""
    run: list[Item] = []
    for item in file.runs():
        if run and not _continues(run[0], run[-1], item):
            yield _pages_row(run[0], run[-1])
            run = []
        if item.kind == HeaderType.PAGE_DATA:
            run = [run[0] if run else item, item]
        elif item.kind != HeaderType.SUPPORTED_PLATFORM:
            yield _row(item)
    if run:
        yield _pages_row(run[0], run[-1])


def _continues(first: Item, last: Item, item: Item) -> bool:
    """Whether a header is the next page of a run, as QEMU sees it."""
    if item.kind != HeaderType.PAGE_DATA or item.number != last.number + last.repeat:
        return False
    page, before, start = item.value, last.value, first.value
    return (
        page.gpa == before.gpa + before.size * last.repeat
        and page.mask == start.mask
        and page.flags == start.flags
        and page.data_type == start.data_type
        and bool(page.file_offset) == bool(start.file_offset)
    )


def _pages_row(first: Item, last: Item) -> dict[str, Any]:
    page, end = first.value, last.value.gpa + last.value.size * last.repeat
    row = _start(first)
    row["headers"] = last.number + last.repeat - first.number
    row["gpa"] = f"{page.gpa:#x}"
    row["size"] = f"{end - page.gpa:#x}"
    row["data_type"] = DataType(page.data_type).name
    row["flags"] = [flag.name for flag in PageFlag if page.flags & flag]
    row["file_offset"] = f"{page.file_offset:#x}"
    return row


def _start(item: Item) -> dict[str, Any]:
    row = {"header": item.number, "offset": f"{item.offset:#x}", "type": fmt.name_of(item.kind)}
    if hasattr(item.value, "mask"):
        row["mask"] = f"{item.value.mask:#x}"
    return row


def _row(item: Item) -> dict[str, Any]:
    row = _start(item)
    for name, value in item.value._asdict().items():
        if name == "mask" or name.startswith("reserved"):
            continue
        if isinstance(value, bytes):
            row[name] = value.hex()
        else:
            is_hex = name in _HEX or name.endswith(("_bytes", "gpa", "mask"))
            row[name] = f"{value:#x}" if is_hex else value
    return row


def table(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The rows as lines for people; what is 0 or empty is left out."""
    for row in found:
        shown = [
            f"{name}={_short(value)}"
            for name, value in row.items()
            if name not in ("header", "headers", "offset", "type") and value not in ([], "0x0", "")
        ]
        last = row["header"] + row.get("headers", 1) - 1
        which = f"{row['header']}" if last == row["header"] else f"{row['header']}..{last}"
        line = f"{which:>9} {row['offset']:>10} {row['type']:<20} {' '.join(shown)}"
        yield line.rstrip()


def _short(value: object) -> str:
    if isinstance(value, list):
        return ",".join(str(part) for part in value)
    text = str(value)
    return text if len(text) <= 96 else f"{text[:16]}..."
