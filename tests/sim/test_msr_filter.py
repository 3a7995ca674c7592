"""KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR: who serves an MSR, and who is asked."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import ffi, lib
from tests.host import require_simulated_cpu

from .driver import struct
from .one_vcpu import EINVAL, Machine
from .plain_vm import CODE, Vm

OK = (0, 0)
READ, WRITE = 1, 2
INVAL, UNKNOWN, FILTER = 1, 2, 4
STAR, GS_BASE, PAT, NOBODYS = 0xC0000081, 0xC0000101, 0x277, 0xDEADBEEF
RDMSR, WRMSR, HLT = "0f32", "0f30", "f4"


def filtered(vm, base, bitmap, *, flags=READ | WRITE, default=0, nmsrs=None):
    """KVM_X86_SET_MSR_FILTER with one range."""
    bits = ffi.new("uint8_t[]", bitmap)
    given = struct("kvm_msr_filter", flags=default)
    part = given.ranges[3]
    part.flags, part.base, part.bitmap = flags, base, bits
    part.nmsrs = 8 * len(bitmap) if nmsrs is None else nmsrs
    return tuple(vm.ioctl(vm.vm, lib.KVM_X86_SET_MSR_FILTER, given))


def exits_for(vm, reasons):
    cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_X86_USER_SPACE_MSR)
    cap.args[0] = reasons
    vm.ok(vm.ioctl(vm.vm, lib.KVM_ENABLE_CAP, cap))


def guest(code: str, msr: int) -> Vm:
    """32-bit code with the MSR in ECX; a handler of #GP is not there, so that shuts down."""
    vm = Vm(bytes.fromhex(code + HLT), code32=True)
    vm.set_regs(rcx=msr, rax=0x33, rdx=0x44)
    return vm


@pytest.fixture
def machine():
    with require_simulated_cpu() as platform:
        yield Machine(platform)


@pytest.mark.parametrize("msr", [STAR, GS_BASE, PAT, NOBODYS])
def test_filtered_read_asks_user_space(msr):
    vm = guest(RDMSR, msr)
    exits_for(vm, FILTER)
    assert filtered(vm, msr, bytes(8)) == OK
    assert vm.enter() == (OK, lib.KVM_EXIT_X86_RDMSR)
    exit_ = vm.run.msr
    assert (exit_.index, exit_.reason, exit_.data, exit_.error) == (msr, FILTER, 0, 0)
    exit_.data = 0x1122334455667788
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, vm.regs.rdx, vm.regs.rip) == (0x55667788, 0x11223344, CODE + 3)


def test_filtered_write_asks_user_space_and_is_not_done():
    vm = guest(WRMSR + RDMSR, STAR)
    exits_for(vm, FILTER)
    assert filtered(vm, STAR, bytes(8), flags=WRITE) == OK
    assert vm.enter() == (OK, lib.KVM_EXIT_X86_WRMSR)
    assert (vm.run.msr.index, vm.run.msr.data) == (STAR, 0x44 << 32 | 0x33)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, vm.regs.rdx) == (0, 0)


@pytest.mark.parametrize(("code", "reason"), [(RDMSR, "RDMSR"), (WRMSR, "WRMSR")])
def test_msr_that_user_space_refuses_is_a_fault(code, reason):
    vm = guest(code, NOBODYS)
    exits_for(vm, UNKNOWN)
    assert vm.enter() == (OK, getattr(lib, f"KVM_EXIT_X86_{reason}"))
    assert vm.run.msr.reason == UNKNOWN
    vm.run.msr.error = 1
    assert vm.enter() == (OK, lib.KVM_EXIT_SHUTDOWN)


def test_write_of_an_impossible_value_has_its_own_reason():
    vm = guest(WRMSR, 0x1D9)  # DEBUGCTL
    vm.set_regs(rax=1 << 20, rdx=0)
    exits_for(vm, INVAL)
    assert vm.enter() == (OK, lib.KVM_EXIT_X86_WRMSR)
    assert vm.run.msr.reason == INVAL


@pytest.mark.parametrize("reasons", [0, INVAL | UNKNOWN])
def test_filtered_msr_is_a_fault_where_user_space_does_not_want_it(reasons):
    vm = guest(RDMSR, STAR)
    exits_for(vm, reasons)
    filtered(vm, STAR, bytes(8))
    assert vm.enter() == (OK, lib.KVM_EXIT_SHUTDOWN)


def test_filter_lets_through_what_its_bitmap_has():
    vm = guest(WRMSR + RDMSR, GS_BASE)
    vm.set_regs(rax=0x1000, rdx=0)
    exits_for(vm, FILTER)
    assert filtered(vm, 0xC0000100, b"\2" + bytes(7), default=1, nmsrs=2) == OK
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rax == 0x1000
    assert vm.get(vm.vcpu, lib.KVM_GET_SREGS).gs.base == 0x1000


def test_filter_that_denies_by_default_has_what_no_range_names():
    vm = guest(RDMSR, PAT)
    exits_for(vm, FILTER)
    assert filtered(vm, STAR, bytes(8), default=1) == OK
    assert vm.enter() == (OK, lib.KVM_EXIT_X86_RDMSR)


def test_filter_without_ranges_ends_the_former_one():
    vm = guest(RDMSR, STAR)
    exits_for(vm, FILTER)
    filtered(vm, STAR, bytes(8))
    assert vm.enter()[1] == lib.KVM_EXIT_X86_RDMSR
    vm.ok(vm.ioctl(vm.vm, lib.KVM_X86_SET_MSR_FILTER, struct("kvm_msr_filter")))
    vm.set_regs(rip=CODE, rax=7)
    vm.run.msr.data = 9
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rax == 9  # the answer that was under way


def test_filter_does_not_hold_for_user_space(machine):
    assert filtered(machine, STAR, bytes(8)) == OK
    keep = ffi.new("char[]", 8 + 16)
    header = ffi.cast("struct kvm_msrs *", keep)
    header.nmsrs, header.entries[0].index = 1, STAR
    assert machine.call("KVM_GET_MSRS", header) == (1, 0)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"flags": 0}, EINVAL),
        ({"flags": 4}, EINVAL),
        ({"default": 2}, EINVAL),
        ({"nmsrs": 8 * 0x600 + 1}, EINVAL),
        ({"nmsrs": 0, "flags": 4}, OK),
        ({"nmsrs": 0, "default": 1}, EINVAL),
    ],
)
def test_filter_with_bad_flags_or_sizes_is_einval(machine, options, answer):
    assert filtered(machine, STAR, bytes(8), **options) == answer


def test_filter_with_a_wild_bitmap_is_efault(machine):
    given = struct("kvm_msr_filter")
    part = given.ranges[0]
    part.flags, part.nmsrs, part.bitmap = READ, 1, ffi.cast("uint8_t *", 8)
    answer = machine.ioctl(machine.vm, lib.KVM_X86_SET_MSR_FILTER, given)
    assert answer == (-1, errno.EFAULT)
