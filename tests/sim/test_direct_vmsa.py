"""Proposal v2 at the ioctl line: the capability, VMSA pages, the vCPU commands, FINISH.

Cases C1-C6, U1-U5, S1-S10, D1-D2 of the reference, with what must not have happened.
"""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import Recorder, address_of, lib

from .driver import PAGE, FrozenPage, Guest, Memory, launched, simulated, struct
from .vmsa_pages import (
    DIRECT_VMSA,
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
    VCPU_STATE,
    VMSA,
    VMSA_VALID,
    VmsaGuest,
    check_digest_of_one_page,
    digest_of_kvms_vmsas,
    extended,
    raw,
    vmsa_page,
)

KERNEL = "direct-vmsa"
LARGE_GPA = 0x200000
SNP_ACTIVE, DEBUG_SWAP = 1, 1 << 5


@pytest.fixture
def platform():
    with simulated(KERNEL) as platform:
        yield platform


@pytest.fixture
def guest(platform):
    return VmsaGuest(platform)


# The capability


@pytest.mark.parametrize("number", [DIRECT_VMSA, VCPU_STATE])
def test_check_extension_when_kernel_has_v2_is_1(platform, number):
    guest = Guest(platform)
    fds = [guest.kvm, guest.vm, guest.create_vm(0)]
    assert [guest.ioctl(fd, lib.KVM_CHECK_EXTENSION, number).ret for fd in fds] == [1, 1, 1]


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.0", "vmsa-page"])
@pytest.mark.parametrize("number", [DIRECT_VMSA, VCPU_STATE])
def test_capability_when_kernel_lacks_v2_is_0_and_cannot_be_enabled(kernel, number):
    with simulated(kernel) as platform:
        guest = VmsaGuest(platform, direct=False, vcpus=0)
        assert guest.capability(number) == 0
        assert guest.enable(number) == EINVAL


def test_enable_when_vm_is_no_snp_vm_is_einval(platform):
    guest = VmsaGuest(platform, direct=False, vcpus=0)
    assert guest.enable(vm=guest.create_vm(0)) == EINVAL


@pytest.mark.parametrize("at", range(4))
def test_enable_when_an_argument_is_set_is_einval_and_harmless(platform, at):
    guest = VmsaGuest(platform, direct=False)
    fresh = VmsaGuest(platform, direct=False, vcpus=0)
    args = [0, 0, 0, 0]
    args[at] = 1
    assert fresh.enable(args=args) == EINVAL
    assert guest.enable(args=args) == EINVAL
    fresh.add_vcpu()
    assert fresh.set_state(fresh.gpa(1)) == (EINVAL, MARK)


@pytest.mark.parametrize("bit", range(32))
def test_enable_when_a_flag_is_set_is_einval(platform, bit):
    guest = VmsaGuest(platform, direct=False, vcpus=0)
    assert guest.enable(flags=1 << bit) == EINVAL


@pytest.mark.parametrize("before", [False, True])
def test_enable_when_a_vcpu_exists_is_einval(platform, before):
    guest = VmsaGuest(platform, direct=before)
    assert guest.enable() == EINVAL


def test_enable_when_vm_is_fresh_succeeds_before_and_after_start(platform):
    assert VmsaGuest(platform, direct=False, vcpus=0, start=False).enable() == OK
    assert VmsaGuest(platform, direct=False, vcpus=0).enable() == OK


def test_enable_of_vcpu_state_is_einval_as_it_only_reports(platform):
    guest = VmsaGuest(platform, direct=False, vcpus=0)
    assert guest.enable(VCPU_STATE) == EINVAL


def test_vcpu_when_direct_has_no_page_of_kvms_own(platform):
    def page(direct):
        guest = VmsaGuest(platform, direct=direct)
        return platform._host.fds.get(guest.vcpus[0]).vcpu.vmsa_spa

    assert page(True) is None
    assert page(False) is not None


# LAUNCH_UPDATE


