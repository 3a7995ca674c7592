"""SEV and SEV-ES launches: what is hashed in which order, and each refusal."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.abi.kernel_hashes import KernelHashes
from kvmlaunch.abi.reset import qemu_reset
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images import PlanOptions, VmsaChoice, load_vmm
from kvmlaunch.launch.legacy import plan_legacy
from tests.images.builders import ovmf, standard_entries


def digest(image: bytes, mode: str, **options: Any) -> bytes:
    return plan_legacy(image, mode, PlanOptions(**options)).digest()


def refusal(image: bytes, mode: str, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        plan_legacy(image, mode, PlanOptions(**options))
    return str(caught.value)


def test_sev_when_there_is_no_kernel_is_the_files_sha256() -> None:
    assert digest(ovmf(), "sev", vcpus=4) == hashlib.sha256(ovmf()).digest()


def test_sev_when_firmware_has_no_table_is_still_measured() -> None:
    assert digest(bytes(4096), "sev") == hashlib.sha256(bytes(4096)).digest()


def test_sev_when_there_is_a_kernel_has_its_table_behind_the_firmware() -> None:
    table = KernelHashes(hashlib.sha256(b"k").digest()).encode()
    assert digest(ovmf(), "sev", kernel=b"k") == hashlib.sha256(ovmf() + table).digest()


@pytest.mark.parametrize("vcpus", [1, 3])
def test_seves_when_measured_has_vmsas_without_features_at_the_end(vcpus: int) -> None:
    starts = [0xFFFFFFF0] + [0x80B004] * (vcpus - 1)
    pages = [qemu_reset(eip, signature=0xA00F11, sev_features=0).encode() for eip in starts]
    expected = hashlib.sha256(ovmf() + b"".join(pages)).digest()
    assert digest(ovmf(), "seves", vcpus=vcpus, signature=0xA00F11, sev_features=0x21) == expected


def test_seves_when_there_is_no_reset_block_has_one_vcpu() -> None:
    image = ovmf(entries=standard_entries(reset_eip=None))
    assert digest(image, "seves") != digest(image, "sev")
    assert "has no SEV-ES reset block to start vCPUs at" in refusal(image, "seves", vcpus=2)


def test_file_when_named_is_read(tmp_path: Path) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(ovmf())
    assert plan_legacy(path, "sev").digest() == digest(ovmf(), "sev")


def test_firmware_when_it_is_large_is_not_copied() -> None:
    image = bytes(16 << 20)
    assert plan_legacy(image, "sev").firmware.obj is image


@pytest.mark.parametrize("mode", ["sev", "seves"])
def test_kernel_when_there_is_no_place_for_its_hashes_is_refused(mode: str) -> None:
    image = ovmf(entries=standard_entries(hashes=None))
    assert "has no place for its hashes" in refusal(image, mode, kernel=b"")


@pytest.mark.parametrize("mode", ["sev", "seves"])
def test_kernel_when_the_vmm_has_no_hashes_is_refused(mode: str) -> None:
    assert "kvm launches no kernel hashes" in refusal(ovmf(), mode, kernel=b"", vmm=load_vmm("kvm"))


def test_firmware_when_its_size_is_odd_is_refused() -> None:
    assert "the size must be a multiple of 4 KiB" in refusal(bytes(100), "sev")


def test_firmware_when_several_vcpus_need_a_table_is_refused() -> None:
    assert "no GUIDed table" in refusal(bytes(4096), "seves", vcpus=2)


@pytest.mark.parametrize(
    "choice",
    [
        {"load_addr": 0x1000},
        {"entry": 0x1000},
        {"vmsa_mode": "direct"},
        {"vmsas": (VmsaChoice(),)},
        {"svsm": b"", "vars_size": 0},
        {"firmware_digest": bytes(48)},
        {"order": "kvm"},
        {"native_zero": True},
    ],
)
def test_choice_when_it_is_for_snp_is_refused(choice: dict[str, Any]) -> None:
    name = next(iter(choice))
    with pytest.raises(FormatError, match=f"{name} is for SNP launches, not for mode sev"):
        plan_legacy(ovmf(), "sev", PlanOptions(**choice))


def test_mode_when_unknown_is_refused() -> None:
    with pytest.raises(FormatError, match="mode 'snp' is not one of seves, sev"):
        plan_legacy(b"", "snp")
