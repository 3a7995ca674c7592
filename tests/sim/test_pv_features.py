"""KVM's own MSRs and hypercalls, and KVM_CAP_ENFORCE_PV_FEATURE_CPUID (x86.c, cpuid.c)."""

from __future__ import annotations

import struct as packing

import pytest

from kvmlaunch.uapi import ffi, lib
from tests.host import require_simulated_cpu

from .driver import PAGE, Memory, struct
from .one_vcpu import EINVAL, OK, Machine
from .plain_vm import Vm
from .test_tsc import get_msr, msr_entry

SIGNATURE = packing.unpack("<3I", b"KVMKVMKVM\0\0\0")
# asm/kvm_para.h
WALL_CLOCK, SYSTEM_TIME, ASYNC_PF_EN, STEAL_TIME, PV_EOI = range(0x4B564D00, 0x4B564D05)
POLL, ASYNC_PF_INT, ASYNC_PF_ACK, MIGRATION = range(0x4B564D05, 0x4B564D09)
FEATURES = {0x11: 0, 0x12: 0, WALL_CLOCK: 3, SYSTEM_TIME: 3, ASYNC_PF_EN: 4, STEAL_TIME: 5}
FEATURES |= {PV_EOI: 6, POLL: 12, ASYNC_PF_INT: 14, ASYNC_PF_ACK: 14}
GPA = 0x1000
KICK_CPU, SCHED_YIELD = 5, 11
KVM_ENOSYS = 1000


@pytest.fixture
def machine():
    with require_simulated_cpu() as platform:
        yield with_memory(Machine(platform))


@pytest.fixture
def split():
    """The same with a local APIC."""
    with require_simulated_cpu() as platform:
        yield with_memory(Machine(platform, split=True))


def with_memory(machine: Machine) -> Machine:
    """The same with two pages at 0, where structures of KVM's can be."""
    machine.ram = Memory(2 * PAGE)
    size = {"memory_size": 2 * PAGE, "userspace_addr": machine.ram.address}
    region = struct("kvm_userspace_memory_region", **size)
    machine.ok(machine.ioctl(machine.vm, lib.KVM_SET_USER_MEMORY_REGION, region))
    return machine


def guest(code: str, features: int, *, base: int = 0x40000000, enforce: bool = True) -> Vm:
    """32-bit code of a guest whose CPUID has these features of KVM's."""
    vm = Vm(bytes.fromhex(code + "f4"), code32=True)
    vm.call = lambda name, args: vm.ioctl(vm.vcpu, getattr(lib, name), args)
    cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_ENFORCE_PV_FEATURE_CPUID)
    cap.args[0] = enforce
    vm.ok(vm.call("KVM_ENABLE_CAP", cap))
    vm.ok(
        Machine.set_cpuid(
            vm, (base, 0, 0, base + 1, *SIGNATURE), (base + 1, 0, 0, features, 0, 0, 0)
        )
    )
    return vm


def set_msr(vm, index, value):
    keep, header = msr_entry(index, value)
    answer = vm.ioctl(vm.vcpu, lib.KVM_SET_MSRS, header)
    del keep
    return answer.ret


@pytest.mark.parametrize("msr", FEATURES)
@pytest.mark.parametrize("code", ["0f32", "0f30"])
def test_msr_of_a_feature_that_cpuid_lacks_is_a_fault(msr, code):
    for features, reason in ((0, lib.KVM_EXIT_SHUTDOWN), (1 << FEATURES[msr], lib.KVM_EXIT_HLT)):
        vm = guest(code, features)
        vm.set_regs(rcx=msr, rax=0, rdx=0)
        if msr == ASYNC_PF_INT and code == "0f30" and features:
            reason = lib.KVM_EXIT_SHUTDOWN  # needs an APIC in the kernel
        assert vm.enter()[1] == reason


def test_msr_of_a_missing_feature_works_where_cpuid_is_not_enforced():
    vm = guest("0f32", 0, enforce=False)
    vm.set_regs(rcx=POLL)
    assert vm.enter()[1] == lib.KVM_EXIT_HLT
    assert vm.regs.rax == 1  # POLL_CONTROL at reset


def test_features_are_found_behind_another_hypervisors_leaves():
    vm = guest("0f32", 1 << 12, base=0x40000100)
    vm.set_regs(rcx=POLL)
    assert vm.enter()[1] == lib.KVM_EXIT_HLT


def test_user_space_reads_an_msr_of_a_missing_feature_as_0_and_writes_no_other():
    vm = guest("", 0)
    assert get_msr(vm, POLL) == 0
    assert (set_msr(vm, POLL, 0), set_msr(vm, POLL, 1)) == (1, 0)


