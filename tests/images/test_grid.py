"""A grid of launches against PyPI's sev-snp-measure: equal in each cell.

Modes x vCPUs x CPU types x VMMs x features, with and without kernel, initrd and command line.
Cells differ cheaply, so one test has all those of an image, a VMM and a choice of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.errors import ImageError
from kvmlaunch.images import PlanOptions, load_image, load_vmm
from kvmlaunch.launch.legacy import plan_legacy
from kvmlaunch.launch.measure import firmware_digest, measure
from tests.debian import Unavailable
from tests.images.builders import metadata_bytes, ovmf, standard_entries, svsm_image
from tests.kernel_packages import KernelPackages

witness = pytest.importorskip("sevsnpmeasure.guest")
CPU_SIGS = pytest.importorskip("sevsnpmeasure.vcpu_types").CPU_SIGS
VMMType = pytest.importorskip("sevsnpmeasure.vmm_types").VMMType
SevMode = pytest.importorskip("sevsnpmeasure.sev_mode").SevMode

FIXTURES = Path(__file__).parent / "fixtures"
VMMS = ("QEMU", "ec2", "gce")
CPUS = sorted(CPU_SIGS)
FEW_CPUS = ("EPYC-v4", "EPYC-Rome", "EPYC-Milan", "EPYC-Genoa", "EPYC-Turin")
VCPUS = (1, 2, 3, 16)
FEATURES = (0x0, 0x1, 0x20, 0x21, 0xFFFF_FFFF_FFFF_FFFF)
MODES = {"snp": SevMode.SEV_SNP, "seves": SevMode.SEV_ES, "sev": SevMode.SEV}
KERNELS: dict[str, dict[str, Any]] = {
    "no kernel": {},
    "kernel": {"kernel": b"a kernel"},
    "kernel and initrd": {"kernel": b"a kernel", "initrd": b"its initrd"},
    "kernel and append": {"kernel": b"", "append": "console=ttyS0 loglevel=7"},
    "all": {"kernel": b"k" * 70_000, "initrd": b"i" * 70_000, "append": " ro  ä=1 "},
}
SMALL_IMAGES = {
    "AmdSev": (FIXTURES / "ovmf_AmdSev_suffix.bin").read_bytes(),
    "AmdSev, old": (FIXTURES / "ovmf_AmdSev_old_suffix.bin").read_bytes(),
    "OvmfX64": (FIXTURES / "ovmf_OvmfX64_suffix.bin").read_bytes(),
    "synthetic": ovmf(),
    "hashes elsewhere": ovmf(
        metadata=metadata_bytes(
            [
                (0x80E000, 0x1000, 3),
                (0x9000, 0x1000, 0x10),
                (0x80D000, 0x1000, 2),
                (0x1000, 0x3000, 1),
            ]
        ),
        entries=standard_entries(hashes=(0x9010, 0x400)),
    ),
}


@pytest.fixture
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(SMALL_IMAGES[request.param])
    return path


def files(folder: Path, choice: dict[str, Any]) -> dict[str, Any]:
    """The choice with its bytes in files, for the tool takes nothing else."""
    made = dict(choice)
    for name in ("kernel", "initrd"):
        if isinstance(choice.get(name), bytes):
            made[name] = folder / name
            made[name].write_bytes(choice[name])
    return made


def theirs(mode: str, image: Path, vmm: str, cell: Any, given: dict[str, Any]) -> str:
    vcpus, cpu, features = cell
    names = [str(given[key]) if key in given else None for key in ("kernel", "initrd", "append")]
    try:
        digest: bytes = witness.calc_launch_digest(
            MODES[mode], vcpus, CPU_SIGS[cpu], str(image), *names, features, "", VMMType[vmm]
        )
    except RuntimeError:
        return "refused"
    return digest.hex()


def ours(mode: str, image: Path, vmm: str, cell: Any, given: dict[str, Any]) -> str:
    vcpus, cpu, features = cell
    options = PlanOptions(
        vcpus=vcpus, signature=CPU_SIGS[cpu], sev_features=features, vmm=load_vmm(vmm), **given
    )
    try:
        if mode == "snp":
            return measure(load_image(image, options)).digest.hex()
        return plan_legacy(image, mode, options).digest().hex()
    except ImageError:
        return "refused"


def cells(mode: str, cpus: Any = CPUS, vcpus: Any = VCPUS) -> Iterator[Any]:
    if mode == "sev":  # which has neither VMSAs nor features
        return iter([(1, "EPYC-v4", 1)])
    return product(vcpus, cpus, FEATURES if mode == "snp" else (1,))


@pytest.mark.parametrize("files_given", KERNELS)
@pytest.mark.parametrize("vmm", VMMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("image", SMALL_IMAGES, indirect=True)
def test_digest_when_the_image_is_small_is_that_of_sev_snp_measure(
    image: Path, mode: str, vmm: str, files_given: str, tmp_path: Path
) -> None:
    given = files(tmp_path, KERNELS[files_given])
    # Each CPU type once; their signatures are few.
    wide = list(cells(mode, FEW_CPUS)) + list(cells(mode, CPUS, [2]))
    expected = {cell: theirs(mode, image, vmm, cell, given) for cell in wide}
    assert {cell: ours(mode, image, vmm, cell, given) for cell in wide} == expected


@pytest.mark.parametrize("vmm", VMMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("files_given", ["no kernel", "all"])
def test_digest_when_ovmf_is_debians_is_that_of_sev_snp_measure(
    ovmf: Path, mode: str, vmm: str, files_given: str, tmp_path: Path
) -> None:
    """Debian's build has no place for kernel hashes, which both say."""
    given = files(tmp_path, KERNELS[files_given])
    wide = list(cells(mode, FEW_CPUS, [1, 4]))
    expected = {cell: theirs(mode, ovmf, vmm, cell, given) for cell in wide}
    assert {cell: ours(mode, ovmf, vmm, cell, given) for cell in wide} == expected
    assert ("refused" in expected.values()) == (files_given == "all")


