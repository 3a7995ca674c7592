"""--explain's search in other images: flat and ELF files, an SVSM, IGVM files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlaunch import LaunchPlan, PlanOptions, explain_digest, load_image
from kvmlaunch.launch.deviations import Asked, dimensions
from tests.images.builders import Seg, elf64, pvh_note
from tests.launch.launched import (
    AMDSEV,
    EPYC_V4,
    MILAN,
    NORMAL,
    PAGE,
    SEC_MEM,
    SEV_FEATURES,
    UNMEASURED,
    VMSA_GPA_52,
    VMSA_TYPE,
    ZERO,
    Page,
    SevMode,
    chain,
    elf,
    firmware,
    flat,
    guest,
    igvm_file,
    metadata,
    names,
    pages_of,
    patched,
    state_pages,
    svsm_files,
    tried_for,
    vmsas,
)

# Flat and ELF files

FEATURES_21 = (0x21).to_bytes(8, "little")


@pytest.mark.parametrize("image", [flat, elf])
@pytest.mark.parametrize(
    ("count", "fields", "expected"),
    [
        (7, {}, {("vCPUs", "7")}),
        (1, {"features": FEATURES_21}, {("SEV_FEATURES", "0x21")}),
        (3, {"features": FEATURES_21}, {("vCPUs", "3"), ("SEV_FEATURES", "0x21")}),
        (1, {"mxcsr": bytes(4), "fcw": bytes(2)}, {("MXCSR and X87_FCW", "0x0, 0x0")}),
    ],
)
def test_flat_and_elf_when_vmsas_differ_are_explained(
    tmp_path: Path,
    image: Callable[[Path], tuple[LaunchPlan, PlanOptions]],
    count: int,
    fields: dict[str, bytes],
    expected: set[tuple[str, str]],
) -> None:
    plan, options = image(tmp_path)
    digest = chain([*pages_of(plan), *state_pages(plan, count, **fields)])
    assert tried_for(digest, plan, options) == expected


def test_flat_when_the_signature_differs_is_explained(tmp_path: Path) -> None:
    plan, options = flat(tmp_path)
    digest = chain([*pages_of(plan), *state_pages(plan, rdx=MILAN.to_bytes(8, "little"))])
    assert tried_for(digest, plan, options) == {("CPU signature", "0xa00f11 (EPYC-Milan)")}


def test_flat_when_vmsas_were_first_is_explained(tmp_path: Path) -> None:
    plan, options = flat(tmp_path)
    digest = chain([*state_pages(plan), *pages_of(plan)])
    assert tried_for(digest, plan, options) == {("place of the VMSAs", "first")}


def test_elf_when_vmsas_are_in_the_52_bit_page_is_explained(tmp_path: Path) -> None:
    plan, options = elf(tmp_path)
    vmsa = [(kind, VMSA_GPA_52, page) for kind, _, page in state_pages(plan)]
    digest = chain([*pages_of(plan), *vmsa])
    assert tried_for(digest, plan, options) == {("GPA of the VMSAs", "0xffffffffff000")}


@pytest.mark.parametrize(
    ("kind", "expected"), [(NORMAL, "NORMAL"), (UNMEASURED, "UNMEASURED"), (0, "not launched")]
)
def test_elf_when_its_bss_had_another_type_is_explained(
    tmp_path: Path, kind: int, expected: str
) -> None:
    plan, options = elf(tmp_path)
    pages = [
        (kind, gpa, bytes(PAGE) if kind == NORMAL else None) if old == ZERO else (old, gpa, data)
        for old, gpa, data in pages_of(plan)
    ]
    digest = chain([page for page in pages if page[0]] + state_pages(plan))
    assert tried_for(digest, plan, options) == {("page type of bss", expected)}


def test_elf_when_its_page_tables_came_last_is_explained(tmp_path: Path) -> None:
    plan, options = elf(tmp_path)
    pages = pages_of(plan)
    digest = chain([*pages[6:], *pages[:6], *state_pages(plan)])
    found = tried_for(digest, plan, options)
    assert found == {("order of pages", "the image, then what it needs")}


def test_elf_when_the_hosts_c_bit_is_another_is_explained(tmp_path: Path) -> None:
    other, _ = elf(tmp_path, cbitpos=47)
    digest = chain([*pages_of(other), *state_pages(other)])
    plan, options = elf(tmp_path)
    assert tried_for(digest, plan, options) == {("position of the C-bit", "47")}


@pytest.mark.parametrize("notes", [[], [pvh_note(0x100000)]])
def test_elf_when_the_signature_has_no_effect_does_not_try_it(
    tmp_path: Path, notes: list[Seg]
) -> None:
    path = tmp_path / "guest.elf"
    path.write_bytes(elf64([Seg(0x100000, bytes(range(256)) * 32), *notes]))
    plan = load_image(path)
    digest = chain([*pages_of(plan), *state_pages(plan, rdx=MILAN.to_bytes(8, "little"))])
    assert not explain_digest(plan, digest, most=5000)


# Firmware of which only the digest is known, and an SVSM


def test_firmware_digest_when_given_is_gone_on_from() -> None:
    start = chain(firmware())
    options = PlanOptions(firmware_digest=start)
    digest = chain([*metadata({SEC_MEM: UNMEASURED}), *vmsas(vmm="gce")], start)
    assert tried_for(digest, load_image(AMDSEV, options), options) == {("VMM", "gce")}


def test_firmware_digest_when_given_has_nothing_before_it() -> None:
    options = PlanOptions(firmware_digest=chain(firmware()))
    rows = dimensions(Asked(load_image(AMDSEV, options), options))
    values = {row.key: values for row, values in rows}
    assert "order" not in values
    assert "alioth" not in values["vmm"]
    assert "ec2" in values["vmm"]


def test_firmware_digest_when_given_may_have_vmsas_behind_it() -> None:
    start = chain(firmware())
    options = PlanOptions(firmware_digest=start)
    digest = chain([*vmsas(), *metadata()], start)
    found = tried_for(digest, load_image(AMDSEV, options), options)
    assert found == {("place of the VMSAs", "behind firmware, before metadata")}


@pytest.mark.parametrize(
    ("vcpus", "signature", "expected"),
    [
        (1, EPYC_V4, set()),
        (3, EPYC_V4, {("vCPUs", "3")}),
        (1, MILAN, {("CPU signature", "0xa00f11 (EPYC-Milan)")}),
    ],
)
def test_svsm_when_sev_snp_measure_says_otherwise_is_explained(
    tmp_path: Path, vcpus: int, signature: int, expected: set[tuple[str, str]]
) -> None:
    image, svsm = svsm_files(tmp_path)
    digest = guest.calc_launch_digest(
        *(SevMode.SEV_SNP_SVSM, vcpus, signature, str(image), "", "", "", 1),
        svsm_file=str(svsm),
        ovmf_vars_size=0x4000,
    )
    options = PlanOptions(svsm=svsm, vars_size=0x4000)
    found = explain_digest(load_image(image, options), digest, options)
    # That tool leaves X87_FCW out.
    assert names(found) == {("MXCSR and X87_FCW", "0x1f80, 0x0"), *expected}
    assert "--compat sev-snp-measure" in str(found).splitlines()[0]


# IGVM files, whose VMSAs may be anywhere

IGVM: dict[str, tuple[Callable[[list[Page]], list[Page]], set[tuple[str, str]]]] = {
    "nothing": (lambda pages: pages, set()),
    "features": (
        lambda pages: [
            (kind, gpa, patched(data or b"", {SEV_FEATURES: b"\x21"}) if kind == 2 else data)
            for kind, gpa, data in pages
        ],
        {("SEV_FEATURES", "0x21")},
    ),
    "native-zero": (
        lambda pages: [(ZERO, gpa, None) if gpa == 0x2000 else (k, gpa, d) for k, gpa, d in pages],
        {("pages without data", "ZERO")},
    ),
    "vmsa-first": (
        lambda pages: sorted(pages, key=lambda page: page[0] != VMSA_TYPE),
        {("place of the VMSAs", "first")},
    ),
}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("planted", IGVM)
def test_igvm_when_it_was_launched_otherwise_is_explained(planted: str, early: bool) -> None:
    change, expected = IGVM[planted]
    options = PlanOptions()
    plan, pages = igvm_file(options, early=early)
    assert tried_for(chain(change(pages)), plan, options) == expected


def test_igvm_when_its_vmsa_came_last_is_explained() -> None:
    options = PlanOptions()
    plan, pages = igvm_file(options, early=True)
    digest = chain(sorted(pages, key=lambda page: page[0] == VMSA_TYPE))
    assert tried_for(digest, plan, options) == {("place of the VMSAs", "last")}


def test_igvm_when_its_zeros_were_normal_is_explained() -> None:
    options = PlanOptions(native_zero=True)
    plan, pages = igvm_file(options, early=True)
    assert tried_for(chain(pages), plan, options) == {("pages without data", "NORMAL")}
