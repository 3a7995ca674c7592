"""Proposal v1 at the ioctl line: one VMSA page, which is the first vCPU's after FINISH."""

from __future__ import annotations

import pytest

from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.sim.profiles import kernel_profile
from kvmlaunch.softcpu import Halt, VmgExit
from kvmlaunch.uapi import lib
from tests.host import require_simulated_cpu

from .driver import PAGE, Guest, simulated, struct
from .scripted import GHCB_GPA, Rig, register_ghcb
from .vmsa_pages import (
    EINVAL,
    EIO,
    GET,
    MARK,
    OK,
    SET,
    TERMINATE,
    VmsaGuest,
    check_digest_of_one_page,
    digest_of_kvms_vmsas,
    extended,
    is_protected,
    vmsa_page,
    with_rules,
)

KERNEL = "vmsa-page"
LARGE_GPA = 0x200000
AP_GPA = Guest.GPA + 3 * PAGE
CREATE, DESTROY = 1, 2
AP_VMSA = vmsa_page(o_178=0x333)
FAIL_ENTRY = (OK, lib.KVM_EXIT_FAIL_ENTRY)


@pytest.fixture
def platform():
    with simulated(KERNEL) as platform:
        yield platform


@pytest.fixture
def guest(platform):
    return VmsaGuest(platform, direct=False)


def test_update_when_vmsa_is_good_measures_it(guest):
    assert guest.measure(1) == (OK, MARK)
    assert guest.digest == extended(bytes(48), 2, guest.gpa(1), vmsa_page())


@pytest.mark.parametrize(
    "wrong", [{"len": 0}, {"len": 2 * PAGE}, {"len": 1}, {"flags": 1}, {"gfn_start": 0}]
)
def test_update_when_call_is_wrong_is_einval_and_the_gpa_stays_usable(guest, wrong):
    assert guest.measure(1, **wrong) == (EINVAL, MARK)
    assert guest.measured() == []
    assert guest.measure(1) == (OK, MARK)


@pytest.mark.parametrize("page", [vmsa_page(vmpl=1), vmsa_page(o_3b0=0), vmsa_page(o_3b0=3)])
def test_update_when_vmsa_is_not_the_vms_is_einval_and_the_gpa_stays_usable(guest, page):
    assert guest.measure(1, page) == (EINVAL, MARK)
    assert guest.digest == bytes(48)
    assert guest.measure(1) == (OK, MARK)


def test_update_when_a_vmsa_was_measured_already_is_einval(guest):
    assert guest.measure(1) == (OK, MARK)
    assert guest.measure(2) == (EINVAL, MARK)
    assert guest.measured() == [(2, guest.gpa(1))]
    assert guest.measure(2, kind=1) == (OK, MARK)


def test_update_when_firmware_refused_the_first_vmsa_is_not_the_second():
    with simulated(KERNEL, faults=["SNP_LAUNCH_UPDATE:fw=0x1a"]) as platform:
        guest = VmsaGuest(platform, direct=False)
        assert guest.measure(1) == (EIO, 0x1A)
        assert guest.measure(2) == (OK, MARK)


def test_update_when_page_is_shared_or_measured_is_eio(guest):
    guest.ok(guest.set_attributes(guest.gpa(1), PAGE, 0))
    assert guest.measure(1) == (EIO, 0)
    assert guest.measure(2, kind=1) == (OK, MARK)
    assert guest.measure(2) == (EIO, 0)


@pytest.mark.parametrize("command", [GET, SET])
def test_vcpu_commands_are_no_commands_of_the_vm(guest, command):
    assert guest.sev(guest.vm, command, struct("kvm_sev_snp_vcpu_state"))[0] == EINVAL


# FINISH


def test_finish_when_a_page_was_given_measures_nothing_and_protects_the_first_vcpu(platform):
    guest = VmsaGuest(platform, direct=False, vcpus=3)
    guest.ok(guest.measure(1)[0])
    before = guest.digest
    assert guest.finish(error=MARK) == (OK, 0)
    assert guest.digest == before
    assert [guest.is_protected(vcpu) for vcpu in range(3)] == [True, False, False]


@pytest.mark.parametrize("vcpus", [0, 1, 2, 8])
def test_digest_when_a_page_was_given_is_the_same_for_any_number_of_vcpus(platform, vcpus):
    check_digest_of_one_page(platform, direct=False, vcpus=vcpus)


def test_finish_when_no_page_was_given_measures_as_mainline_does():
    assert digest_of_kvms_vmsas(KERNEL) == digest_of_kvms_vmsas("7.0")


