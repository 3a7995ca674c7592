from __future__ import annotations

import pytest

from kvmlaunch.abi.page import PAGE_SIZE, PageType


def test_page_size_is_4096() -> None:
    assert PAGE_SIZE == 4096


@pytest.mark.parametrize(
    ("name", "number"),
    # snp-firmware-abi.md 1.2
    [("NORMAL", 1), ("VMSA", 2), ("ZERO", 3), ("UNMEASURED", 4), ("SECRETS", 5), ("CPUID", 6)],
)
def test_page_type_by_name_has_firmware_number(name: str, number: int) -> None:
    assert PageType[name] == number


def test_page_types_are_exactly_six() -> None:
    assert len(PageType) == 6


def test_measures_contents_is_true_for_normal_and_vmsa_only() -> None:
    assert [t.name for t in PageType if t.measures_contents] == ["NORMAL", "VMSA"]
