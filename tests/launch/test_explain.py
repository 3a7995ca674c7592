"""--explain's search: a cause planted in each dimension, two at once, and none.

The planted digests come from hashlib over a list of pages that is written down here, with VMSAs
of sev-snp-measure, or from that tool where it knows the cause.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch import (
    LaunchPlan,
    PlanOptions,
    explain_digest,
    explain_vmsa,
    load_image,
    load_vmm,
    measure,
)
from kvmlaunch.abi.kernel_hashes import KernelHashes, hash_cmdline
from kvmlaunch.errors import FormatError
from kvmlaunch.hashing import backends, hasher
from kvmlaunch.hashing.plain import PlainHasher
from kvmlaunch.images import VmsaChoice
from kvmlaunch.launch import variants
from kvmlaunch.launch.deviations import Asked, dimensions
from kvmlaunch.launch.explain import Explanation
from tests.images import igvm_files, published
from tests.images.builders import (
    AMDSEV_SECTIONS,
    GUID_SVSM,
    Seg,
    elf64,
    entry_bytes,
    metadata_bytes,
    pvh_note,
    standard_entries,
)
from tests.images.builders import ovmf as ovmf_image

guest = pytest.importorskip("sevsnpmeasure.guest")
CPU_SIGS = pytest.importorskip("sevsnpmeasure.vcpu_types").CPU_SIGS
SevMode = pytest.importorskip("sevsnpmeasure.sev_mode").SevMode
VMMType = pytest.importorskip("sevsnpmeasure.vmm_types").VMMType
VMSA = pytest.importorskip("sevsnpmeasure.vmsa").VMSA

FIXTURES = Path(__file__).parents[1] / "images" / "fixtures"
AMDSEV = FIXTURES / published.AMDSEV
PAGE = 4096
NORMAL, VMSA_TYPE, ZERO, UNMEASURED, SECRETS, CPUID = range(1, 7)
TYPES = {1: ZERO, 2: SECRETS, 3: CPUID, 4: ZERO, 0x10: ZERO}
SEC_MEM, CAA, HASHES = 1, 4, 0x10
VMSA_GPA, VMSA_GPA_52 = 0xFFFFFFFFF000, 0xFFFFFFFFFF000
AP_EIP = 0x80B004  # of the fixtures
EPYC_V4, MILAN = 0x800F12, 0xA00F11
SEV_FEATURES, RDX, MXCSR, FCW, CR3 = 0x3B0, 0x310, 0x408, 0x410, 0x150

Page = tuple[int, int, bytes | None]


def chain(pages: Sequence[Page], start: bytes = bytes(48)) -> bytes:
    """The launch digest of (page type, GPA, bytes or None) by hashlib alone."""
    for kind, gpa, data in pages:
        contents = bytes(48) if data is None else hashlib.sha384(data).digest()
        tail = struct.pack("<HB5xQ", 0x70, kind, gpa)
        start = hashlib.sha384(start + contents + tail).digest()
    return start


def paged(kind: int, gpa: int, data: bytes) -> list[Page]:
    return [(kind, gpa + at, data[at : at + PAGE]) for at in range(0, len(data), PAGE)]


def firmware(path: Path = AMDSEV) -> list[Page]:
    data = path.read_bytes()
    return paged(NORMAL, (1 << 32) - len(data), data)


def metadata(
    change: dict[int, int] | None = None, *, kernel: bytes | None = None, cpuid_last: bool = False
) -> list[Page]:
    """The sections' pages, by type of section changed to a page type (0: left out)."""
    found: list[Page] = []
    last: list[Page] = []
    for gpa, size, section in AMDSEV_SECTIONS:
        kind = (change or {}).get(section, TYPES[section])
        data = None
        if section == HASHES and kernel is not None:
            kind, data = NORMAL, kernel
        if kind == NORMAL and data is None:
            data = bytes(PAGE)
        into = last if cpuid_last and section == 3 else found
        into += [(kind, gpa + at, data) for at in range(0, size, PAGE) if kind]
    return found + last


