"""Every digest and VMSA page that others publish, from their inputs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from kvmlaunch.images import LaunchPlan, PlanOptions, load_image, load_vmm
from kvmlaunch.launch.legacy import plan_legacy
from kvmlaunch.launch.measure import firmware_digest, measure
from tests.images import published
from tests.images.svsm_files import FIRMWARE, FIXTURES, SVSM, SvsmFiles, stand_ins


def plan(image: str, vmm: str, vcpus: int, features: int, append: str | None) -> LaunchPlan:
    kernel = None if append is None else "/dev/null"
    options = PlanOptions(
        vmm=load_vmm(vmm),
        vcpus=vcpus,
        sev_features=features,
        signature=published.SIGNATURE,
        kernel=kernel,
        initrd=kernel,
        append=append,
    )
    return load_image(FIXTURES / image, options)


@pytest.mark.parametrize("row", [*published.SNP, *published.SNP_OLD], ids=lambda row: row[5][:12])
def test_digest_when_published_is_predicted(
    row: tuple[str, str, int, int, str | None, str],
) -> None:
    *inputs, expected = row
    assert measure(plan(*inputs)).digest.hex() == expected


def test_firmware_digest_when_published_is_predicted() -> None:
    image, expected = published.FIRMWARE_ONLY
    assert firmware_digest(load_image(FIXTURES / image)).hex() == expected


@pytest.mark.parametrize("row", published.SNP[:2], ids=lambda row: row[5][:12])
def test_digest_when_the_firmwares_is_known_goes_on_from_it(
    row: tuple[str, str, int, int, str | None, str],
) -> None:
    image, _, vcpus, features, append, expected = row
    options = PlanOptions(
        vcpus=vcpus,
        sev_features=features,
        kernel=b"",
        append=append,
        firmware_digest=bytes.fromhex(published.FIRMWARE_ONLY[1]),
    )
    assert measure(load_image(FIXTURES / image, options)).digest.hex() == expected


def test_digest_when_the_firmware_is_another_one_uses_only_the_metadata() -> None:
    features, firmware, append, expected = published.FROM_FIRMWARE_DIGEST
    options = PlanOptions(
        vmm=load_vmm("QEMU-before-6.10"),
        sev_features=features,
        kernel=b"",
        append=append,
        firmware_digest=bytes.fromhex(firmware),
    )
    found = measure(load_image(FIXTURES / published.AMDSEV_OLD, options))
    assert found.digest.hex() == expected


@pytest.mark.parametrize("row", [*published.LEGACY, *published.LEGACY_OLD], ids=lambda r: r[4][:12])
def test_sha256_when_published_is_predicted(row: tuple[str, str, int, str | None, str]) -> None:
    mode, image, vcpus, append, expected = row
    options = PlanOptions(
        vmm=load_vmm("QEMU-before-6.10" if row in published.LEGACY_OLD else "QEMU"),
        vcpus=vcpus,
        kernel=None if append is None else b"",
        append=append,
    )
    assert plan_legacy(FIXTURES / image, mode, options).digest().hex() == expected


@pytest.mark.parametrize("vmm", ["ec2", "ec2-rdx0", "gce", "QEMU-before-6.10"])
def test_published_vmsa_when_the_vmm_is_not_on_mainline_is_measured_as_it_is(vmm: str) -> None:
    assert load_vmm(vmm).as_given


@pytest.mark.parametrize("key", published.VMSA_PAGES, ids=str)
def test_vmsa_page_when_published_is_made(key: tuple[str, bool, int]) -> None:
    vmm, ap, signature = key
    states = load_vmm(vmm).states(
        2 if ap else 1, signature=signature, sev_features=1, reset_eip=0x80B004
    )
    page = states[ap].encode()
    assert hashlib.sha384(page).hexdigest() == published.VMSA_PAGES[key]


@pytest.fixture(scope="module")
def svsm(tmp_path_factory: pytest.TempPathFactory) -> SvsmFiles:
    named = os.environ.get("KVMLAUNCH_SVSM")
    if not named:
        return stand_ins(tmp_path_factory.mktemp("svsm"))
    missing = [name for name in (SVSM, FIRMWARE) if not Path(named, name).is_file()]
    if missing:
        pytest.fail(f"KVMLAUNCH_SVSM={named} has no {' and no '.join(missing)}")
    return SvsmFiles(Path(named), {})


def svsm_plan(svsm: SvsmFiles, vcpus: int, vmm: str, compat: str | None) -> LaunchPlan:
    options = PlanOptions(
        vcpus=vcpus,
        vmm=load_vmm(vmm),
        svsm=svsm.folder / SVSM,
        vars_size=published.SVSM_VARS_SIZE,
        compat=compat,
    )
    return load_image(svsm.folder / FIRMWARE, options)


@pytest.mark.parametrize("vcpus", published.SVSM)
def test_svsm_digest_when_published_is_that_of_the_tools_bug(svsm: SvsmFiles, vcpus: int) -> None:
    buggy = svsm_plan(svsm, vcpus, "QEMU", "sev-snp-measure")
    assert svsm.digest(buggy) == published.SVSM[vcpus]
    right = svsm_plan(svsm, vcpus, "QEMU", None)
    assert svsm.digest(right) != published.SVSM[vcpus]


@pytest.mark.parametrize("vcpus", published.SVSM_OLD)
def test_svsm_digest_when_the_kernel_measured_no_fpu_is_predicted(
    svsm: SvsmFiles, vcpus: int
) -> None:
    old = svsm_plan(svsm, vcpus, "QEMU-before-6.10", None)
    assert svsm.digest(old) == published.SVSM_OLD[vcpus]


def test_svsm_digest_is_that_of_the_prediction(svsm: SvsmFiles, tmp_path: Path) -> None:
    plan = svsm_plan(svsm, 4, "QEMU", None)
    assert SvsmFiles(tmp_path, {}).digest(plan) == measure(plan).digest.hex()


def test_svsm_vmsa_page_when_published_is_made(svsm: SvsmFiles) -> None:
    state = svsm_plan(svsm, 1, "QEMU", "sev-snp-measure").vcpus[0]
    assert state.rip == 0xFFAEA000
    assert hashlib.sha384(state.encode()).hexdigest() == published.SVSM_VMSA_PAGE
