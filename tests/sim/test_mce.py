"""KVM_X86_SETUP_MCE and the machine check registers (x86.c: set_msr_mce(), get_msr_mce())."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import ffi, lib

from .one_vcpu import Machine
from .plain_vm import Vm

OK = (0, 0)
ONES = (1 << 64) - 1
CTL_P, SER_P, CMCI_P = 1 << 8, 1 << 24, 1 << 10  # asm/mce.h
CAP, STATUS, CTL, MC0_CTL, MC0_CTL2 = 0x179, 0x17A, 0x17B, 0x400, 0x280
MC0_STATUS, HWCR, STATUS_WRITES = 0x401, 0xC0010015, 1 << 18
HLT, FAULT = (OK, lib.KVM_EXIT_HLT), (OK, lib.KVM_EXIT_SHUTDOWN)  # without a handler #GP is the end


def setup(machine: Machine, cap: int) -> tuple[int, int]:
    return tuple(machine.call("KVM_X86_SETUP_MCE", ffi.new("uint64_t *", cap)))


def access(machine: Machine, name: str, index: int, value: int = 0) -> tuple[int, int]:
    """How many MSRs were done, and the value afterwards."""
    words = ffi.new("uint64_t[]", [1, index, value])
    return machine.ok(machine.call(name, words)), words[2]


def get(machine: Machine, index: int) -> int | None:
    done, value = access(machine, "KVM_GET_MSRS", index)
    return value if done else None


def put(machine: Machine, index: int, value: int) -> bool:
    return bool(access(machine, "KVM_SET_MSRS", index, value)[0])


def test_supported_mce_cap_when_asked_is_what_amd_hosts_have(machine: Machine) -> None:
    value = ffi.new("uint64_t *")
    request = lib.KVM_X86_GET_MCE_CAP_SUPPORTED
    assert tuple(machine.ioctl(machine.kvm, request, value)) == OK
    assert value[0] == CTL_P | SER_P
    assert tuple(machine.ioctl(machine.kvm, request, 8)) == (-1, errno.EFAULT)


@pytest.mark.parametrize(
    ("cap", "code"),
    [
        (0, errno.EINVAL),
        (CTL_P, errno.EINVAL),  # no banks
        (33, errno.EINVAL),
        (32 | CMCI_P, errno.EINVAL),
        (32 | 1 << 63, errno.EINVAL),
        (1, 0),
        (32 | CTL_P | SER_P, 0),
        (10 | 0xFF0000, 0),
    ],
)
def test_setup_mce_when_the_host_lacks_it_is_einval(machine: Machine, cap: int, code: int) -> None:
    before = get(machine, CAP)
    assert setup(machine, cap) == ((-1, code) if code else OK)
    assert get(machine, CAP) == (before if code else cap)


def test_setup_mce_when_memory_is_unreadable_is_efault(machine: Machine) -> None:
    assert tuple(machine.call("KVM_X86_SETUP_MCE", 8)) == (-1, errno.EFAULT)


def test_registers_when_the_vcpu_is_new_are_zero_in_32_banks(machine: Machine) -> None:
    assert get(machine, CAP) == 32  # KVM_MAX_MCE_BANKS
    assert [get(machine, index) for index in (STATUS, CTL, 0, 1)] == [0, 0, 0, 0]
    assert {get(machine, MC0_CTL + n) for n in range(32 * 4)} == {0}
    assert get(machine, MC0_CTL + 32 * 4) is None


def test_registers_when_set_up_are_on(machine: Machine) -> None:
    assert setup(machine, 2 | CTL_P) == OK
    assert get(machine, CTL) == ONES
    assert [get(machine, MC0_CTL + n) for n in range(9)] == [ONES, 0, 0, 0, ONES, 0, 0, 0, None]
    assert [get(machine, MC0_CTL2 + n) for n in range(3)] == [0, 0, None]
    assert setup(machine, 1) == OK  # what is there stays
    assert get(machine, CTL) == ONES


@pytest.mark.parametrize(
    ("index", "value", "taken"),
    [
        (CAP, 0, False),
        (0, 0, False),
        (STATUS, 7, True),
        (CTL, 0, True),
        (CTL, ONES, True),
        (CTL, 1, False),
        (MC0_CTL, 0, True),
        (MC0_CTL, ONES, True),
        (MC0_CTL, ONES ^ 1 << 10 ^ 1, True),
        (MC0_CTL, 1, False),
        (MC0_STATUS, 1 << 63, True),
        (MC0_CTL + 2, 5, True),
        (MC0_CTL2, 0, True),
        (MC0_CTL2, 1, False),
        (MC0_CTL + 8, 0, False),  # of a third bank
        (MC0_CTL2 + 2, 0, False),
    ],
)
def test_user_space_when_it_sets_a_register_keeps_to_its_values(
    machine: Machine, index: int, value: int, taken: bool
) -> None:
    assert setup(machine, 2 | CTL_P) == OK
    before = get(machine, index)
    assert put(machine, index, value) is taken
    assert get(machine, index) == (value if taken else before)


def test_user_space_when_there_is_no_control_register_may_only_clear_it(machine: Machine) -> None:
    assert setup(machine, 2) == OK
    assert put(machine, CTL, 0)
    assert not put(machine, CTL, ONES)


@pytest.mark.parametrize(
    ("cap", "index", "expected"),
    [
        (2 | CTL_P, CTL, HLT),
        (2, CTL, FAULT),
        (2, CAP, HLT),
        (2, STATUS, HLT),
        (2, 0x0, HLT),
        (2, MC0_STATUS, HLT),
        (2, MC0_CTL + 8, FAULT),
        (2, MC0_CTL2, FAULT),
    ],
)
def test_guest_when_it_reads_what_its_cpu_lacks_gets_gp(
    cap: int, index: int, expected: tuple[tuple[int, int], int]
) -> None:
    vm = Vm(bytes.fromhex("0f32 f4"), code32=True)  # rdmsr; hlt
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_X86_SETUP_MCE, ffi.new("uint64_t *", cap)))
    vm.set_regs(rcx=index)
    assert vm.enter() == expected


@pytest.mark.parametrize(
    ("cap", "index", "value", "expected"),
    [
        (2 | CTL_P, CTL, 0, HLT),
        (2, CTL, 0, FAULT),
        (2, MC0_STATUS, 0, HLT),
        (2, MC0_STATUS, 1, FAULT),
        (2, MC0_STATUS + 4, 1, FAULT),
        (2, MC0_CTL + 2, 1, HLT),
        (2, MC0_CTL2, 0, FAULT),
        (2, CAP, 0, FAULT),
    ],
)
def test_guest_when_it_writes_what_user_space_may_gets_gp(
    cap: int, index: int, value: int, expected: tuple[tuple[int, int], int]
) -> None:
    vm = Vm(bytes.fromhex("0f30 f4"), code32=True)  # wrmsr; hlt
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_X86_SETUP_MCE, ffi.new("uint64_t *", cap)))
    vm.set_regs(rcx=index, rax=value, rdx=0)
    assert vm.enter() == expected


# AMD 24593 (APM volume 2), 9.3: HWCR[McStatusWrEn] lets software write MCi_STATUS.
@pytest.mark.parametrize(
    ("amd", "hwcr", "expected"),
    [(True, STATUS_WRITES, HLT), (True, 0, FAULT), (False, STATUS_WRITES, FAULT)],
)
def test_guest_when_hwcr_allows_it_makes_up_an_error(
    amd: bool, hwcr: int, expected: tuple[tuple[int, int], int]
) -> None:
    vm = Vm(bytes.fromhex("0f30 f4"), code32=True)
    table = ffi.new("char[]", 8 + 40)
    header = ffi.cast("struct kvm_cpuid2 *", table)
    header.nent = 1
    entry = header.entries[0]
    if amd:
        entry.ebx, entry.edx, entry.ecx = 0x68747541, 0x69746E65, 0x444D4163
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_CPUID2, table))
    words = ffi.new("uint64_t[]", [1, HWCR, hwcr])
    assert vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_MSRS, words)) == 1
    vm.set_regs(rcx=MC0_STATUS, rax=1, rdx=0)
    assert vm.enter() == expected
