"""IGVM headers: names and layouts, bytes <-> values. Reads no files and judges nothing.

Source: igvm_defs of github.com/microsoft/igvm, which is the format's specification.
"""

from __future__ import annotations

import enum
import struct
from typing import Any, NamedTuple, TypeAlias

from kvmlaunch.abi.page import PAGE_SIZE

__all__ = [
    "FIXED_V1",
    "FIXED_V2",
    "LARGE_PAGE",
    "LAYOUTS",
    "MAGIC",
    "OPTIONAL",
    "PAGE_SIZE",
    "PARAMETERS",
    "TLV",
    "Architecture",
    "Cca",
    "Corim",
    "DataType",
    "ErrorRange",
    "FixedHeader",
    "GuestPolicyHeader",
    "HeaderType",
    "IdBlockHeader",
    "Insert",
    "MemoryEntry",
    "MemoryType",
    "PageData",
    "PageFlag",
    "PageTableRelocation",
    "Parameter",
    "ParameterArea",
    "PlatformType",
    "Relocation",
    "RequiredMemory",
    "SupportedPlatform",
    "Value",
    "VbsMeasurement",
    "VpContext",
    "name_of",
    "padded",
    "section_of",
]

MAGIC = 0x4D564749
"""u32 of the bytes ``IGVM``."""
OPTIONAL = 1 << 31
"""Bit of a header's type: a loader that doesn't know it may skip it."""
LARGE_PAGE = 2 << 20
"""Bytes of a page with PageFlag.IS_2MB."""

FIXED_V1 = struct.Struct("<IIIIII")
"""Magic, version, offset and size of the variable headers, file size, checksum."""
FIXED_V2 = struct.Struct("<IIIIIIII")
"""The same, then architecture and page size."""
TLV = struct.Struct("<II")
"""Type and length before each variable header; the length counts neither this nor padding."""


class Architecture(enum.IntEnum):
    """Architecture of a version 2 file."""

    X64 = 0
    AARCH64 = 1


class FixedHeader(NamedTuple):
    """The head of a file; version 1 means x64 and pages of 4 KiB."""

    version: int
    variable_offset: int
    variable_size: int
    total_size: int
    checksum: int
    architecture: int = Architecture.X64
    page_size: int = PAGE_SIZE

    @property
    def size(self) -> int:
        """Bytes that it takes in its version."""
        return FIXED_V1.size if self.version == 1 else FIXED_V2.size

    def encode(self, checksum: int | None = None) -> bytes:
        """The header's bytes, with another checksum if one is given."""
        crc = self.checksum if checksum is None else checksum
        words = (MAGIC, *self[:4], crc)
        return FIXED_V1.pack(*words) if self.version == 1 else FIXED_V2.pack(*words, *self[5:])


class HeaderType(enum.IntEnum):
    """Type of a variable header."""

    SUPPORTED_PLATFORM = 0x001
    GUEST_POLICY = 0x101
    RELOCATABLE_REGION = 0x102
    PAGE_TABLE_RELOCATION_REGION = 0x103
    CORIM_DOCUMENT = 0x104
    CORIM_SIGNATURE = 0x105
    CCA_POLICY = 0x106
    PARAMETER_AREA = 0x301
    PAGE_DATA = 0x302
    PARAMETER_INSERT = 0x303
    VP_CONTEXT = 0x304
    REQUIRED_MEMORY = 0x305
    VP_COUNT_PARAMETER = 0x307
    SRAT = 0x308
    MADT = 0x309
    MMIO_RANGES = 0x30A
    SNP_ID_BLOCK = 0x30B
    MEMORY_MAP = 0x30C
    ERROR_RANGE = 0x30D
    COMMAND_LINE = 0x30E
    SLIT = 0x30F
    PPTT = 0x310
    VBS_MEASUREMENT = 0x311
    DEVICE_TREE = 0x312
    ENVIRONMENT_INFO_PARAMETER = 0x313