def test_update_when_vmsa_is_good_measures_it_and_writes_the_rest_back(guest):
    guest.source.write(vmsa_page(), PAGE)
    args = guest.update_args(1, type=VMSA)
    assert guest.update(args, error=MARK) == (OK, MARK)
    assert (args.gfn_start, args.uaddr, args.len) == (
        guest.gpa(2) // PAGE,
        guest.source.address + 2 * PAGE,
        0,
    )
    assert guest.digest == extended(bytes(48), 2, guest.gpa(1), vmsa_page())


def test_update_when_there_are_several_vmsas_measures_each_in_order(guest):
    first, second = vmsa_page(), vmsa_page(o_178=0x100)
    assert guest.measure(3, second) == (OK, MARK)
    assert guest.measure(0, b"code".ljust(PAGE, b"\0"), kind=1) == (OK, MARK)
    assert guest.measure(2, first) == (OK, MARK)
    digest = extended(bytes(48), 2, guest.gpa(3), second)
    digest = extended(digest, 1, guest.gpa(0), b"code".ljust(PAGE, b"\0"))
    assert guest.digest == extended(digest, 2, guest.gpa(2), first)


@pytest.mark.parametrize(
    "wrong",
    [
        {"len": 2 * PAGE},
        {"len": 0},
        {"len": 1},
        {"len": PAGE + 1},
        *({"flags": 1 << bit} for bit in range(16)),
        {"gfn_start": 0},
        {"gfn_start": END_OF_RAM // PAGE},
    ],
)
def test_update_when_call_is_wrong_is_einval_and_the_gpa_stays_usable(guest, wrong):
    assert guest.measure(1, **wrong) == (EINVAL, MARK)
    assert guest.measured() == []
    assert guest.measure(1) == (OK, MARK)


def test_update_when_source_is_unaligned_is_einval(guest):
    assert guest.measure(1, uaddr=guest.source.address + 8) == (EINVAL, MARK)


@pytest.mark.parametrize("vmpl", [1, 2, 3, 0xFF])
def test_update_when_vmpl_is_not_0_is_einval_and_the_gpa_stays_usable(guest, vmpl):
    assert guest.measure(1, vmsa_page(vmpl=vmpl)) == (EINVAL, MARK)
    assert guest.digest == bytes(48)
    assert guest.measure(1) == (OK, MARK)


@pytest.mark.parametrize("features", [0, 3, 1 | DEBUG_SWAP, 1 | 1 << 63, 1 << 8])
def test_update_when_features_are_not_the_vms_is_einval_and_the_gpa_stays_usable(guest, features):
    assert guest.measure(1, vmsa_page(o_3b0=features)) == (EINVAL, MARK)
    assert guest.digest == bytes(48)
    assert guest.measure(1) == (OK, MARK)


def test_update_when_vm_has_features_wants_them_in_the_vmsa(platform):
    guest = VmsaGuest(platform, features=DEBUG_SWAP)
    assert guest.measure(1) == (EINVAL, MARK)
    assert guest.measure(1, vmsa_page(o_3b0=SNP_ACTIVE | DEBUG_SWAP)) == (OK, MARK)


def test_update_when_the_rest_is_nonsense_is_taken(guest):
    page = bytearray(b"\xa5" * PAGE)
    page[0xCA] = 0
    page[0x3B0:0x3B8] = b"\1" + bytes(7)
    assert guest.measure(1, bytes(page)) == (OK, MARK)


def test_update_when_gpa_is_2_mib_aligned_is_taken(guest):
    guest.add_ram(slot=1, gpa=LARGE_GPA)
    assert guest.measure(1, gfn_start=LARGE_GPA // PAGE) == (OK, MARK)
    assert guest.measured() == [(2, LARGE_GPA)]


@pytest.mark.parametrize("kind", [1, 3, 4, 5])
def test_update_when_page_is_no_vmsa_is_not_looked_at(guest, kind):
    assert guest.measure(1, b"\xff" * PAGE, kind=kind) == (OK, MARK)


@pytest.mark.parametrize("kind", [0, 7, 8, 255])
def test_update_when_type_is_unknown_is_einval(guest, kind):
    assert guest.measure(1, kind=kind) == (EINVAL, MARK)


def test_update_when_page_is_measured_already_is_eio_even_with_a_bad_vmsa(guest):
    assert guest.measure(1) == (OK, MARK)
    assert guest.measure(1) == (EIO, 0)
    assert guest.measure(1, vmsa_page(vmpl=1)) == (EIO, 0)


def test_update_when_page_is_shared_is_eio_even_with_a_bad_vmsa(guest):
    guest.ok(guest.set_attributes(guest.gpa(1), PAGE, 0))
    assert guest.measure(1) == (EIO, 0)
    assert guest.measure(1, vmsa_page(vmpl=1)) == (EIO, 0)
    guest.ok(guest.set_attributes(guest.gpa(1), PAGE))
    assert guest.measure(1) == (OK, MARK)


@pytest.mark.parametrize("uaddr", [0, 1 << 62])
def test_update_when_source_is_unreadable_is_eio(guest, uaddr):
    assert guest.measure(1, uaddr=uaddr) == (EIO, 0)


def test_update_when_firmware_refuses_is_eio_with_its_word_and_the_gpa_stays_usable():
    with simulated(KERNEL, faults=["SNP_LAUNCH_UPDATE:fw=0x1a"]) as platform:
        guest = VmsaGuest(platform)
        assert guest.measure(1) == (EIO, 0x1A)
        assert guest.measured() == []
        assert guest.measure(1) == (OK, MARK)


def test_update_when_firmware_keeps_the_page_kills_the_vm():
    faults = ["SNP_LAUNCH_UPDATE:fw=0x1a", "SNP_PAGE_RECLAIM:fail"]
    with simulated(KERNEL, faults=faults) as platform:
        guest = VmsaGuest(platform)
        assert guest.measure(1) == (EIO, 0x1A)
        assert guest.ioctl(guest.vm, lib.KVM_CHECK_EXTENSION, DIRECT_VMSA) == EIO
        assert guest.set_state(guest.gpa(1)) == (EIO, MARK)


def test_update_when_struct_cannot_be_written_is_efault_but_done(guest):
    guest.source.write(vmsa_page(), PAGE)
    frozen = FrozenPage(raw(guest.update_args(1, type=VMSA)))
    command = lib.KVM_SEV_SNP_LAUNCH_UPDATE
    assert guest.sev(guest.vm, command, frozen.address, guest.sev_fd) == (EFAULT, 0)
    assert guest.measured() == [(2, guest.gpa(1))]


def test_update_when_capability_is_not_enabled_is_measured_as_well(platform):
    guest = VmsaGuest(platform, direct=False)
    assert guest.measure(1) == (OK, MARK)


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.0"])
def test_update_when_kernel_has_no_proposal_is_einval(kernel):
    with simulated(kernel) as platform:
        guest = VmsaGuest(platform, direct=False)
        assert guest.measure(1) == (EINVAL, MARK)


# SET_VCPU_STATE and GET_VCPU_STATE


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


# FINISH


def test_finish_when_direct_measures_nothing_and_protects_every_vcpu(platform):
    guest = VmsaGuest(platform, vcpus=3)
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.set_state(guest.gpa(1), 0)[0])
    before = guest.digest
    assert [guest.is_protected(vcpu) for vcpu in range(3)] == [False] * 3
    assert guest.finish(error=MARK) == (OK, 0)
    assert guest.digest == before
    assert [guest.is_protected(vcpu) for vcpu in range(3)] == [True] * 3


def test_finish_when_no_vcpu_is_bound_works_too(platform):
    guest = VmsaGuest(platform, vcpus=2)
    assert guest.finish() == (OK, 0)
    assert guest.measured() == []


@pytest.mark.parametrize("vcpus", [1, 2, 4, 8])
def test_digest_when_direct_is_the_same_for_any_number_of_vcpus(platform, vcpus):
    check_digest_of_one_page(platform, vcpus=vcpus)


def test_finish_when_capability_is_not_enabled_measures_as_mainline_does():
    assert digest_of_kvms_vmsas(KERNEL) == digest_of_kvms_vmsas("7.0")


def test_finish_when_vmsas_are_measured_without_capability_measures_kvms_own_as_well(platform):
    guest = VmsaGuest(platform, direct=False)
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.finish()[0])
    assert guest.measured() == [(2, guest.gpa(1)), (2, 0xFFFFFFFFF000)]


