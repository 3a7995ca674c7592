"""--explain's search in firmware: a cause planted in each dimension, and two at once.

The planted digests come from hashlib over a list of pages that is written down in launched.py,
with VMSAs of sev-snp-measure, or from that tool where it knows the cause.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlaunch import PlanOptions, explain_digest, load_image, load_vmm
from kvmlaunch.images import VmsaChoice
from tests.images import published
from tests.launch.launched import (
    AMDSEV,
    CAA,
    CPU_SIGS,
    FIXTURES,
    HASHES,
    MILAN,
    NO_FCW,
    NO_FPU,
    NORMAL,
    RDX,
    SEC_MEM,
    UNMEASURED,
    VMSA_GPA,
    VMSA_GPA_52,
    VMSA_TYPE,
    ZERO,
    Page,
    SevMode,
    VMMType,
    chain,
    firmware,
    guest,
    hashes_page,
    kernel_options,
    metadata,
    names,
    pages_of,
    state_pages,
    tried_for,
    vmsas,
)


def test_page_list_when_nothing_is_planted_gives_the_published_digest() -> None:
    row = published.SNP[5]
    assert row[:5] == (published.AMDSEV, "QEMU", 1, 1, None)
    assert chain([*firmware(), *metadata(), *vmsas()]).hex() == row[5]


# A cause in each dimension: what was launched -> what is to be named

PLANTED: dict[str, tuple[Callable[[], list[Page]], set[tuple[str, str]]]] = {
    "vcpus": (
        lambda: [*firmware(), *metadata(), *vmsas(23)],
        {("vCPUs", "23")},
    ),
    "many-vcpus": (
        lambda: [*firmware(), *metadata(), *vmsas(512)],
        {("vCPUs", "512")},
    ),
    "debug-swap": (
        lambda: [*firmware(), *metadata(), *vmsas(features=0x21)],
        {("SEV_FEATURES", "0x21")},
    ),
    "secure-tsc": (
        lambda: [*firmware(), *metadata(), *vmsas(features=0x201)],
        {("SEV_FEATURES", "0x201")},
    ),
    "two-features": (
        lambda: [*firmware(), *metadata(), *vmsas(features=0x29)],
        {("SEV_FEATURES", "0x29")},
    ),
    "signature": (
        lambda: [*firmware(), *metadata(), *vmsas(signature=MILAN)],
        {("CPU signature", "0xa00f11 (EPYC-Milan)")},
    ),
    "signature-600": (
        lambda: [*firmware(), *metadata(), *vmsas(signature=0x600)],
        {("CPU signature", "0x600")},
    ),
    "signature-0": (
        lambda: [*firmware(), *metadata(), *vmsas(signature=0)],
        {("CPU signature", "0x0")},
    ),
    "no-fpu": (
        lambda: [*firmware(), *metadata(), *vmsas(fields=NO_FPU)],
        {("MXCSR and X87_FCW", "0x0, 0x0")},
    ),
    "no-fcw": (
        lambda: [*firmware(), *metadata(), *vmsas(fields=NO_FCW)],
        {("MXCSR and X87_FCW", "0x1f80, 0x0")},
    ),
    "ec2": (
        lambda: [*firmware(), *metadata(cpuid_last=True), *vmsas(vmm="ec2")],
        {("VMM", "ec2")},
    ),
    "gce": (
        lambda: [*firmware(), *metadata({SEC_MEM: UNMEASURED}), *vmsas(vmm="gce")],
        {("VMM", "gce")},
    ),
    "gce-genoa": (
        lambda: [
            *firmware(),
            *metadata({SEC_MEM: UNMEASURED}),
            *vmsas(vmm="gce", gpa=VMSA_GPA_52),
        ],
        {("VMM", "gce-genoa")},
    ),
    "gpa": (
        lambda: [*firmware(), *metadata(), *vmsas(gpa=VMSA_GPA_52)],
        {("GPA of the VMSAs", "0xffffffffff000")},
    ),
    "metadata-first": (
        lambda: [*metadata(), *firmware(), *vmsas()],
        {("order of pages", "metadata, firmware")},
    ),
    "cpuid-last": (
        lambda: [*firmware(), *metadata(cpuid_last=True), *vmsas()],
        {("order of pages", "firmware, metadata, cpuid")},
    ),
    "vmsas-first": (
        lambda: [*vmsas(), *firmware(), *metadata()],
        {("place of the VMSAs", "first")},
    ),
    "vmsas-before-metadata": (
        lambda: [*firmware(), *vmsas(), *metadata()],
        {("place of the VMSAs", "behind firmware, before metadata")},
    ),
    "sec-mem-unmeasured": (
        lambda: [*firmware(), *metadata({SEC_MEM: UNMEASURED}), *vmsas()],
        {("page type of sec-mem", "UNMEASURED")},
    ),
    "sec-mem-normal": (
        lambda: [*firmware(), *metadata({SEC_MEM: NORMAL}), *vmsas()],
        {("page type of sec-mem", "NORMAL")},
    ),
    "all-zero-pages-normal": (
        lambda: [
            *firmware(),
            *metadata({SEC_MEM: NORMAL, CAA: NORMAL, HASHES: NORMAL}),
            *vmsas(),
        ],
        {("all ZERO pages", "NORMAL")},
    ),
    "caa-left-out": (
        lambda: [*firmware(), *metadata({CAA: 0}), *vmsas()],
        {("page type of svsm-caa", "not launched")},
    ),
    "cpuid-unmeasured": (
        lambda: [*firmware(), *metadata({3: UNMEASURED}), *vmsas()],
        {("page type of cpuid", "UNMEASURED")},
    ),
    "secrets-zero": (
        lambda: [*firmware(), *metadata({2: ZERO}), *vmsas()],
        {("page type of secrets", "ZERO")},
    ),
    "no-vmsas": (
        lambda: [*firmware(), *metadata()],
        {("VMSAs", "none are measured")},
    ),
    "vmsa-of-user-space": (
        # The lowest page that is free: vCPU 0's in mode direct.
        lambda: [*firmware(), *metadata(), *vmsas(gpa=0x1000)],
        {("VMSAs", "one page of the launcher's, for vCPU 0")},
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_cause_when_planted_is_named(planted: str) -> None:
    pages, expected = PLANTED[planted]
    options = PlanOptions()
    assert tried_for(chain(pages()), load_image(AMDSEV, options), options) == expected


# Two at once

TWO: dict[str, tuple[Callable[[], list[Page]], set[tuple[str, str]]]] = {
    "features-and-vcpus": (
        lambda: [*firmware(), *metadata(), *vmsas(6, features=0x21)],
        {("vCPUs", "6"), ("SEV_FEATURES", "0x21")},
    ),
    "signature-and-sec-mem": (
        lambda: [*firmware(), *metadata({SEC_MEM: UNMEASURED}), *vmsas(signature=MILAN)],
        {("CPU signature", "0xa00f11 (EPYC-Milan)"), ("page type of sec-mem", "UNMEASURED")},
    ),
    "place-and-features": (
        lambda: [*vmsas(features=0x21), *firmware(), *metadata()],
        {("SEV_FEATURES", "0x21"), ("place of the VMSAs", "first")},
    ),
    "place-and-vcpus": (
        lambda: [*vmsas(3), *firmware(), *metadata()],
        {("vCPUs", "3"), ("place of the VMSAs", "first")},
    ),
    "gpa-and-order": (
        lambda: [*metadata(), *firmware(), *vmsas(gpa=VMSA_GPA_52)],
        {("GPA of the VMSAs", "0xffffffffff000"), ("order of pages", "metadata, firmware")},
    ),
    "no-fpu-and-features": (
        lambda: [*firmware(), *metadata(), *vmsas(features=0x21, fields=NO_FPU)],
        {("SEV_FEATURES", "0x21"), ("MXCSR and X87_FCW", "0x0, 0x0")},
    ),
    "three-with-the-count": (
        lambda: [*firmware(), *metadata(), *vmsas(9, features=0x21, signature=MILAN)],
        {
            ("vCPUs", "9"),
            ("SEV_FEATURES", "0x21"),
            ("CPU signature", "0xa00f11 (EPYC-Milan)"),
        },
    ),
}


@pytest.mark.parametrize("planted", TWO)
def test_causes_when_several_are_planted_are_all_named(planted: str) -> None:
    pages, expected = TWO[planted]
    options = PlanOptions()
    assert tried_for(chain(pages()), load_image(AMDSEV, options), options) == expected


def test_cause_when_more_vcpus_were_asked_for_is_fewer() -> None:
    options = PlanOptions(vcpus=12)
    digest = chain([*firmware(), *metadata(), *vmsas(3)])
    assert tried_for(digest, load_image(AMDSEV, options), options) == {("vCPUs", "3")}


def test_vmm_when_that_asked_for_has_another_order_is_the_tables_again() -> None:
    options = PlanOptions(vmm=load_vmm("ec2"), signature=MILAN, vcpus=2)
    digest = chain([*firmware(), *metadata(), *vmsas(2, signature=MILAN)])
    assert tried_for(digest, load_image(AMDSEV, options), options) == {("VMM", "QEMU")}


def test_signature_when_the_vmm_takes_none_is_not_tried() -> None:
    options = PlanOptions(vmm=load_vmm("ec2"))
    rdx = {RDX: MILAN.to_bytes(8, "little")}
    digest = chain([*firmware(), *metadata(cpuid_last=True), *vmsas(vmm="ec2", fields=rdx)])
    assert not explain_digest(load_image(AMDSEV, options), digest, options, most=50_000)


@pytest.mark.parametrize(("count", "explained"), [(1, True), (2, False)])
def test_vmm_when_it_knows_one_vcpu_is_tried_with_one(count: int, explained: bool) -> None:
    krun = load_image(AMDSEV, PlanOptions(vmm=load_vmm("krun")))
    digest = chain([*firmware(), *metadata(), *state_pages(krun, count)])
    assert bool(explain_digest(load_image(AMDSEV), digest, most=50_000)) is explained


def test_profile_when_measured_as_given_is_predicted_so(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    # KVM would measure EFER.SVME.
    path.write_text(
        '{"format": "kvmlaunch.vmm/1", "name": "own", "base": "QEMU", "measured": "as-given", '
        '"registers": {"efer": 0}}'
    )
    options = PlanOptions(vmm=load_vmm(str(path)))
    digest = chain([*firmware(), *metadata(), *vmsas(fields={0xD0: bytes(8)})])
    assert tried_for(digest, load_image(AMDSEV, options), options) == set()


# Published digests, all as if QEMU with one vCPU and features 1 had been asked for


@pytest.mark.parametrize("row", [*published.SNP, *published.SNP_OLD], ids=lambda row: row[5][:12])
def test_published_digest_when_other_inputs_were_asked_for_is_explained(
    row: tuple[str, str, int, int, str | None, str],
) -> None:
    image, vmm, vcpus, features, append, digest = row
    kernel = None if append is None else "/dev/null"
    options = PlanOptions(
        signature=published.SIGNATURE, kernel=kernel, initrd=kernel, append=append
    )
    plan = load_image(FIXTURES / image, options)
    expected = set()
    if vcpus > 1:
        expected.add(("vCPUs", str(vcpus)))
    if features != 1:
        expected.add(("SEV_FEATURES", hex(features)))
    if vmm == "QEMU-before-6.10":
        expected.add(("MXCSR and X87_FCW", "0x0, 0x0"))
    elif vmm != "QEMU":
        expected.add(("VMM", vmm))
    assert tried_for(bytes.fromhex(digest), plan, options) == expected


# sev-snp-measure over Debian's firmware of 2 MiB


@pytest.mark.parametrize(
    ("vcpus", "cpu", "features", "vmm", "expected"),
    [
        (4, "EPYC-v4", 1, "QEMU", {("vCPUs", "4")}),
        (1, "EPYC-Genoa", 1, "QEMU", {("CPU signature", "0xa10f10 (EPYC-Genoa)")}),
        (1, "EPYC-v4", 1, "ec2", {("VMM", "ec2")}),
        (1, "EPYC-v4", 1, "gce", {("VMM", "gce")}),
        (8, "EPYC-v4", 0x21, "gce", {("vCPUs", "8"), ("SEV_FEATURES", "0x21"), ("VMM", "gce")}),
    ],
)
def test_debian_ovmf_when_sev_snp_measure_had_other_inputs_is_explained(
    ovmf: Path, vcpus: int, cpu: str, features: int, vmm: str, expected: set[tuple[str, str]]
) -> None:
    digest = guest.calc_launch_digest(
        *(SevMode.SEV_SNP, vcpus, CPU_SIGS[cpu], str(ovmf), "", "", "", features),
        vmm_type=VMMType[vmm],
    )
    options = PlanOptions()
    assert tried_for(digest, load_image(ovmf, options), options) == expected


def test_vmm_when_another_cpu_was_asked_for_starts_with_that(ovmf: Path) -> None:
    digest = guest.calc_launch_digest(SevMode.SEV_SNP, 2, MILAN, str(ovmf), "", "", "", 1)
    options = PlanOptions(vmm=load_vmm("ec2"), signature=MILAN, vcpus=2)
    assert tried_for(digest, load_image(ovmf, options), options) == {("VMM", "QEMU")}


# Kernel hashes


@pytest.mark.parametrize(
    ("asked", "kernel", "expected"),
    [
        ("console=ttyS0", None, "none"),
        ("console=ttyS0", hashes_page(initrd=b""), "without the initrd's"),
        ("console=ttyS0", hashes_page(append=""), "without the command line's"),
        (" console=ttyS0 ", hashes_page(), "of the command line without outer blanks"),
        (
            "console=ttyS0",
            hashes_page(append="console=ttyS0\n"),
            "of the command line and a newline",
        ),
    ],
)
def test_kernel_hashes_when_others_were_launched_are_named(
    asked: str, kernel: bytes | None, expected: str
) -> None:
    options = kernel_options(asked)
    digest = chain([*firmware(), *metadata(kernel=kernel), *vmsas()])
    plan = load_image(AMDSEV, options)
    assert tried_for(digest, plan, options) == {("kernel hashes", expected)}


def test_vmm_when_it_launches_no_hashes_goes_without_the_kernel() -> None:
    options = kernel_options()
    plain = load_image(AMDSEV, PlanOptions(vmm=load_vmm("alioth")))
    digest = chain([*pages_of(plain), (VMSA_TYPE, VMSA_GPA, plain.vcpus[0].encode())])
    found = explain_digest(load_image(AMDSEV, options), digest, options)
    assert names(found) == {("VMM", "alioth")}
    assert str(found).startswith("--vmm-type alioth without --kernel gives this digest")


# VMSA modes


def test_direct_when_kvm_made_the_vmsas_is_explained() -> None:
    options = PlanOptions(vmsa_mode="direct", vcpus=2)
    found = tried_for(
        chain([*firmware(), *metadata(), *vmsas(2)]), load_image(AMDSEV, options), options
    )
    assert {name for name, _ in found} == {"VMSAs"}


def test_sync_when_each_vcpu_had_a_page_is_explained() -> None:
    options = PlanOptions(vcpus=3)
    pages = [(kind, 0x1000 * (1 + n), page) for n, (kind, _, page) in enumerate(vmsas(3))]
    digest = chain([*firmware(), *metadata(), *pages])
    found = tried_for(digest, load_image(AMDSEV, options), options)
    assert found == {("VMSAs", "a page of the launcher's for each vCPU")}


def test_direct_when_features_differ_is_explained() -> None:
    options = PlanOptions(vmsas=(VmsaChoice(gpa=0x5000),))
    digest = chain([*firmware(), *metadata(), *vmsas(features=0x21, gpa=0x5000)])
    found = tried_for(digest, load_image(AMDSEV, options), options)
    assert found == {("SEV_FEATURES", "0x21")}


def test_direct_when_a_forced_vmsa_has_other_features_counts_from_those() -> None:
    edits = (("sev_features", 0x21),)
    options = PlanOptions(vmsas=(VmsaChoice(gpa=0x5000, edits=edits),), forced=True)
    digest = chain([*firmware(), *metadata(), *vmsas(gpa=0x5000)])
    (cause,) = explain_digest(load_image(AMDSEV, options), digest, options).causes or ()
    assert (cause.name, cause.found, cause.asked) == ("SEV_FEATURES", "0x1", "0x21")


def test_direct_when_the_vmm_differs_is_explained() -> None:
    options = PlanOptions(vmsas=(VmsaChoice(gpa=0x5000),))
    digest = chain([*firmware(), *metadata(cpuid_last=True), *vmsas(vmm="ec2", gpa=0x5000)])
    assert tried_for(digest, load_image(AMDSEV, options), options) == {("VMM", "ec2")}