def vmsas(
    count: int = 1,
    *,
    features: int = 1,
    signature: int = EPYC_V4,
    vmm: str = "QEMU",
    gpa: int = VMSA_GPA,
    fields: dict[int, bytes] | None = None,
) -> list[Page]:
    pages = VMSA(SevMode.SEV_SNP, AP_EIP, signature, features, VMMType[vmm]).pages(count)
    return [(VMSA_TYPE, gpa, patched(page, fields or {})) for page in pages]


def patched(page: bytes, fields: dict[int, bytes]) -> bytes:
    made = bytearray(page)
    for offset, value in fields.items():
        made[offset : offset + len(value)] = value
    return bytes(made)


NO_FPU = {MXCSR: bytes(4), FCW: bytes(2)}
NO_FCW = {FCW: bytes(2)}


def names(found: Explanation) -> set[tuple[str, str]]:
    assert found.causes is not None
    return {(cause.name, cause.found) for cause in found.causes}


def tried_for(digest: bytes, plan: LaunchPlan, options: PlanOptions) -> set[tuple[str, str]]:
    return names(explain_digest(plan, digest, options))


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

KERNEL, INITRD = b"a kernel", b"an initrd"


def kernel_options(append: str = "console=ttyS0") -> PlanOptions:
    return PlanOptions(kernel=KERNEL, initrd=INITRD, append=append)


def hashes_page(initrd: bytes = INITRD, append: str = "console=ttyS0") -> bytes:
    """The page of the fixture, whose table is at 0xC00."""
    table = KernelHashes(
        hashlib.sha256(KERNEL).digest(), hashlib.sha256(initrd).digest(), hash_cmdline(append)
    )
    return bytes(0xC00) + table.encode().ljust(0x400, b"\0")


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


# Images that are no firmware


def pages_of(plan: LaunchPlan) -> list[Page]:
    """The pages of a plan's steps, of which the loaders' tests say that they are right."""
    return [
        (
            int(step.type),
            step.gpa + index * PAGE,
            bytes(step.page(index)) if step.type in (NORMAL, VMSA_TYPE) else None,
        )
        for step, index in plan.pages()
    ]


def state_pages(plan: LaunchPlan, count: int = 1, **fields: bytes) -> list[Page]:
    offsets = {"features": SEV_FEATURES, "rdx": RDX, "mxcsr": MXCSR, "fcw": FCW, "cr3": CR3}
    page = plan.vcpus[0].encode()
    made = patched(page, {offsets[name]: value for name, value in fields.items()})
    return [(VMSA_TYPE, VMSA_GPA, made)] * count


def flat(tmp_path: Path) -> tuple[LaunchPlan, PlanOptions]:
    path = tmp_path / "flat.bin"
    path.write_bytes(bytes(range(256)) * 32)
    options = PlanOptions()
    return load_image(path, options), options


def elf(tmp_path: Path, **choices: Any) -> tuple[LaunchPlan, PlanOptions]:
    """An ELF file with two pages of bytes and three of bss; page tables come first."""
    path = tmp_path / "guest.elf"
    path.write_bytes(elf64([Seg(0x100000, bytes(range(256)) * 32, memsz=0x5000)]))
    options = PlanOptions(**choices)
    return load_image(path, options), options


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


def svsm_files(tmp_path: Path) -> tuple[Path, Path]:
    firmware, svsm = tmp_path / "OVMF.fd", tmp_path / "svsm.bin"
    firmware.write_bytes(ovmf_image(size=0x10000))
    entries = [entry_bytes(GUID_SVSM, struct.pack("<I", 0x100)), *standard_entries()]
    svsm.write_bytes(ovmf_image(size=0x8000, entries=entries))
    return firmware, svsm


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


def igvm_file(options: PlanOptions, *, early: bool) -> tuple[LaunchPlan, list[Page]]:
    """Two pages with data around one without, and a VMSA; and what is launched."""
    state = igvm_files.vmsa()
    vmsa = igvm_files.context(0xFF000, 2 * PAGE)
    pages = [igvm_files.page(0x1000, 0), igvm_files.page(0x2000), igvm_files.page(0x3000, PAGE)]
    found: list[Page] = [
        (NORMAL, 0x1000, igvm_files.pattern(1)),
        (NORMAL, 0x2000, bytes(PAGE)),
        (NORMAL, 0x3000, igvm_files.pattern(2)),
    ]
    at = 1 if early else 3
    pages.insert(at, vmsa)
    found.insert(at, (VMSA_TYPE, 0xFF000, state))
    data = igvm_files.pattern(1) + igvm_files.pattern(2) + state
    image = igvm_files.igvm([igvm_files.platform(), *pages], data)
    return load_image(image, options), found


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