def test_finish_when_direct_does_not_look_at_registers_that_it_would_have_to_sync(platform):
    guest = VmsaGuest(platform)
    guest.ok(guest.measure(1)[0])
    debug = struct("kvm_guest_debug", control=1)
    guest.ok(guest.ioctl(guest.vcpus[0], lib.KVM_SET_GUEST_DEBUG, debug))
    assert guest.finish() == (OK, 0)


def test_finish_when_firmware_refused_may_be_tried_again_with_another_binding():
    with simulated(KERNEL, faults=["SNP_LAUNCH_FINISH:fw=0xb"]) as platform:
        guest = VmsaGuest(platform)
        guest.ok(guest.set_state(guest.gpa(1))[0])
        assert guest.finish() == (EIO, 0xB)
        assert guest.is_protected(0)
        assert guest.set_state(guest.gpa(2), 0) == (OK, MARK)
        assert guest.finish() == (OK, 0)
        assert guest.get_state() == (3, guest.gpa(2), 0)


def test_finish_when_done_already_is_firmwares_answer(guest):
    guest.ok(guest.finish()[0])
    assert guest.finish() == (EIO, lib.SEV_RET_INVALID_GUEST_STATE)


def test_update_after_finish_is_firmwares_answer(guest):
    guest.ok(guest.finish()[0])
    assert guest.measure(1) == (EIO, lib.SEV_RET_INVALID_GUEST_STATE)


