"""IGVM files taken apart: what the format says, and every rule of it that a file can break."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmlaunch.errors import ImageError
from kvmlaunch.images import ImageSource
from kvmlaunch.images.igvm.format import HeaderType, PlatformType
from kvmlaunch.images.igvm.parse import AREAS_MOST, IgvmFile, parse
from tests.images import igvm_files as f

ONE = [f.platform(), f.policy(), f.page(0x1000, 0)]
DATA = f.pattern(1)


def parsed(data: bytes) -> IgvmFile:
    return parse(ImageSource.of(data, "x.igvm"))


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        parsed(data)
    return str(caught.value)


@pytest.mark.parametrize("version", [1, 2])
def test_parse_when_a_file_is_valid_gives_its_headers_in_order(version: int) -> None:
    file = parsed(f.igvm(ONE, DATA, version=version))
    assert (file.header.version, file.header.page_size, file.skipped) == (version, 4096, 0)
    base = {1: 24, 2: 32}[version] + 3 * 8 + 16 + 16 + 24
    assert file.data_start == base
    assert [(item.number, item.kind, tuple(item.value)) for item in file.items()] == [
        (0, 0x001, (1, 0, 2, 1, 0)),
        (1, 0x101, (0x30000, 1, 0)),
        (2, 0x302, (0x1000, 1, base, 0, 0, 0)),
    ]


def test_parse_when_headers_begin_behind_a_gap_follows_them_there() -> None:
    assert [item.offset for item in parsed(f.igvm(ONE, DATA, gap=16)).items()] == [40, 64, 88]


def test_parse_when_padding_is_not_zero_takes_it_as_igvm_tooling_writes_it() -> None:
    image = f.igvm([f.platform(), f.context(f.KVM_GPA, 0), f.page(0x1000)], DATA, padding=b"0")
    assert [item.kind for item in parsed(image).items()] == [0x001, 0x304, 0x302]


def test_parse_when_a_type_is_optional_and_unknown_skips_it() -> None:
    extra = (1 << 31 | 0x3FF, b"12345")
    file = parsed(f.igvm([f.platform(), extra, f.page(0x1000, 0)], DATA))
    assert file.skipped == 1
    assert [item.number for item in file.items()] == [0, 2]


# Struct sizes: igvm_defs of github.com/microsoft/igvm, `size_of` by its field lists.
SIZES = {
    **{0x001: 16, 0x101: 16, 0x102: 48, 0x103: 32, 0x104: 16, 0x105: 16, 0x106: 32},
    **{0x301: 16, 0x302: 24, 0x303: 16, 0x304: 20, 0x305: 24, 0x30B: 696, 0x30D: 16, 0x311: 864},
    **dict.fromkeys([0x307, 0x308, 0x309, 0x30A, 0x30C, 0x30E, 0x30F, 0x310, 0x312, 0x313], 8),
}


def test_header_types_are_those_of_the_format() -> None:
    assert {int(kind) for kind in HeaderType} == set(SIZES)


@pytest.mark.parametrize("kind", SIZES)
def test_parse_when_a_length_is_not_that_of_its_type_names_both(kind: int) -> None:
    for wrong in (SIZES[kind] - 1, SIZES[kind] + 1):
        sentence = refused(f.igvm([(kind, bytes(wrong))], DATA))
        assert f"length {wrong} is not {SIZES[kind]}" in sentence


def test_platform_when_the_file_is_for_another_says_for_which() -> None:
    file = parsed(f.igvm([f.platform(4, f.TDX), f.platform(8, f.VBS)], DATA))
    with pytest.raises(ImageError) as caught:
        file.platform(PlatformType.SEV_SNP)
    assert str(caught.value) == (
        "x.igvm: the file has no platform SEV_SNP; it is for TDX (mask 0x4), "
        "VSM_ISOLATION (mask 0x8)"
    )


def test_runs_for_when_masks_differ_gives_those_of_one_platform_and_those_without() -> None:
    headers = [
        *(f.platform(1), f.platform(2, f.TDX), f.area(0), f.page(0x1000, 0, mask=2)),
        *(f.page(0x1000, 0), f.page(0x2000, 0, mask=3)),
    ]
    file = parsed(f.igvm(headers, DATA))
    assert [item.number for item in file.runs_for(1)] == [0, 2, 4, 5]
    assert [item.number for item in file.runs_for(2)] == [1, 2, 3, 5]


END = len(f.igvm(ONE, DATA))
FIXED: list[tuple[dict[str, Any], str]] = [
    ({"magic": 0x4D564748}, "offset 0x0: magic is 0x4d564748, not 0x4d564749 ('IGVM')"),
    ({"version": 3}, "offset 0x4: format version 3 is neither 1 nor 2"),
    ({"total": END + 1}, f"offset 0x10: the header says {END + 1:#x} bytes, the file has {END:#x}"),
    ({"offset": 16}, "offset 0x8: variable headers at 0x10: must be a multiple of 8 behind the"),
    ({"offset": 28}, "offset 0x8: variable headers at 0x1c: must be a multiple of 8 behind the"),
    ({"size": END}, "offset 0xc: variable headers of"),
    ({"offset": 1 << 31}, "offset 0xc: variable headers of"),
    ({"checksum": 0x12345678}, "offset 0x14: checksum 0x12345678 is wrong: fixed and variable"),
]


@pytest.mark.parametrize(("fields", "sentence"), FIXED, ids=lambda v: str(v)[:40])
def test_parse_when_the_fixed_header_is_wrong_names_the_rule(
    fields: dict[str, Any], sentence: str
) -> None:
    assert refused(f.igvm(ONE, DATA, **fields)).startswith(f"x.igvm: {sentence}")


def test_parse_when_version_2_is_for_something_else_is_refused() -> None:
    assert "offset 0x18: architecture AARCH64 is not X64" in refused(
        f.igvm(ONE, DATA, version=2, architecture=1)
    )
    assert "offset 0x1c: page size 65536 is not 4096" in refused(
        f.igvm(ONE, DATA, version=2, page_size=65536)
    )


@pytest.mark.parametrize("size", [4, 23])
def test_parse_when_cut_in_the_fixed_header_is_refused(size: int) -> None:
    assert "an IGVM file has at least 24 bytes" in refused(f.igvm(ONE, DATA)[:size])


def test_parse_when_checksum_covers_a_changed_header_is_refused() -> None:
    image = bytearray(f.igvm(ONE, DATA))
    image[24 + 8] ^= 2  # the platform's mask
    assert "checksum" in refused(bytes(image))


def test_parse_when_only_data_changes_the_checksum_stays_right() -> None:
    image = bytearray(f.igvm(ONE, DATA))
    image[-1] ^= 1
    assert parsed(bytes(image)).counts[0x302] == 1


def snp(*headers: f.Header) -> list[f.Header]:
    return [f.platform(), *headers]


BIG = 1 << 40
RULES: dict[str, tuple[list[f.Header], str]] = {
    "unknown-required": (snp((0x3FF, b"")), "header 1: type 0x3ff is unknown and not optional"),
    "reserved-type": (snp((0x306, bytes(16))), "header 1: type 0x306 is unknown and not optional"),
    "length-beyond": (snp((0x302, b"")), "header 1 (PAGE_DATA): length 0 is not 24"),
    "order": (
        snp(f.page(0x1000), f.policy()),
        "header 2 (GUEST_POLICY): follows a directive, but belongs before those",
    ),
    "platform-late": (
        snp(f.policy(), f.platform(2, f.TDX)),
        "header 2 (SUPPORTED_PLATFORM): follows an initialization header",
    ),
    "mask-two-bits": ([f.platform(3)], "mask 0x3 is not one bit that no other platform has"),
    "mask-zero": ([f.platform(0)], "mask 0x0 is not one bit that no other platform has"),
    "mask-taken": ([f.platform(), f.platform(1, f.TDX)], "header 1 (SUPPORTED_PLATFORM): mask 0x1"),
    "platform-twice": ([f.platform(), f.platform(2)], "platform SEV_SNP is there twice"),
    "platform-type": ([f.platform(1, 9)], "platform type 9 is unknown"),
    "platform-version": ([f.platform(version=2)], "platform version 2 is not 1"),
    "platform-vtl": ([f.platform(vtl=1)], "highest VTL 1 is neither 0 nor 2"),
    "native-border": (
        [f.platform(kind=f.NATIVE, border=1 << 40)],
        "NATIVE's shared GPA boundary must be 0",
    ),
    "no-platform": ([f.page(0x1000)], "compatibility mask 0x1 names no platform"),
    "mask-without-platform": (
        snp(f.page(0x1000, mask=4)),
        "header 1 (PAGE_DATA): compatibility mask 0x4 names no platform; those of the file have "
        "0x1",
    ),
    "mask-0": (snp(f.page(0x1000, mask=0)), "compatibility mask 0x0 names no platform"),
    "policy-reserved": (snp(f.policy(reserved=1)), "header 1 (GUEST_POLICY): reserved must be 0"),
    "page-unaligned": (snp(f.page(0x1008)), "GPA 0x1008 is not aligned to the page's 0x1000"),
    "page-flags": (snp(f.page(0x1000, flags=8)), "flags besides bits 0 to 2 must be 0, not 0x8"),
    "page-reserved": (snp(f.page(0x1000, reserved=1)), "reserved must be 0, not 0x1"),
    "page-type": (snp(f.page(0x1000, kind=4)), "data type 4 is unknown"),
    "page-data-beyond": (
        snp(f.page(0x1000, 1)),
        "header 1 (PAGE_DATA): 0x1000 bytes at file offset 0x51 are not in the file's data, which "
        "is at 0x50..0x1050",
    ),
    "page-data-in-headers": (
        snp((0x302, struct.pack("<QIIIHH", 0x1000, 1, 8, 0, 0, 0))),
        "0x1000 bytes at file offset 0x8 are not in the file's data",
    ),
    "large-unaligned": (snp(f.page(0x1000, flags=1)), "not aligned to the page's 0x200000 bytes"),
    "large-data-beyond": (snp(f.page(0x200000, 0, flags=1)), "0x200000 bytes at file offset"),
    "secrets-shared": (snp(f.page(0x1000, flags=4, kind=1)), "SECRETS is one private page"),
    "area-size": (snp(f.area(0, 0x1001)), "0x1001 bytes: not a positive number of 4 KiB pages"),
    "area-empty": (snp(f.area(0, 0)), "0x0 bytes: not a positive number of 4 KiB pages"),
    "area-twice": (snp(f.area(7), f.area(7)), "header 2 (PARAMETER_AREA): parameter area 7 is"),
    "area-data-beyond": (snp(f.area(0, 0x2000, 0)), "0x2000 bytes at file offset"),
    "areas": (
        snp(*(f.area(n) for n in range(AREAS_MOST + 1))),
        f"header {AREAS_MOST + 1} (PARAMETER_AREA): more than 4096 parameter areas",
    ),
    "parameter-without-area": (
        snp(f.parameter(0x307, 3)),
        "header 1 (VP_COUNT_PARAMETER): there is no parameter area 3 before",
    ),
    "parameter-beyond": (
        snp(f.area(0), f.parameter(0x307, 0, 0xFFD)),
        "4 bytes at offset 0xffd end beyond parameter area 0 of 0x1000 bytes",
    ),
    "memory-map-beyond": (
        snp(f.area(0), f.parameter(0x30C, 0, 0x1000 - 23)),
        "header 2 (MEMORY_MAP): 24 bytes at offset 0xfe9 end beyond parameter area 0",
    ),
    "parameter-late": (
        snp(f.area(0), f.insert(0x1000, 0), f.parameter(0x307, 0)),
        "header 3 (VP_COUNT_PARAMETER): parameter area 0 has been inserted already",
    ),
    "insert-without-area": (snp(f.insert(0x1000, 0)), "there is no parameter area 0 before"),
    "insert-twice": (
        snp(f.area(0), f.insert(0x1000, 0), f.insert(0x2000, 0)),
        "header 3 (PARAMETER_INSERT): parameter area 0 has been inserted already",
    ),
    "area-after-insert": (
        snp(f.area(0), f.insert(0x1000, 0), f.area(0)),
        "header 3 (PARAMETER_AREA): parameter area 0 is declared twice",
    ),
    "insert-unaligned": (snp(f.area(0), f.insert(0x1001, 0)), "GPA 0x1001, 0x1000 bytes: not a"),
    "insert-beyond-64-bits": (
        snp(f.area(0, BIG), f.insert((1 << 64) - 0x1000, 0)),
        "ends beyond 64 bits",
    ),
    "context-unaligned": (snp(f.context(0x1001, 0)), "GPA 0x1001, 0x1000 bytes: not a positive"),
    "context-reserved": (snp(f.context(0x1000, 0, reserved=2)), "reserved must be 0, not 0x2"),
    "context-data-beyond": (snp(f.context(0x1000, 1)), "0x1000 bytes at file offset"),
    "context-of-two": (
        [f.platform(), f.platform(2, f.TDX), f.context(0x1000, 0, mask=3)],
        "header 2 (VP_CONTEXT): mask 0x3 is for several platforms, whose registers differ",
    ),
    "required-unaligned": (snp(f.required(0, 0x1001)), "0x1001 bytes: not a positive number"),
    "required-flags": (snp(f.required(0, 0x1000, flags=2)), "flags besides bit 0 must be 0"),
    "required-reserved": (snp(f.required(0, 0x1000, reserved=1)), "reserved must be 0"),
    "error-range-empty": (snp(f.error_range(0x1000, 0)), "not a positive number of 4 KiB pages"),
    "id-block-reserved": (
        snp((0x30B, b"\1\0\0\0" + b"\0\1" + bytes(690))),
        "header 1 (SNP_ID_BLOCK): reserved must be 0",
    ),
    "id-block-enabled": (
        snp((0x30B, b"\1\0\0\0" + b"\2" + bytes(691))),
        "author_key_enabled 2 is not 0 or 1",
    ),
    "id-block-key-reserved": (
        snp((0x30B, b"\1\0\0\0" + bytes(248) + b"\1" + bytes(443))),
        "reserved of the ID key must be 0",
    ),
    "signature-without-document": (
        snp((0x105, lambda base: struct.pack("<IIII", 1, base, 16, 0))),
        "header 1 (CORIM_SIGNATURE): mask 0x1 has no CORIM_DOCUMENT before",
    ),
    "document-beyond": (
        snp((0x104, lambda base: struct.pack("<IIII", 1, base, 0x1001, 0))),
        "header 1 (CORIM_DOCUMENT): 0x1001 bytes at file offset",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_parse_when_a_rule_is_broken_names_offset_header_and_rule(name: str) -> None:
    headers, rule = RULES[name]
    sentence = refused(f.igvm(headers, DATA))
    assert sentence.startswith("x.igvm: offset 0x")
    assert rule in sentence
    assert "\n" not in sentence


def test_parse_when_a_header_leaves_the_variable_headers_says_where_they_end() -> None:
    image = f.igvm([(0x3FE, b"")], DATA, length=0x100)
    assert "header 0 (type 0x3fe): length 0x100 ends beyond the variable headers" in refused(image)


def test_parse_when_bytes_are_left_over_says_how_many() -> None:
    image = f.igvm([(1 << 31 | 1, b"")], DATA, size=12)
    # The first four bytes of the data are the rest of a header that isn't there.
    assert "header 1: 4 bytes are left of the variable headers" in refused(image)
