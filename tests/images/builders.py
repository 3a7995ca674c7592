"""Tiny images, built byte by byte from the format documents, not by code under test."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE = 1, 2, 3, 4
ET_REL, ET_EXEC, ET_DYN = 1, 2, 3

GUID_FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
GUID_RESET = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
GUID_SECRET = "4c2eb361-7d9b-4cc3-8081-127c90d3d294"
GUID_HASHES = "7255371f-3a3b-4b04-927b-1da6efa8d454"
GUID_METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"
GUID_SVSM = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"

# Sections of edk2's AmdSevX64 build (edk2-stable202405): gpa, size, type.
AMDSEV_SECTIONS = (
    (0x800000, 0x9000, 1),
    (0x80A000, 0x3000, 1),
    (0x80D000, 0x1000, 2),
    (0x80E000, 0x1000, 3),
    (0x80F000, 0x1000, 4),
    (0x810000, 0x1000, 0x10),
    (0x811000, 0xF000, 1),
)
METADATA_FROM_END = 0x600


@dataclass
class Seg:
    """A program header and its bytes; fields that are None follow from the others."""

    paddr: int
    data: bytes = b""
    memsz: int | None = None
    vaddr: int | None = None
    offset: int | None = None
    filesz: int | None = None
    type: int = PT_LOAD
    align: int = 0x1000


def elf64(
    segments: Sequence[Seg],
    *,
    entry: int = 0x100000,
    etype: int = ET_EXEC,
    machine: int = 62,
    ei_class: int = 2,
    ei_data: int = 1,
    phoff: int = 64,
    phentsize: int = 56,
    phnum: int | None = None,
) -> bytes:
    """An ELF64 file without sections; segment bytes follow each other behind the headers."""
    ident = b"\x7fELF" + bytes([ei_class, ei_data, 1]) + bytes(9)
    count = len(segments) if phnum is None else phnum
    order = "<" if ei_data == 1 else ">"
    header = ident + struct.pack(
        order + "HHIQQQIHHHHHH",
        *(etype, machine, 1, entry, phoff, 0, 0, 64, phentsize, count, 0, 0, 0),
    )
    at = 64 + 56 * len(segments)
    headers, body = b"", b""
    for seg in segments:
        headers += struct.pack(
            "<IIQQQQQQ",
            *(seg.type, 5),
            at + len(body) if seg.offset is None else seg.offset,
            seg.paddr if seg.vaddr is None else seg.vaddr,
            seg.paddr,
            len(seg.data) if seg.filesz is None else seg.filesz,
            len(seg.data) if seg.memsz is None else seg.memsz,
            seg.align,
        )
        body += seg.data
    return header + headers + body


def note_bytes(kind: int, descriptor: bytes, *, owner: bytes = b"Xen\0", align: int = 4) -> bytes:
    """A note of an ELF file, padded."""
    head = struct.pack("<III", len(owner), len(descriptor), kind) + owner
    head += bytes(-len(head) % align)
    return head + descriptor + bytes(-len(descriptor) % align)


def pvh_note(entry: int, size: int = 4) -> Seg:
    """A segment of notes with a PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY)."""
    return Seg(0, note_bytes(18, entry.to_bytes(size, "little")), type=PT_NOTE, align=4)


def data_offset(segments: int) -> int:
    """File offset of the first segment's bytes in an elf64() with that many segments."""
    return 64 + 56 * segments


def entry_bytes(guid: str, data: bytes, length: int | None = None) -> bytes:
    """An entry of OVMF's GUIDed table: data, length, GUID."""
    length = len(data) + 18 if length is None else length
    return data + struct.pack("<H", length) + uuid.UUID(guid).bytes_le


def metadata_bytes(
    sections: Sequence[tuple[int, int, int]],
    *,
    magic: bytes = b"ASEV",
    size: int | None = None,
    version: int = 1,
    count: int | None = None,
) -> bytes:
    """OVMF's SEV metadata."""
    count = len(sections) if count is None else count
    size = 16 + 12 * count if size is None else size
    head = magic + struct.pack("<III", size, version, count)
    return head + b"".join(struct.pack("<III", *section) for section in sections)


def standard_entries(
    *,
    reset_eip: int | None = 0x80B004,
    metadata: int | None = METADATA_FROM_END,
    hashes: tuple[int, int] | None = (0x810C00, 0x400),
) -> list[bytes]:
    """The table entries of an OVMF build, lowest first."""
    entries = []
    if metadata is not None:
        entries.append(entry_bytes(GUID_METADATA, struct.pack("<I", metadata)))
    if hashes is not None:
        entries.append(entry_bytes(GUID_HASHES, struct.pack("<II", *hashes)))
    entries.append(entry_bytes(GUID_SECRET, struct.pack("<II", 0x810000, 0xC00)))
    if reset_eip is not None:
        entries.append(entry_bytes(GUID_RESET, struct.pack("<I", reset_eip)))
    return entries


SVSM_SECTIONS = ((0, 0x9E000, 1), (0x9E000, 0x1000, 2), (0x9F000, 0x1000, 3))
"""Sections of coconut's SVSM (bebb485a): gpa, size, type."""


def svsm_image(
    *,
    start: int = 0x100,
    size: int = 0x8000,
    entries: Sequence[bytes] | None = None,
    sections: Sequence[tuple[int, int, int]] = SVSM_SECTIONS,
) -> bytes:
    """An SVSM: patterned bytes, SEV metadata at absolute GPAs, SVSM info."""
    usual = [
        entry_bytes(GUID_METADATA, struct.pack("<I", METADATA_FROM_END)),
        entry_bytes(GUID_SVSM, struct.pack("<I", start)),
    ]
    return ovmf(
        size=size,
        entries=usual if entries is None else entries,
        metadata=metadata_bytes(sections),
    )


def ovmf(
    *,
    size: int = 0x4000,
    entries: Sequence[bytes] | None = None,
    metadata: bytes | None = None,
    table_size: int | None = None,
    footer: str = GUID_FOOTER,
) -> bytes:
    """A firmware image: patterned bytes, SEV metadata, GUIDed table, reset vector."""
    table = b"".join(standard_entries() if entries is None else entries)
    table_size = len(table) + 18 if table_size is None else table_size
    tail = table + struct.pack("<H", table_size) + uuid.UUID(footer).bytes_le + bytes(32)
    sections = metadata_bytes(AMDSEV_SECTIONS) if metadata is None else metadata
    image = bytearray((n * 7 + n // 4096) & 0xFF for n in range(size))
    image[size - METADATA_FROM_END : size - METADATA_FROM_END + len(sections)] = sections
    image[size - len(tail) :] = tail
    return bytes(image)
