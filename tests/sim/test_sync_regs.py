"""Registers by struct kvm_run (KVM_CAP_SYNC_REGS), and events on their way to the guest."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import ffi, lib
from tests.host import require_simulated_cpu

from .driver import struct
from .one_vcpu import EINVAL, Machine
from .plain_vm import CODE, Vm

OK = (0, 0)
REGS, SREGS, EVENTS = 1, 2, 4


@pytest.fixture
def machine():
    with require_simulated_cpu() as platform:
        yield Machine(platform)


def events_of(vm):
    return vm.get(vm.vcpu, lib.KVM_GET_VCPU_EVENTS)


def with_handler(code: str, vector: int) -> Vm:
    """A guest in real mode whose handler of that vector, at 0x2000, is a HLT."""
    vm = Vm(bytes.fromhex(code))
    vm.ram.write(b"\xf4", 0x2000)
    vm.ram.write((0x2000).to_bytes(4, "little"), 4 * vector)
    vm.set_regs(rsp=0x3000)
    return vm


def test_valid_registers_are_there_after_the_run():
    vm = Vm(bytes.fromhex("b83412 e460"))  # mov ax, 0x1234; in al, 0x60
    vm.run.kvm_valid_regs = REGS | SREGS | EVENTS
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    synced = vm.run.s.regs
    assert (synced.regs.rax, synced.regs.rip) == (0x1234, CODE + 3)
    assert bytes(ffi.buffer(ffi.addressof(synced.regs))) == bytes(ffi.buffer(vm.regs))
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    assert synced.sregs.apic_base == sregs.apic_base != 0
    assert bytes(ffi.buffer(ffi.addressof(synced.events))) == bytes(ffi.buffer(events_of(vm)))


def test_valid_registers_are_there_although_the_run_was_interrupted():
    vm = Vm(b"\xf4")
    vm.set_regs(rbx=0x77)
    vm.run.immediate_exit, vm.run.kvm_valid_regs = 1, REGS
    assert vm.enter()[0] == (-1, errno.EINTR)
    assert vm.run.s.regs.regs.rbx == 0x77


def test_registers_that_nobody_asked_for_stay_as_they_are():
    vm = Vm(b"\xf4")
    vm.run.s.regs.regs.rbx = 0xAAAA
    vm.enter()
    assert (vm.run.s.regs.regs.rbx, vm.regs.rbx) == (0xAAAA, 0)


def test_dirty_registers_are_taken_once():
    vm = Vm(bytes.fromhex("43 f4 43 f4"))  # inc bx; hlt; inc bx; hlt
    regs = vm.regs
    regs.rbx = 0x10
    vm.run.s.regs.regs = regs[0]
    vm.run.kvm_dirty_regs = REGS
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rbx, vm.run.kvm_dirty_regs) == (0x11, 0)
    vm.enter()
    assert vm.regs.rbx == 0x12


def test_dirty_registers_when_sregs_are_impossible_are_einval_and_stay_dirty():
    vm = Vm(b"\xf4")
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    sregs.cr0 |= 1 << 31  # paging without protection
    vm.run.s.regs.regs = vm.regs[0]
    vm.run.s.regs.regs.rbx = 5
    vm.run.s.regs.sregs = sregs[0]
    vm.run.kvm_dirty_regs = REGS | SREGS | EVENTS
    assert vm.enter()[0] == EINVAL
    assert vm.run.kvm_dirty_regs == SREGS | EVENTS
    assert vm.regs.rbx == 5


def test_dirty_events_when_exception_cannot_be_are_einval():
    vm = Vm(b"\xf4")
    events = vm.run.s.regs.events
    events.exception.injected, events.exception.nr = 1, 255
    vm.run.kvm_dirty_regs = EVENTS
    assert vm.enter()[0] == EINVAL
    assert vm.run.kvm_dirty_regs == EVENTS


def test_injected_exception_reaches_the_guest():
    vm = with_handler("40 f4", 6)
    events = struct("kvm_vcpu_events")
    events.exception.injected, events.exception.nr = 1, 6
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_VCPU_EVENTS, events))
    assert events_of(vm).exception.nr == 6
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rip, vm.regs.rax) == (0x2001, 0)
    assert vm.ram.read(2, 0x2FFA) == CODE.to_bytes(2, "little")
    assert not events_of(vm).exception.injected


def test_pending_exception_without_payload_is_dropped():
    vm = with_handler("40 f4", 6)
    events = struct("kvm_vcpu_events")
    events.exception.pending, events.exception.nr = 1, 6
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_VCPU_EVENTS, events))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rax == 1


def test_pending_nmi_reaches_the_guest_and_blocks_the_next():
    vm = with_handler("40 f4", 2)
    events = struct("kvm_vcpu_events", flags=lib.KVM_VCPUEVENT_VALID_NMI_PENDING)
    events.nmi.pending = 1
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_VCPU_EVENTS, events))
    assert (events_of(vm).nmi.pending, events_of(vm).nmi.masked) == (1, 0)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rip == 0x2001
    assert (events_of(vm).nmi.pending, events_of(vm).nmi.masked) == (0, 1)


def test_masked_nmi_waits_although_registers_are_set():
    vm = with_handler("40 f4", 2)
    events = struct("kvm_vcpu_events", flags=lib.KVM_VCPUEVENT_VALID_NMI_PENDING)
    events.nmi.pending = events.nmi.masked = 1
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_VCPU_EVENTS, events))
    vm.set_regs(rbx=1)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rip, events_of(vm).nmi.masked) == (CODE + 2, 1)


@pytest.mark.parametrize(
    ("pending", "injected", "masked", "waiting"),
    [(255, 0, 0, 2), (255, 0, 1, 1), (255, 255, 0, 2), (0, 255, 1, 1), (1, 0, 0, 1)],
)
def test_no_more_than_two_nmis_wait(machine, pending, injected, masked, waiting):
    """process_nmi(); the injected one counts as waiting here."""
    events = struct("kvm_vcpu_events", flags=lib.KVM_VCPUEVENT_VALID_NMI_PENDING)
    events.nmi.pending, events.nmi.injected, events.nmi.masked = pending, injected, masked
    assert machine.call("KVM_SET_VCPU_EVENTS", events) == OK
    assert events_of(machine).nmi.pending == waiting


def test_injected_nmis_do_not_add_up(machine):
    events = struct("kvm_vcpu_events")
    events.nmi.injected = 255
    for _ in range(3):
        assert machine.call("KVM_SET_VCPU_EVENTS", events) == OK
    assert events_of(machine).nmi.pending == 2


def test_one_nmi_waits_while_the_guest_handles_another():
    vm = with_handler("40 f4", 2)
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_NMI))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    for _ in range(3):
        vm.ok(vm.ioctl(vm.vcpu, lib.KVM_NMI))
    assert (events_of(vm).nmi.masked, events_of(vm).nmi.pending) == (1, 1)


def test_interrupt_shadow_that_is_set_delays_interrupts():
    vm = Vm(b"\xf4")
    vm.set_regs(rflags=0x202)
    events = struct("kvm_vcpu_events", flags=lib.KVM_VCPUEVENT_VALID_SHADOW)
    vm.run.immediate_exit = 1
    for shadow, ready in ((1, 0), (0, 1)):
        events.interrupt.shadow = shadow
        vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_VCPU_EVENTS, events))
        vm.enter()
        assert (vm.run.if_flag, vm.run.ready_for_interrupt_injection) == (1, ready)


def test_sipi_vector_is_a_byte():
    """kvm_vcpu_deliver_sipi_vector() takes no more of it."""
    with require_simulated_cpu() as platform:
        machine = Machine(platform, split=True)
        events = struct("kvm_vcpu_events", flags=lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR)
        events.sipi_vector = 0x12345678
        assert machine.call("KVM_SET_VCPU_EVENTS", events) == OK
        state = struct("kvm_mp_state", mp_state=lib.KVM_MP_STATE_SIPI_RECEIVED)
        assert machine.call("KVM_SET_MP_STATE", state) == OK
        machine.get(machine.vcpu, lib.KVM_GET_MP_STATE)
        cs = machine.get(machine.vcpu, lib.KVM_GET_SREGS).cs
        assert (cs.selector, cs.base) == (0x7800, 0x78000)


def test_interrupt_shadow_survives_registers_that_are_set():
    vm = Vm(bytes.fromhex("fb e460 f4"))  # sti; in al, 0x60: the shadow covers it
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    vm.set_regs(rbx=1)
    assert events_of(vm).interrupt.shadow == 3
    events = struct("kvm_vcpu_events", flags=lib.KVM_VCPUEVENT_VALID_SHADOW)
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_VCPU_EVENTS, events))
    assert events_of(vm).interrupt.shadow == 0


def test_queued_interrupt_is_reported(machine):
    assert machine.call("KVM_INTERRUPT", struct("kvm_interrupt", irq=0x30)) == OK
    interrupt = machine.get(machine.vcpu, lib.KVM_GET_VCPU_EVENTS).interrupt
    assert (interrupt.injected, interrupt.nr) == (1, 0x30)


def test_smm_events_of_a_vcpu_after_init_are_einval():
    with require_simulated_cpu() as platform:
        machine = Machine(platform, split=True)
        state = struct("kvm_mp_state", mp_state=lib.KVM_MP_STATE_INIT_RECEIVED)
        assert machine.call("KVM_SET_MP_STATE", state) == OK
        events = struct("kvm_vcpu_events", flags=lib.KVM_VCPUEVENT_VALID_SMM)
        events.smi.pending = 1
        assert machine.call("KVM_SET_VCPU_EVENTS", events) == EINVAL
