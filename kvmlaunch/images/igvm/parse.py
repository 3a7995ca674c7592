"""An IGVM file taken apart: framing and the rules that need no platform to be chosen.

Headers are decoded when they are walked over and page contents stay views of the mapped file,
so that a large file takes no more memory than a small one. A header is named by its number
among the variable headers, from 0.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvmlaunch.errors import ImageError
from kvmlaunch.images.igvm import format as fmt
from kvmlaunch.images.igvm.format import DataType, HeaderType, PageFlag, PlatformType
from kvmlaunch.images.source import ImageSource

__all__ = ["AREAS_MOST", "IgvmFile", "Item", "parse", "single"]

AREAS_MOST = 4096
"""Parameter areas of a file, at most; known files have five."""

_CHUNK = 1 << 20
_PAGE = struct.Struct("<IIQIIIHH")  # a PAGE_DATA header with its type and length
_PAGE_DATA = int(HeaderType.PAGE_DATA)
_RUN_HEADERS = 1024
_NOT_SPECIAL = int(PageFlag.SHARED | PageFlag.IS_2MB)
_PARAMETER_SIZES = {
    HeaderType.VP_COUNT_PARAMETER: 4,
    HeaderType.ENVIRONMENT_INFO_PARAMETER: 4,
    HeaderType.MMIO_RANGES: 32,
    HeaderType.MEMORY_MAP: 24,
}
_BEFORE = ("a platform header", "an initialization header", "a directive")


class Item(NamedTuple):
    """A variable header: its number, its offset in the file, its type and its value.

    ``repeat``: so many PAGE_DATA headers, each of which is the one before with the next page and,
    if it has data, the next bytes of the file.
    """

    number: int
    offset: int
    kind: int
    value: Any
    repeat: int = 1

    def __str__(self) -> str:
        return f"header {self.number} ({fmt.name_of(self.kind)})"


@dataclass(frozen=True)
class IgvmFile:
    """A file that keeps the format's rules.

    Attributes: ``source``, ``header``, ``platforms``, ``counts`` (known headers by type) and
    ``skipped`` (headers of unknown types that may be left out); ``long_runs``: offset -> number
    of headers, where many pages continue each other.
    """

    source: ImageSource = field(repr=False)
    header: fmt.FixedHeader
    platforms: tuple[fmt.SupportedPlatform, ...]
    counts: Mapping[int, int]
    skipped: int
    long_runs: dict[int, int] = field(repr=False)

    @property
    def data_start(self) -> int:
        """Where the file's data begins, behind the variable headers."""
        return self.header.variable_offset + self.header.variable_size

    def items(self) -> Iterator[Item]:
        """Every header of a known type, in file order, each for itself."""
        for item in self.runs():
            yield from single(item)

    def runs(self) -> Iterator[Item]:
        """The same with as many pages in one as continue each other."""
        for number, offset, kind, _, count in _frames(self.source, self.header, self.long_runs):
            if kind in fmt.LAYOUTS:
                layout, make = fmt.LAYOUTS[kind]
                value = make._make(layout.unpack_from(self.source.data, offset + fmt.TLV.size))
                yield Item(number, offset, kind, value, count)

    def runs_for(self, mask: int) -> Iterator[Item]:
        """Those that apply to the platform of this mask, and those without a mask."""
        for item in self.runs():
            if getattr(item.value, "mask", mask) & mask:
                yield item

    def platform(self, kind: PlatformType) -> fmt.SupportedPlatform:
        """The platform header of this type. ImageError names those that there are."""
        for platform in self.platforms:
            if platform.platform_type == kind:
                return platform
        has = ", ".join(
            f"{PlatformType(p.platform_type).name} (mask {p.mask:#x})" for p in self.platforms
        )
        raise self.source.fail(f"the file has no platform {kind.name}; it is for {has or 'none'}")

    def fail(self, item: Item, rule: str) -> ImageError:
        """An error that names file, offset and header (to be raised by the caller)."""
        return self.source.fail(f"{item}: {rule}", offset=item.offset)


def parse(source: ImageSource) -> IgvmFile:
    """Check a file against the format's rules. Raises ImageError for the first that it breaks."""
    header = _fixed_header(source)
    _check_checksum(source, header)
    checker = _Checker(source, header)
    checker.run()
    return IgvmFile(
        source,
        header,
        tuple(checker.platforms),
        dict(checker.counts),
        checker.skipped,
        checker.long_runs,
    )


