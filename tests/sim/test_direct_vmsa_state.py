"""Proposal v2 at the ioctl line: SET_VCPU_STATE and GET_VCPU_STATE, the commands of a vCPU.

Cases S1-S10 of the reference, with what must not have happened.
"""

from __future__ import annotations

import pytest

from kvmlaunch.uapi import address_of, lib

from .driver import PAGE, FrozenPage, Guest, Memory, launched, simulated, struct
from .vmsa_pages import (
    EFAULT,
    EINVAL,
    EIO,
    END_OF_RAM,
    ENOTTY,
    GET,
    GHCB_VALID,
    MARK,
    OK,
    SET,
    VMSA_VALID,
    VmsaGuest,
    raw,
)

KERNEL = "direct-vmsa"
LARGE_GPA = 0x200000


@pytest.fixture
def platform():
    with simulated(KERNEL) as platform:
        yield platform


@pytest.fixture
def guest(platform):
    return VmsaGuest(platform)


def test_set_when_good_can_be_read_back(guest):
    assert guest.measure(1) == (OK, MARK)
    assert guest.set_state(guest.gpa(1), 1 << 40) == (OK, MARK)
    assert guest.get_state() == (VMSA_VALID | GHCB_VALID, guest.gpa(1), 1 << 40)


def test_set_when_repeated_the_last_one_counts(guest):
    assert guest.set_state(guest.gpa(1), 0x1000) == (OK, MARK)
    assert guest.set_state(guest.gpa(2), 0) == (OK, MARK)
    assert guest.get_state() == (3, guest.gpa(2), 0)


def test_set_when_vmsa_is_not_marked_takes_it_away(guest):
    guest.ok(guest.set_state(guest.gpa(1), 0)[0])
    assert guest.set_state(None, 0x5000, vmsa_gpa=guest.gpa(2)) == (OK, MARK)
    assert guest.get_state() == (GHCB_VALID, 0, 0x5000)


def test_set_when_ghcb_is_not_marked_takes_it_away(guest):
    guest.ok(guest.set_state(guest.gpa(1), 0x5000)[0])
    assert guest.set_state(guest.gpa(1), ghcb_gpa=0x6000) == (OK, MARK)
    assert guest.get_state() == (VMSA_VALID, guest.gpa(1), 0)


def test_set_when_nothing_is_marked_takes_both_away(guest):
    guest.ok(guest.set_state(guest.gpa(1), 0x5000)[0])
    assert guest.set_state() == (OK, MARK)
    assert guest.get_state() == (0, 0, 0)


@pytest.mark.parametrize("ghcb", [0, 1, 0xFFF, 1 << 63, (1 << 64) - 2])
def test_set_of_ghcb_is_not_checked(guest, ghcb):
    assert guest.set_state(None, ghcb) == (OK, MARK)
    assert guest.get_state() == (GHCB_VALID, 0, ghcb)


def test_set_of_ghcb_to_all_ones_means_none(guest):
    """INVALID_PAGE: GET can't tell it from a GHCB that was taken away."""
    assert guest.set_state(None, (1 << 64) - 1) == (OK, MARK)
    assert guest.get_state() == (0, 0, 0)


def test_get_when_nothing_was_set_has_the_ghcb_msrs_reset_value(guest):
    """SEV_INFO's answer: versions 2 to 1, C-bit 51 of a Milan."""
    assert guest.get_state() == (GHCB_VALID, 0, 2 << 48 | 1 << 32 | 51 << 24 | 1)


def test_set_is_of_one_vcpu(platform):
    guest = VmsaGuest(platform, vcpus=2)
    guest.ok(guest.set_state(guest.gpa(1), 0, vcpu=1)[0])
    assert guest.get_state(0)[0] & VMSA_VALID == 0
    assert guest.get_state(1) == (3, guest.gpa(1), 0)


@pytest.mark.parametrize("private", [False, True])
def test_set_of_vmsa_in_guest_memfd_does_not_ask_what_it_is(guest, private):
    guest.ok(guest.set_attributes(guest.gpa(1), PAGE, 8 if private else 0))
    assert guest.set_state(guest.gpa(1)) == (OK, MARK)


def test_set_of_page_that_isnt_measured_yet_makes_it_the_guests_and_update_fails(guest):
    """sev_gmem_prepare() by kvm_gmem_get_pfn(): so measuring comes before binding."""
    assert guest.set_state(guest.gpa(1)) == (OK, MARK)
    assert guest.measure(1) == (EIO, 0)


