"""Guests whose CPUs work on copies of user memory, as they do for supervised programs."""

from __future__ import annotations

import os
import select
import threading
import time

import pytest

from kvmlaunch.sim.uaccess import OwnProcess
from kvmlaunch.uapi import address_of, ffi, lib, peek, poke
from tests.host import require_simulated_cpu

from .driver import PAGE, simulated, struct
from .plain_vm import CODE, Vm
from .test_plain_run import OK


class Copies(OwnProcess):
    """Pages that are pinned are copied; `sync` brings changes of either side to the other."""

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[int, tuple[object, int, bytes]] = {}
        self.due = False

    def pin(self, address: int) -> int:
        if address not in self._pages:
            keep = ffi.new("char[]", 2 * PAGE)
            here = -(-address_of(keep) // PAGE) * PAGE
            poke(here, peek(address, PAGE))
            self._pages[address] = keep, here, peek(address, PAGE)
        return self._pages[address][1]

    def has_copy(self, address: int) -> bool:
        return address in self._pages

    def copied(self, address: int, size: int) -> bytes:
        """What the guest sees at the start of a page."""
        return peek(self._pages[address][1], size)

    def wants_sync(self, *, idle: bool) -> bool:
        return self.due or idle

    def sync(self) -> bool:
        changed, self.due = False, False
        for address, (keep, here, base) in self._pages.items():
            ours, theirs = peek(here, PAGE), peek(address, PAGE)
            if ours != base:
                poke(address, ours)
            elif theirs != base:
                poke(here, theirs)
                changed = True
            self._pages[address] = keep, here, peek(address, PAGE)
        return changed


@pytest.fixture
def user():
    require_simulated_cpu()
    return Copies()


# cmp word [0x3000], 0; je -7; mov word [0x4000], 1; hlt
WAIT = bytes.fromhex("833e003000 74f9 c70600400100 f4")


def test_guest_that_runs_on_sees_what_user_space_writes(user):
    with simulated(user=user) as platform:
        vm = Vm(WAIT, platform=platform)
        results = []
        thread = threading.Thread(target=lambda: results.append(vm.enter()))
        thread.start()
        while not user.has_copy(vm.ram.address + 0x3000):
            time.sleep(0.001)
        vm.ram.write(b"\1", 0x3000)
        time.sleep(0.05)
        assert not results, "nothing told the guest yet"
        user.due = True
        thread.join(10)
        assert results == [(OK, lib.KVM_EXIT_HLT)]
        assert vm.ram.read(1, 0x4000) == b"\1"
        assert vm.regs.rip == CODE + len(WAIT)


# mov word [0x3000], 7; mov al, 1; out 0x10, al; jmp $
KICK = bytes.fromhex("c70600300700 b001 e610 ebfe")


def test_ioeventfd_is_signalled_after_what_the_guest_wrote_before(user):
    event = os.eventfd(0, os.EFD_NONBLOCK)
    with simulated(user=user) as platform:
        vm = Vm(KICK, platform=platform)
        flags = lib.KVM_IOEVENTFD_FLAG_PIO
        args = struct("kvm_ioeventfd", addr=0x10, len=1, fd=event, flags=flags)
        vm.ok(vm.ioctl(vm.vm, lib.KVM_IOEVENTFD, args))
        thread = threading.Thread(target=vm.enter)
        thread.start()
        assert select.select([event], [], [], 10)[0] == [event]
        assert vm.ram.read(2, 0x3000) == b"\7\0"
        vm.run.immediate_exit = 1
        thread.join(10)
        assert not thread.is_alive()
    os.close(event)


# inc dword [0x3000]; jmp to it
COUNT = bytes.fromhex("66ff060030 ebf9")


@pytest.mark.parametrize("by_hand", [False, True])
def test_dirty_log_is_not_ahead_of_what_the_guest_wrote(user, by_hand):
    with simulated(user=user) as platform:
        vm = Vm(COUNT, platform=platform)
        region = struct(
            "kvm_userspace_memory_region",
            flags=lib.KVM_MEM_LOG_DIRTY_PAGES,
            memory_size=16 * PAGE,
            userspace_addr=vm.ram.address,
        )
        vm.ok(vm.ioctl(vm.vm, lib.KVM_SET_USER_MEMORY_REGION, region))
        if by_hand:
            cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
            cap.args[0] = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
            vm.ok(vm.ioctl(vm.vm, lib.KVM_ENABLE_CAP, cap))
        bits = ffi.new("uint64_t[]", 1)
        log = struct("kvm_dirty_log", dirty_bitmap=address_of(bits))
        clear = struct("kvm_clear_dirty_log", num_pages=16, dirty_bitmap=address_of(bits))
        thread = threading.Thread(target=vm.enter)
        thread.start()
        seen = []
        try:
            for _ in range(3):
                end = time.monotonic() + 10
                bits[0] = 0
                while not bits[0] & 1 << 3:
                    assert time.monotonic() < end, "the page isn't write-protected again"
                    time.sleep(0.002)  # calls come first, the guest in between
                    vm.ok(vm.ioctl(vm.vm, lib.KVM_GET_DIRTY_LOG, log))
                before = vm.ram.read(4, 0x3000)
                if by_hand:
                    while user.copied(vm.ram.address + 0x3000, 4) == before:
                        assert time.monotonic() < end, "the guest doesn't run"
                        time.sleep(0.002)
                    vm.ok(vm.ioctl(vm.vm, lib.KVM_CLEAR_DIRTY_LOG, clear))
                    assert vm.ram.read(4, 0x3000) != before, "written between GET and CLEAR"
                seen.append(vm.ram.read(4, 0x3000))
        finally:
            vm.run.immediate_exit = 1
            thread.join(10)
        assert not thread.is_alive()
    assert len(set(seen)) > 1
