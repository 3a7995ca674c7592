"""SEV hashes table: layout, known answers, and what is no table."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.kernel_hashes import HASHES_SIZE, KernelHashes, hash_cmdline
from kvmlaunch.errors import FormatError

# SHA-256 of nothing and of one zero byte (FIPS 180-4 by sha256sum).
OF_NOTHING = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
OF_NUL = bytes.fromhex("6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d")

# GUIDs in mixed-endian form (snp-firmware-abi.md 4.3).
TABLE = bytes.fromhex("06d63894224fc94cb479a793d411fd21")
KERNEL = bytes.fromhex("3794e74dd2ab7f42b835d5b172d2045b")
INITRD = bytes.fromhex("31f7ba442f3ad74b9af141e29169781d")
CMDLINE = bytes.fromhex("d82dd09720bd944caa78e7714d36ab2a")

HASHES = st.builds(KernelHashes, *[st.binary(min_size=32, max_size=32)] * 3)


def table(kernel: bytes, initrd: bytes, cmdline: bytes) -> bytes:
    """A table by hand: 168 bytes and 8 of padding."""
    rows = [(CMDLINE, cmdline), (INITRD, initrd), (KERNEL, kernel)]
    entries = b"".join(guid + struct.pack("<H", 50) + value for guid, value in rows)
    return TABLE + struct.pack("<H", 168) + entries + bytes(8)


def test_table_when_only_a_kernel_is_given_hashes_nothing_and_a_nul() -> None:
    assert KernelHashes(b"k" * 32).encode() == table(b"k" * 32, OF_NOTHING, OF_NUL)


def test_table_when_all_is_given_has_cmdline_initrd_kernel_in_this_order() -> None:
    made = KernelHashes(b"k" * 32, b"i" * 32, b"c" * 32).encode()
    assert made == table(b"k" * 32, b"i" * 32, b"c" * 32)
    assert len(made) == HASHES_SIZE == 176


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", OF_NUL.hex()),
        # printf 'console=ttyS0 loglevel=7\0' | sha256sum
        (
            "console=ttyS0 loglevel=7",
            "321c8eec6a77bad179511397f913a083067ad8cb737bb260aacbfe8df70fc50a",
        ),
    ],
)
def test_cmdline_when_hashed_ends_with_a_nul(text: str, expected: str) -> None:
    assert hash_cmdline(text).hex() == expected
    assert hash_cmdline(text.encode()).hex() == expected


def test_cmdline_when_white_space_is_around_it_keeps_it() -> None:
    assert len({hash_cmdline(text) for text in ("a", " a", "a ", "a\n")}) == 4


def test_cmdline_when_it_is_no_utf8_is_hashed_as_the_shell_gave_it() -> None:
    assert hash_cmdline("\udcff") == hash_cmdline(b"\xff")


def test_cmdline_when_a_nul_is_inside_is_refused() -> None:
    with pytest.raises(FormatError, match="ends at its first NUL, this one has one inside"):
        hash_cmdline("quiet\0splash")


@pytest.mark.parametrize("name", ["kernel", "initrd", "cmdline"])
def test_hash_when_of_another_length_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"the hash of the {name} is 31 bytes, must be 32"):
        KernelHashes(**{"kernel": bytes(32), name: bytes(31)})


@given(HASHES)
def test_table_when_decoded_gives_the_hashes_back(hashes: KernelHashes) -> None:
    assert KernelHashes.decode(hashes.encode()) == hashes


@given(HASHES, st.integers(0, 4096 - 176))
def test_page_when_made_has_the_table_at_its_offset_and_zeros_around(
    hashes: KernelHashes, offset: int
) -> None:
    page = hashes.page(offset)
    assert len(page) == 4096
    assert page[offset : offset + 176] == hashes.encode()
    assert not any(page[:offset])
    assert not any(page[offset + 176 :])


@pytest.mark.parametrize("offset", [-1, 4096 - 175, 4096])
def test_page_when_the_table_leaves_it_is_refused(offset: int) -> None:
    with pytest.raises(FormatError, match=r"of 176 bytes at offset -?0x[0-9a-f]+ leaves its page"):
        KernelHashes(bytes(32)).page(offset)


@given(st.binary(max_size=200))
def test_bytes_when_arbitrary_are_no_table(data: bytes) -> None:
    with pytest.raises(FormatError):
        KernelHashes.decode(data)


@given(HASHES, st.integers(0, 175), st.integers(1, 255))
def test_table_when_a_byte_is_changed_is_refused_or_has_another_hash(
    hashes: KernelHashes, at: int, change: int
) -> None:
    raw = bytearray(hashes.encode())
    raw[at] ^= change
    try:
        found = KernelHashes.decode(raw)
    except FormatError:
        assert not any(start <= at < start + 32 for start in (0x24, 0x56, 0x88))
    else:
        assert found != hashes
        assert found.encode() == raw
