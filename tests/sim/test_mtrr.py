"""The memory type range registers, which KVM keeps (mtrr.c)."""

from __future__ import annotations

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import Guest, simulated
from .one_vcpu import Machine
from .test_mce import get, put

CAP, BASE, MASK, FIXED, DEFAULT = 0xFE, 0x200, 0x201, 0x250, 0x2FF
C_BIT = 1 << 51


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
        for value, taken in ((1 << 47 | 6, 1), (C_BIT | 6, 0)):
            words = ffi.new("uint64_t[]", [1, BASE, value])
            assert guest.ioctl(vcpu, lib.KVM_SET_MSRS, words) == (taken, 0)