def _fixed_header(source: ImageSource) -> fmt.FixedHeader:
    data, size = source.data, len(source.data)
    if size < fmt.FIXED_V1.size:
        raise source.fail(f"an IGVM file has at least {fmt.FIXED_V1.size} bytes, this has {size}")
    magic, *words = fmt.FIXED_V1.unpack_from(data)
    if magic != fmt.MAGIC:
        raise source.fail(f"magic is {magic:#x}, not {fmt.MAGIC:#x} ('IGVM')", offset=0)
    if words[0] not in (1, 2):
        raise source.fail(f"format version {words[0]} is neither 1 nor 2", offset=4)
    header = fmt.FixedHeader(*words)
    if header.version == 2:
        if size < fmt.FIXED_V2.size:
            raise source.fail(f"a fixed header of version 2 has 32 bytes, this file has {size}")
        header = fmt.FixedHeader(*fmt.FIXED_V2.unpack_from(data)[1:])
        if header.architecture != fmt.Architecture.X64:
            known = {a.value: a.name for a in fmt.Architecture}
            raise source.fail(
                f"architecture {known.get(header.architecture, header.architecture)} is not X64",
                offset=24,
            )
        if header.page_size != fmt.PAGE_SIZE:
            raise source.fail(f"page size {header.page_size} is not 4096", offset=28)
    if header.total_size != size:
        raise source.fail(
            f"the header says {header.total_size:#x} bytes, the file has {size:#x}", offset=16
        )
    if header.variable_offset < header.size or header.variable_offset % 8:
        raise source.fail(
            f"variable headers at {header.variable_offset:#x}: must be a multiple of 8 behind the "
            f"fixed header of {header.size} bytes",
            offset=8,
        )
    if header.variable_offset + header.variable_size > size:
        raise source.fail(
            f"variable headers of {header.variable_size:#x} bytes at {header.variable_offset:#x} "
            f"end beyond the file of {size:#x}",
            offset=12,
        )
    return header


def _check_checksum(source: ImageSource, header: fmt.FixedHeader) -> None:
    crc = zlib.crc32(header.encode(0))
    end = header.variable_offset + header.variable_size
    for at in range(header.variable_offset, end, _CHUNK):
        crc = zlib.crc32(source.data[at : min(at + _CHUNK, end)], crc)
    if crc != header.checksum:
        raise source.fail(
            f"checksum {header.checksum:#010x} is wrong: fixed and variable headers have {crc:#x}",
            offset=20,
        )


def single(item: Item) -> Iterator[Item]:
    """The headers of an item, each for itself."""
    if item.repeat == 1:
        yield item
        return
    page: fmt.PageData = item.value
    for n in range(item.repeat):
        gpa = page.gpa + n * page.size
        file_offset = page.file_offset + n * page.size if page.file_offset else 0
        value = page._replace(gpa=gpa, file_offset=file_offset)
        yield Item(item.number + n, item.offset + n * _PAGE.size, item.kind, value)


