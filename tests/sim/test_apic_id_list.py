"""The GHCB event APIC_ID_LIST, which a guest needs to start vCPUs that have no VMSA yet.

Expected answers: tools/testing/selftests/kvm/x86/sev_snp_apic_id_test.c as posted with the VMSA
proposal, and patch 56/60 of the series "planes" (June 2026).
"""

from __future__ import annotations

import dataclasses
import struct

import pytest

from kvmlaunch.sim.profiles import kernel_profile
from kvmlaunch.softcpu import VmgExit
from kvmlaunch.uapi import lib

from .driver import PAGE, RAM_PAGES, Guest
from .scripted import RAX, RBX, RCX, RDX, Rig, asks

LIST = 0x80000017
WITH_LIST = kernel_profile("direct-vmsa")
BUFFER_GPA = Guest.GPA + 9 * PAGE
LAST_GPA = Guest.GPA + (RAM_PAGES - 1) * PAGE
MISSING_INPUT, INVALID_INPUT, INVALID_EVENT = (2, 4), (2, 5), (2, 6)
UNTOUCHED = b"\xee" * 64


def answered(info_1: int = BUFFER_GPA, *, vcpus: int = 2, **fields: int) -> Rig:
    """The guest asked, and went on to its HLT; its buffer held 0xEE bytes."""
    rig = asks({"code": LIST, "info_1": info_1, **fields}, profile=WITH_LIST, vcpus=vcpus)
    rig.guest.ram.write(UNTOUCHED, BUFFER_GPA - Guest.GPA)
    assert (rig.enter(), rig.run.exit_reason) == ((0, 0), lib.KVM_EXIT_HLT)
    return rig


def in_buffer(rig: Rig, size: int = len(UNTOUCHED)) -> bytes:
    return rig.guest.ram.read(size, BUFFER_GPA - Guest.GPA)


def test_list_when_it_fits_is_a_count_and_the_ids_in_shared_memory():
    rig = answered(rax=1, vcpus=3)
    assert rig.error == (0, 0)
    # u32 count, then u32 each; nothing behind.
    assert in_buffer(rig)[:20] == struct.pack("<IIII", 3, 0, 1, 2) + UNTOUCHED[:4]
    assert [rig.field(offset) for offset in (RAX, RBX, RCX, RDX)] == [1, 0, 0, 0]


def test_list_when_ids_are_not_numbered_through_has_them_as_created():
    rig = asks({"code": LIST, "info_1": BUFFER_GPA, "rax": 1}, profile=WITH_LIST)
    for vcpu_id in (9, 4):
        rig.guest.add_vcpu(vcpu_id)
    assert rig.enter() == (0, 0)
    assert in_buffer(rig, 16) == struct.pack("<IIII", 3, 0, 9, 4)


def test_list_when_rax_is_not_valid_is_refused():
    rig = answered()
    assert (rig.error, in_buffer(rig)) == (MISSING_INPUT, UNTOUCHED)


def test_list_when_there_is_no_page_for_it_says_how_many_it_takes():
    rig = answered(rax=0)
    assert (rig.error, rig.field(RAX), in_buffer(rig)) == ((0, 0), 1, UNTOUCHED)


@pytest.mark.parametrize("pages", [0, 1, 1 << 52])
def test_list_when_pages_are_too_few_says_how_many_it_takes(pages: int):
    """1023 IDs and the count fill a page; a size of 2**64 bytes is one of 0 in KVM's 64 bits."""
    rig = answered(rax=pages, vcpus=1024)
    assert (rig.error, rig.field(RAX), in_buffer(rig)) == ((0, 0), 2, UNTOUCHED)


@pytest.mark.parametrize(("vcpus", "pages"), [(1023, 1), (1024, 2)])
def test_list_when_it_just_fits_is_complete(vcpus: int, pages: int):
    rig = answered(rax=pages, vcpus=vcpus)
    assert rig.error == (0, 0)
    found = struct.unpack(f"<{1 + vcpus}I", in_buffer(rig, 4 * (1 + vcpus)))
    assert found == (vcpus, *range(vcpus))


@pytest.mark.parametrize(
    "gpa",
    [1 << 52, BUFFER_GPA + 4, LAST_GPA + PAGE, BUFFER_GPA | 1 << 51],
    ids=["too wide", "unaligned", "no memory", "C-bit"],
)
def test_list_when_the_buffer_is_not_a_page_is_refused(gpa: int):
    rig = answered(gpa, rax=2)
    assert (rig.error, in_buffer(rig)) == (INVALID_INPUT, UNTOUCHED)


def test_list_when_its_second_page_is_not_there_is_refused():
    assert answered(LAST_GPA, rax=2, vcpus=1024).error == INVALID_INPUT


def test_list_when_pages_are_too_few_is_not_refused_for_its_gpa():
    assert answered(1 << 52, rax=0).error == (0, 0)


@pytest.mark.parametrize("name", ["6.12", "6.18", "7.0", "multi-vmpl", "vmsa-page"])
def test_list_when_the_kernel_has_no_such_event_is_refused(name: str):
    rig = asks({"code": LIST, "info_1": BUFFER_GPA, "rax": 1}, profile=name)
    rig.enter()
    assert rig.error == INVALID_EVENT


@pytest.mark.parametrize(
    ("profile", "features"),
    [("7.0", 0x3), ("direct-vmsa", 0x13), (dataclasses.replace(WITH_LIST, vmpls=4), 0x33)],
    ids=["7.0", "with the list", "with the list and VMPLs"],
)
def test_features_when_the_event_is_there_have_bit_4(profile, features: int):
    """Both ways to ask: the event HV_FEATURES, and the MSR protocol's 0x080."""
    rig = asks({"code": 0x8000FFFD}, profile=profile)
    rig.enter()

    def script(cpu):
        cpu.ghcb = 0x080
        yield VmgExit(0x080)
        msr.append(cpu.ghcb)

    msr: list[int] = []
    Rig(script, profile=profile).enter()
    assert (rig.error, msr) == ((0, features), [features << 12 | 0x081])