def test_finish_when_the_pages_slot_is_gone_is_einval_and_harmless(platform):
    guest = VmsaGuest(platform, direct=False)
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.set_region(slot=0, memory_size=0))
    assert guest.finish(error=MARK) == (EINVAL, MARK)
    assert not guest.is_protected(0)


def test_finish_when_done_already_is_firmwares_answer(guest):
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.finish()[0])
    assert guest.finish() == (EIO, lib.SEV_RET_INVALID_GUEST_STATE)


# KVM_RUN


@pytest.mark.parametrize("gpa", [Guest.GPA + PAGE, LARGE_GPA])
def test_first_vcpu_when_run_starts_from_the_page_wherever_it_is(gpa):
    """No rule of v1 says that it isn't 2 MiB aligned."""
    with require_simulated_cpu(KERNEL) as platform:
        guest = VmsaGuest(platform, direct=False)
        guest.ok(guest.measure(0, TERMINATE.ljust(PAGE, b"\xf4"), kind=1)[0])
        if gpa == LARGE_GPA:
            guest.add_ram(slot=1, gpa=LARGE_GPA)
        guest.ok(guest.measure(1, gfn_start=gpa // PAGE)[0])
        guest.ok(guest.finish()[0])
        assert guest.enter() == (OK, lib.KVM_EXIT_SYSTEM_EVENT)


def test_page_is_for_the_vcpu_with_index_0_whatever_its_id():
    with require_simulated_cpu(KERNEL) as platform:
        guest = VmsaGuest(platform, direct=False, vcpus=0)
        guest.ok(guest.measure(0, TERMINATE.ljust(PAGE, b"\xf4"), kind=1)[0])
        guest.ok(guest.measure(1)[0])
        guest.add_vcpu(5)
        guest.add_vcpu(0)
        guest.ok(guest.finish()[0])
        assert guest.enter(0) == (OK, lib.KVM_EXIT_SYSTEM_EVENT)
        assert guest.enter(1) == FAIL_ENTRY


def test_ap_stays_uninitialised_and_is_fail_entry_when_it_is_forced(platform):
    guest = VmsaGuest(platform, direct=False, vcpus=2, split=True)
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.finish()[0])
    assert guest.mp_state(1) == lib.KVM_MP_STATE_UNINITIALIZED
    state = struct("kvm_mp_state", mp_state=lib.KVM_MP_STATE_RUNNABLE)
    guest.ok(guest.ioctl(guest.vcpus[1], lib.KVM_SET_MP_STATE, state))
    assert guest.enter(1) == FAIL_ENTRY


def creating(kind, gpa, kernel=KERNEL):
    """vCPU 0 makes this AP creation request for vCPU 1, which has halted or failed since."""

    def script(cpu):
        if cpu is not rig.machine.cpus[0]:
            yield Halt()
        yield from register_ghcb(cpu)
        rig.request(0x80000013, 1 << 32 | kind, gpa, rax=1)
        yield VmgExit(GHCB_GPA)
        assert rig.error == (0, 0)

    def prepare(guest):
        guest.source.write(vmsa_page(), PAGE)
        guest.ok(guest.update_pages(1, type=2)[0])

    rig = Rig(script, profile=kernel, vcpus=2, prepare=prepare)
    memory = rig.platform._host.fds.get(rig.guest.vm).vm.memory
    spa = memory.private_page(AP_GPA)
    memory.rmp_update(AP_GPA, validated=True, vmsa=True)
    rig.platform._host.memory.page(spa)[:] = AP_VMSA
    rig.enter(0)
    assert not is_protected(rig.guest, 1)
    rig.runs[1].immediate_exit = kind == DESTROY
    rig.enter(1)
    return rig


@pytest.mark.parametrize("protects", [False, True])
def test_ap_creation_gives_an_ap_its_vmsa_and_protects_it_by_rule(protects):
    kernel = with_rules(kernel_profile(KERNEL), ap_create_protects=protects)
    rig = creating(CREATE, AP_GPA, kernel)
    assert rig.runs[1].exit_reason == lib.KVM_EXIT_HLT
    assert rig.machine.cpus[1].vmsa == Vmsa.decode(AP_VMSA)
    assert is_protected(rig.guest, 1) == protects


def test_ap_creation_when_there_is_no_such_page_is_fail_entry_and_protects_nothing():
    rig = creating(CREATE, 0x7_0000_1000)
    assert rig.runs[1].exit_reason == lib.KVM_EXIT_FAIL_ENTRY
    assert not is_protected(rig.guest, 1)


def test_ap_that_is_destroyed_before_it_was_ever_created_is_not_protected():
    assert not is_protected(creating(DESTROY, 0).guest, 1)
