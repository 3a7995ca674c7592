from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.tcb import Product, Tcb, product_of
from kvmlaunch.errors import FormatError


@pytest.mark.parametrize(
    ("product", "value"),
    # snp-firmware-abi.md 8.2
    [
        ("Milan", 0x0407000000000201),
        ("Genoa", 0x0407000000000201),
        ("Turin", 0x0400000007020100),
    ],
)
def test_encode_has_the_products_layout(product: Product, value: int) -> None:
    tcb = Tcb(bootloader=1, tee=2, snp=7, microcode=4)
    assert tcb.encode(product) == value
    assert Tcb.decode(product, value) == tcb


def test_decode_of_real_milan_word_names_its_parts() -> None:
    # snp-firmware-abi.md 8.6: the first real report
    assert Tcb.decode("Milan", 0x7308000000000003) == Tcb(bootloader=3, snp=8, microcode=0x73)


def test_encode_fmc_is_turins_byte_0() -> None:
    assert Tcb(fmc=5).encode("Turin") == 5
    with pytest.raises(FormatError, match="no FMC"):
        Tcb(fmc=5).encode("Milan")


@pytest.mark.parametrize("value", [-1, 256])
def test_version_outside_a_byte_is_format_error(value: int) -> None:
    with pytest.raises(FormatError, match="snp"):
        Tcb(snp=value)


@given(st.sampled_from(["Milan", "Genoa", "Turin"]), st.integers(0, 2**64 - 1))
def test_decode_of_any_word_keeps_the_named_bytes(product: Product, value: int) -> None:
    mask = 0xFF000000FFFFFFFF if product == "Turin" else 0xFFFF00000000FFFF
    assert Tcb.decode(product, value).encode(product) == value & mask


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode", "fmc"])
def test_covers_when_one_part_is_older_is_false(part: str) -> None:
    old, new = Tcb(5, 5, 5, 5, 5), Tcb(**{**dict.fromkeys(vars(Tcb()), 5), part: 6})
    assert new.covers(old)
    assert not old.covers(new)
    assert old.covers(old)


@pytest.mark.parametrize(
    ("family", "model", "product"),
    # snp-firmware-abi.md 8.2
    [
        (0x19, 0x00, "Milan"),
        (0x19, 0x0F, "Milan"),
        (0x19, 0x10, "Genoa"),
        (0x19, 0x1F, "Genoa"),
        (0x19, 0x20, None),
        (0x19, 0xA0, "Genoa"),
        (0x19, 0xAF, "Genoa"),
        (0x19, 0xB0, None),
        (0x1A, 0x00, "Turin"),
        (0x1A, 0x11, "Turin"),
        (0x1A, 0x12, None),
        (0x17, 0x01, None),
        (0, 0, None),
    ],
)
def test_product_of_family_and_model(family: int, model: int, product: Product | None) -> None:
    assert product_of(family, model) == product
