"""AP creation and the run states of vCPUs (svm/sev.c, x86.c of 6.12)."""

from __future__ import annotations

import errno
import threading

import pytest

from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.sim.scheduler import GRACE_SECONDS
from kvmlaunch.softcpu import Access, FaultReason, Halt, NestedFault, VmgExit
from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Guest
from .scripted import GHCB_GPA, Rig, register_ghcb

OK = (0, 0)
CREATE_ON_INIT, CREATE, DESTROY = 0, 1, 2
REFUSED = (2, 5)
VMSA_GPA = Guest.GPA + 3 * PAGE
AP_CREATION = 0x80000013
STATE = Vmsa(rip=0x1234, efer=0x1000, sev_features=1, xcr0=1)


def creating(*requests, vcpus=2, **options):
    """vCPU 0 makes these requests (info_1, info_2, RAX); the others halt when they run."""

    def script(cpu):
        if cpu is not rig.machine.cpus[0]:
            return
        yield from register_ghcb(cpu)
        make_vmsa(rig)
        for info_1, info_2, rax in requests:
            rig.request(AP_CREATION, info_1, info_2, rax=rax)
            cpu.ghcb = GHCB_GPA
            yield VmgExit(GHCB_GPA)

    rig = Rig(script, vcpus=vcpus, **options)
    return rig


def make_vmsa(rig, gpa=VMSA_GPA, state=STATE):
    """What PVALIDATE, stores and RMPADJUST leave."""
    memory = rig.machine.memory
    assert isinstance(memory.resolve(gpa, True), int)
    memory.rmp_update(gpa, validated=True)
    host = rig.platform._host
    host.memory.page(memory.private_page(gpa))[:] = state.encode()
    memory.rmp_update(gpa, vmsa=True)


def asked(*request, **options):
    rig = creating(request, **options)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    return rig


