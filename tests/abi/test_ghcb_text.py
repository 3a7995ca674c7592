"""Requests of a guest in words; the values are made by hand from the GHCB specification."""

from __future__ import annotations

import pytest

from kvmlaunch.abi.ghcb_text import describe_event, describe_msr

_CREATE = "CREATE apic_id=3 vmpl=0 vmsa=0x5000"
_WRITE = "write index=0x10 value=0x100000002"
NONE = {"rax": 0, "rcx": 0, "rdx": 0}


@pytest.mark.parametrize(
    ("value", "name", "detail"),
    [
        (0x002, "SEV_INFO", ""),
        (0x8000001F_40000004, "CPUID", "leaf=0x8000001f register=EBX"),
        (0x0020_0000_0010_1014, "PSC", "gpa=0x101000 to=shared"),
        (0x0010_0000_0010_1014, "PSC", "gpa=0x101000 to=private"),
        (0x0090_0000_0010_1014, "PSC", "gpa=0x101000 to=operation 9"),
        (0x101012, "REGISTER_GPA", "gpa=0x101000"),
        (0x777, "request 0x777", "msr=0x777"),
    ],
)
def test_msr_when_described_has_name_and_arguments(value: int, name: str, detail: str) -> None:
    assert describe_msr(value) == (name, detail)


def test_msr_when_guest_terminates_has_the_reason() -> None:
    name, detail = describe_msr(0x2_1100)
    assert name == "TERMINATE"
    assert "PVALIDATE failed" in detail


@pytest.mark.parametrize(
    ("code", "infos", "registers", "name", "detail"),
    [
        (0x72, (0, 0), {"rax": 0xD, "rcx": 1}, "CPUID", "leaf=0xd index=0x1"),
        (0x7B, (0x3F8_0010, 0), {"rax": 0x1141}, "IOIO", "out port=0x3f8 size=1 value=0x41"),
        (0x7B, (0x60_0011, 0), {}, "IOIO", "in port=0x60 size=1"),
        (0x7B, (0x60_0014, 0), {}, "IOIO", "out port=0x60 size=1 string"),
        (0x7C, (0, 0), {"rcx": 0x10}, "MSR", "read index=0x10"),
        (
            0x7C,
            (1, 0),
            {"rcx": 0x10, "rax": 2, "rdx": 1},
            "MSR",
            _WRITE,
        ),
        (0x80000001, (0xFEC00000, 4), {}, "MMIO_READ", "gpa=0xfec00000 size=4"),
        (
            0x80000013,
            (3 << 32 | 1, 0x5000),
            {},
            "AP_CREATION",
            _CREATE,
        ),
        (0x80000017, (0x9000, 0), {"rax": 2}, "APIC_ID_LIST", "gpa=0x9000 pages=2"),
        (0x8000FFFE, (0x5_1, 0), {}, "TERMINATE", "reason set 1 code 5"),
        (0x80000010, (0, 0), {}, "PSC", "info_1=0x0 info_2=0x0"),
        (0x1234, (1, 2), {}, "event 0x1234", "info_1=0x1 info_2=0x2"),
    ],
)
def test_event_when_described_has_name_and_arguments(
    code: int, infos: tuple[int, int], registers: dict[str, int], name: str, detail: str
) -> None:
    assert describe_event(code, *infos, {**NONE, **registers}) == (name, detail)