# Nothing to find, and the limit


def test_predicted_digest_when_asked_for_is_called_that() -> None:
    found = explain_digest(load_image(AMDSEV), chain([*firmware(), *metadata(), *vmsas()]))
    assert found.causes == ()
    assert str(found) == "that is the predicted digest"


def test_digest_when_nothing_explains_it_counts_and_names_suspects(tmp_path: Path) -> None:
    plan, options = flat(tmp_path)
    found = explain_digest(plan, bytes(48), options)
    assert not found
    assert found.complete
    assert str(found.tried) in str(found).splitlines()[0]
    assert "limit" not in str(found)
    assert any("image's bytes" in suspect for suspect in found.suspects)
    assert any("--load-addr" in suspect for suspect in found.suspects)


@pytest.mark.parametrize(
    ("options", "suspect"),
    [
        (PlanOptions(), "a kernel, initrd and command line whose hashes were launched (--kernel)"),
        (kernel_options(), "the bytes of --kernel and --initrd, and --append"),
        (PlanOptions(firmware_digest=bytes(47) + b"\1"), "the firmware's digest"),
    ],
)
def test_suspects_when_nothing_is_found_are_those_of_the_launch(
    options: PlanOptions, suspect: str
) -> None:
    found = explain_digest(load_image(AMDSEV, options), bytes(48), options, most=100)
    assert suspect in found.suspects


def test_suspects_when_the_image_is_an_igvm_file_are_its_own() -> None:
    plan, _ = igvm_file(PlanOptions(), early=True)
    found = explain_digest(plan, bytes(48))
    assert found.complete
    assert "--order, in which a loader takes the file's directives" in found.suspects
    assert not any("--load-addr" in text or "--vmm-type" in text for text in found.suspects)


def test_search_when_it_meets_its_limit_says_so() -> None:
    found = explain_digest(load_image(AMDSEV), bytes(48), most=1000)
    assert 1000 <= found.tried < 2000
    assert not found.complete
    assert "the limit" in str(found)


def test_search_when_its_last_candidate_is_beyond_the_limit_does_not_find_it() -> None:
    digest = chain([*firmware(), *metadata(), *vmsas(features=0x21, fields=NO_FPU)])
    assert not explain_digest(load_image(AMDSEV), digest, most=1000)
    assert explain_digest(load_image(AMDSEV), digest)


@pytest.mark.parametrize("size", [0, 32, 47, 49])
def test_digest_when_it_has_another_size_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match=f"a launch digest is 48 bytes, not {size}"):
        explain_digest(load_image(AMDSEV), bytes(size))


def test_plan_when_kvm_would_refuse_a_state_is_refused() -> None:
    plan = load_image(AMDSEV)
    plan = dataclasses.replace(plan, vcpus=(plan.vcpus[0].replace(dr7=0x401),))
    with pytest.raises(FormatError, match="dr7"):
        explain_digest(plan, bytes(48), most=100)


def test_progress_when_wanted_counts_up_to_the_total(tmp_path: Path) -> None:
    plan, options = flat(tmp_path)
    seen: list[tuple[int, int]] = []
    explain_digest(
        plan,
        bytes(48),
        options,
        most=60_000,
        progress=lambda tried, total: seen.append((tried, total)),
    )
    assert [tried for tried, _ in seen] == sorted(tried for tried, _ in seen)
    assert len(seen) >= 100
    assert all(tried <= total + 600 for tried, total in seen)


# Words


def test_words_when_all_can_be_typed_are_the_options() -> None:
    digest = chain([*firmware(), *metadata(), *vmsas(4, features=0x21)])
    lines = str(explain_digest(load_image(AMDSEV), digest)).splitlines()
    assert lines[0] == "--vcpus 4 --guest-features 0x21 gives this digest:"
    assert lines[1] == "  vCPUs: 4, not 1"
    assert "Linux 6.6 and 6.7" in lines[2]