def test_create_gives_the_target_the_guests_vmsa():
    rig = asked(1 << 32 | CREATE, VMSA_GPA, 1)
    assert rig.error == (0, 0)
    assert (rig.enter(1), rig.runs[1].exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert rig.machine.cpus[1].vmsa == STATE


@pytest.mark.parametrize(
    "request_",
    [
        (9 << 32 | CREATE, VMSA_GPA, 1),
        (1 << 32 | CREATE, VMSA_GPA + 8, 1),
        (1 << 32 | CREATE, 1 << 52, 1),
        (1 << 32 | CREATE, 0x200000, 1),
        (1 << 32 | CREATE, VMSA_GPA, 1 | 1 << 3),
        (1 << 32 | CREATE, VMSA_GPA, 1 | 1 << 4),
        (1 << 32 | CREATE_ON_INIT, VMSA_GPA + 1, 1),
        (1 << 32 | 3, VMSA_GPA, 1),
        (1 << 32 | 1 << 16 | CREATE, VMSA_GPA, 1),
    ],
    ids=[
        *("no such vCPU", "unaligned", "too wide", "2 MiB aligned", "restricted injection"),
        *("alternate injection", "unaligned on INIT", "unknown request", "VMPL1"),
    ],
)
def test_request_that_kvm_refuses_changes_nothing(request_):
    rig = asked(*request_)
    assert rig.error == REFUSED
    rig.enter(1)
    assert rig.machine.cpus[1].vmsa != STATE


@pytest.mark.parametrize(("profile", "error"), [("6.12", (0, 0)), ("6.18", REFUSED)])
def test_create_with_other_features_is_refused_by_newer_kernels(profile, error):
    assert asked(1 << 32 | CREATE, VMSA_GPA, 1 | 1 << 5, profile=profile).error == error


def test_destroy_needs_no_rax():
    def script(cpu):
        yield from register_ghcb(cpu)
        rig.request(AP_CREATION, 1 << 32 | DESTROY)
        yield VmgExit(GHCB_GPA)

    rig = Rig(script, vcpus=2)
    assert (rig.enter(), rig.error) == (OK, (0, 0))


def test_destroy_with_other_features_is_taken():
    assert asked(1 << 32 | DESTROY, 0, 1 | 1 << 3).error == (0, 0)


def test_create_on_init_waits_for_an_init():
    rig = asked(1 << 32 | CREATE_ON_INIT, VMSA_GPA, 1)
    assert rig.error == (0, 0)
    rig.enter(1)
    assert rig.machine.cpus[1].vmsa != STATE


def test_create_with_a_page_that_is_no_vmsa_fails_the_entry():
    rig = asked(1 << 32 | CREATE, VMSA_GPA + PAGE, 1)
    assert (rig.enter(1), rig.runs[1].exit_reason) == (OK, lib.KVM_EXIT_FAIL_ENTRY)
    assert rig.runs[1].fail_entry.hardware_entry_failure_reason == 0xFFFFFFFF


def test_state_of_a_destroyed_vcpu_is_in_its_page_and_can_be_taken_up_again():
    requests = [(CREATE, VMSA_GPA), (DESTROY, 0), (CREATE, VMSA_GPA)]

    def script(cpu):
        if cpu is not rig.machine.cpus[0]:
            return
        yield from register_ghcb(cpu)
        make_vmsa(rig)
        for kind, gpa in requests:
            rig.request(AP_CREATION, 1 << 32 | kind, gpa, rax=1)
            cpu.ghcb = GHCB_GPA
            yield VmgExit(GHCB_GPA)
            yield Halt()

    rig = Rig(script, vcpus=2)
    rig.enter(0)
    rig.enter(1)
    target = rig.machine.cpus[1]
    target.registers["rax"] = 0x55
    rig.enter(0)
    assert interrupted(rig, 1)
    assert mp_state(rig, 1) == lib.KVM_MP_STATE_HALTED
    rig.enter(0)
    assert (rig.enter(1), rig.runs[1].exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert (target.loads, target.vmsa) == (2, STATE.replace(rax=0x55))


def test_vcpu_that_was_created_is_woken_while_it_waits():
    """The target blocks in KVM_RUN, in its own thread, until vCPU 0 creates it."""

    def script(cpu):
        if cpu is not rig.machine.cpus[0]:
            return
        yield from register_ghcb(cpu)
        make_vmsa(rig)
        for kind, gpa in [(DESTROY, 0), (CREATE, VMSA_GPA)]:
            rig.request(AP_CREATION, 1 << 32 | kind, gpa, rax=1)
            cpu.ghcb = GHCB_GPA
            yield VmgExit(GHCB_GPA)
            yield Halt()

    rig = Rig(script, vcpus=2)
    rig.enter(0)
    results = []
    thread = threading.Thread(target=lambda: results.append(rig.enter(1)))
    thread.start()
    thread.join(2 * GRACE_SECONDS)
    assert thread.is_alive()
    rig.enter(0)
    thread.join(10)
    assert (results, rig.runs[1].exit_reason) == ([OK], lib.KVM_EXIT_HLT)
    assert rig.machine.cpus[1].vmsa == STATE


# With the APIC in the kernel


def test_ap_that_nobody_started_waits():
    rig = Rig(nothing, vcpus=2, split=True)
    assert interrupted(rig, 1)
    assert rig.runs[1].exit_reason == lib.KVM_EXIT_INTR


@pytest.mark.parametrize(("profile", "started"), [("7.0", False), ("direct-vmsa", True)])
def test_ap_that_nobody_started_runs_once_created_where_the_kernel_looks(profile, started):
    """Mainline gives up KVM_RUN with EAGAIN over and over, and the vCPU stays as it is."""
    rig = creating((1 << 32 | CREATE, VMSA_GPA, 1), profile=profile, split=True)
    assert mp_state(rig, 1) == lib.KVM_MP_STATE_UNINITIALIZED
    assert interrupted(rig, 0)
    assert rig.error == (0, 0)
    assert rig.enter(1) == (-1, errno.EAGAIN)
    if not started:
        assert rig.enter(1) == (-1, errno.EAGAIN)
        assert mp_state(rig, 1) == lib.KVM_MP_STATE_UNINITIALIZED
        return
    assert mp_state(rig, 1) == lib.KVM_MP_STATE_RUNNABLE
    assert interrupted(rig, 1)
    assert mp_state(rig, 1) == lib.KVM_MP_STATE_HALTED
    assert rig.machine.cpus[1].vmsa == STATE


def test_ap_that_nobody_started_waits_on_for_an_init_after_create_on_init():
    rig = creating((1 << 32 | CREATE_ON_INIT, VMSA_GPA, 1), profile="direct-vmsa", split=True)
    assert interrupted(rig, 0)
    assert rig.error == (0, 0)
    assert interrupted(rig, 1)
    assert mp_state(rig, 1) == lib.KVM_MP_STATE_UNINITIALIZED


def test_ap_that_got_its_sipi_runs():
    rig = Rig(nothing, vcpus=2, split=True)
    set_mp_state(rig, 1, lib.KVM_MP_STATE_SIPI_RECEIVED)
    assert interrupted(rig, 1)
    assert rig.machine.cpus[0].loads == 1
    assert mp_state(rig, 1) == lib.KVM_MP_STATE_HALTED


def test_halted_vcpu_waits_and_an_nmi_wakes_it():
    rig = Rig(nothing, split=True)
    assert interrupted(rig, 0)
    rig.guest.ok(rig.guest.ioctl(rig.vcpus[0], lib.KVM_NMI))
    assert interrupted(rig, 0)
    assert rig.machine.cpus[0].injected == [("nmi", 2, None)]


@pytest.mark.parametrize("event", [False, True])
def test_reset_hold_in_the_kernel_ends_with_a_sipi(event):
    """INIT and SIPI by user space; the first SIPI of a vCPU starts what the launch set up."""

    def by_msr(cpu):
        cpu.ghcb = 0x006
        yield VmgExit(0x006)
        rig.answer = cpu.ghcb

    def by_event(cpu):
        yield from register_ghcb(cpu)
        rig.request(0x80000004)
        yield VmgExit(GHCB_GPA)
        rig.answer = rig.error

    script = by_event if event else by_msr
    rig = Rig(script, vcpus=2, split=True)
    set_mp_state(rig, 1, lib.KVM_MP_STATE_SIPI_RECEIVED)
    assert interrupted(rig, 1)
    assert mp_state(rig, 1) == lib.KVM_MP_STATE_AP_RESET_HOLD
    set_mp_state(rig, 1, lib.KVM_MP_STATE_SIPI_RECEIVED)
    assert interrupted(rig, 1)
    assert rig.answer == ((0, 1) if event else 1 << 12 | 7)


def nothing(cpu):
    yield from ()


def interrupted(rig, index):
    """KVM_RUN of a vCPU that blocks; True if it came back with EINTR when it was told to."""
    run = rig.runs[index]
    timer = threading.Timer(3 * GRACE_SECONDS, lambda: setattr(run, "immediate_exit", 1))
    timer.start()
    result = rig.enter(index)
    timer.join()
    run.immediate_exit = 0
    return result == (-1, errno.EINTR)


def mp_state(rig, index):
    state = ffi.new("struct kvm_mp_state *")
    rig.guest.ok(rig.guest.ioctl(rig.vcpus[index], lib.KVM_GET_MP_STATE, state))
    return state.mp_state


def set_mp_state(rig, index, value):
    state = ffi.new("struct kvm_mp_state *", [value])
    rig.guest.ok(rig.guest.ioctl(rig.vcpus[index], lib.KVM_SET_MP_STATE, state))


# Several VMPLs, which mainline KVM doesn't have

RUN_VMPL = 0x80000018


def with_vmpl1(then):
    """VMPL1 gets a VMSA on the same vCPU, is run, and does ``then``; VMPL0 halts afterwards."""

    def script(cpu):
        yield from register_ghcb(cpu)
        make_vmsa(rig, state=STATE.replace(vmpl=1))
        rig.request(AP_CREATION, 1 << 16 | CREATE, VMSA_GPA, rax=1)
        cpu.ghcb = GHCB_GPA
        yield VmgExit(GHCB_GPA)
        rig.created = rig.error
        rig.request(RUN_VMPL, 1)
        yield VmgExit(GHCB_GPA)
        yield from then(rig, cpu)

    rig = Rig(script, profile="multi-vmpl")
    return rig


def test_vmpl_when_run_has_its_vmsa_and_a_ghcb_msr_of_its_own():
    def then(rig, cpu):
        rig.seen = (cpu.vmsa.vmpl, cpu.vmsa.rip, cpu.ghcb & 0xFFF)
        yield from ()

    rig = with_vmpl1(then)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert (rig.created, rig.seen) == ((0, 0), (1, 0x1234, 1))


def test_vmpl_when_it_gives_way_lets_the_other_go_on_where_it_was():
    def then(rig, cpu):
        cpu.ghcb = 0xAB << 40 | 0x016  # RUN_VMPL of the MSR protocol, VMPL0 in bits 39:32
        yield VmgExit(cpu.ghcb)
        rig.seen = (cpu.vmsa.vmpl, cpu.ghcb)

    rig = with_vmpl1(then)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert rig.seen == (0, GHCB_GPA)


@pytest.mark.parametrize("vmpl", [1, 4, 1 << 40])
def test_vmpl_without_a_vmsa_is_refused(vmpl):
    def script(cpu):
        yield from register_ghcb(cpu)
        rig.request(RUN_VMPL, vmpl)
        cpu.ghcb = GHCB_GPA
        yield VmgExit(GHCB_GPA)

    rig = Rig(script, profile="multi-vmpl")
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert rig.error == REFUSED


def test_vmpl_without_a_vmsa_is_an_error_of_the_msr_protocol():
    def script(cpu):
        cpu.ghcb = 1 << 32 | 0x016
        yield VmgExit(cpu.ghcb)
        rig.answer = cpu.ghcb

    rig = Rig(script, profile="multi-vmpl")
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert (rig.answer & 0xFFFFFFFF, rig.answer >> 32 != 0) == (0x017, True)


def test_page_that_a_vmpl_may_not_use_is_a_memory_fault():
    def script(cpu):
        yield NestedFault(VMSA_GPA + 8, Access.WRITE, True, FaultReason.VMPL)

    rig = Rig(script, profile="multi-vmpl")
    assert rig.enter() == (-1, errno.EFAULT)
    fault = rig.run.memory_fault
    assert (rig.run.exit_reason, fault.gpa, fault.size, fault.flags) == (
        lib.KVM_EXIT_MEMORY_FAULT,
        VMSA_GPA,
        PAGE,
        lib.KVM_MEMORY_EXIT_FLAG_PRIVATE,
    )