class PlatformType(enum.IntEnum):
    """What a platform header is for."""

    NATIVE = 0
    VSM_ISOLATION = 1
    SEV_SNP = 2
    TDX = 3
    SEV = 4
    SEV_ES = 5
    CCA = 6


class PageFlag(enum.IntFlag):
    """Flags of PAGE_DATA."""

    IS_2MB = 1
    UNMEASURED = 2
    SHARED = 4


class DataType(enum.IntEnum):
    """What PAGE_DATA is: PageFlag says how NORMAL pages are measured."""

    NORMAL = 0
    SECRETS = 1
    CPUID_DATA = 2
    CPUID_XF = 3


class MemoryType(enum.IntEnum):
    """Type of a MEMORY_MAP entry."""

    MEMORY = 0
    PLATFORM_RESERVED = 1
    PERSISTENT = 2
    VTL2_PROTECTABLE = 3
    SPECIFIC_PURPOSE = 4
    HIDDEN = 5


class SupportedPlatform(NamedTuple):
    """A platform that the file is for, and the mask by which other headers name it."""

    mask: int
    highest_vtl: int
    platform_type: int
    platform_version: int
    shared_gpa_boundary: int


class GuestPolicyHeader(NamedTuple):
    """Guest policy; on SNP the word of SNP_LAUNCH_START."""

    policy: int
    mask: int
    reserved: int


class Relocation(NamedTuple):
    """Memory that a loader may move."""

    mask: int
    vp_index: int
    vtl: int
    flags: int
    alignment: int
    gpa: int
    size: int
    min_gpa: int
    max_gpa: int


class PageTableRelocation(NamedTuple):
    """Where the page tables of a moved guest are built."""

    mask: int
    vp_index: int
    vtl: int
    reserved: int
    gpa: int
    size: int
    used_size: int


class Corim(NamedTuple):
    """A CoRIM document or its signature, in the file's data."""

    mask: int
    file_offset: int
    size_bytes: int
    reserved: int


class Cca(NamedTuple):
    """Policy of an Arm CCA realm."""

    mask: int
    reserved: int
    required_zeroes: int
    required_ones: int
    hash_algorithm: int
    lfa: int
    reserved2: bytes


class ParameterArea(NamedTuple):
    """An area to be filled by the loader; 0 as file offset means zeros."""

    number_of_bytes: int
    area: int
    file_offset: int


class PageData(NamedTuple):
    """One page; 0 as file offset means zeros."""

    gpa: int
    mask: int
    file_offset: int
    flags: int
    data_type: int
    reserved: int

    @property
    def size(self) -> int:
        """Bytes of the page."""
        return LARGE_PAGE if self.flags & 1 else PAGE_SIZE


class Insert(NamedTuple):
    """The parameter area becomes guest memory here."""

    gpa: int
    mask: int
    area: int


class VpContext(NamedTuple):
    """Registers of a virtual processor; on SNP its VMSA."""

    gpa: int
    mask: int
    file_offset: int
    vp_index: int
    reserved: int


class RequiredMemory(NamedTuple):
    """Memory that must be there."""

    gpa: int
    mask: int
    number_of_bytes: int
    flags: int
    reserved: int


class Parameter(NamedTuple):
    """A value that the loader writes into a parameter area."""

    area: int
    byte_offset: int


class IdBlockHeader(NamedTuple):
    """SNP_ID_BLOCK: an ID block without its policy, signatures and keys."""

    mask: int
    author_key_enabled: int
    reserved: bytes
    ld: bytes
    family_id: bytes
    image_id: bytes
    version: int
    guest_svn: int
    id_key_algorithm: int
    author_key_algorithm: int
    id_key_signature: bytes
    id_public_key: bytes
    author_key_signature: bytes
    author_public_key: bytes


class ErrorRange(NamedTuple):
    """Shared pages for the guest's error reports."""

    gpa: int
    mask: int
    size_bytes: int


class VbsMeasurement(NamedTuple):
    """Signed measurement for VSM isolation."""

    mask: int
    version: int
    product_id: int
    module_id: int
    security_version: int
    policy_flags: int
    boot_digest_algo: int
    signing_algo: int
    digest: bytes
    signature: bytes
    public_key: bytes