# Around it


@pytest.mark.parametrize("name", ["SNP_SET_VCPU_STATE", "KVM_SEV_SNP_SET_VCPU_STATE"])
def test_fault_when_ordered_by_the_commands_name_hits_the_vcpus_ioctl(name):
    with simulated(KERNEL, faults=[f"{name}:errno=EBUSY@2"]) as platform:
        guest = VmsaGuest(platform)
        assert guest.set_state(None, 1) == (OK, MARK)
        assert guest.set_state(None, 2) == ((-1, errno.EBUSY), MARK)
        assert guest.get_state() == (GHCB_VALID, 0, 1)


def test_fault_of_get_leaves_set_alone():
    with simulated(KERNEL, faults=["SNP_GET_VCPU_STATE:errno=EIO@1+"]) as platform:
        guest = VmsaGuest(platform)
        assert guest.set_state(None, 1) == (OK, MARK)
        assert guest.sev(guest.vcpus[0], GET, struct("kvm_sev_snp_vcpu_state"))[0] == EIO


def test_recorder_decodes_the_vcpus_command_in_both_directions(platform):
    calls = []
    guest = VmsaGuest(Recorder(platform, calls.append))
    guest.set_state(guest.gpa(1), 0x5000)
    guest.get_state()
    set_, get = [call for call in calls if call.name.endswith("VCPU_STATE")]
    state = {"valid_fields": 3, "vmsa_gpa": guest.gpa(1), "ghcb_gpa": 0x5000}
    assert (set_.name, set_.sent["data"]) == ("KVM_SEV_SNP_SET_VCPU_STATE", state)
    assert get.sent["data"] == {"valid_fields": 77, "vmsa_gpa": 77, "ghcb_gpa": 77}
    assert get.received["data"] == state
