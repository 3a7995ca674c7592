"""The dirty log, and slots that a guest can't write to (virt/kvm/kvm_main.c)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import address_of, ffi, lib

from .driver import PAGE, Guest, Memory, simulated, struct
from .plain_vm import CODE, Vm
from .test_plain_run import OK

LOG, RO = lib.KVM_MEM_LOG_DIRTY_PAGES, lib.KVM_MEM_READONLY
EINVAL = (-1, errno.EINVAL)
ENOENT = (-1, errno.ENOENT)
EFAULT = (-1, errno.EFAULT)
PAGES = 16
# mov byte [0x3000], 1; mov al, [0x4000]; mov byte [0x5fff], 2; hlt
WRITES = bytes.fromhex("c606003001 a00040 c606ff5f02 f4")


class Logged(Vm):
    """A plain VM whose code runs again and again, on 16 pages that are logged."""

    def __init__(self, code: bytes = WRITES, flags: int = LOG) -> None:
        super().__init__(code)
        self.bitmap = ffi.new("uint64_t[]", 2)
        self.ok(self.set_flags(flags))

    def set_flags(self, flags, **fields):
        region = struct(
            "kvm_userspace_memory_region",
            **{
                "flags": flags,
                "memory_size": PAGES * PAGE,
                "userspace_addr": self.ram.address,
                **fields,
            },
        )
        return self.ioctl(self.vm, lib.KVM_SET_USER_MEMORY_REGION, region)

    def again(self):
        self.set_regs(rip=CODE)
        assert self.enter() == (OK, lib.KVM_EXIT_HLT)

    def get_log(self, slot=0, bitmap=None):
        at = address_of(self.bitmap) if bitmap is None else bitmap
        log = struct("kvm_dirty_log", slot=slot, dirty_bitmap=at)
        return tuple(self.ioctl(self.vm, lib.KVM_GET_DIRTY_LOG, log))

    def clear_log(self, first=0, count=PAGES, bits=0, slot=0, bitmap=None):
        words = ffi.new("uint64_t[]", [bits, 0])
        at = address_of(words) if bitmap is None else bitmap
        log = struct(
            "kvm_clear_dirty_log", slot=slot, first_page=first, num_pages=count, dirty_bitmap=at
        )
        return tuple(self.ioctl(self.vm, lib.KVM_CLEAR_DIRTY_LOG, log))

    @property
    def dirty(self):
        """Pages that the log has now."""
        self.bitmap[0] = self.bitmap[1] = 1 << 63
        assert self.get_log() == OK
        assert self.bitmap[1] == 1 << 63, "one word is enough for 16 pages"
        return {page for page in range(64) if self.bitmap[0] >> page & 1}

    def manual(self, options=lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE):
        cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
        cap.args[0] = options
        return tuple(self.ioctl(self.vm, lib.KVM_ENABLE_CAP, cap))


def test_log_has_the_pages_that_the_guest_wrote():
    vm = Logged()
    assert vm.dirty == set()
    vm.again()
    assert vm.dirty == {3, 5}


def test_log_begins_anew_when_it_was_read():
    vm = Logged()
    vm.again()
    assert vm.dirty == {3, 5}
    assert vm.dirty == set()
    vm.again()
    assert vm.dirty == {3, 5}, "the pages are write-protected again"


@pytest.mark.parametrize("by_hand", [False, True])
def test_log_begins_anew_for_a_guest_that_goes_on(by_hand):
    # mov byte [0x3000], 1; hlt; mov byte [0x3000], 2; hlt
    vm = Logged(bytes.fromhex("c606003001 f4 c606003002 f4"))
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_RUN))
    if by_hand:
        assert vm.manual() == OK
    assert vm.dirty == {3}
    if by_hand:
        assert vm.clear_log(bits=1 << 3) == OK
    assert vm.dirty == set()
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_RUN))
    assert vm.dirty == {3}


def run_with_clock(vm, gpa):
    """Let KVM write the time there as it enters."""
    words = ffi.new("uint64_t[]", [1, 0x12, gpa | 1])  # MSR_KVM_SYSTEM_TIME
    assert vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_MSRS, words)) == 1
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)


def test_log_has_what_kvm_writes_itself():
    vm = Logged(b"\xf4")
    run_with_clock(vm, 0x6000)
    assert vm.dirty == {6}
    assert vm.ram.read(32, 0x6000) != bytes(32)


def test_log_tells_a_write_to_a_page_that_was_only_read_before():
    # mov al, [0x3000]; hlt; mov byte [0x3000], 1; hlt
    vm = Logged(bytes.fromhex("a00030 f4 c606003001 f4"))
    vm.again()
    assert vm.dirty == set()
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.dirty == {3}


def test_log_of_a_slot_that_has_none_is_enoent():
    vm = Logged(flags=0)
    assert vm.get_log() == ENOENT
    assert vm.clear_log() == ENOENT
    assert vm.get_log(slot=7) == ENOENT
    vm.ok(vm.set_flags(LOG))
    assert vm.get_log() == OK
    vm.ok(vm.set_flags(0))
    assert vm.get_log() == ENOENT


@pytest.mark.parametrize("slot", [32764, 0xFFFF, 2 << 16])
def test_log_of_a_number_that_is_no_slot_is_einval(slot):
    vm = Logged()
    assert vm.get_log(slot) == EINVAL
    assert vm.clear_log(slot=slot) == EINVAL


def test_second_address_space_is_plain_only():
    with simulated() as platform:
        guest = Guest(platform)
        log = struct("kvm_dirty_log", slot=1 << 16)
        assert guest.ioctl(guest.vm, lib.KVM_GET_DIRTY_LOG, log) == EINVAL
    assert Logged().get_log(slot=1 << 16) == ENOENT


def test_log_goes_on_when_its_slot_moves_and_when_it_is_set_again():
    vm = Logged()
    vm.again()
    vm.ok(vm.set_flags(LOG))
    vm.ok(vm.set_flags(LOG, guest_phys_addr=0x100000))
    assert vm.dirty == {3, 5}


def test_log_that_cannot_be_copied_is_efault_and_lost():
    vm = Logged()
    vm.again()
    assert vm.get_log(bitmap=8) == EFAULT
    assert vm.dirty == set()


def test_log_by_hand_is_kept_until_it_is_cleared():
    vm = Logged()
    assert vm.manual() == OK
    vm.again()
    assert vm.dirty == {3, 5}
    assert vm.clear_log(bits=1 << 3 | 1 << 4) == OK
    assert vm.dirty == {5}
    vm.again()
    assert vm.dirty == {3, 5}


def test_log_by_hand_may_begin_with_all_pages():
    vm = Logged(flags=0)
    assert vm.manual(3) == OK
    vm.ok(vm.set_flags(LOG))
    assert vm.dirty == set(range(PAGES))


@pytest.mark.parametrize(
    ("options", "expected"), [(0, OK), (1, OK), (3, OK), (2, EINVAL), (5, EINVAL)]
)
def test_options_of_the_log_by_hand(options, expected):
    assert Logged().manual(options) == expected


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [
        (0, 16, OK),
        (0, 0, OK),
        (1, 15, EINVAL),
        (64, 0, EINVAL),
        (0, 17, EINVAL),
        (0, 8, EINVAL),  # part of a word, not at the end of the slot
    ],
)
def test_range_of_a_clear(first, count, expected):
    assert Logged().clear_log(first, count) == expected


def test_clear_with_bits_that_cannot_be_read_is_efault():
    assert Logged().clear_log(bitmap=8) == EFAULT


def test_page_of_a_log_that_user_space_writes_stays_clean():
    vm = Logged()
    vm.ram.write(b"x", 0x7000)
    assert vm.dirty == set()


# Read-only slots


def read_only_page(vm):
    """One page at 0x10000."""
    rom = Memory(PAGE)
    region = struct(
        "kvm_userspace_memory_region",
        slot=1,
        flags=RO,
        guest_phys_addr=0x10000,
        memory_size=PAGE,
        userspace_addr=rom.address,
    )
    vm.ok(vm.ioctl(vm.vm, lib.KVM_SET_USER_MEMORY_REGION, region))
    return rom


def test_write_of_kvm_to_a_read_only_slot_is_not_done():
    vm = Vm(b"\xf4")
    rom = read_only_page(vm)
    run_with_clock(vm, 0x10000)
    assert rom.read() == bytes(PAGE)


def test_write_to_a_read_only_slot_exits_and_changes_nothing():
    # mov ax, 0x1000; mov ds, ax; mov al, [8]; mov byte [8], 0x55; mov bl, [8]; hlt
    vm = Vm(bytes.fromhex("b80010 8ed8 a00800 c606080055 8a1e0800 f4"))
    rom = read_only_page(vm)
    rom.write(b"\xab", 8)
    assert vm.enter() == (OK, lib.KVM_EXIT_MMIO)
    mmio = vm.run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write, mmio.data[0]) == (0x10008, 1, 1, 0x55)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax & 0xFF, vm.regs.rbx & 0xFF) == (0xAB, 0xAB)
    assert rom.read(1, 8) == b"\xab"
