"""What OVMF (edk2) firmware says about itself: GUIDed table and SEV metadata.

Below the image's reset vector is a table of GUIDed entries, read backwards; one of them
points to the SEV metadata, a list of guest pages that the firmware wants from the launch.
All of this is untrusted input: every length and offset is checked before it is used.
"""

from __future__ import annotations

from kvmlaunch.abi.record import Record
from kvmlaunch.images.source import ImageSource

__all__ = [
    "FOOTER_GUID",
    "GOOD_BUILDS",
    "HASH_TABLE_GUID",
    "METADATA_GUID",
    "RESET_BLOCK_GUID",
    "SECTION_TYPES",
    "SVSM_INFO_GUID",
    "OvmfEntry",
    "OvmfSection",
    "OvmfTables",
    "has_table",
    "parse_table",
    "words",
]

FOOTER_GUID = "96b582de-1fb2-45f7-baea-a366c55a082d"
RESET_BLOCK_GUID = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
SECRET_AREA_GUID = "4c2eb361-7d9b-4cc3-8081-127c90d3d294"
HASH_TABLE_GUID = "7255371f-3a3b-4b04-927b-1da6efa8d454"
METADATA_GUID = "dc886566-984a-4798-a75e-5585a7bf67cc"
TDX_METADATA_GUID = "e47a6535-984a-4798-865e-4685a7bf8ec2"
SVSM_INFO_GUID = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"
IGVM_HINTS_GUID = "784fa70e-3176-4677-8a20-04b68699e374"

_NAMES = {
    FOOTER_GUID: "table footer",
    RESET_BLOCK_GUID: "SEV-ES reset block",
    SECRET_AREA_GUID: "SEV launch secret area",
    HASH_TABLE_GUID: "SEV hash table",
    METADATA_GUID: "SEV metadata",
    TDX_METADATA_GUID: "TDX metadata",
    SVSM_INFO_GUID: "SVSM info",
    IGVM_HINTS_GUID: "IGVM hints",
}

SECTION_TYPES = {
    0x01: "sec-mem",
    0x02: "secrets",
    0x03: "cpuid",
    0x04: "svsm-caa",
    0x10: "kernel-hashes",
}
"""Section type -> name. How the pages are launched depends on the VMM."""

_TRAILER = 18  # bytes behind an entry's data: its length (u16), GUID
_METADATA_HEADER = 16  # bytes: "ASEV", and as u32 size, version, number of sections
_SECTION = 12  # bytes: GPA, size, type, each u32
_TABLE_TAIL = 32  # bytes between the table and the image's end
GOOD_BUILDS = "use a build that supports SEV-SNP (Debian's OVMF.fd or OVMF.amdsev.fd)"


class OvmfEntry(Record):
    """An entry of the GUIDed table: ``offset`` and ``size`` are those of its data."""

    guid: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        """Name and GUID."""
        return f"{self.name} ({self.guid})"


class OvmfSection(Record):
    """A section of the SEV metadata; ``offset`` is where the image describes it."""

    index: int
    offset: int
    gpa: int
    size: int
    type: int

    @property
    def end(self) -> int:
        """First GPA behind the section."""
        return self.gpa + self.size

    @property
    def label(self) -> str:
        """Name of the section's type."""
        return SECTION_TYPES.get(self.type, f"section-type-{self.type:#x}")

    def __str__(self) -> str:
        """Index, type and place, for messages."""
        return f"metadata section {self.index} ({self.label}, {self.gpa:#x}..{self.end:#x})"


class OvmfTables(Record):
    """What an OVMF image says about itself.

    Attributes: ``entries`` (from the footer downwards, without the footer),
    ``sections`` (in table order; empty without metadata), ``reset_eip`` (where APs
    start, or None), ``hash_base`` and ``hash_size`` (kernel hash table, 0 where the
    build has none).
    """

    entries: tuple[OvmfEntry, ...]
    sections: tuple[OvmfSection, ...]
    reset_eip: int | None
    hash_base: int
    hash_size: int

    def find(self, guid: str) -> OvmfEntry | None:
        """The entry with that GUID, or None."""
        return next((entry for entry in self.entries if entry.guid == guid), None)


def has_table(source: ImageSource) -> bool:
    """True if the image ends like OVMF, with the footer of a GUIDed table."""
    size = len(source.data)
    return (
        size >= _TABLE_TAIL + _TRAILER and _guid(source.data[size - 48 : size - 32]) == FOOTER_GUID
    )


