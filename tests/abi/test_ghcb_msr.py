"""Termination requests of the GHCB MSR protocol (AMD 56421; Linux sev-common.h)."""

from __future__ import annotations

import re

import pytest

from kvmlaunch.abi.ghcb_msr import Termination, decode_termination
from tests.guests import EXAMPLES

# Value of the MSR: 0x100 in bits 11:0, reason set in 15:12, reason code in 23:16.
KNOWN = [
    (0x000100, 0, 0, "general termination request"),
    (0x010100, 0, 1, "protocol range"),
    (0x020100, 0, 2, "SNP features"),
    (0x001100, 1, 0, "registration failed"),
    (0x011100, 1, 1, "page state change"),
    (0x021100, 1, 2, "PVALIDATE"),
    (0x031100, 1, 3, "not at VMPL0"),
    (0x041100, 1, 4, "CPUID table"),
    (0x051100, 1, 5, "CPUID from the hypervisor"),
    (0x061100, 1, 6, "secrets page"),
    (0x071100, 1, 7, "SVSM"),
    (0x081100, 1, 8, "VMPL0"),
    (0x091100, 1, 9, "calling area"),
    # The guests of examples/guests (runtime/runtime.h).
    (0x06F100, 15, 6, "PVALIDATE failed"),
    (0x0BF100, 15, 11, "memory doesn't hold what was written"),
    (0x01F100, 15, 1, "not an SNP guest"),
    (0x0CF100, 15, 12, "a check failed"),
    (0x0DF100, 15, 13, "isn't validated"),
    (0x0EF100, 15, 14, "didn't answer a guest message"),
    (0x0FF100, 15, 15, "no other VMPL than 0"),
    (0x10F100, 15, 16, "more vCPUs"),
    (0x21F100, 15, 0x21, "was refused: GHCB page not registered"),
    (0x22F100, 15, 0x22, "was refused: invalid usage"),
    (0x23F100, 15, 0x23, "was refused: invalid scratch area"),
    (0x24F100, 15, 0x24, "was refused: missing input"),
    (0x25F100, 15, 0x25, "was refused: invalid input"),
    (0x26F100, 15, 0x26, "was refused: invalid event"),
    (0x8DF100, 15, 0x8D, "exception 13"),
]


@pytest.mark.parametrize(("value", "reason_set", "code", "_text"), KNOWN)
def test_termination_when_decoded_has_set_and_code(
    value: int, reason_set: int, code: int, _text: str
) -> None:
    assert decode_termination(value) == Termination(reason_set, code)


@pytest.mark.parametrize(("value", "_set", "_code", "text"), KNOWN)
def test_termination_when_known_is_explained(value: int, _set: int, _code: int, text: str) -> None:
    assert text in str(decode_termination(value))


@pytest.mark.parametrize(
    ("value", "name"),
    [(0x000100, "set 0 (GHCB specification)"), (0x001100, "set 1 (Linux)"), (0x2100, "set 2 (unk")],
)
def test_termination_when_shown_names_whose_set_it_is(value: int, name: str) -> None:
    assert name in str(decode_termination(value))


@pytest.mark.parametrize("value", [0xFF0100, 0x0A1100, 0x00F100])
def test_termination_when_the_code_is_unknown_shows_the_numbers(value: int) -> None:
    shown = str(decode_termination(value))
    assert f"set {value >> 12 & 0xF} " in shown
    assert f"code {value >> 16} (unknown code)" in shown


def test_termination_when_higher_bits_are_set_ignores_them() -> None:
    assert decode_termination(0xFFFF_FFFF_FF02_1100) == Termination(1, 2)


# Through the GHCB page: the event carries the page's address, whose low 12 bits are 0.
@pytest.mark.parametrize("value", [0x0, 0x7FFF_F000, 0x1000, 0x0000_0001_0000_0000])
def test_termination_when_it_came_through_the_ghcb_page_has_no_reason(value: int) -> None:
    assert decode_termination(value) == Termination(None, None)


def test_termination_when_it_came_through_the_ghcb_page_points_to_the_kernel_log() -> None:
    assert "kernel log" in str(decode_termination(0x7FFF_F000))


@pytest.mark.parametrize("value", [0x001, 0x101, 0x014, 0xFFF])
def test_termination_when_the_request_is_another_has_no_reason(value: int) -> None:
    assert decode_termination(value).reason_set is None


def test_code_when_an_example_guest_has_it_is_explained_in_its_words() -> None:
    header = (EXAMPLES / "guests" / "runtime" / "runtime.h").read_text()
    found = re.findall(r"#define (FAIL|REFUSED)_\w+ +(\w+) +/\* ([^:*]+)(?::| \*)", header)
    codes = {
        int(number, 0) + (0x20 if kind == "REFUSED" else 0): text
        for kind, number, text in found
        if not text.startswith("plus")
    }
    assert sorted(codes) == [*range(1, 9), *range(10, 17), *range(0x21, 0x27)]
    for code, text in codes.items():
        assert f"code {code} (" in str(decode_termination(code << 16 | 0xF100))
        assert text in str(decode_termination(code << 16 | 0xF100))
