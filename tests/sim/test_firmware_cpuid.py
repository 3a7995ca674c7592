"""LAUNCH_UPDATE of a CPUID page: refusal, correction, retry (snp-firmware-abi 7.5)."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.cpuid_page import CpuidEntry, decode, encode
from kvmlaunch.sim.cpumodel import cpu_model
from kvmlaunch.sim.firmware_profiles import FirmwareProfile, firmware_profile
from tests.abi import vectors

from .rig import Rig

OK, PARAM = 0x00, 0x16
CPUID = 6
TSC_DEADLINE = 1 << 24
V7 = vectors.SINGLE_PAGE["V7"][3]
GPA = 0x4000

LEAF_1 = CpuidEntry(1, eax=0xA00F11, ebx=0x800, ecx=1, edx=1)


def kvm_table(name: str) -> bytes:
    """The table that a careless VMM sends: KVM's own."""
    return encode(
        CpuidEntry(e.function, e.index, 0, 0, e.eax, e.ebx, e.ecx, e.edx)
        for e in cpu_model(name).supported_cpuid()
    )


def test_launch_update_cpuid_good_table_is_measured_as_v7() -> None:
    rig = Rig()
    table = encode([LEAF_1])
    gctx, page = rig.activated(), rig.pre_guest(GPA, table)
    assert rig.psp.launch_update(gctx, page, CPUID) == OK
    assert rig.contents(page) == table
    assert rig.psp.launch_digest(gctx).hex() == V7


@pytest.mark.parametrize("name", ["Milan", "Genoa", "Turin"])
def test_launch_update_cpuid_of_kvm_is_corrected_and_one_retry_succeeds(name: str) -> None:
    rig = Rig(firmware_profile(name))  # type: ignore[arg-type]
    sent = kvm_table(name)
    gctx, page = rig.activated(), rig.pre_guest(GPA, sent)
    assert rig.psp.launch_update(gctx, page, CPUID) == PARAM
    assert rig.psp.launch_digest(gctx) == bytes(48)
    assert rig.psp.measured_pages(gctx) == []
    assert rig.state(page) == "Pre-Guest"
    corrected = rig.contents(page)
    assert corrected != sent
    assert rig.psp.launch_update(gctx, page, CPUID) == OK
    assert rig.contents(page) == corrected
    assert rig.psp.launch_digest(gctx).hex() == V7


def test_launch_update_cpuid_corrects_every_bad_entry_and_no_other() -> None:
    rig = Rig()
    bad_1 = CpuidEntry(1, eax=0xA00F11, ebx=0x800, ecx=1 | TSC_DEADLINE, edx=1)
    hypervisor = CpuidEntry(0x40000000, eax=0x40000001, ebx=0xFFFFFFFF)
    c_bit = CpuidEntry(0x8000001F, eax=0x2, ebx=47)
    gctx, page = rig.activated(), rig.pre_guest(GPA, encode([bad_1, hypervisor, c_bit]))
    assert rig.psp.launch_update(gctx, page, CPUID) == PARAM
    fixed_c_bit = CpuidEntry(0x8000001F, eax=0x2, ebx=51)
    assert decode(rig.contents(page)) == (LEAF_1, hypervisor, fixed_c_bit)


def test_launch_update_cpuid_correction_keeps_bytes_behind_the_table() -> None:
    rig = Rig()
    table = bytearray(encode([CpuidEntry(0x1234, eax=1)]))
    table[-4:] = b"tail"
    gctx, page = rig.activated(), rig.pre_guest(GPA, bytes(table))
    assert rig.psp.launch_update(gctx, page, CPUID) == PARAM
    table[0x10 + 0x18] = 0
    assert rig.contents(page) == bytes(table)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, 65),  # COUNT
        (4, 1),  # reserved
        (8, 1),
        (12, 1),
        (0x10 + 0x28, 1),  # reserved in an entry
        (0x10 + 0x2C, 1),
    ],
)
def test_launch_update_cpuid_bad_structure_is_never_corrected(offset: int, value: int) -> None:
    rig = Rig()
    table = bytearray(encode([CpuidEntry(1, ecx=TSC_DEADLINE)]))
    struct.pack_into("<I", table, offset, value)
    gctx, page = rig.activated(), rig.pre_guest(GPA, bytes(table))
    for _ in range(2):
        assert rig.psp.launch_update(gctx, page, CPUID) == PARAM
        assert rig.contents(page) == bytes(table)
    assert rig.psp.launch_digest(gctx) == bytes(48)


def test_launch_update_cpuid_of_64_entries_is_taken() -> None:
    rig = Rig()
    gctx, page = rig.activated(), rig.pre_guest(GPA, encode([LEAF_1] * 64))
    assert rig.psp.launch_update(gctx, page, CPUID) == OK


def test_launch_update_cpuid_of_an_older_models_signature_is_taken() -> None:
    """QEMU's EPYC-v4 on Milan: signature and brand are the guest owner's business."""
    rig = Rig()
    brand = CpuidEntry(0x80000002, eax=0x20444D41, ebx=1, ecx=2, edx=3)
    table = [CpuidEntry(1, eax=0x800F12, ebx=0x800), brand]
    assert rig.psp.launch_update(rig.activated(), rig.pre_guest(GPA, encode(table)), CPUID) == OK


def test_launch_update_cpuid_as_qemu_sends_xsave_is_taken() -> None:
    """QEMU: EBX 0x240 with XCR0_IN 1, XSS_IN 0, for subleaves 0 and 1."""
    rig = Rig()
    table = [
        CpuidEntry(0xD, 0, 1, 0, eax=0x207, ebx=0x240, ecx=0x988),
        CpuidEntry(0xD, 1, 1, 0, eax=0xF, ebx=0x240),
    ]
    assert rig.psp.launch_update(rig.activated(), rig.pre_guest(GPA, encode(table)), CPUID) == OK


@pytest.mark.parametrize(("policy", "status"), [("strict", PARAM), ("permissive", OK)])
def test_launch_update_cpuid_of_too_many_threads_depends_on_the_policy(
    policy: str, status: int
) -> None:
    rig = Rig(FirmwareProfile(cpuid_policy=policy))  # type: ignore[arg-type]
    shared_by_4096 = CpuidEntry(0x8000001D, 3, eax=0x03FFC163, ebx=0x03C0003F, ecx=0x7FFF, edx=2)
    gctx, page = rig.activated(), rig.pre_guest(GPA, encode([shared_by_4096]))
    assert rig.psp.launch_update(gctx, page, CPUID) == status


words = st.integers(0, 0xFFFFFFFF)
entries = st.builds(
    CpuidEntry,
    st.sampled_from([0, 1, 7, 0xB, 0xD, 0x80000000, 0x80000008, 0x8000001D, 0x8000001F]) | words,
    st.integers(0, 12),
    st.integers(0, 0x3FF),
    st.integers(0, 0x1FFF),
    words,
    words,
    words,
    words,
)


@given(st.lists(entries, max_size=64))
def test_launch_update_cpuid_of_any_table_succeeds_at_the_latest_on_retry(
    table: list[CpuidEntry],
) -> None:
    rig = Rig()
    gctx, page = rig.activated(), rig.pre_guest(GPA, encode(table))
    first = rig.psp.launch_update(gctx, page, CPUID)
    assert first in (OK, PARAM)
    if first == PARAM:
        assert rig.psp.launch_update(gctx, page, CPUID) == OK
    assert rig.psp.launch_digest(gctx).hex() == V7
