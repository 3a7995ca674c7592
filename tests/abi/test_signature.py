from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.signature import decode_signature, encode_signature
from kvmlaunch.errors import FormatError

NUMBERS = st.integers(0, 2**576 - 1)


def test_encode_is_little_endian_at_0_and_0x48() -> None:
    # snp-firmware-abi.md 6.3
    raw = encode_signature(0x0102, 0x030405)
    assert raw == (b"\x02\x01".ljust(72, b"\0") + b"\x05\x04\x03").ljust(512, b"\0")


@given(NUMBERS, NUMBERS)
def test_decode_of_encode_of_any_numbers_is_identity(r: int, s: int) -> None:
    assert decode_signature(encode_signature(r, s)) == (r, s)


@pytest.mark.parametrize("numbers", [(2**576, 0), (0, 2**576), (-1, 0)])
def test_encode_of_number_that_does_not_fit_is_format_error(numbers: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match=r"^[RS] "):
        encode_signature(*numbers)


def test_decode_with_byte_behind_s_gives_its_offset() -> None:
    with pytest.raises(FormatError) as caught:
        decode_signature(bytes(0x90) + b"\x01" + bytes(511 - 0x90))
    assert caught.value.offset == 0x90


@given(st.binary(max_size=600) | st.binary(max_size=144).map(lambda b: b.ljust(512, b"\0")))
def test_decode_of_arbitrary_bytes_raises_format_error_only(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        decode_signature(raw)
