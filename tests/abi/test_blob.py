from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.blob import parse_blob
from kvmlaunch.errors import FormatError

BLOB = bytes(range(200, 248))


@pytest.mark.parametrize(
    "data",
    [
        BLOB,
        BLOB.hex().encode(),
        BLOB.hex().upper().encode(),
        b"0x" + BLOB.hex().encode() + b"\n",
        b"0X" + BLOB.hex().upper().encode(),
        b" " + BLOB.hex(" ", 4).encode() + b"\r\n",
        base64.b64encode(BLOB),
        base64.encodebytes(BLOB),
    ],
)
def test_parse_when_in_a_known_form_gives_the_bytes(data: bytes) -> None:
    assert parse_blob(data, len(BLOB), "a blob") == BLOB


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "0 bytes"),
        (BLOB[:-1], "47 bytes"),
        (BLOB + b"\0", "49 bytes"),
        (BLOB[:-1].hex().encode(), "94 hex digits"),
        (BLOB.hex().encode() + b"00", "98 hex digits"),
        (base64.b64encode(BLOB[:-3]), "base64 of 45 bytes"),
        (base64.b64encode(BLOB)[:-1], "63 bytes"),
        (b"not hex, nor base64!", "20 bytes"),
        (b"0x", "2 bytes"),
    ],
)
def test_parse_when_of_another_size_or_form_says_what_it_is(data: bytes, found: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_blob(data, len(BLOB), "a blob")
    assert str(caught.value) == f"a blob is 48 bytes, raw, hex or base64; this is {found}"


def test_parse_when_a_digest_is_taken_for_an_id_block_says_so() -> None:
    """96 hex digits are 96 bytes."""
    with pytest.raises(FormatError, match=r"an ID block is 96 bytes.*; this is 96 hex digits"):
        parse_blob(b"ab" * 48, 96, "an ID block")


@given(st.binary(max_size=300), st.integers(1, 100))
def test_parse_whatever_comes_gives_the_size_or_a_format_error(data: bytes, size: int) -> None:
    try:
        assert len(parse_blob(data, size, "a blob")) == size
    except FormatError as error:
        assert "\n" not in str(error)  # noqa: PT017