def test_set_and_get_when_vm_is_no_snp_vm_are_enotty(platform):
    guest = Guest(platform, init=False, vm_type=0)
    vcpu = guest.add_vcpu()
    for command in (GET, SET):
        args = struct("kvm_sev_snp_vcpu_state", valid_fields=1)
        assert guest.sev(vcpu, command, args, error=MARK) == (ENOTTY, MARK)


def test_set_and_get_when_snp_vm_is_not_initialised_are_enotty(platform):
    guest = Guest(platform, init=False)
    vcpu = guest.add_vcpu()
    assert guest.sev(vcpu, SET, struct("kvm_sev_snp_vcpu_state"))[0] == ENOTTY
    assert guest.sev(vcpu, GET, struct("kvm_sev_snp_vcpu_state"))[0] == ENOTTY


@pytest.mark.parametrize("start", [False, True])
def test_set_when_capability_is_not_enabled_is_einval(platform, start):
    guest = VmsaGuest(platform, direct=False, start=start)
    assert guest.set_state(guest.gpa(1)) == (EINVAL, MARK)
    assert guest.set_state() == (EINVAL, MARK)


def test_get_when_capability_is_not_enabled_works(platform):
    guest = VmsaGuest(platform, direct=False)
    assert guest.get_state()[0] == GHCB_VALID


def test_set_and_get_before_start_are_einval(platform):
    guest = VmsaGuest(platform, start=False)
    assert guest.set_state(guest.gpa(1)) == (EINVAL, MARK)
    out = struct("kvm_sev_snp_vcpu_state")
    assert guest.sev(guest.vcpus[0], GET, out, error=MARK) == (EINVAL, MARK)


def unchanged(guest, **wrong):
    """The SET is refused with EINVAL, and what was set before still is."""
    guest.ok(guest.set_state(guest.gpa(3), 0x7000)[0])
    fields = {"vmsa": guest.gpa(1), "ghcb": 0x1000, **wrong}
    result = guest.set_state(**fields)
    return result == (EINVAL, MARK) and guest.get_state() == (3, guest.gpa(3), 0x7000)


@pytest.mark.parametrize("at", range(5))
def test_set_when_pad_is_not_0_is_einval_and_harmless(guest, at):
    pad = [0] * 5
    pad[at] = 1 << 63
    assert unchanged(guest, pad=pad)


@pytest.mark.parametrize("bit", range(2, 64))
def test_set_when_an_unknown_field_is_marked_is_einval_and_harmless(guest, bit):
    assert unchanged(guest, valid_fields=3 | 1 << bit)


@pytest.mark.parametrize(
    "gpa",
    [
        0x1001,
        Guest.GPA + PAGE + 1,
        Guest.GPA + PAGE + 0x800,
        0,
        LARGE_GPA,
        (1 << 40) + PAGE,
        END_OF_RAM,
        1 << 52 | PAGE,
        (1 << 64) - PAGE,
    ],
)
def test_set_when_vmsas_gpa_is_wrong_is_einval_and_harmless(guest, gpa):
    guest.add_ram(slot=1, gpa=LARGE_GPA)
    assert unchanged(guest, vmsa=gpa)


def test_set_when_vmsa_is_beyond_the_vcpus_address_width_is_einval(guest):
    """36 bits, as long as it has no CPUID; the host's memory goes on."""
    guest.add_ram(slot=1, gpa=1 << 36)
    assert guest.measure(1, gfn_start=(1 << 24) + 1) == (OK, MARK)
    assert guest.set_state((1 << 36) + PAGE) == (EINVAL, MARK)