def parse_table(source: ImageSource) -> OvmfTables:
    """Read the GUIDed table and the SEV metadata, if there are any.

    Raises ImageError if the image has no table, or one that breaks a rule.
    """
    if not has_table(source):
        raise source.fail(
            f"no GUIDed table: its footer GUID {FOOTER_GUID} is not at 48 bytes before the end, "
            "so this is not OVMF code (SeaBIOS, qboot and OVMF_VARS files have no table); "
            + GOOD_BUILDS
        )
    entries = _walk_table(source)
    by_guid = {entry.guid: entry for entry in entries}
    metadata = by_guid.get(METADATA_GUID)
    reset = by_guid.get(RESET_BLOCK_GUID)
    hashes = by_guid.get(HASH_TABLE_GUID)
    reset_eip = words(source, reset, 1)[0] if reset else None
    hash_base, hash_size = words(source, hashes, 2) if hashes else (0, 0)
    return OvmfTables(
        entries=entries,
        sections=_read_metadata(source, metadata) if metadata else (),
        reset_eip=reset_eip,
        hash_base=hash_base,
        hash_size=hash_size,
    )


def _walk_table(source: ImageSource) -> tuple[OvmfEntry, ...]:
    end = len(source.data) - _TABLE_TAIL - _TRAILER  # the footer's trailer is here
    (table_size,) = _numbers(source.data, end, 2)
    start = end + _TRAILER - table_size
    if table_size < _TRAILER or start < 0:
        raise source.fail(
            f"the GUIDed table's size {table_size:#x} is less than its footer or beyond the image",
            offset=end,
        )
    entries: dict[str, OvmfEntry] = {}
    while end > start:
        trailer = end - _TRAILER
        if trailer < start:
            raise source.fail("a GUIDed table entry begins before its table", offset=start)
        (length,) = _numbers(source.data, trailer, 2)
        guid = _guid(source.data[trailer + 2 : end])
        entry = OvmfEntry(guid, _NAMES.get(guid, "unknown"), end - length, length - _TRAILER)
        if length < _TRAILER or entry.offset < start:
            raise source.fail(
                f"GUIDed table entry {entry}: length {length:#x} is less than its trailer "
                "or beyond the table",
                offset=trailer,
            )
        if guid in entries:
            raise source.fail(f"GUIDed table entry {entry} is there twice", offset=trailer)
        entries[guid] = entry
        end = entry.offset
    return tuple(entries.values())


def _numbers(data: memoryview, at: int, *sizes: int) -> tuple[int, ...]:
    """Successive unsigned integers, of these sizes in bytes."""
    found = []
    for size in sizes:
        found.append(int.from_bytes(data[at : at + size], "little"))
        at += size
    return tuple(found)


def _guid(raw: memoryview) -> str:
    """A GUID as text; its first three numbers are little-endian in the image."""
    first, second, third = _numbers(raw, 0, 4, 2, 2)
    return f"{first:08x}-{second:04x}-{third:04x}-{raw[8:10].hex()}-{raw[10:].hex()}"


def words(source: ImageSource, entry: OvmfEntry, count: int) -> tuple[int, ...]:
    """The first ``count`` u32 of an entry."""
    if entry.size < 4 * count:
        raise source.fail(
            f"GUIDed table entry {entry} has {entry.size} bytes of data, not {4 * count}",
            offset=entry.offset,
        )
    return _numbers(source.data, entry.offset, *(4,) * count)


def _read_metadata(source: ImageSource, entry: OvmfEntry) -> tuple[OvmfSection, ...]:
    from_end = words(source, entry, 1)[0]
    offset = len(source.data) - from_end
    if not _METADATA_HEADER <= from_end <= len(source.data):
        raise source.fail(
            f"the SEV metadata's place, {from_end:#x} bytes before the end, is not in the image",
            offset=entry.offset,
        )
    magic = bytes(source.data[offset : offset + 4])
    size, version, count = _numbers(source.data, offset + 4, 4, 4, 4)
    if magic != b"ASEV":
        raise source.fail(f"SEV metadata begins with {magic!r}, not b'ASEV'", offset=offset)
    if version != 1:
        raise source.fail(f"SEV metadata version {version} is not 1", offset=offset + 8)
    if size != _METADATA_HEADER + count * _SECTION:
        raise source.fail(
            f"SEV metadata size {size:#x} doesn't fit its {count} sections", offset=offset + 4
        )
    source.slice(offset, size, "SEV metadata")
    first = offset + _METADATA_HEADER
    return tuple(
        OvmfSection(index, at, *_numbers(source.data, at, 4, 4, 4))
        for index, at in enumerate(range(first, first + count * _SECTION, _SECTION))
    )