def _frames(
    source: ImageSource, header: fmt.FixedHeader, long_runs: dict[int, int]
) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, offset, type, length, count) of every variable header; see `Item`.

    ``long_runs`` is filled by the first walk, and spares the next ones to count them again.
    """
    data, at = source.data, header.variable_offset
    end = at + header.variable_size
    number, unpack, prefix = 0, fmt.TLV.unpack_from, fmt.TLV.size
    while at < end:
        if at + prefix > end:
            raise source.fail(
                f"header {number}: {end - at} bytes are left of the variable headers, a header "
                f"begins with {prefix}",
                offset=at,
            )
        kind, length = unpack(data, at)
        size = prefix + (length + 7 & ~7)
        if at + size > end:
            raise source.fail(
                f"header {number} ({fmt.name_of(kind)}): length {length:#x} ends beyond the "
                f"variable headers, which end at {end:#x}",
                offset=at,
            )
        count = 1
        if kind == _PAGE_DATA and size == _PAGE.size:
            count = long_runs.get(at) or _run_length(data, at, end)
            if count >= _RUN_HEADERS:
                long_runs[at] = count
        yield number, at, kind, length, count
        at += size * count
        number += count


def _run_length(data: memoryview, at: int, end: int) -> int:
    """How many PAGE_DATA headers from ``at`` on continue each other."""
    _, length, gpa, mask, file_offset, flags, data_type, reserved = _PAGE.unpack_from(data, at)
    size = fmt.LARGE_PAGE if flags & 1 else fmt.PAGE_SIZE
    step = size if file_offset else 0
    same = (_PAGE_DATA, length, mask, flags, data_type, reserved)
    count, at = 1, at + _PAGE.size
    while at + _PAGE.size <= end:
        stop = at + min((end - at) // _PAGE.size, _RUN_HEADERS) * _PAGE.size
        for kind, length, next_gpa, mask, next_offset, *rest in _PAGE.iter_unpack(data[at:stop]):
            gpa += size
            file_offset += step
            if next_gpa != gpa or next_offset != file_offset:
                return count
            if (kind, length, mask, *rest) != same:
                return count
            count += 1
        at = stop
    return count


class _Checker:
    """One walk over the headers, in file order, with what the rules must remember."""

    def __init__(self, source: ImageSource, header: fmt.FixedHeader) -> None:
        self._source = source
        self._header = header
        self._data_start = header.variable_offset + header.variable_size
        self._section = 0
        # Bytes of each parameter area; None once it has been inserted.
        self._areas: dict[int, int | None] = {}
        self._documents = 0
        self._known_mask = 0
        self.platforms: list[fmt.SupportedPlatform] = []
        self.counts: Counter[int] = Counter()
        self.skipped = 0
        self.long_runs: dict[int, int] = {}
        self._rules: dict[int, Callable[[Item], None]] = {
            HeaderType.SUPPORTED_PLATFORM: self._platform,
            HeaderType.GUEST_POLICY: self._reserved,
            HeaderType.PAGE_TABLE_RELOCATION_REGION: self._reserved,
            HeaderType.CORIM_DOCUMENT: self._corim,
            HeaderType.CORIM_SIGNATURE: self._corim,
            HeaderType.PARAMETER_AREA: self._area,
            HeaderType.PAGE_DATA: self._page,
            HeaderType.PARAMETER_INSERT: self._insert,
            HeaderType.VP_CONTEXT: self._context,
            HeaderType.REQUIRED_MEMORY: self._required,
            HeaderType.SNP_ID_BLOCK: self._id_block,
            HeaderType.ERROR_RANGE: self._error_range,
            **dict.fromkeys(fmt.PARAMETERS, self._parameter),
        }

    def run(self) -> None:
        data, prefix = self._source.data, fmt.TLV.size
        for number, offset, kind, length, count in _frames(
            self._source, self._header, self.long_runs
        ):
            known = fmt.LAYOUTS.get(kind)
            if known is None:
                self._unknown(number, offset, kind)
                continue
            layout, make = known
            if length != layout.size:
                raise self._source.fail(
                    f"header {number} ({fmt.name_of(kind)}): length {length} is not {layout.size}",
                    offset=offset,
                )
            value = make._make(layout.unpack_from(data, offset + prefix))
            item = Item(number, offset, kind, value, count)
            self._check_order(item)
            self.counts[kind] += count
            if kind != HeaderType.SUPPORTED_PLATFORM and hasattr(item.value, "mask"):
                self._mask(item)
            rule = self._rules.get(kind)
            if rule is not None:
                rule(item)

    def _fail(self, item: Item, rule: str) -> ImageError:
        return self._source.fail(f"{item}: {rule}", offset=item.offset)

    def _unknown(self, number: int, offset: int, kind: int) -> None:
        if not kind & fmt.OPTIONAL:
            raise self._source.fail(
                f"header {number}: type {kind:#x} is unknown and not optional (bit 31 is clear)",
                offset=offset,
            )
        self.skipped += 1

    def _check_order(self, item: Item) -> None:
        section = fmt.section_of(item.kind)
        assert section is not None  # every known type is in one
        if section < self._section:
            raise self._fail(item, f"follows {_BEFORE[self._section]}, but belongs before those")
        self._section = section

    def _mask(self, item: Item) -> None:
        mask = item.value.mask
        if not mask or mask & ~self._known_mask:
            raise self._fail(
                item,
                f"compatibility mask {mask:#x} names no platform; those of the file have "
                f"{self._known_mask:#x}",
            )

    def _zero(self, item: Item, **values: int) -> None:
        for name, value in values.items():
            if value:
                raise self._fail(item, f"{name} must be 0, not {value:#x}")

    def _reserved(self, item: Item) -> None:
        self._zero(item, reserved=item.value.reserved)

    def _data(self, item: Item, offset: int, size: int) -> None:
        if offset < self._data_start or offset + size > len(self._source.data):
            raise self._fail(
                item,
                f"{size:#x} bytes at file offset {offset:#x} are not in the file's data, which is "
                f"at {self._data_start:#x}..{len(self._source.data):#x}",
            )

    def _pages(self, item: Item, gpa: int, size: int = fmt.PAGE_SIZE) -> None:
        if gpa % fmt.PAGE_SIZE or size % fmt.PAGE_SIZE or not size:
            raise self._fail(
                item, f"GPA {gpa:#x}, {size:#x} bytes: not a positive number of 4 KiB pages"
            )
        if gpa + size > 1 << 64:
            raise self._fail(item, f"GPA {gpa:#x}, {size:#x} bytes: ends beyond 64 bits")

    def _platform(self, item: Item) -> None:
        platform: fmt.SupportedPlatform = item.value
        mask, kind = platform.mask, platform.platform_type
        if mask.bit_count() != 1 or mask & self._known_mask:
            raise self._fail(item, f"mask {mask:#x} is not one bit that no other platform has")
        if kind not in list(PlatformType):
            raise self._fail(item, f"platform type {kind} is unknown")
        name = PlatformType(kind).name
        if any(kind == other.platform_type for other in self.platforms):
            raise self._fail(item, f"platform {name} is there twice")
        if platform.platform_version != 1:
            raise self._fail(item, f"platform version {platform.platform_version} is not 1")
        if platform.highest_vtl not in (0, 2):
            raise self._fail(item, f"highest VTL {platform.highest_vtl} is neither 0 nor 2")
        if kind in (PlatformType.NATIVE, PlatformType.VSM_ISOLATION):
            self._zero(item, **{f"{name}'s shared GPA boundary": platform.shared_gpa_boundary})
        self.platforms.append(platform)
        self._known_mask |= mask

    def _corim(self, item: Item) -> None:
        self._reserved(item)
        self._data(item, item.value.file_offset, item.value.size_bytes)
        if item.kind == HeaderType.CORIM_DOCUMENT:
            self._documents |= item.value.mask
        elif item.value.mask & ~self._documents:
            raise self._fail(item, f"mask {item.value.mask:#x} has no CORIM_DOCUMENT before")

    def _area(self, item: Item) -> None:
        area: fmt.ParameterArea = item.value
        if area.number_of_bytes % fmt.PAGE_SIZE or not area.number_of_bytes:
            raise self._fail(
                item, f"{area.number_of_bytes:#x} bytes: not a positive number of 4 KiB pages"
            )
        if area.area in self._areas:
            raise self._fail(item, f"parameter area {area.area} is declared twice")
        if len(self._areas) == AREAS_MOST:
            raise self._fail(item, f"more than {AREAS_MOST} parameter areas")
        if area.file_offset:
            self._data(item, area.file_offset, area.number_of_bytes)
        self._areas[area.area] = area.number_of_bytes

    def _area_size(self, item: Item) -> int:
        index = item.value.area
        if index not in self._areas:
            raise self._fail(item, f"there is no parameter area {index} before")
        size = self._areas[index]
        if size is None:
            raise self._fail(item, f"parameter area {index} has been inserted already")
        return size

    def _parameter(self, item: Item) -> None:
        area_size = self._area_size(item)
        size = _PARAMETER_SIZES.get(HeaderType(item.kind), 1)
        if item.value.byte_offset + size > area_size:
            raise self._fail(
                item,
                f"{size} bytes at offset {item.value.byte_offset:#x} end beyond parameter area "
                f"{item.value.area} of {area_size:#x} bytes",
            )

    def _insert(self, item: Item) -> None:
        self._pages(item, item.value.gpa, self._area_size(item))
        self._areas[item.value.area] = None

    def _page(self, item: Item) -> None:
        page: fmt.PageData = item.value
        gpa, _, file_offset, flags, data_type, reserved = page
        if flags & ~7 or reserved:
            self._zero(item, **{"flags besides bits 0 to 2": flags & ~7, "reserved": reserved})
        if data_type > DataType.CPUID_XF:
            raise self._fail(item, f"data type {data_type} is unknown")
        size = page.size
        if gpa % size:
            raise self._fail(item, f"GPA {gpa:#x} is not aligned to the page's {size:#x} bytes")
        end = len(self._source.data)
        if file_offset and not self._data_start <= file_offset <= end - item.repeat * size:
            for one in single(item):
                self._data(one, one.value.file_offset, size)
        if data_type != DataType.NORMAL and flags & _NOT_SPECIAL:
            raise self._fail(item, f"{DataType(data_type).name} is one private page of 4 KiB")

    def _context(self, item: Item) -> None:
        context: fmt.VpContext = item.value
        self._zero(item, reserved=context.reserved)
        self._pages(item, context.gpa)
        if context.mask not in [platform.mask for platform in self.platforms]:
            raise self._fail(
                item, f"mask {context.mask:#x} is for several platforms, whose registers differ"
            )
        if context.file_offset:
            self._data(item, context.file_offset, fmt.PAGE_SIZE)

    def _required(self, item: Item) -> None:
        required: fmt.RequiredMemory = item.value
        self._zero(
            item,
            **{"flags besides bit 0": required.flags & ~1, "reserved": required.reserved},
        )
        self._pages(item, required.gpa, required.number_of_bytes)

    def _id_block(self, item: Item) -> None:
        block: fmt.IdBlockHeader = item.value
        self._zero(item, reserved=int.from_bytes(block.reserved, "little"))
        for what, key in (("ID", block.id_public_key), ("author", block.author_public_key)):
            word = int.from_bytes(key[4:8], "little")
            self._zero(item, **{f"reserved of the {what} key": word})
        if block.author_key_enabled > 1:
            raise self._fail(item, f"author_key_enabled {block.author_key_enabled} is not 0 or 1")

    def _error_range(self, item: Item) -> None:
        self._pages(item, item.value.gpa, item.value.size_bytes)