@pytest.fixture(scope="module")
def debian_kernel() -> Path:
    try:
        boot = KernelPackages.newest().image / "boot"
    except Unavailable as error:
        pytest.skip(str(error))
    return next(boot.glob("vmlinuz-*"))


@pytest.mark.parametrize("with_initrd", [False, True])
@pytest.mark.parametrize("append", [None, "", "root=/dev/vda ro"])
@pytest.mark.parametrize("vmm", VMMS)
@pytest.mark.parametrize("mode", MODES)
def test_digest_when_the_kernel_is_debians_is_that_of_sev_snp_measure(
    debian_kernel: Path, mode: str, vmm: str, append: str | None, with_initrd: bool
) -> None:
    image = FIXTURES / "ovmf_AmdSev_suffix.bin"
    given: dict[str, Any] = {"kernel": debian_kernel}
    if append is not None:
        given["append"] = append
    if with_initrd:
        given["initrd"] = next(debian_kernel.parent.glob("System.map-*"))
    cell = (2, "EPYC-Milan", 0x1)
    expected = theirs(mode, image, vmm, cell, given)
    assert expected != "refused"
    assert ours(mode, image, vmm, cell, given) == expected


@pytest.mark.parametrize("image", SMALL_IMAGES, indirect=True)
def test_firmware_digest_when_the_image_is_small_is_that_of_sev_snp_measure(image: Path) -> None:
    expected = witness.calc_snp_ovmf_hash(str(image))
    assert firmware_digest(load_image(image)) == expected


@pytest.mark.parametrize("files_given", ["no kernel", "all"])
@pytest.mark.parametrize("vmm", VMMS)
def test_digest_when_it_goes_on_from_another_is_that_of_sev_snp_measure(
    vmm: str, files_given: str, tmp_path: Path
) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(SMALL_IMAGES["AmdSev"])
    start, given = bytes(range(48)), files(tmp_path, KERNELS[files_given])
    names = [str(given[key]) if key in given else None for key in ("kernel", "initrd", "append")]
    expected = witness.calc_launch_digest(
        SevMode.SEV_SNP, 2, 0xA00F11, str(path), *names, 0x21, start.hex(), VMMType[vmm]
    )
    options = PlanOptions(
        vcpus=2,
        signature=0xA00F11,
        sev_features=0x21,
        vmm=load_vmm(vmm),
        firmware_digest=start,
        **given,
    )
    assert measure(load_image(path, options)).digest == expected


@pytest.mark.parametrize("features", [0x1, 0x21])
@pytest.mark.parametrize("start", [0, 0x100])
@pytest.mark.parametrize("vars_size", [0x1000, 540672])
@pytest.mark.parametrize("cpu", FEW_CPUS)
@pytest.mark.parametrize("vcpus", VCPUS)
def test_svsm_digest_when_compatible_is_that_of_sev_snp_measure(
    tmp_path: Path, vcpus: int, cpu: str, vars_size: int, start: int, features: int
) -> None:
    firmware, svsm = tmp_path / "OVMF.fd", tmp_path / "svsm.bin"
    firmware.write_bytes(ovmf())
    svsm.write_bytes(svsm_image(start=start))
    expected = witness.calc_launch_digest(
        SevMode.SEV_SNP_SVSM,
        vcpus,
        CPU_SIGS[cpu],
        str(firmware),
        *(None, None, None),
        features,
        svsm_file=str(svsm),
        ovmf_vars_size=vars_size,
    )
    options = PlanOptions(
        vcpus=vcpus,
        signature=CPU_SIGS[cpu],
        sev_features=features,
        svsm=svsm,
        vars_size=vars_size,
        compat="sev-snp-measure",
    )
    assert measure(load_image(firmware, options)).digest == expected
