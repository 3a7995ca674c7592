"""KVM_RUN where VMSAs come from user space (proposal v2)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.softcpu import Halt, InvalidState, VmgExit
from kvmlaunch.uapi import lib
from tests.host import require_simulated_cpu

from .driver import PAGE, Guest, struct
from .scripted import GHCB_GPA, Rig, register_ghcb
from .vmsa_pages import (
    DIRECT_VMSA,
    EINVAL,
    MARK,
    OK,
    TERMINATE,
    VmsaGuest,
    enter,
    get_state,
    set_state,
    vmsa_page,
)

KERNEL = "direct-vmsa"
AP_CREATION, CREATE, DESTROY = 0x80000013, 1, 2
FAIL_ENTRY = (OK, lib.KVM_EXIT_FAIL_ENTRY)
TERMINATED = (OK, lib.KVM_EXIT_SYSTEM_EVENT)
AP_PAGE = 3
AP_GPA = Guest.GPA + AP_PAGE * PAGE
FIRST, SECOND = vmsa_page(o_178=0x111, o_1d8=0x222), vmsa_page(o_178=0x333)


def halting(cpu):
    yield Halt()


def direct(script=halting, prepare=lambda guest: None, **options):
    return Rig(script, profile=KERNEL, enable=(DIRECT_VMSA,), prepare=prepare, **options)


def measure(guest, page, data):
    guest.source.write(data, page * PAGE)
    guest.ok(guest.update_pages(page, type=2)[0])


def bind(guest, page, ghcb=0, vcpu=0):
    set_state(guest, Guest.GPA + page * PAGE, ghcb, vcpu)


# With a processor


def measured_code(guest):
    guest.ok(guest.measure(0, TERMINATE.ljust(PAGE, b"\xf4"), kind=1)[0])


@pytest.fixture
def guest():
    with require_simulated_cpu(KERNEL) as platform:
        yield VmsaGuest(platform, vcpus=2, split=True)


def test_bound_vcpu_when_run_starts_from_its_page(guest):
    measured_code(guest)
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.set_state(guest.gpa(1), 0)[0])
    guest.ok(guest.finish()[0])
    assert guest.enter() == TERMINATED
    event = guest.mmap_run(guest.vcpus[0]).system_event
    assert (event.type, event.data[0]) == (lib.KVM_SYSTEM_EVENT_SEV_TERM, 0x100)


def test_bound_vcpu_when_bound_twice_starts_from_the_second_page(guest):
    """The first one would run into a HLT, with nobody to wake it up."""
    measured_code(guest)
    guest.ok(guest.measure(1, vmsa_page(o_178=0x800))[0])
    guest.ok(guest.measure(2)[0])
    guest.ok(guest.set_state(guest.gpa(1), 0)[0])
    guest.ok(guest.set_state(guest.gpa(2), 0)[0])
    guest.ok(guest.finish()[0])
    assert guest.enter() == TERMINATED


def test_registers_that_were_set_by_ioctl_when_direct_are_not_the_guests(guest):
    """RIP by KVM_SET_REGS points at nothing."""
    measured_code(guest)
    guest.ok(guest.measure(1)[0])
    regs = guest.get(guest.vcpus[0], lib.KVM_GET_REGS)
    regs.rip = 0x1234
    guest.ok(guest.ioctl(guest.vcpus[0], lib.KVM_SET_REGS, regs))
    guest.ok(guest.set_state(guest.gpa(1), 0)[0])
    guest.ok(guest.finish()[0])
    assert guest.enter() == TERMINATED


@pytest.mark.parametrize(
    "page",
    [
        vmsa_page(o_d0=0),  # EFER without SVME
        vmsa_page(o_158=1 << 31),  # paging without protection
    ],
    ids=["EFER.SVME clear", "CR0.PG without PE"],
)
def test_bound_vmsa_when_vmrun_refuses_it_is_fail_entry(guest, page):
    guest.ok(guest.measure(1, page)[0])
    guest.ok(guest.set_state(guest.gpa(1), 0)[0])
    guest.ok(guest.finish()[0])
    assert guest.enter() == FAIL_ENTRY


def test_ap_without_vmsa_stays_uninitialised_until_it_is_forced(guest):
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.set_state(guest.gpa(1), 0)[0])
    guest.ok(guest.finish()[0])
    assert guest.mp_state(0) == lib.KVM_MP_STATE_RUNNABLE
    assert guest.mp_state(1) == lib.KVM_MP_STATE_UNINITIALIZED
    run = guest.mmap_run(guest.vcpus[1])
    run.immediate_exit = 1
    assert guest.enter(1)[0] == (-1, errno.EINTR)
    run.immediate_exit = 0
    set_mp_state(guest, 1, lib.KVM_MP_STATE_RUNNABLE)
    assert guest.enter(1) == FAIL_ENTRY
    assert run.fail_entry.hardware_entry_failure_reason == 0xFFFFFFFF


def set_mp_state(guest, vcpu, state):
    args = struct("kvm_mp_state", mp_state=state)
    guest.ok(guest.ioctl(guest.vcpus[vcpu], lib.KVM_SET_MP_STATE, args))


def test_bound_ap_runs_once_it_is_started(guest):
    measured_code(guest)
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.set_state(guest.gpa(1), 0, vcpu=1)[0])
    guest.ok(guest.finish()[0])
    assert guest.mp_state(1) == lib.KVM_MP_STATE_UNINITIALIZED
    set_mp_state(guest, 1, lib.KVM_MP_STATE_SIPI_RECEIVED)
    assert guest.enter(1) == TERMINATED


def test_launch_without_the_capability_runs_from_the_synced_registers():
    with require_simulated_cpu(KERNEL) as platform:
        guest = VmsaGuest(platform, direct=False)
        measured_code(guest)
        sregs = guest.get(guest.vcpus[0], lib.KVM_GET_SREGS)
        sregs.cs.base = guest.GPA
        guest.ok(guest.ioctl(guest.vcpus[0], lib.KVM_SET_SREGS, sregs))
        regs = guest.get(guest.vcpus[0], lib.KVM_GET_REGS)
        regs.rip = 0
        guest.ok(guest.ioctl(guest.vcpus[0], lib.KVM_SET_REGS, regs))
        guest.ok(guest.finish()[0])
        assert guest.enter() == TERMINATED


# With a scripted one


def test_vmsa_reaches_the_processor_byte_for_byte():
    page = vmsa_page(o_178=0x1234, o_1f8=0xABCD, o_308=7, o_150=0x5000, o_268=0x0007040600070406)

    def prepare(guest):
        measure(guest, 1, page)
        bind(guest, 1)

    rig = direct(prepare=prepare)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert rig.machine.cpus[0].vmsa == Vmsa.decode(page)


@pytest.mark.parametrize(
    ("fields", "msr"),
    [
        ({"ghcb": 0}, 0),
        ({"ghcb": 0x4000}, 0x4000),
        ({"ghcb": None}, (1 << 64) - 1),
    ],
    ids=["0", "an address", "not marked as valid"],
)
def test_guest_finds_in_the_ghcb_msr_what_was_set(fields, msr):
    seen = []

    def script(cpu):
        seen.append(cpu.ghcb)
        yield Halt()

    def prepare(guest):
        measure(guest, 1, FIRST)
        set_state(guest, Guest.GPA + PAGE, **fields)

    direct(script, prepare).enter()
    assert seen == [msr]


def test_bound_page_when_it_is_no_vmsa_is_fail_entry():
    def prepare(guest):
        guest.ok(guest.update_pages(1)[0])
        bind(guest, 1)

    rig = direct(prepare=prepare)
    assert (rig.enter(), rig.run.exit_reason) == FAIL_ENTRY


def test_bound_page_when_it_was_never_measured_is_fail_entry():
    rig = direct(prepare=lambda guest: bind(guest, 1))
    assert (rig.enter(), rig.run.exit_reason) == FAIL_ENTRY


def test_bound_page_when_it_is_shared_is_fail_entry():
    def prepare(guest):
        guest.ok(guest.set_attributes(Guest.GPA + PAGE, PAGE, 0))
        bind(guest, 1)

    rig = direct(prepare=prepare)
    assert (rig.enter(), rig.run.exit_reason) == FAIL_ENTRY


def test_bound_page_when_the_guests_memory_lost_it_is_fail_entry():
    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1)

    rig = direct(prepare=prepare)
    rig.guest.ok(rig.guest.platform.fallocate(rig.guest.gmem, 3, PAGE, PAGE))
    assert (rig.enter(), rig.run.exit_reason) == FAIL_ENTRY


def test_processor_that_refuses_the_vmsa_is_fail_entry():
    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1)

    rig = direct(prepare=prepare)
    rig.enter()
    rig.platform._host.fds.get(rig.vcpus[0]).vcpu.running.unload()
    rig.machine.invalid = InvalidState("CR0.PG without PE")
    assert (rig.enter(), rig.run.exit_reason) == FAIL_ENTRY


def test_vcpu_that_was_never_bound_is_fail_entry_though_another_one_was():
    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1, vcpu=1)

    rig = direct(prepare=prepare, vcpus=2)
    assert (rig.enter(0), rig.run.exit_reason) == FAIL_ENTRY
    assert (rig.enter(1), rig.runs[1].exit_reason) == (OK, lib.KVM_EXIT_HLT)


def test_vcpu_whose_binding_was_taken_away_is_fail_entry():
    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1)
        set_state(guest, None, 0)

    rig = direct(prepare=prepare)
    assert (rig.enter(), rig.run.exit_reason) == FAIL_ENTRY


def test_bound_vcpu_before_finish_is_fail_entry():
    reasons = []

    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1)
        reasons.append(enter(guest))

    rig = direct(prepare=prepare)
    assert reasons == [FAIL_ENTRY]
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)


def test_bound_vcpu_when_firmware_refused_finish_is_fail_entry():
    reasons = []

    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1)
        reasons.append(guest.finish()[1])
        reasons.append(enter(guest))

    rig = direct(prepare=prepare, faults=["SNP_LAUNCH_FINISH:fw=0xb"])
    assert reasons == [0xB, FAIL_ENTRY]
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)


def test_get_has_the_ghcb_msr_that_the_guest_wrote():
    def script(cpu):
        yield from register_ghcb(cpu)
        cpu.ghcb = GHCB_GPA
        yield Halt()

    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1)

    rig = direct(script, prepare)
    rig.enter()
    assert get_state(rig.guest) == (3, Guest.GPA + PAGE, GHCB_GPA)


def test_two_vcpus_on_one_page_both_start_from_it():
    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1, vcpu=0)
        bind(guest, 1, vcpu=1)

    rig = direct(prepare=prepare, vcpus=2)
    rig.enter(0)
    rig.enter(1)
    assert [cpu.vmsa for cpu in rig.machine.cpus] == [Vmsa.decode(FIRST)] * 2


def creating(*requests, **options):
    """vCPU 0, bound to page 1, makes these AP creation requests for vCPU 1."""

    def script(cpu):
        if cpu is not rig.machine.cpus[0]:
            yield Halt()
        yield from register_ghcb(cpu)
        for kind, gpa in requests:
            rig.request(AP_CREATION, 1 << 32 | kind, gpa, rax=1)
            cpu.ghcb = GHCB_GPA
            yield VmgExit(GHCB_GPA)
            assert rig.error == (0, 0)

    def prepare(guest):
        measure(guest, 1, FIRST)
        bind(guest, 1)
        measure(guest, AP_PAGE, SECOND)

    rig = direct(script, prepare, vcpus=2, **options)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    return rig


def test_ap_creation_gives_an_unbound_vcpu_its_vmsa_and_get_reports_it():
    rig = creating((CREATE, AP_GPA))
    assert (rig.enter(1), rig.runs[1].exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert rig.machine.cpus[1].vmsa == Vmsa.decode(SECOND)
    guest = rig.guest
    assert get_state(guest, 1)[:2] == (3, AP_GPA)
    assert get_state(guest, 0)[:2] == (3, Guest.GPA + PAGE)


def test_vcpu_that_is_destroyed_has_no_vmsa_even_if_it_never_had_one():
    rig = creating((DESTROY, 0))
    guest = rig.guest
    rig.runs[1].immediate_exit = 1
    rig.enter(1)
    assert get_state(guest, 1)[0] & 1 == 0


def test_vcpu_made_after_finish_has_no_vmsa():
    rig = direct()
    late = rig.guest.add_vcpu(7)
    run = rig.guest.mmap_run(late)
    assert (rig.guest.ioctl(late, lib.KVM_RUN), run.exit_reason) == FAIL_ENTRY
    assert set_state(rig.guest, AP_GPA, vcpu=1) == (EINVAL, MARK)
