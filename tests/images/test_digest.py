"""Launch digests of plans against sev-snp-measure (PyPI), a witness that shares no code."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.measure import measure
from tests.images.builders import Seg, elf64, metadata_bytes, ovmf, pvh_note

guest = pytest.importorskip("sevsnpmeasure.guest")
vcpu_types = pytest.importorskip("sevsnpmeasure.vcpu_types")
GCTX = pytest.importorskip("sevsnpmeasure.gctx").GCTX
SevMode = pytest.importorskip("sevsnpmeasure.sev_mode").SevMode
vmsa_module = pytest.importorskip("sevsnpmeasure.vmsa")
VMSA, VmcbSeg = vmsa_module.VMSA, vmsa_module.VmcbSeg

CPU_TYPES = sorted(vcpu_types.CPU_SIGS)
IMAGES = {
    "amdsev": ovmf(),
    "one-page": ovmf(size=0x1000),
    "unsorted": ovmf(
        metadata=metadata_bytes([(0x811000, 0x2000, 1), (0x80E000, 0x1000, 3), (0x1000, 0x1000, 2)])
    ),
}


def expected(path: Path, *, vcpus: int, signature: int, features: int) -> str:
    digest: bytes = guest.calc_launch_digest(
        SevMode.SEV_SNP, vcpus, signature, str(path), "", "", "", features
    )
    return digest.hex()


def got(path: Path, *, vcpus: int, signature: int, features: int) -> str:
    options = PlanOptions(vcpus=vcpus, signature=signature, sev_features=features)
    return measure(load_image(path, options)).digest.hex()


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize("features", [0x1, 0x21])
@pytest.mark.parametrize("cpu_type", CPU_TYPES)
def test_digest_when_ovmf_is_synthetic_is_that_of_sev_snp_measure(
    tmp_path: Path, image: str, vcpus: int, features: int, cpu_type: str
) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(IMAGES[image])
    args = {"vcpus": vcpus, "signature": vcpu_types.CPU_SIGS[cpu_type], "features": features}
    assert got(path, **args) == expected(path, **args)


@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize("features", [0x1, 0x21])
@pytest.mark.parametrize("cpu_type", CPU_TYPES)
def test_digest_when_ovmf_is_debians_is_that_of_sev_snp_measure(
    ovmf: Path, vcpus: int, features: int, cpu_type: str
) -> None:
    args = {"vcpus": vcpus, "signature": vcpu_types.CPU_SIGS[cpu_type], "features": features}
    assert got(ovmf, **args) == expected(ovmf, **args)


def save_area(**fields: Any) -> bytes:
    """A VMSA page by sev-snp-measure's struct: QEMU's reset state with some fields changed."""
    area = VMSA.build_save_area(0xFFFFFFF0, 1, 0x800F12)
    for name, value in fields.items():
        assert hasattr(area, name)
        setattr(area, name, value)
    return bytes(area)


def test_digest_when_image_is_flat_in_real_mode_is_that_of_its_pages() -> None:
    image = bytes(range(256)) * 17
    context = GCTX()
    context.update_normal_pages(0x7000, image.ljust(0x2000, b"\0"))
    cs = VmcbSeg(0, 0x9B, 0xFFFF, 0)
    context.update_vmsa_page(save_area(cs=cs, rip=0x7C00))
    plan = load_image(image, PlanOptions(load_addr=0x7000, entry=0x7C00))
    assert measure(plan).digest == context.ld()


def test_digest_when_image_is_elf_is_that_of_tables_segments_and_vmsa() -> None:
    c_bit = 1 << 51
    tables = [0] * (6 * 512)
    tables[0] = 0x2000 | 3 | c_bit
    tables[512:516] = [0x3000 + n * 0x1000 | 3 | c_bit for n in range(4)]
    for n in range(2048):
        tables[1024 + n] = n << 21 | 0x83 | (c_bit if n < 128 else 0)  # 256 MiB of RAM
    data = VmcbSeg(0x10, 0xC93, 0xFFFFFFFF, 0)
    vmsa = save_area(
        cs=VmcbSeg(8, 0xA9B, 0xFFFFFFFF, 0),
        **dict.fromkeys(("ds", "es", "ss", "fs", "gs"), data),
        gdtr=VmcbSeg(0, 0, 0, 0),
        idtr=VmcbSeg(0, 0, 0, 0),
        cr0=0x80000011,
        cr3=0x1000 | c_bit,
        cr4=0x60,
        efer=0x1500,
        rip=0x100010,
        rdx=0,
    )
    context = GCTX()
    context.update_normal_pages(0x1000, b"".join(e.to_bytes(8, "little") for e in tables))
    context.update_normal_pages(0x100000, b"A" * 0x1800 + bytes(0x800))
    context.update_zero_pages(0x102000, 0x3000)
    for _ in range(2):
        context.update_vmsa_page(vmsa)
    image = elf64([Seg(0x100000, b"A" * 0x1800, memsz=0x4800)], entry=0x100010)
    assert measure(load_image(image, PlanOptions(vcpus=2))).digest == context.ld()


def test_digest_when_elf_has_a_pvh_note_is_that_of_start_info_segments_and_vmsa() -> None:
    info = struct.pack("<IIIIQQQQII", 0x336EC578, 1, 0, 0, 0, 0, 0, 0x1000 + 56, 1, 0)
    info += struct.pack("<QQII", 0, 256 << 20, 1, 0)
    data = VmcbSeg(0x10, 0xC93, 0xFFFFFFFF, 0)
    vmsa = save_area(
        cs=VmcbSeg(8, 0xC9B, 0xFFFFFFFF, 0),
        **dict.fromkeys(("ds", "es", "ss", "fs", "gs"), data),
        tr=VmcbSeg(0, 0x8B, 0x67, 0),
        gdtr=VmcbSeg(0, 0, 0, 0),
        idtr=VmcbSeg(0, 0, 0, 0),
        cr0=0x11,
        rip=0x100010,
        rbx=0x1000,
        rdx=0,
    )
    context = GCTX()
    context.update_normal_pages(0x1000, info.ljust(0x1000, b"\0"))
    context.update_normal_pages(0x100000, b"A" * 0x1800 + bytes(0x800))
    context.update_zero_pages(0x102000, 0x3000)
    for _ in range(2):
        context.update_vmsa_page(vmsa)
    image = elf64([Seg(0x100000, b"A" * 0x1800, memsz=0x4800), pvh_note(0x100010)])
    assert measure(load_image(image, PlanOptions(vcpus=2))).digest == context.ld()
