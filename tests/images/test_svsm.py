"""OVMF under an SVSM: the plan, what is right against the known tool, each refusal."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmlaunch.abi.vmsa import diff
from kvmlaunch.errors import ImageError
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image, load_vmm
from tests.images.builders import (
    GUID_METADATA,
    GUID_SVSM,
    METADATA_FROM_END,
    entry_bytes,
    ovmf,
    svsm_image,
)

METADATA = entry_bytes(GUID_METADATA, struct.pack("<I", METADATA_FROM_END))
INFO = entry_bytes(GUID_SVSM, struct.pack("<I", 0x100))
GPA = 0xFFFFC000 - 0x10000 - 0x8000


def svsm(*entries: bytes, **choices: Any) -> bytes:
    return svsm_image(entries=entries or None, **choices)


def plan(image: bytes | None = None, **options: Any) -> LaunchPlan:
    chosen = {"svsm": svsm() if image is None else image, "vars_size": 0x10000, **options}
    return load_image(ovmf(), PlanOptions(**chosen))


def refusal(image: bytes | None = None, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        plan(image, **options)
    return str(caught.value)


def test_plan_when_there_is_an_svsm_launches_firmware_svsm_and_its_sections() -> None:
    assert [(s.label, s.gpa, s.size, s.type.name) for s in plan().steps] == [
        ("firmware", 0xFFFFC000, 0x4000, "NORMAL"),
        ("svsm", GPA, 0x8000, "NORMAL"),
        ("sec-mem", 0, 0x9E000, "ZERO"),
        ("secrets", 0x9E000, 0x1000, "SECRETS"),
        ("cpuid", 0x9F000, 0x1000, "CPUID"),
    ]
    image = plan().steps[1]
    assert b"".join(bytes(image.page(n)) for n in range(image.npages)) == svsm()


def test_vcpus_when_there_is_an_svsm_all_start_in_it() -> None:
    """snp-firmware-abi.md 3.3."""
    states = plan(vcpus=3, signature=0xA00F11, sev_features=0x21).vcpus
    assert len({*states}) == 1
    state = states[0]
    assert state.rip == GPA + 0x100
    for name, selector, attrib, limit in (
        *((name, 16, 0xC93, 0xFFFFFFFF) for name in ("es", "ss", "ds", "fs")),
        ("cs", 8, 0xC9B, 0xFFFFFFFF),
        ("gs", 0, 0x93, 0xFFFF),
        ("ldtr", 0, 0x82, 0xFFFF),
        ("tr", 0, 0x8B, 0xFFFF),
    ):
        segment = getattr(state, name)
        assert (segment.selector, segment.attrib, segment.limit, segment.base) == (
            selector,
            attrib,
            limit,
            0,
        )
    assert (state.cr0, state.rdx, state.sev_features) == (0x11, 0xA00F11, 0x21)
    assert (state.mxcsr, state.x87_fcw) == (0x1F80, 0x37F)


def test_vcpus_when_compatible_lack_what_the_tool_drops() -> None:
    right = plan(sev_features=0x21).vcpus[0]
    buggy = plan(sev_features=0x21, compat="sev-snp-measure")
    assert [(d.name, d.a, d.b) for d in diff(right, buggy.vcpus[0])] == [
        ("sev_features", 0x21, 1),
        ("x87_fcw", 0x37F, 0),
    ]
    assert buggy.sev_features == 1


def test_vcpus_when_the_kernel_is_old_have_no_fpu_state() -> None:
    state = plan(vmm=load_vmm("QEMU-before-6.10")).vcpus[0]
    assert (state.mxcsr, state.x87_fcw) == (0, 0)


def test_firmware_when_it_has_no_metadata_is_launched_under_an_svsm() -> None:
    options = PlanOptions(svsm=svsm(), vars_size=0)
    assert load_image(ovmf(entries=[]), options).steps[1].gpa == 0xFFFFC000 - 0x8000


def test_vars_size_when_it_grows_moves_the_svsm_down() -> None:
    assert plan(vars_size=0x84000).steps[1].gpa == 0xFFFFC000 - 0x84000 - 0x8000


@pytest.mark.parametrize("name", ["ec2", "gce", "alioth", "krun", "kvm"])
def test_svsm_when_the_vmm_launches_none_is_refused(name: str) -> None:
    assert f"how {name} launches an SVSM is not known" in refusal(vmm=load_vmm(name))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (bytes(0x8000), "<svsm>: no GUIDed table: its footer GUID"),
        (
            svsm(METADATA),
            f"<svsm>: not an SVSM with SEV metadata: its table has no {GUID_SVSM}",
        ),
        (svsm(INFO), f"not an SVSM with SEV metadata: its table has no {GUID_METADATA} "),
        (svsm(sections=[]), f"its table has no {GUID_METADATA} entry"),
        (bytes(1) + svsm(), "an SVSM of 0x8001 bytes below 0xfffec000: not a number of 4 KiB"),
        (
            svsm(sections=[(0, 0x2000, 1), (0x1000, 0x1000, 2)]),
            "<svsm>: offset 0x7a1c: metadata section 1 (secrets, 0x1000..0x2000) overlaps metadata",
        ),
        (
            svsm(sections=[(0x2000_0000, 0x1000, 1)]),
            "(sec-mem, 0x20000000..0x20001000) is outside the guest's memory (0x0..0x10000000)",
        ),
        (
            svsm(METADATA, entry_bytes(GUID_SVSM, struct.pack("<I", 0x18000))),
            f"the SVSM starts at {GPA + 0x18000:#x}, outside its image",
        ),
        (svsm(METADATA, entry_bytes(GUID_SVSM, b"ab")), "has 2 bytes of data, not 4"),
    ],
    ids=range(9),
)
def test_svsm_when_it_breaks_a_rule_is_refused(image: bytes, sentence: str) -> None:
    assert sentence in refusal(image)


def test_svsm_when_it_would_be_in_ram_is_refused() -> None:
    assert "not a number of 4 KiB pages, or too many" in refusal(vars_size=0x40000000)


def test_svsm_when_its_file_is_missing_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "nosuch"
    with pytest.raises(ImageError, match="nosuch: can't be read: No such file or directory"):
        load_image(ovmf(), PlanOptions(svsm=path, vars_size=0))
