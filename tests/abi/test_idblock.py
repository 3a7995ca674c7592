from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.idblock import IdAuth, IdBlock
from kvmlaunch.errors import FormatError

from . import vectors

BLOCK = base64.b64decode(vectors.ID_BLOCK_BASE64)
U32 = st.integers(0, 2**32 - 1)


def sized(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


@pytest.mark.parametrize(
    ("name", "value"),
    # snp-firmware-abi.md 6.5 B
    [
        ("ld", bytes.fromhex(vectors.ID_BLOCK_LD)),
        ("family_id", bytes(16)),
        ("image_id", bytes(16)),
        ("version", 1),
        ("guest_svn", 0),
        ("policy", 0x30000),
    ],
)
def test_decode_of_published_id_block_gives_field(name: str, value: object) -> None:
    assert getattr(IdBlock.decode(BLOCK), name) == value


def test_encode_of_defaults_with_ld_is_published_id_block() -> None:
    assert IdBlock(bytes.fromhex(vectors.ID_BLOCK_LD)).encode() == BLOCK


def test_encode_of_sev_snp_measure_ld_is_its_id_block() -> None:
    ld = base64.b64decode(vectors.SSM_ID_BLOCK_LD_BASE64)
    assert base64.b64encode(IdBlock(ld).encode()).decode() == vectors.SSM_ID_BLOCK_BASE64


@pytest.mark.parametrize(
    ("offset", "data"),
    # snp-firmware-abi.md 6.1
    [
        (0x00, b"\x01" * 48),
        (0x30, b"\x02" * 16),
        (0x40, b"\x03" * 16),
        (0x50, b"\x04\0\0\0"),
        (0x54, b"\x05\0\0\0"),
        (0x58, b"\x06\0\0\0\0\0\0\x80"),
    ],
)
def test_id_block_encode_puts_field_at_its_offset(offset: int, data: bytes) -> None:
    block = IdBlock(b"\x01" * 48, b"\x02" * 16, b"\x03" * 16, 4, 5, 6 | 1 << 63)
    assert block.encode()[offset : offset + len(data)] == data


def test_id_block_is_96_bytes() -> None:
    assert len(IdBlock(bytes(48)).encode()) == 96


def test_id_block_with_short_ld_is_format_error() -> None:
    with pytest.raises(FormatError, match="ld"):
        IdBlock(bytes(32))


def test_id_block_with_wide_svn_is_format_error() -> None:
    with pytest.raises(FormatError, match="guest_svn"):
        IdBlock(bytes(48), guest_svn=1 << 32)


@given(sized(96))
def test_id_block_encode_of_decode_is_identity(raw: bytes) -> None:
    assert IdBlock.decode(raw).encode() == raw


@given(st.binary(max_size=95))
def test_id_block_decode_of_short_input_is_format_error(raw: bytes) -> None:
    with pytest.raises(FormatError, match="96"):
        IdBlock.decode(raw)


@pytest.mark.parametrize(
    ("offset", "data"),
    # snp-firmware-abi.md 6.2
    [
        (0x000, b"\x01\0\0\0"),
        (0x004, b"\x02\0\0\0"),
        (0x008, bytes(56)),
        (0x040, b"\x03" * 512),
        (0x240, b"\x04" * 1028),
        (0x644, bytes(60)),
        (0x680, b"\x05" * 512),
        (0x880, b"\x06" * 1028),
        (0xC84, bytes(892)),
    ],
)
def test_id_auth_encode_puts_field_at_its_offset(offset: int, data: bytes) -> None:
    auth = IdAuth(1, 2, b"\x03" * 512, b"\x04" * 1028, b"\x05" * 512, b"\x06" * 1028)
    assert auth.encode()[offset : offset + len(data)] == data


def test_id_auth_default_is_a_zero_page() -> None:
    assert IdAuth().encode() == bytes(4096)


def test_id_auth_with_short_key_is_format_error() -> None:
    with pytest.raises(FormatError, match="author_key"):
        IdAuth(author_key=bytes(1027))


@pytest.mark.parametrize("offset", [0x008, 0x03F, 0x644, 0x67F, 0xC84, 0xFFF])
def test_id_auth_decode_with_reserved_byte_set_gives_its_offset(offset: int) -> None:
    page = bytearray(4096)
    page[offset] = 1
    with pytest.raises(FormatError) as caught:
        IdAuth.decode(page)
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("auth", "present"),
    [
        (IdAuth(1, 0, id_key=b"\x01" * 1028), False),
        (IdAuth(1, 1), True),
        (IdAuth(1, 0, author_key=b"\x01" * 1028), True),
    ],
)
def test_has_author_key_is_true_when_any_part_is_there(auth: IdAuth, present: bool) -> None:
    assert auth.has_author_key is present


@given(st.builds(IdAuth, U32, U32, sized(512), sized(1028), sized(512), sized(1028)))
def test_id_auth_decode_of_encode_is_identity(auth: IdAuth) -> None:
    assert IdAuth.decode(auth.encode()) == auth


@given(st.binary(max_size=200).map(lambda head: head.ljust(4096, b"\0")) | st.binary())
def test_id_auth_decode_of_arbitrary_bytes_raises_format_error_only(page: bytes) -> None:
    with contextlib.suppress(FormatError):
        IdAuth.decode(page)
