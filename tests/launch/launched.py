"""What was launched, page by page, and its digest by hashlib: --explain's planted causes.

The pages are written down here, with VMSAs of sev-snp-measure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch import LaunchPlan, PlanOptions, explain_digest, load_image
from kvmlaunch.abi.kernel_hashes import KernelHashes, hash_cmdline
from kvmlaunch.launch.explain import Explanation
from tests.images import igvm_files, published
from tests.images.builders import (
    AMDSEV_SECTIONS,
    GUID_SVSM,
    Seg,
    elf64,
    entry_bytes,
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


def svsm_files(tmp_path: Path) -> tuple[Path, Path]:
    firmware, svsm = tmp_path / "OVMF.fd", tmp_path / "svsm.bin"
    firmware.write_bytes(ovmf_image(size=0x10000))
    entries = [entry_bytes(GUID_SVSM, struct.pack("<I", 0x100)), *standard_entries()]
    svsm.write_bytes(ovmf_image(size=0x8000, entries=entries))
    return firmware, svsm


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