class MemoryEntry(NamedTuple):
    """One entry of a MEMORY_MAP, in pages of 4 KiB."""

    start_page: int
    pages: int
    type: int
    flags: int = 0
    reserved: int = 0

    def encode(self) -> bytes:
        """Its 24 bytes."""
        return struct.pack("<QQHHI", *self)


Value: TypeAlias = (
    SupportedPlatform
    | GuestPolicyHeader
    | Relocation
    | PageTableRelocation
    | Corim
    | Cca
    | ParameterArea
    | PageData
    | Insert
    | VpContext
    | RequiredMemory
    | Parameter
    | IdBlockHeader
    | ErrorRange
    | VbsMeasurement
)
"""A decoded header."""

PARAMETERS = frozenset(
    {
        HeaderType.VP_COUNT_PARAMETER,
        HeaderType.SRAT,
        HeaderType.MADT,
        HeaderType.MMIO_RANGES,
        HeaderType.MEMORY_MAP,
        HeaderType.COMMAND_LINE,
        HeaderType.SLIT,
        HeaderType.PPTT,
        HeaderType.DEVICE_TREE,
        HeaderType.ENVIRONMENT_INFO_PARAMETER,
    }
)
"""Headers that name a value to be written into a parameter area."""

LAYOUTS: dict[int, tuple[struct.Struct, Any]] = {
    HeaderType.SUPPORTED_PLATFORM: (struct.Struct("<IBBHQ"), SupportedPlatform),
    HeaderType.GUEST_POLICY: (struct.Struct("<QII"), GuestPolicyHeader),
    HeaderType.RELOCATABLE_REGION: (struct.Struct("<IHBBQQQQQ"), Relocation),
    HeaderType.PAGE_TABLE_RELOCATION_REGION: (struct.Struct("<IHBBQQQ"), PageTableRelocation),
    HeaderType.CORIM_DOCUMENT: (struct.Struct("<IIII"), Corim),
    HeaderType.CORIM_SIGNATURE: (struct.Struct("<IIII"), Corim),
    HeaderType.CCA_POLICY: (struct.Struct("<IIQQBB6s"), Cca),
    HeaderType.PARAMETER_AREA: (struct.Struct("<QII"), ParameterArea),
    HeaderType.PAGE_DATA: (struct.Struct("<QIIIHH"), PageData),
    HeaderType.PARAMETER_INSERT: (struct.Struct("<QII"), Insert),
    HeaderType.VP_CONTEXT: (struct.Struct("<QIIHH"), VpContext),
    HeaderType.REQUIRED_MEMORY: (struct.Struct("<QIIII"), RequiredMemory),
    HeaderType.SNP_ID_BLOCK: (
        struct.Struct("<IB3s48s16s16sIIII144s152s144s152s"),
        IdBlockHeader,
    ),
    HeaderType.ERROR_RANGE: (struct.Struct("<QII"), ErrorRange),
    HeaderType.VBS_MEASUREMENT: (struct.Struct("<IIIIIIII64s256s512s"), VbsMeasurement),
    **{kind: (struct.Struct("<II"), Parameter) for kind in PARAMETERS},
}
"""Header type -> its bytes, and the class of its values."""

_SECTIONS = ((range(0x001, 0x101), 0), (range(0x101, 0x201), 1), (range(0x301, 0x401), 2))


def section_of(kind: int) -> int | None:
    """0 platform, 1 initialization, 2 directive; None for a type of no section."""
    number = kind & ~OPTIONAL
    return next((section for numbers, section in _SECTIONS if number in numbers), None)


def name_of(kind: int) -> str:
    """The name of a header type, for messages."""
    return HeaderType(kind).name if kind in LAYOUTS else f"type {kind:#x}"


def padded(length: int) -> int:
    """Bytes that a header of this length takes with its padding."""
    return -(-length // 8) * 8
