from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.policy import DEFAULT_POLICY, GuestPolicy, describe_policy, parse_policy
from kvmlaunch.errors import FormatError

# snp-firmware-abi.md section 5
BITS = {
    "smt": 16,
    "migrate_ma": 18,
    "debug": 19,
    "single_socket": 20,
    "cxl_allow": 21,
    "mem_aes_256_xts": 22,
    "rapl_dis": 23,
    "ciphertext_hiding": 24,
    "page_swap_disable": 25,
}
U64 = st.integers(0, 2**64 - 1)


def test_default_policy_is_qemus() -> None:
    assert DEFAULT_POLICY == 0x30000


@pytest.mark.parametrize("name", BITS)
def test_int_with_one_flag_sets_its_bit_and_bit_17(name: str) -> None:
    assert int(dataclasses.replace(GuestPolicy(), **{name: True})) == 1 << BITS[name] | 1 << 17


def test_flags_are_exactly_those_of_the_table() -> None:
    names = {f.name for f in dataclasses.fields(GuestPolicy)}
    assert names == {*BITS, "abi_minor", "abi_major"}


def test_int_with_abi_puts_major_above_minor() -> None:
    assert int(GuestPolicy(abi_major=1, abi_minor=55)) == 0x20137


def test_from_int_of_debug_policy_has_debug() -> None:
    assert GuestPolicy.from_int(0xB0000) == GuestPolicy(smt=True, debug=True)


def test_from_int_with_bit_17_clear_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="bit 17"):
        GuestPolicy.from_int(0x10000)


def test_from_int_with_reserved_bits_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="26, 63"):
        GuestPolicy.from_int(0x30000 | 1 << 26 | 1 << 63)


@pytest.mark.parametrize("value", [0x10000, 0x30000 | 1 << 26])
def test_from_int_not_strict_takes_reserved_bits_as_they_must_be(value: int) -> None:
    assert int(GuestPolicy.from_int(value, strict=False)) == 0x30000


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_from_int_outside_u64_is_format_error(value: int) -> None:
    with pytest.raises(FormatError, match="64 bits"):
        GuestPolicy.from_int(value, strict=False)


def test_abi_above_8_bits_is_format_error() -> None:
    with pytest.raises(FormatError, match="abi_minor"):
        GuestPolicy(abi_minor=256)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (GuestPolicy(smt=True), "0x30000 (smt)"),
        (GuestPolicy(), "0x20000"),
        (GuestPolicy(smt=True, debug=True, abi_major=1), "0xb0100 (smt,debug,abi=1.0)"),
    ],
)
def test_str_shows_word_and_names(policy: GuestPolicy, text: str) -> None:
    assert str(policy) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0x30000", 0x30000),
        ("196608", 0x30000),
        ("0X3000A", 0x3000A),
        ("0", 0),
        ("smt", 0x30000),
        ("SMT, debug", 0xB0000),
        ("single-socket", 0x120000),
        ("smt,abi=1.55", 0x30137),
    ],
)
def test_parse_policy_gives_the_word(text: str, value: int) -> None:
    assert parse_policy(text) == value


@pytest.mark.parametrize(
    "text", ["", "smt,", "0x", "-1", "1.5", "abi=1", "abi=1.256", "0x1" + "0" * 16, "9" * 5000]
)
def test_parse_policy_of_anything_else_is_format_error(text: str) -> None:
    with pytest.raises(FormatError):
        parse_policy(text)


@pytest.mark.parametrize("name", BITS)
def test_parse_policy_of_unknown_name_lists_known_names(name: str) -> None:
    with pytest.raises(FormatError, match=name):
        parse_policy("smtt")


@pytest.mark.parametrize("bit", [*BITS.values(), 17])
def test_describe_policy_of_default_has_a_line_for_each_known_bit(bit: int) -> None:
    assert any(line.startswith(f"bit {bit} ") for line in describe_policy(0x30000))


def test_describe_policy_with_bit_17_clear_says_refused() -> None:
    assert "bit 17 reserved = 0: must be 1, is refused" in describe_policy(0)


@given(U64)
def test_describe_policy_of_any_u64_gives_lines(value: int) -> None:
    assert len(describe_policy(value)) >= 11


@given(U64.map(lambda v: v & (1 << 26) - 1 | 1 << 17))
def test_int_of_from_int_is_identity(value: int) -> None:
    assert int(GuestPolicy.from_int(value)) == value


@given(U64.map(lambda v: v & (1 << 26) - 1 | 1 << 17))
def test_parse_policy_of_names_from_str_is_identity(value: int) -> None:
    policy = GuestPolicy.from_int(value)
    names = str(policy).partition("(")[2].rstrip(")")
    assert parse_policy(names or "0x20000") == value


@given(st.text())
def test_parse_policy_of_arbitrary_text_raises_format_error_only(text: str) -> None:
    with contextlib.suppress(FormatError):
        assert 0 <= parse_policy(text) < 1 << 64