PROFILES: dict[str, tuple[Callable[[], list[Page]], str]] = {
    "pages-and-gpa": (
        lambda: [*firmware(), *metadata({SEC_MEM: UNMEASURED}), *vmsas(gpa=VMSA_GPA_52)],
        "QEMU",
    ),
    "order": (lambda: [*metadata(), *firmware(), *vmsas()], "QEMU"),
    "all-zero-pages": (
        lambda: [
            *firmware(),
            *metadata({SEC_MEM: NORMAL, CAA: NORMAL, HASHES: NORMAL}),
            *vmsas(),
        ],
        "QEMU",
    ),
    "no-fcw": (lambda: [*firmware(), *metadata(), *vmsas(fields=NO_FCW)], "QEMU"),
    "vmm-and-type": (
        lambda: [*firmware(), *metadata({CAA: NORMAL}, cpuid_last=True), *vmsas(vmm="ec2")],
        "ec2",
    ),
    "no-fpu-and-type": (
        lambda: [*firmware(), *metadata({CAA: UNMEASURED}), *vmsas(fields=NO_FPU)],
        "QEMU",
    ),
}


@pytest.mark.parametrize("planted", PROFILES)
def test_profile_when_shown_gives_the_digest_as_a_file(tmp_path: Path, planted: str) -> None:
    pages, base = PROFILES[planted]
    digest = chain(pages())
    lines = str(explain_digest(load_image(AMDSEV), digest)).splitlines()
    assert lines[-2] == "as far as it can be typed: --vmm-type FILE.json"
    text = lines[-1].removeprefix("FILE.json: ")
    assert json.loads(text)["base"] == base
    path = tmp_path / "FILE.json"
    path.write_text(text)
    assert measure(load_image(AMDSEV, PlanOptions(vmm=load_vmm(str(path))))).digest == digest


def test_profile_when_a_section_has_no_name_says_other(tmp_path: Path) -> None:
    sections = [(0x800000, 0x1000, 1), (0x801000, 0x1000, 0x77)]
    image = ovmf_image(metadata=metadata_bytes(sections))
    plan = load_image(image)
    pages = [
        (UNMEASURED if gpa == 0x801000 else kind, gpa, data) for kind, gpa, data in pages_of(plan)
    ]
    found = explain_digest(plan, chain([*pages, *state_pages(plan)]))
    path = tmp_path / "FILE.json"
    path.write_text(str(found).splitlines()[-1].removeprefix("FILE.json: "))
    assert measure(load_image(image, PlanOptions(vmm=load_vmm(str(path))))).digest == chain(
        [*pages, *state_pages(plan)]
    )


def test_profile_when_that_was_a_users_has_no_base(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"format": "kvmlaunch.vmm/1", "name": "own", "base": "ec2", "svsm": false}')
    options = PlanOptions(vmm=load_vmm(str(path)))
    digest = chain([*firmware(), *metadata(cpuid_last=True), *vmsas(vmm="ec2", gpa=VMSA_GPA_52)])
    found = explain_digest(load_image(AMDSEV, options), digest, options)
    assert (
        str(found).splitlines()[-1]
        == 'to change in the VMM profile: {"vmsa_gpa": "0xffffffffff000"}'
    )


def test_words_when_two_options_are_the_same_one_are_a_profile(tmp_path: Path) -> None:
    alioth = load_image(AMDSEV, PlanOptions(vmm=load_vmm("alioth")))
    page = patched(alioth.vcpus[0].encode(), NO_FPU)
    digest = chain([*pages_of(alioth), (VMSA_TYPE, VMSA_GPA, page)])
    *_, typed, text = str(explain_digest(load_image(AMDSEV), digest)).splitlines()
    assert typed == "as far as it can be typed: --vmm-type FILE.json"
    path = tmp_path / "FILE.json"
    path.write_text(text.removeprefix("FILE.json: "))
    assert measure(load_image(AMDSEV, PlanOptions(vmm=load_vmm(str(path))))).digest == digest


