from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.secrets_page import SecretsPage
from kvmlaunch.errors import FormatError

KEYS = tuple(bytes([0xA0 + n]) * 32 for n in range(4))
PAGE = SecretsPage(
    version=3,
    imi_en=True,
    fms=0xA00F11,
    gosvw=b"\x10" * 16,
    vmpck=KEYS,  # type: ignore[arg-type]
    os_area=b"\x20" * 96,
    vmsa_tweak_bitmap=b"\x30" * 64,
    svsm_base=0x1000,
    svsm_size=0x2000,
    svsm_caa=0x3000,
    svsm_max_version=4,
    svsm_guest_vmpl=2,
    tsc_factor=200,
)


@pytest.mark.parametrize(
    ("offset", "data"),
    # snp-firmware-abi.md 7.6
    [
        (0x000, b"\x03\0\0\0"),
        (0x004, b"\x01\0\0\0"),
        (0x008, b"\x11\x0f\xa0\0"),
        (0x010, b"\x10" * 16),
        (0x020, KEYS[0]),
        (0x040, KEYS[1]),
        (0x060, KEYS[2]),
        (0x080, KEYS[3]),
        (0x0A0, b"\x20" * 96),
        (0x100, b"\x30" * 64),
        (0x140, b"\x00\x10\0\0\0\0\0\0"),
        (0x148, b"\x00\x20\0\0\0\0\0\0"),
        (0x150, b"\x00\x30\0\0\0\0\0\0"),
        (0x158, b"\x04\0\0\0"),
        (0x15C, b"\x02\0\0\0"),
        (0x160, b"\xc8\0\0\0"),
        (0x164, bytes(4096 - 0x164)),
    ],
)
def test_encode_puts_field_at_its_offset(offset: int, data: bytes) -> None:
    assert PAGE.encode()[offset : offset + len(data)] == data


def test_decode_of_encode_is_identity() -> None:
    assert SecretsPage.decode(PAGE.encode()) == PAGE


@given(
    st.builds(
        SecretsPage,
        version=st.integers(0, 2**32 - 1),
        imi_en=st.booleans(),
        gosvw=st.binary(min_size=16, max_size=16),
        vmpck=st.tuples(*[st.binary(min_size=32, max_size=32)] * 4),
        os_area=st.binary(min_size=96, max_size=96),
        svsm_caa=st.integers(0, 2**64 - 1),
        svsm_guest_vmpl=st.integers(0, 255),
    )
)
def test_decode_of_encode_of_any_page_is_identity(page: SecretsPage) -> None:
    assert SecretsPage.decode(page.encode()) == page


@pytest.mark.parametrize("show", [repr, str])
@pytest.mark.parametrize("key", KEYS)
def test_repr_and_str_do_not_show_keys(show: object, key: bytes) -> None:
    text = show(PAGE)  # type: ignore[operator]
    assert key.hex() not in text
    assert repr(key)[2:-1] not in text


def test_error_about_a_key_does_not_show_it() -> None:
    with pytest.raises(FormatError, match="vmpck2") as caught:
        SecretsPage(vmpck=(KEYS[0], KEYS[1], b"secret", KEYS[3]))
    assert "secret" not in str(caught.value)


def test_three_keys_are_a_format_error() -> None:
    with pytest.raises(FormatError, match="VMPCK"):
        SecretsPage(vmpck=KEYS[:3])  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [0x00C, 0x15D, 0x164, 0xFFF])
def test_decode_with_reserved_byte_set_gives_its_offset(offset: int) -> None:
    page = bytearray(PAGE.encode())
    page[offset] = 1
    with pytest.raises(FormatError) as caught:
        SecretsPage.decode(page)
    assert caught.value.offset == offset


def test_decode_with_unknown_flag_is_format_error() -> None:
    page = bytearray(PAGE.encode())
    page[4] = 2
    with pytest.raises(FormatError, match="flags"):
        SecretsPage.decode(page)


def test_decode_not_strict_skips_reserved_bits() -> None:
    page = bytearray(PAGE.encode())
    page[4] |= 2
    page[0xFFF] = 1
    assert SecretsPage.decode(page, strict=False) == PAGE


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_decode_of_wrong_size_is_format_error(size: int) -> None:
    with pytest.raises(FormatError, match="4096"):
        SecretsPage.decode(bytes(size))


@given(st.binary(max_size=400).map(lambda head: head.ljust(4096, b"\0")) | st.binary())
def test_decode_of_arbitrary_bytes_raises_format_error_only(page: bytes) -> None:
    with contextlib.suppress(FormatError):
        SecretsPage.decode(page)
