"""Proposal v2 at the ioctl line: the capability, VMSA pages, FINISH.

Cases C1-C6, U1-U5, D1-D2 of the reference, with what must not have happened.
"""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import Recorder, lib

from .driver import PAGE, FrozenPage, Guest, simulated, struct
from .vmsa_pages import (
    DIRECT_VMSA,
    EFAULT,
    EINVAL,
    EIO,
    END_OF_RAM,
    GET,
    GHCB_VALID,
    MARK,
    OK,
    VCPU_STATE,
    VMSA,
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
