"""TSC, TSC_ADJUST and the TSC offset (x86.c: kvm_synchronize_tsc(), kvm_set_msr_common())."""

from __future__ import annotations

import pytest

from kvmlaunch.uapi import ffi, lib
from tests.host import require_simulated_cpu

from .driver import struct
from .one_vcpu import Machine
from .plain_vm import Vm

TSC, TSC_ADJUST = 0x10, 0x3B
STEP = 1 << 30
"""Far more than a test executes."""


@pytest.fixture
def machine():
    with require_simulated_cpu() as platform:
        yield Machine(platform)


def msr_entry(index, value=0):
    keep = ffi.new("char[]", 8 + 16)
    header = ffi.cast("struct kvm_msrs *", keep)
    header.nmsrs, header.entries[0].index, header.entries[0].data = 1, index, value
    return keep, header


def get_msr(vm, index, vcpu=None):
    keep, header = msr_entry(index)
    assert vm.ioctl(vm.vcpu if vcpu is None else vcpu, lib.KVM_GET_MSRS, header) == (1, 0)
    return int(ffi.cast("struct kvm_msrs *", keep).entries[0].data)


def set_msr(vm, index, value, vcpu=None):
    keep, header = msr_entry(index, value)
    assert vm.ioctl(vm.vcpu if vcpu is None else vcpu, lib.KVM_SET_MSRS, header) == (1, 0)
    del keep


def with_tsc_adjust(vm):
    """CPUID leaf 7 with TSC_ADJUST (EBX bit 1)."""
    Machine.set_cpuid(vm, (7, 0, 1, 0, 2, 0, 0))


def guest(code: str) -> Vm:
    vm = Vm(bytes.fromhex(code + "f4"), code32=True)
    vm.call = lambda name, args: vm.ioctl(vm.vcpu, getattr(lib, name), args)
    with_tsc_adjust(vm)
    return vm


def rounded(value):
    return (value + STEP // 2) // STEP


def test_guest_that_writes_its_tsc_sees_that_in_tsc_adjust():
    vm = guest("0f30 0f31 89c6 89d7 b93b000000 0f32")  # wrmsr; rdtsc; esi, edi; rdmsr 0x3b
    vm.set_regs(rcx=TSC, rax=0, rdx=5)
    vm.enter()
    assert rounded(vm.regs.rdi << 32 | vm.regs.rsi) == 20
    assert rounded(vm.regs.rdx << 32 | vm.regs.rax) == 20
    assert rounded(get_msr(vm, TSC)) == rounded(get_msr(vm, TSC_ADJUST)) == 20


def test_guest_that_writes_tsc_adjust_moves_its_tsc():
    vm = guest("0f30 0f31")
    vm.set_regs(rcx=TSC_ADJUST, rax=0, rdx=2)
    vm.enter()
    assert rounded(vm.regs.rdx << 32 | vm.regs.rax) == 8


def test_guest_without_the_feature_writes_tsc_adjust_in_vain():
    vm = Vm(bytes.fromhex("0f30 0f31 f4"), code32=True)
    vm.set_regs(rcx=TSC_ADJUST, rax=0, rdx=2)
    assert vm.enter()[1] == lib.KVM_EXIT_HLT
    assert (vm.regs.rdx, get_msr(vm, TSC_ADJUST)) == (0, 0)


def test_user_space_that_writes_the_tsc_leaves_tsc_adjust_alone(machine):
    with_tsc_adjust(machine)
    set_msr(machine, TSC, 64 * STEP)
    assert (rounded(get_msr(machine, TSC)), get_msr(machine, TSC_ADJUST)) == (64, 0)
    set_msr(machine, TSC_ADJUST, 7 * STEP)
    assert (rounded(get_msr(machine, TSC)), get_msr(machine, TSC_ADJUST)) == (64, 7 * STEP)


def test_tsc_offset_attribute_is_what_the_guest_is_ahead():
    vm = guest("0f31")
    attr = struct("kvm_device_attr", group=lib.KVM_VCPU_TSC_CTRL, attr=lib.KVM_VCPU_TSC_OFFSET)
    offset = ffi.new("uint64_t *", 9 * STEP)
    attr.addr = int(ffi.cast("uintptr_t", offset))
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_DEVICE_ATTR, attr))
    vm.enter()
    assert rounded(vm.regs.rdx << 32 | vm.regs.rax) == 9
    offset[0] = 0
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_GET_DEVICE_ATTR, attr))
    assert offset[0] == 9 * STEP


def test_second_vcpu_gets_the_tsc_of_the_first(machine):
    set_msr(machine, TSC, 64 * STEP)
    other = machine.ok(machine.ioctl(machine.vm, lib.KVM_CREATE_VCPU, 1))
    assert rounded(get_msr(machine, TSC, other)) == 64


@pytest.mark.parametrize(("ahead", "matched"), [(1000, True), (1 << 40, False)])
def test_second_write_close_to_the_first_means_the_same(machine, ahead, matched):
    other = machine.ok(machine.ioctl(machine.vm, lib.KVM_CREATE_VCPU, 1))
    set_msr(machine, TSC, 1 << 42)
    set_msr(machine, TSC, (1 << 42) + ahead, other)
    difference = get_msr(machine, TSC, other) - get_msr(machine, TSC)
    assert difference == (0 if matched else ahead)


@pytest.mark.parametrize(("ahead", "matched"), [(1000, True), (1 << 40, False)])
def test_write_close_to_a_negative_offset_means_the_same(ahead, matched):
    vm = Vm(bytes.fromhex("b9a00f 49 75fd f4"))  # mov cx, 4000; dec cx; jnz: the TSC goes on
    other = vm.ok(vm.ioctl(vm.vm, lib.KVM_CREATE_VCPU, 1))
    vm.enter()
    offset = ffi.new("uint64_t *", (1 << 64) - 500)
    attr = struct("kvm_device_attr", group=lib.KVM_VCPU_TSC_CTRL, attr=lib.KVM_VCPU_TSC_OFFSET)
    attr.addr = int(ffi.cast("uintptr_t", offset))
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_DEVICE_ATTR, attr))
    now = get_msr(vm, TSC)
    set_msr(vm, TSC, now + ahead, other)
    assert get_msr(vm, TSC, other) == now + (0 if matched else ahead)


def test_first_write_is_taken_as_it_is_although_it_is_small(machine):
    """The second of slop holds between writes of user space only."""
    set_msr(machine, TSC, 1000)
    assert get_msr(machine, TSC) == 1000
