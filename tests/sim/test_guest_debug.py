"""KVM_SET_GUEST_DEBUG on a plain guest (x86.c, svm.c; the selftest debug_regs)."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from kvmlaunch.uapi import lib

from .driver import struct
from .plain_vm import CODE, Vm

OK = (0, 0)
DB, BP = 1, 3
ENABLE, STEP, SOFTWARE, HARDWARE = 1, 2, 0x10000, 0x20000
INJECT_DB, INJECT_BP, BLOCK_IRQ = 0x40000, 0x80000, 0x100000
DR6 = 0xFFFF0FF0


def set_debug(vm, control, dr7=0x400, **registers):
    debug = struct("kvm_guest_debug", control=control)
    debug.arch.debugreg[7] = dr7
    for name, value in registers.items():
        debug.arch.debugreg[int(name[2:])] = value
    return vm.ioctl(vm.vcpu, lib.KVM_SET_GUEST_DEBUG, debug)


def stopped(vm):
    """Exception, place and DR6 of the debug exit that comes next."""
    assert vm.enter() == (OK, lib.KVM_EXIT_DEBUG)
    arch = vm.run.debug.arch
    return arch.exception, arch.pc, arch.dr6


def test_software_breakpoint_exits_at_the_int3():
    vm = Vm(bytes.fromhex("90 cc f4"))
    assert set_debug(vm, ENABLE | SOFTWARE) == OK
    assert stopped(vm)[:2] == (BP, CODE + 1)
    vm.set_regs(rip=CODE + 2)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)


def test_hardware_breakpoint_says_which_one_and_dr7():
    vm = Vm(bytes.fromhex("90 90 f4"))
    set_debug(vm, ENABLE | HARDWARE, dr7=0x400 | 1 << 5, db2=CODE + 1)
    assert stopped(vm) == (DB, CODE + 1, DR6 | 1 << 2)
    assert vm.run.debug.arch.dr7 == 0x400 | 1 << 5


def test_watched_data_exits_behind_the_store():
    vm = Vm(bytes.fromhex("a20050 f4"))  # mov [0x5000], al
    set_debug(vm, ENABLE | HARDWARE, dr7=0x400 | 2 | 0x10000, db0=0x5000)
    assert stopped(vm) == (DB, CODE + 3, DR6 | 1)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)


def test_single_steps_go_through_what_kvm_emulates():
    vm = Vm(bytes.fromhex("40 0fa2 b91b000000 0f32 43 f4"), code32=True)  # inc; cpuid; mov; rdmsr
    set_debug(vm, ENABLE | STEP)
    steps = [stopped(vm) for _ in range(5)]
    lengths = (1, 3, 8, 10, 11)
    assert steps == [(DB, CODE + length, DR6 | 1 << 14) for length in lengths]
    assert not vm.regs.rflags & 1 << 8


def test_single_step_of_an_instruction_that_user_space_completes_comes_after_it():
    vm = Vm(bytes.fromhex("e460 e660 f4"))  # in al, 0x60; out 0x60, al
    set_debug(vm, ENABLE | STEP)
    for behind in (CODE + 2, CODE + 4):
        assert vm.enter() == (OK, lib.KVM_EXIT_IO)
        assert stopped(vm) == (DB, behind, DR6 | 1 << 14)


def test_debug_that_is_not_enabled_is_off():
    vm = Vm(bytes.fromhex("90 cc f4"))
    set_debug(vm, ENABLE | STEP)
    stopped(vm)
    set_debug(vm, STEP | SOFTWARE)
    vm.ram.write(b"\xf4", 0x2000)
    vm.ram.write((0x2000).to_bytes(4, "little"), 4 * 3)  # the guest's own handler of INT3
    vm.set_regs(rsp=0x3000)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rip == 0x2001


@pytest.mark.parametrize(("control", "vector"), [(INJECT_DB, 1), (INJECT_BP, 3)])
def test_exception_for_the_guest_is_injected_once(control, vector):
    vm = Vm(b"\xf4")
    assert set_debug(vm, control) == OK
    events = vm.get(vm.vcpu, lib.KVM_GET_VCPU_EVENTS)
    assert (events.exception.injected, events.exception.nr) == (1, vector)
    assert set_debug(vm, control) == (-1, errno.EBUSY)


@pytest.mark.parametrize(("block", "rip"), [(BLOCK_IRQ, CODE + 1), (0, 0x2001)])
def test_interrupt_waits_while_they_are_blocked(block, rip):
    vm = Vm(bytes.fromhex("90 90 f4"))
    vm.ram.write(b"\x90\xf4", 0x2000)
    vm.ram.write((0x2000).to_bytes(4, "little"), 4 * 0x30)
    vm.set_regs(rflags=0x202, rsp=0x3000)
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_INTERRUPT, struct("kvm_interrupt", irq=0x30)))
    set_debug(vm, ENABLE | STEP | block)
    assert stopped(vm)[1] == rip


def test_capability_names_every_bit():
    vm = Vm(b"\xf4")
    bits = ENABLE | STEP | SOFTWARE | HARDWARE | INJECT_DB | INJECT_BP | BLOCK_IRQ
    assert vm.ioctl(vm.vm, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_SET_GUEST_DEBUG2) == (bits, 0)


def test_debug_of_one_vcpu_is_set_while_another_one_runs():
    """The CPUs share an engine, which must not be touched then."""
    vm = Vm(bytes.fromhex("ff060030 ebfa"))  # inc word [0x3000]; again
    other = vm.ok(vm.ioctl(vm.vm, lib.KVM_CREATE_VCPU, 1))
    thread = threading.Thread(target=vm.enter)
    thread.start()
    while not any(vm.ram.read(2, 0x3000)):
        time.sleep(0.001)
    for _ in range(200):
        debug = struct("kvm_guest_debug", control=ENABLE | HARDWARE)
        debug.arch.debugreg[0], debug.arch.debugreg[7] = CODE, 0x402
        assert vm.ioctl(other, lib.KVM_SET_GUEST_DEBUG, debug) == OK
    vm.run.immediate_exit = 1
    thread.join()
    assert vm.run.exit_reason == lib.KVM_EXIT_INTR