def test_set_when_2_mib_aligned_vmsa_is_measured_is_einval_all_the_same(guest):
    guest.add_ram(slot=1, gpa=LARGE_GPA)
    assert guest.measure(0, gfn_start=LARGE_GPA // PAGE) == (OK, MARK)
    assert guest.measure(1, gfn_start=LARGE_GPA // PAGE + 1) == (OK, MARK)
    assert guest.set_state(LARGE_GPA) == (EINVAL, MARK)
    assert guest.set_state(LARGE_GPA + PAGE) == (OK, MARK)


def test_set_when_gpa_is_wrong_but_not_marked_is_ignored(guest):
    assert guest.set_state(None, 0, vmsa_gpa=0x1001) == (OK, MARK)


def test_set_when_slot_has_no_guest_memfd_is_efault(guest):
    memory = Memory(PAGE)
    slot = {"slot": 5, "guest_phys_addr": 0x801000, "memory_size": PAGE}
    guest.ok(guest.set_region(userspace_addr=memory.address, **slot))
    assert guest.set_state(0x801000) == (EFAULT, MARK)
    assert guest.get_state()[0] & VMSA_VALID == 0


def test_set_when_guest_memfd_is_closed_is_efault(guest):
    guest.platform.close(guest.gmem)
    assert guest.set_state(guest.gpa(1)) == (EFAULT, MARK)


def test_set_after_finish_is_einval_and_get_goes_on(guest):
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.set_state(guest.gpa(1), 0)[0])
    guest.ok(guest.finish()[0])
    assert guest.set_state(guest.gpa(1), 0) == (EINVAL, MARK)
    assert guest.set_state() == (EINVAL, MARK)
    assert guest.get_state() == (3, guest.gpa(1), 0)


@pytest.mark.parametrize("command", [GET, SET])
@pytest.mark.parametrize("address", [0, 8, (1 << 64) - 8])
def test_command_when_its_struct_is_unreachable_is_efault(guest, command, address):
    assert guest.sev(guest.vcpus[0], command, address, error=MARK) == (EFAULT, MARK)


def test_get_into_a_read_only_struct_is_efault(guest):
    assert guest.sev(guest.vcpus[0], GET, FrozenPage(b"").address)[0] == EFAULT


def test_set_from_a_read_only_struct_works(guest):
    frozen = FrozenPage(raw(struct("kvm_sev_snp_vcpu_state", valid_fields=2, ghcb_gpa=9)))
    assert guest.sev(guest.vcpus[0], SET, frozen.address)[0] == OK
    assert guest.get_state() == (GHCB_VALID, 0, 9)


@pytest.mark.parametrize(("start", "code"), [(False, EINVAL), (True, EFAULT)])
def test_set_looks_at_the_launch_before_its_struct(platform, start, code):
    guest = VmsaGuest(platform, start=start)
    assert guest.sev(guest.vcpus[0], SET, 8)[0] == code


# The ioctl on a vCPU


def op(guest, arg, vcpu=0):
    return guest.ioctl(guest.vcpus[vcpu], lib.KVM_MEMORY_ENCRYPT_OP, arg)


def test_vcpu_op_without_command_is_einval(guest):
    assert op(guest, 0) == EINVAL


@pytest.mark.parametrize("address", [8, (1 << 64) - 8])
def test_vcpu_op_when_command_is_unreadable_is_efault(guest, address):
    assert op(guest, address) == EFAULT


@pytest.mark.parametrize("command", [0, 22, 100, 101, 102, 103, 106, (1 << 32) - 1])
def test_vcpu_op_when_command_is_no_vcpus_is_einval_and_not_copied_back(guest, command):
    assert guest.sev(guest.vcpus[0], command, error=MARK) == (EINVAL, MARK)
    frozen = FrozenPage(raw(struct("kvm_sev_cmd", id=command)))
    assert op(guest, frozen.address) == EINVAL


@pytest.mark.parametrize("command", [GET, SET])
def test_vm_op_when_command_is_a_vcpus_is_einval(guest, command):
    assert guest.sev(guest.vm, command, struct("kvm_sev_snp_vcpu_state"))[0] == EINVAL


def test_vcpu_op_when_command_is_read_only_is_efault_though_it_was_done(guest):
    args = struct("kvm_sev_snp_vcpu_state", valid_fields=2, ghcb_gpa=0x9000)
    frozen = FrozenPage(raw(struct("kvm_sev_cmd", id=SET, data=address_of(args))))
    assert op(guest, frozen.address) == EFAULT
    assert guest.get_state() == (GHCB_VALID, 0, 0x9000)


@pytest.mark.parametrize(
    ("kernel", "code"),
    [("6.12", EINVAL), ("6.18", ENOTTY), ("7.0", ENOTTY), ("vmsa-page", ENOTTY)],
)
@pytest.mark.parametrize("arg", [0, 8])
def test_vcpu_op_when_kernel_has_no_vcpu_commands(kernel, code, arg):
    with simulated(kernel) as platform:
        guest = launched(platform)
        assert op(guest, arg) == code
        assert guest.sev(guest.vcpus[0], GET, struct("kvm_sev_snp_vcpu_state"))[0] == code