def test_option_when_typed_gives_the_digest() -> None:
    digest = chain([*firmware(), *metadata(cpuid_last=True), *vmsas(4, vmm="ec2", features=0x21)])
    found = explain_digest(load_image(AMDSEV), digest)
    assert found.causes is not None
    assert [cause.option for cause in found.causes] == (
        ["--vcpus 4", "--guest-features 0x21", "--vmm-type ec2"]
    )
    options = PlanOptions(vcpus=4, sev_features=0x21, vmm=load_vmm("ec2"))
    assert explain_digest(load_image(AMDSEV, options), digest, options).causes == ()


# One VMSA


def fits(page: bytes) -> Callable[[bytes], bool]:
    return lambda other: other == page


@pytest.mark.parametrize(
    ("vcpu", "page", "expected"),
    [
        (0, vmsas(features=0x21)[0][2], {("SEV_FEATURES", "0x21")}),
        (1, vmsas(2, signature=MILAN)[1][2], {("CPU signature", "0xa00f11 (EPYC-Milan)")}),
        (1, vmsas(2, vmm="ec2")[1][2], {("VMM", "ec2")}),
        (
            0,
            vmsas(features=0x21, fields=NO_FPU)[0][2],
            {("SEV_FEATURES", "0x21"), ("MXCSR and X87_FCW", "0x0, 0x0")},
        ),
        (0, vmsas()[0][2], set()),
    ],
)
def test_vmsa_when_another_page_fits_is_explained(
    vcpu: int, page: bytes, expected: set[tuple[str, str]]
) -> None:
    options = PlanOptions(vcpus=2)
    assert names(explain_vmsa(load_image(AMDSEV, options), vcpu, fits(page), options)) == expected


def test_vmsa_when_pages_are_in_another_order_is_that_of_the_vcpu() -> None:
    choices = (VmsaChoice(vcpu=None), VmsaChoice(vcpu=1), VmsaChoice(vcpu=0))
    options = PlanOptions(vcpus=2, vmsas=choices)
    page = vmsas(2, features=0x21)[1][2]
    assert page is not None
    plan = load_image(AMDSEV, options)
    assert names(explain_vmsa(plan, 1, fits(page), options)) == {("SEV_FEATURES", "0x21")}
    assert not explain_vmsa(plan, 0, fits(page), options)


def test_vmsa_when_the_vcpu_has_none_is_not_explained() -> None:
    options = PlanOptions(vcpus=2, vmsas=(VmsaChoice(),))
    found = explain_vmsa(load_image(AMDSEV, options), 1, lambda page: True, options)
    assert (bool(found), found.tried) == (False, 0)


def test_vmsa_when_no_page_fits_is_not_explained() -> None:
    found = explain_vmsa(load_image(AMDSEV), 0, lambda page: False)
    assert not found
    assert found.tried > 1000


# Speed: what is hashed


class Counting(PlainHasher):
    """Counts the pages whose contents are hashed."""

    def __init__(self) -> None:
        self.pages = 0

    def _contents(self, data: memoryview, out: memoryview, threads: int) -> None:
        self.pages += data.nbytes // PAGE
        super()._contents(data, out, threads)


def test_pages_when_many_launches_are_tried_are_hashed_once() -> None:
    counted = []
    for most in (20_000, 80_000):
        counting = Counting()
        explain_digest(load_image(AMDSEV), bytes(48), most=most, hasher=counting)
        counted.append(counting.pages)
    zero = sum(size // PAGE for _, size, section in AMDSEV_SECTIONS if TYPES[section] == ZERO)
    # Those that can be NORMAL zeros are hashed as such.
    assert counted == [len(firmware()) + zero] * 2


def test_vmsas_when_many_launches_are_tried_are_hashed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bytes] = []
    plain = variants.page_contents

    def counting(kind: Any, page: bytes) -> bytes:
        seen.append(page)
        return plain(kind, page)

    monkeypatch.setattr(variants, "page_contents", counting)
    found = explain_digest(load_image(AMDSEV), bytes(48), most=80_000)
    assert len(seen) == len(set(seen))
    assert len(seen) < found.tried / 20


@pytest.mark.parametrize("name", backends())
def test_backend_when_chosen_finds_the_same(name: str) -> None:
    digest = chain([*metadata(), *firmware(), *vmsas(5)])
    found = explain_digest(load_image(AMDSEV), digest, hasher=hasher(name))
    assert names(found) == {("vCPUs", "5"), ("order of pages", "metadata, firmware")}
