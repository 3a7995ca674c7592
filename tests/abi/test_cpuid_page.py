from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.cpuid_page import CpuidDiff, CpuidEntry, decode, diff_pages, encode
from kvmlaunch.errors import FormatError

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
ENTRIES = st.builds(CpuidEntry, U32, U32, U64, U64, U32, U32, U32, U32)
ENTRY = CpuidEntry(
    eax_in=0x01020304,
    ecx_in=0x11121314,
    xcr0_in=0x2122232425262728,
    xss_in=0x3132333435363738,
    eax=0x41424344,
    ebx=0x51525354,
    ecx=0x61626364,
    edx=0x71727374,
)


def test_encode_of_one_entry_has_the_published_layout() -> None:
    # snp-firmware-abi.md 7.5: count, 12 reserved, then 48 bytes per entry
    want = (
        "01000000 000000000000000000000000 04030201 14131211 2827262524232221 3837363534333231"
        "44434241 54535251 64636261 74737271 0000000000000000"
    )
    assert encode([ENTRY])[:0x40] == bytes.fromhex(want)


def test_encode_is_one_page() -> None:
    assert len(encode([])) == 4096


def test_encode_of_64_entries_ends_at_0xc10() -> None:
    assert encode([ENTRY] * 64).rstrip(b"\0")[-1:] == b"\x71"
    assert len(encode([ENTRY] * 64).rstrip(b"\0")) == 0xC10 - 8


def test_encode_of_65_entries_is_format_error() -> None:
    with pytest.raises(FormatError, match="64"):
        encode([ENTRY] * 65)


@pytest.mark.parametrize("name", ["eax_in", "ecx_in", "eax", "ebx", "ecx", "edx"])
def test_entry_with_wide_register_names_it(name: str) -> None:
    with pytest.raises(FormatError, match=name):
        CpuidEntry(**{"eax_in": 0, name: 1 << 32})


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_decode_of_wrong_size_is_format_error(size: int) -> None:
    with pytest.raises(FormatError, match="4096"):
        decode(bytes(size))


def test_decode_with_count_above_64_is_format_error() -> None:
    with pytest.raises(FormatError, match="COUNT 65"):
        decode(b"\x41" + bytes(4095))


@pytest.mark.parametrize("offset", [0x04, 0x0F, 0x38, 0x3F])
def test_decode_with_reserved_byte_set_gives_its_offset(offset: int) -> None:
    page = bytearray(encode([ENTRY]))
    page[offset] = 1
    with pytest.raises(FormatError) as caught:
        decode(page)
    assert caught.value.offset == offset


def test_decode_skips_bytes_behind_the_last_entry() -> None:
    page = bytearray(encode([ENTRY]))
    page[0x40] = 1
    assert decode(page) == (ENTRY,)


@given(st.lists(ENTRIES, max_size=64))
def test_decode_of_encode_is_identity(entries: list[CpuidEntry]) -> None:
    assert decode(encode(entries)) == tuple(entries)


@given(st.binary(max_size=80).map(lambda head: head.ljust(4096, b"\0")) | st.binary())
def test_decode_of_arbitrary_bytes_raises_format_error_only(page: bytes) -> None:
    with contextlib.suppress(FormatError):
        decode(page)


def test_entry_repr_shows_what_is_not_zero() -> None:
    assert repr(CpuidEntry(7, edx=0x4000000)) == "CpuidEntry(eax_in=0x7, edx=0x4000000)"


def test_diff_pages_of_equal_pages_is_empty() -> None:
    assert diff_pages(encode([ENTRY]), encode([ENTRY])) == []


def test_diff_pages_names_leaf_register_and_values() -> None:
    # https://github.com/NVIDIA/nvtrust/issues/91: 8000_001D index 3 EDX, 6 sent, 2 expected
    sent = encode([CpuidEntry(0x8000001D, 3, edx=6)])
    corrected = encode([CpuidEntry(0x8000001D, 3, edx=2)])
    assert diff_pages(sent, corrected) == [CpuidDiff(0x8000001D, 3, "edx", 6, 2)]


def test_diff_pages_line_shows_bits_that_differ() -> None:
    line = str(CpuidDiff(7, 0, "edx", 0x84000004, 0x4))
    assert line == "leaf 0x7 index 0x0 EDX: sent 0x84000004, corrected 0x4, differing bits 26, 31"


def test_diff_pages_of_dropped_entry_shows_its_registers() -> None:
    found = diff_pages(encode([CpuidEntry(1, eax=5)]), encode([]))
    assert found == [CpuidDiff(1, 0, "eax", 5, 0)]


def test_diff_pages_of_changed_input_is_shown() -> None:
    found = diff_pages(encode([CpuidEntry(0xD, xss_in=1)]), encode([CpuidEntry(0xD)]))
    assert found == [CpuidDiff(0xD, 0, "xss_in", 1, 0)]
