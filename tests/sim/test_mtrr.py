"""The memory type range registers (mtrr.c) and KVM's own MSRs, which KVM keeps."""

from __future__ import annotations

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Guest, Memory, simulated, struct
from .one_vcpu import Machine

CAP, BASE, MASK, FIXED, DEFAULT = 0xFE, 0x200, 0x201, 0x250, 0x2FF
C_BIT = 1 << 51
# asm/kvm_para.h
WALL_CLOCK, SYSTEM_TIME, ASYNC_PF_EN, STEAL_TIME, PV_EOI = range(0x4B564D00, 0x4B564D05)
POLL, ASYNC_PF_INT, ASYNC_PF_ACK, MIGRATION = range(0x4B564D05, 0x4B564D09)
GPA = 0x10000


def access(machine: object, vcpu: int, name: str, index: int, value: int = 0) -> tuple[int, int]:
    words = ffi.new("uint64_t[]", [1, index, value])
    done = machine.ok(machine.ioctl(vcpu, getattr(lib, name), words))  # type: ignore[attr-defined]
    return done, words[2]


def get(machine: Machine, index: int, vcpu: int | None = None) -> int | None:
    fd = machine.vcpu if vcpu is None else vcpu
    done, value = access(machine, fd, "KVM_GET_MSRS", index)
    return value if done else None


def put(machine: Machine, index: int, value: int, vcpu: int | None = None) -> bool:
    fd = machine.vcpu if vcpu is None else vcpu
    return bool(access(machine, fd, "KVM_SET_MSRS", index, value)[0])


def test_mtrr_cap_when_read_has_eight_variable_ranges_and_is_not_written(machine: Machine) -> None:
    assert get(machine, CAP) == 0x508
    assert not put(machine, CAP, 0x508)


@pytest.mark.parametrize(
    ("index", "value", "taken"),
    [
        (DEFAULT, 0xC06, True),
        (DEFAULT, 0x100, False),
        (DEFAULT, 2, False),  # types are 0, 1, 4, 5, 6
        (DEFAULT, 7, False),
        (FIXED, 0x0605040100060504, True),
        (FIXED, 0x0600000000000002, False),
        (0x258, 0x06, True),
        (0x26F, 0x03, False),
        (BASE, 1 << 35 | 6, True),
        (BASE, 1 << 36 | 6, False),  # 36 bits without a CPUID table
        (BASE, 0x106, False),
        (BASE, 2, False),
        (MASK, 0x800, True),
        (MASK, 0x400, False),
        (MASK, 1 << 36, False),
        (0x20F, 0x800, True),
    ],
)
def test_mtrr_when_a_value_is_reserved_is_refused(
    machine: Machine, index: int, value: int, taken: bool
) -> None:
    assert put(machine, index, value) is taken
    assert get(machine, index) == (value if taken else 0)


@pytest.mark.parametrize("index", [0x210, 0x24F, 0x251, 0x25A, 0x267, 0x270])
def test_mtrr_when_it_is_between_the_others_is_none(machine: Machine, index: int) -> None:
    assert get(machine, index) is None
    assert not put(machine, index, 0)


def test_mtrr_when_the_guest_has_a_c_bit_does_not_take_it() -> None:
    """kvm_vcpu_reserved_gpa_bits_raw(), of which SEV doesn't take the C-bit."""
    with simulated() as platform:
        guest = Guest(platform)
        vcpu = guest.add_vcpu()
        table = ffi.new("char[]", 8 + 3 * 40)
        header = ffi.cast("struct kvm_cpuid2 *", table)
        header.nent = 3
        for entry, (function, eax, ebx) in zip(
            header.entries[0:3],
            [(0x80000000, 0x8000001F, 0), (0x80000008, 0x3030, 0), (0x8000001F, 0x1A, 51)],
            strict=True,
        ):
            entry.function, entry.eax, entry.ebx = function, eax, ebx
        guest.ok(guest.ioctl(vcpu, lib.KVM_SET_CPUID2, table))
        assert access(guest, vcpu, "KVM_SET_MSRS", BASE, 1 << 47 | 6) == (1, 1 << 47 | 6)
        assert access(guest, vcpu, "KVM_SET_MSRS", BASE, C_BIT | 6)[0] == 0


# KVM's own MSRs


@pytest.fixture
def split():
    """A VM with local APICs, and RAM at GPA."""
    with simulated() as platform:
        machine = Machine(platform, split=True)
        memory = Memory(2 * PAGE)
        region = struct(
            "kvm_userspace_memory_region",
            guest_phys_addr=GPA,
            memory_size=2 * PAGE,
            userspace_addr=memory.address,
        )
        machine.ok(machine.ioctl(machine.vm, lib.KVM_SET_USER_MEMORY_REGION, region))
        yield machine
        del memory


@pytest.mark.parametrize(
    ("index", "value", "taken"),
    [
        (STEAL_TIME, GPA | 1, True),
        (STEAL_TIME, GPA | 3, False),
        (POLL, 1, True),
        (POLL, 2, False),
        (PV_EOI, GPA | 1, True),
        (PV_EOI, GPA | 2, False),
        (PV_EOI, GPA + 2 * PAGE | 1, False),  # no memory
        (PV_EOI, GPA + 2 * PAGE, True),  # off
        (ASYNC_PF_INT, 0xFF, True),
        (ASYNC_PF_INT, 0x100, False),
        (ASYNC_PF_EN, GPA | 9, True),
        (ASYNC_PF_EN, GPA | 0x10, False),
        (ASYNC_PF_EN, GPA + 2 * PAGE | 1, True),  # not by interrupt, so not on
        (MIGRATION, 1, False),  # user space's
    ],
)
def test_kvms_msr_when_a_value_is_impossible_is_refused(
    split: Machine, index: int, value: int, taken: bool
) -> None:
    assert put(split, index, value) is taken
    if taken:
        assert get(split, index) == value


def test_async_page_faults_when_no_memory_is_there_are_refused_but_kept(split: Machine) -> None:
    assert not put(split, ASYNC_PF_EN, GPA + 2 * PAGE | 9)
    assert get(split, ASYNC_PF_EN) == GPA + 2 * PAGE | 9


def test_async_page_faults_when_there_is_no_local_apic_stay_off(machine: Machine) -> None:
    assert put(machine, ASYNC_PF_EN, 0)
    assert not put(machine, ASYNC_PF_EN, 2)
    assert not put(machine, ASYNC_PF_INT, 0)


def test_acknowledgement_when_written_reads_as_zero(machine: Machine) -> None:
    assert put(machine, ASYNC_PF_ACK, 1)
    assert get(machine, ASYNC_PF_ACK) == 0


def test_clocks_when_set_by_one_number_are_read_by_the_other(machine: Machine) -> None:
    other = machine.ok(machine.ioctl(machine.vm, lib.KVM_CREATE_VCPU, 1))
    for old, new in ((0x11, WALL_CLOCK), (0x12, SYSTEM_TIME)):
        assert put(machine, old, 0x5001)
        assert get(machine, new) == 0x5001
        assert put(machine, new, 0x6001)
        assert get(machine, old) == 0x6001
    # The wall clock is the VM's, the time a vCPU's.
    assert (get(machine, 0x11, other), get(machine, 0x12, other)) == (0x6001, 0)
