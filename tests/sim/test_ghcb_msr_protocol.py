"""The GHCB MSR protocol (svm/sev.c: sev_handle_vmgexit_msr_protocol of 6.12)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.softcpu import VmgExit
from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Guest
from .scripted import GHCB_GPA, Rig

OK = (0, 0)
SEV_TERM = 6


def said(value, **options):
    """A rig and the MSR after one VMGEXIT with ``value``, seen when the guest goes on."""

    def script(cpu):
        cpu.ghcb = value
        yield VmgExit(value)
        rig.answer = cpu.ghcb

    rig = Rig(script, **options)
    rig.answer = None
    return rig


def answer(value, **options):
    rig = said(value, **options)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    return rig.answer


@pytest.mark.parametrize(
    ("version", "wanted"),
    [(0, 2 << 48 | 1 << 32 | 51 << 24 | 1), (1, 1 << 48 | 1 << 32 | 51 << 24 | 1)],
)
def test_sev_info_has_versions_and_c_bit(version, wanted):
    assert answer(2, ghcb_version=version) == wanted


def test_msr_of_a_new_vcpu_is_sev_info():
    def script(cpu):
        rig.answer = cpu.ghcb
        yield from ()

    rig = Rig(script)
    rig.enter()
    assert rig.answer == 2 << 48 | 1 << 32 | 51 << 24 | 1


@pytest.mark.parametrize(("register", "value"), [(0, 0xA1), (1, 0xB2), (2, 0xC3), (3, 0xD4)])
def test_cpuid_gives_one_register(register, value):
    rig = said(0x1234 << 32 | register << 30 | 0x2AAAA << 12 | 4)
    entry = {"function": 0x1234, "eax": 0xA1, "ebx": 0xB2, "ecx": 0xC3, "edx": 0xD4}
    table = ffi.new("struct kvm_cpuid2 *", {"nent": 1, "entries": [entry]})
    rig.guest.ok(rig.guest.ioctl(rig.vcpus[0], lib.KVM_SET_CPUID2, table))
    rig.enter()
    # Bits that KVM has no use for stay.
    assert rig.answer == value << 32 | register << 30 | 0x2AAAA << 12 | 5


def test_hv_features_are_snp_and_ap_creation():
    assert answer(0x80) == 3 << 12 | 0x81


def test_preferred_gpa_is_none():
    assert answer(0x10) == ((1 << 52) - 1) << 12 | 0x11


def test_registration_echoes_the_gfn():
    assert answer(GHCB_GPA | 0x12) == GHCB_GPA | 0x13


@pytest.mark.parametrize("value", [0x016, 0xFFF, 0x123456000 | 0x018, 1])
def test_request_that_is_unknown_leaves_the_msr(value):
    assert answer(value) == value


def test_termination_exits_with_the_msr():
    rig = said(0x5_2_100)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_SYSTEM_EVENT)
    event = rig.run.system_event
    assert (event.type, event.ndata, event.data[0]) == (SEV_TERM, 1, 0x52100)


def test_reset_hold_without_an_apic_exits_and_says_that_no_sipi_came():
    rig = said(0x6)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_AP_RESET_HOLD)
    rig.enter()
    assert rig.answer == 7


# Page state change

PSC_ERROR = 1 << 63 | 0x15  # GHCB_MSR_PSC_RESP_ERROR of asm/sev-common.h


@pytest.mark.parametrize(("operation", "attributes"), [(1, 0x10), (2, 0)])
def test_page_state_change_exits(operation, attributes):
    rig = said(operation << 52 | Guest.GPA | 0x14)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HYPERCALL)
    hypercall = rig.run.hypercall
    assert (hypercall.nr, list(hypercall.args)[:3]) == (12, [Guest.GPA, 1, attributes])


@pytest.mark.parametrize(("ret", "wanted"), [(0, 0x15), (errno.EINVAL, PSC_ERROR)])
def test_page_state_change_returns_what_user_space_says(ret, wanted):
    rig = said(1 << 52 | Guest.GPA | 0x14)
    rig.enter()
    rig.run.hypercall.ret = ret
    rig.enter()
    assert rig.answer == wanted


@pytest.mark.parametrize(("profile", "kept"), [("6.12", 77), ("6.18", 0), ("7.0", 0)])
def test_page_state_change_clears_ret_in_newer_kernels_only(profile, kept):
    rig = said(1 << 52 | Guest.GPA | 0x14, profile=profile)
    rig.run.hypercall.ret = 77
    rig.enter()
    assert rig.run.hypercall.ret == kept


@pytest.mark.parametrize("operation", [0, 3, 4, 15])
def test_page_state_change_of_another_kind_is_an_error(operation):
    assert answer(operation << 52 | Guest.GPA | 0x14) == PSC_ERROR


def test_page_state_change_without_the_exit_is_an_error():
    assert answer(1 << 52 | Guest.GPA | 0x14, hypercalls=False) == PSC_ERROR


def test_page_state_change_ignores_bits_above_the_operation():
    rig = said(0xAB << 56 | 1 << 52 | Guest.GPA + PAGE | 0x14)
    assert (rig.enter(), rig.run.hypercall.args[0]) == (OK, Guest.GPA + PAGE)
