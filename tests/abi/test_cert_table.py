from __future__ import annotations

import contextlib
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.cert_table import CERT_GUIDS, decode, encode
from kvmlaunch.errors import FormatError

VCEK = bytes.fromhex("63da758de6644564adc5f4b93be8accd")
ARK = bytes.fromhex("c0b406a4a80349529743 3fb6014cd0ae")
TABLES = st.dictionaries(st.uuids(), st.binary(max_size=40), max_size=5)


def test_encode_puts_entries_end_and_blobs_in_order() -> None:
    # snp-firmware-abi.md 8.3
    table = encode({CERT_GUIDS["VCEK"]: b"leaf", CERT_GUIDS["ARK"]: b"root!"})
    entries = VCEK + b"\x48\0\0\0\x04\0\0\0" + ARK + b"\x4c\0\0\0\x05\0\0\0"
    assert table == entries + bytes(24) + b"leafroot!"


def test_encode_of_nothing_is_the_empty_table() -> None:
    assert encode({}) == bytes(24)


@given(TABLES, st.binary(max_size=30))
def test_decode_of_encode_of_any_table_is_identity(table: dict[UUID, bytes], more: bytes) -> None:
    assert decode(encode(table) + more) == table


def test_decode_of_guid_that_is_not_known_keeps_it() -> None:
    extra = UUID("ecae0c0f-9502-43b1-afa2-0ae2e0d565b6")
    assert decode(encode({extra: b"x"})) == {extra: b"x"}


@pytest.mark.parametrize("size", [0, 23, 24 + 23])
def test_decode_without_end_is_format_error(size: int) -> None:
    with pytest.raises(FormatError, match="24 zero bytes"):
        decode((VCEK + bytes(8)).ljust(size, b"\0")[:size])


@pytest.mark.parametrize("place", [b"\x31\0\0\0\0\0\0\0", b"\0\0\0\0\x31\0\0\0", b"\xff" * 8])
def test_decode_with_blob_outside_gives_the_entrys_offset(place: bytes) -> None:
    with pytest.raises(FormatError, match="63da758d") as caught:
        decode(VCEK + place + bytes(24))
    assert caught.value.offset == 0


def test_decode_with_guid_twice_is_format_error() -> None:
    entry = VCEK + bytes(8)
    with pytest.raises(FormatError, match="twice"):
        decode(entry + entry + bytes(24))


@given(st.binary(max_size=200))
def test_decode_of_arbitrary_bytes_raises_format_error_only(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        assert all(len(blob) <= len(raw) for blob in decode(raw).values())


def test_decode_with_blobs_that_overlap_is_format_error() -> None:
    # many entries of all of the input would be as many times its size in memory
    entries = b"".join(
        bytes([n + 1]) * 16 + bytes(4) + (1000).to_bytes(4, "little") for n in range(2)
    )
    with pytest.raises(FormatError, match="overlap"):
        decode((entries + bytes(24)).ljust(1000, b"x"))