@pytest.mark.parametrize(
    ("msr", "value", "taken"),
    [
        (STEAL_TIME, GPA | 1, 1),
        (STEAL_TIME, GPA | 3, 0),
        (STEAL_TIME, GPA | 0x3E, 0),
        (POLL, 1, 1),
        (POLL, 2, 0),
        (PV_EOI, GPA | 1, 1),
        (PV_EOI, GPA | 2, 0),
        (PV_EOI, GPA + PAGE | 1, 0),  # no memory
        (PV_EOI, GPA + PAGE, 1),  # off
        (ASYNC_PF_INT, 0xFF, 1),
        (ASYNC_PF_INT, 0x100, 0),
        (ASYNC_PF_EN, GPA | 1, 1),
        (ASYNC_PF_EN, GPA | 5, 1),
        (ASYNC_PF_EN, GPA | 9, 1),
        (ASYNC_PF_EN, GPA | 0xB, 1),
        (ASYNC_PF_EN, GPA | 0x11, 0),
        (ASYNC_PF_EN, GPA | 0x21, 0),
        (ASYNC_PF_EN, GPA + PAGE | 1, 1),  # not by interrupt, so not on
        (MIGRATION, 1, 0),  # user space's
    ],
)
def test_value_of_an_own_msr(split, msr, value, taken):
    assert set_msr(split, msr, value) == taken
    if taken:
        assert get_msr(split, msr) == value


@pytest.mark.parametrize(
    ("msr", "value", "kept"),
    [
        (WALL_CLOCK, GPA, True),
        (SYSTEM_TIME, GPA | 1, False),
        (ASYNC_PF_EN, GPA | 9, False),
        (ASYNC_PF_INT, 0x30, False),
        (STEAL_TIME, GPA | 1, False),
        (PV_EOI, GPA | 1, False),
        (POLL, 0, True),
    ],
)
def test_own_msr_after_init_is_cleared_or_kept(split, msr, value, kept):
    """kvm_vcpu_reset(), kvmclock_reset(), kvm_lapic_reset()."""
    assert set_msr(split, msr, value) == 1
    split.platform._host.fds.get(split.vcpu).vcpu.init_pending = True
    split.get(split.vcpu, lib.KVM_GET_MP_STATE)
    assert get_msr(split, msr) == (value if kept else 0)


def test_async_page_faults_without_memory_are_refused_but_kept(split):
    assert set_msr(split, ASYNC_PF_EN, GPA + PAGE | 9) == 0
    assert get_msr(split, ASYNC_PF_EN) == GPA + PAGE | 9


def test_async_page_faults_without_an_apic_stay_off(machine):
    assert set_msr(machine, ASYNC_PF_EN, 0) == 1
    assert [set_msr(machine, ASYNC_PF_EN, value) for value in (2, GPA | 1)] == [0, 0]
    assert [set_msr(machine, ASYNC_PF_INT, value) for value in (0, 0x30)] == [0, 0]


def test_acknowledgement_reads_as_0(machine):
    assert set_msr(machine, ASYNC_PF_ACK, 1) == 1
    assert get_msr(machine, ASYNC_PF_ACK) == 0


def test_clocks_that_are_set_by_one_number_are_read_by_the_other(machine):
    other = machine.ok(machine.ioctl(machine.vm, lib.KVM_CREATE_VCPU, 1))
    for old, new in ((0x11, WALL_CLOCK), (0x12, SYSTEM_TIME)):
        assert set_msr(machine, old, 0x5001) == 1
        assert get_msr(machine, new) == 0x5001
        assert set_msr(machine, new, 0x6001) == 1
        assert get_msr(machine, old) == 0x6001
    # The wall clock is the VM's, the time a vCPU's.
    assert (get_msr(machine, 0x11, other), get_msr(machine, 0x12, other)) == (0x6001, 0)


@pytest.mark.parametrize(("number", "feature"), [(KICK_CPU, 7), (SCHED_YIELD, 13), (10, 11)])
def test_hypercall_of_a_missing_feature_is_unknown(number, feature):
    answers = []
    for features in (0, 1 << feature):
        vm = guest("0f01d9", features)
        vm.set_regs(rax=number)
        vm.enter()
        answers.append(vm.regs.rax)
    assert answers[0] == -KVM_ENOSYS & 0xFFFFFFFF
    assert answers[1] != answers[0]


@pytest.mark.parametrize("changes", [{"flags": 1}, {"cap": 3}], ids=["flags", "another capability"])
def test_vcpu_capability_that_is_none_is_einval(machine, changes):
    cap = struct("kvm_enable_cap", **{"cap": lib.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, **changes})
    assert machine.call("KVM_ENABLE_CAP", cap) == EINVAL


def disable_exits(machine, exits):
    cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_X86_DISABLE_EXITS)
    cap.args[0] = exits
    return machine.ioctl(machine.vm, lib.KVM_ENABLE_CAP, cap)


def test_pv_unhalt_is_not_for_guests_that_halt_by_themselves(machine):
    """kvm_pv_test: KVM clears the feature, in its own leaves only."""
    assert disable_exits(machine, 1 << 1) == OK
    features = (0x40000001, 0, 0, 0x80, 0, 0, 0)
    for signature, expected in ((SIGNATURE, 0), ((1, 2, 3), 0x80)):
        machine.ok(machine.set_cpuid((0x40000000, 0, 0, 0x40000001, *signature), features))
        keep = ffi.new("char[]", 8 + 40 * 2)
        table = ffi.cast("struct kvm_cpuid2 *", keep)
        table.nent = 2
        assert machine.call("KVM_GET_CPUID2", table) == OK
        assert table.entries[1].eax == expected


def test_disabled_exits_must_be_known(machine):
    assert disable_exits(machine, 1 << 4) == EINVAL
    assert machine.ioctl(machine.vm, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_X86_DISABLE_EXITS) == (
        0xF,
        0,
    )
