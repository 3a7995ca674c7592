"""kvmclock: KVM_GET_CLOCK, KVM_SET_CLOCK, and the page that a guest reads (x86.c)."""

from __future__ import annotations

import errno
import time
from struct import unpack

import pytest

from kvmlaunch.uapi import lib

from .driver import struct
from .plain_vm import CODE, Vm
from .test_plain_run import OK
from .test_tsc import set_msr

SYSTEM_TIME, SYSTEM_TIME_NEW = 0x12, 0x4B564D01
PAGE_AT = 0x3000
SECOND = 1_000_000_000
FLAGS = 2 | 4 | 8  # KVM_CLOCK_TSC_STABLE, ..._REALTIME, ..._HOST_TSC


class Clocked(Vm):
    """A plain VM that halts."""

    def __init__(self) -> None:
        super().__init__(b"\xf4")

    def again(self):
        self.set_regs(rip=CODE)
        assert self.enter() == (OK, lib.KVM_EXIT_HLT)

    @property
    def page(self):
        """version, TSC, time, multiplier, shift, flags."""
        return unpack("<I4xQQIbB2x", self.ram.read(32, PAGE_AT))


def set_clock(driver, vm, **fields):
    return tuple(driver.ioctl(vm, lib.KVM_SET_CLOCK, struct("kvm_clock_data", **fields)))


def get_clock(driver, vm):
    return driver.get(vm, lib.KVM_GET_CLOCK)


def test_capability_has_every_flag(driver, vm):
    assert driver.ioctl(vm, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_ADJUST_CLOCK) == (FLAGS, 0)


def test_clock_that_was_set_is_what_get_tells(driver, vm):
    assert get_clock(driver, vm).clock == 0
    assert set_clock(driver, vm, clock=180 * SECOND) == OK
    clock = get_clock(driver, vm)
    assert (clock.clock, clock.flags) == (180 * SECOND, FLAGS)
    assert abs(clock.realtime - time.time_ns()) < 60 * SECOND


def test_clock_goes_on_since_the_time_that_it_was_taken_at(driver, vm):
    before = time.time_ns()
    assert set_clock(driver, vm, clock=5, flags=4, realtime=before - 10 * SECOND) == OK
    assert 10 * SECOND + 5 <= get_clock(driver, vm).clock < 70 * SECOND
    assert set_clock(driver, vm, clock=5, flags=4, realtime=before + 1000 * SECOND) == OK
    assert get_clock(driver, vm).clock == 5, "not backwards"


@pytest.mark.parametrize(("flags", "expected"), [(FLAGS, OK), (1, (-1, 22)), (16, (-1, 22))])
def test_flags_of_set_clock(driver, vm, flags, expected):
    assert set_clock(driver, vm, flags=flags, realtime=1 << 63) == expected


def test_clock_null_is_efault(driver, vm):
    assert driver.ioctl(vm, lib.KVM_SET_CLOCK, 0) == (-1, errno.EFAULT)
    assert driver.ioctl(vm, lib.KVM_GET_CLOCK, 0) == (-1, errno.EFAULT)


@pytest.mark.parametrize("index", [SYSTEM_TIME, SYSTEM_TIME_NEW])
@pytest.mark.parametrize("khz", [2_450_000, 1_000_000, 10_000_000, 500])
def test_page_makes_nanoseconds_of_the_tsc(index, khz):
    vm = Clocked()
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_TSC_KHZ, khz))
    set_msr(vm, index, PAGE_AT | 1)
    vm.again()
    version, _, _, multiplier, shift, flags = vm.page
    assert (version, flags) == (2, 1)
    ticks = khz * 1000
    # pvclock_scale_delta() of asm/pvclock.h, for the ticks of a second.
    scaled = ticks << shift if shift >= 0 else ticks >> -shift
    assert scaled * multiplier >> 32 == pytest.approx(SECOND, rel=1e-6)


def test_page_is_written_anew_where_the_clock_was_set():
    vm = Clocked()
    set_msr(vm, SYSTEM_TIME_NEW, PAGE_AT | 1)
    vm.again()
    first = vm.page
    vm.again()
    assert vm.page == first
    vm.ok(vm.ioctl(vm.vm, lib.KVM_SET_CLOCK, struct("kvm_clock_data", clock=180 * SECOND)))
    vm.again()
    assert vm.page[0] == 4
    assert vm.page[2] == 180 * SECOND
    assert vm.page[1] > first[1]


def test_page_keeps_that_the_guest_was_stopped_and_an_odd_version_becomes_even():
    vm = Clocked()
    vm.ram.write(b"\x07", PAGE_AT)
    vm.ram.write(b"\xff", PAGE_AT + 29)
    set_msr(vm, SYSTEM_TIME_NEW, PAGE_AT | 1)
    vm.again()
    assert (vm.page[0], vm.page[5]) == (10, 3)


@pytest.mark.parametrize("value", [PAGE_AT, 0x3FF0 | 1, 0x40000000 | 1, 0])
def test_no_page_is_written_where_none_is_asked_for_or_can_be(value):
    vm = Clocked()
    before = vm.ram.read(0x2000, PAGE_AT)
    set_msr(vm, SYSTEM_TIME_NEW, value)
    vm.again()
    assert vm.ram.read(0x2000, PAGE_AT) == before


def test_page_that_is_asked_for_again_is_written_again():
    vm = Clocked()
    for expected in (2, 4):
        set_msr(vm, SYSTEM_TIME_NEW, PAGE_AT | 1)
        vm.again()
        assert vm.page[0] == expected
        set_msr(vm, SYSTEM_TIME_NEW, 0)
        vm.again()
