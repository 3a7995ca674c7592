"""Device accesses by instructions that KVM doesn't emulate (x86.c: handle_emulation_failure())."""

from __future__ import annotations

import pytest

from kvmlaunch.uapi import lib

from .driver import struct
from .one_vcpu import EINVAL
from .plain_vm import CODE, Vm

OK = (0, 0)
DEVICE = 0x54000
FLDS = "d900"  # fld dword [eax]


def guest(code: str, *, always: int) -> Vm:
    vm = Vm(bytes.fromhex(code + "f4"), code32=True)
    cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
    cap.args[0] = always
    vm.ok(vm.ioctl(vm.vm, lib.KVM_ENABLE_CAP, cap))
    vm.set_regs(rax=DEVICE)
    return vm


@pytest.mark.parametrize("code", [FLDS, "dd00", "66d900", "df28"])
def test_failure_tells_what_was_fetched(code):
    vm = guest(code, always=1)
    assert vm.enter() == (OK, lib.KVM_EXIT_INTERNAL_ERROR)
    failure = vm.run.emulation_failure
    fetched = bytes.fromhex(code + "f4").ljust(15, b"\0")
    assert (failure.suberror, failure.flags) == (1, 1)
    assert (failure.ndata, failure.insn_size) == (8, 15)
    assert bytes(failure.insn_bytes) == fetched
    assert (vm.run.internal.data[3], vm.run.internal.data[5]) == (0x400, DEVICE)


def test_failure_that_user_space_skips_is_over():
    vm = guest(FLDS, always=1)
    vm.enter()
    vm.set_regs(rip=CODE + 2)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)


def test_failure_that_user_space_ignores_comes_again():
    vm = guest(FLDS, always=1)
    assert [vm.enter()[1] for _ in range(2)] == [lib.KVM_EXIT_INTERNAL_ERROR] * 2


def test_failure_in_the_guests_kernel_exits_and_is_an_undefined_opcode():
    vm = guest(FLDS, always=0)
    assert vm.enter() == (OK, lib.KVM_EXIT_INTERNAL_ERROR)
    events = vm.get(vm.vcpu, lib.KVM_GET_VCPU_EVENTS)
    assert (events.exception.injected, events.exception.nr) == (1, 6)
    assert vm.enter() == (OK, lib.KVM_EXIT_SHUTDOWN)  # without an IDT


def test_failure_in_the_guests_user_space_is_only_an_undefined_opcode():
    vm = guest(FLDS, always=0)
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    for name in ("cs", "ds", "es", "ss"):
        getattr(sregs, name).dpl, getattr(sregs, name).selector = 3, 3
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, sregs))
    assert vm.enter() == (OK, lib.KVM_EXIT_SHUTDOWN)  # without an IDT


@pytest.mark.parametrize("code", ["d938", "dd38", "8b00"])
def test_instruction_that_kvm_knows_reaches_the_device(code):
    assert guest(code, always=1).enter() == (OK, lib.KVM_EXIT_MMIO)


def test_capability_takes_0_and_1():
    vm = Vm(b"\xf4")
    cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
    cap.args[0] = 2
    assert vm.ioctl(vm.vm, lib.KVM_ENABLE_CAP, cap) == EINVAL
