"""KVM_IOEVENTFD and KVM_IRQFD (virt/kvm/eventfd.c): every error, signals, and interrupts."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from kvmlaunch.sim.uaccess import Eventfd, OwnProcess
from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Driver, simulated, struct
from .irqchips import add_irqchip, new_vm, route_table
from .plain_vm import Vm
from .scripted import BUFFER, GHCB_GPA, asks

OK = (0, 0)
HLT = (OK, lib.KVM_EXIT_HLT)
MATCH, PIO, OFF = (
    lib.KVM_IOEVENTFD_FLAG_DATAMATCH,
    lib.KVM_IOEVENTFD_FLAG_PIO,
    lib.KVM_IOEVENTFD_FLAG_DEASSIGN,
)
FULL = (1 << 64) - 2
PORT, DEVICE = 0x3F8, 0x300000
SECONDS = 10


def failed(code: int) -> tuple[int, int]:
    return (-1, code)


@pytest.fixture
def event() -> Iterator[int]:
    """An eventfd that nothing waits for when it is read."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def count(event: int) -> int:
    """What was signalled since it was read last."""
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


def ioeventfd(driver: Driver, vm: int, fd: int, **fields: int) -> tuple[int, int]:
    return tuple(driver.ioctl(vm, lib.KVM_IOEVENTFD, struct("kvm_ioeventfd", fd=fd, **fields)))


def irqfd(driver: Driver, vm: int, fd: int, **fields: int) -> tuple[int, int]:
    args = struct("kvm_irqfd", fd=fd & 0xFFFFFFFF, **fields)
    return tuple(driver.ioctl(vm, lib.KVM_IRQFD, args))


def wait_until(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Ioeventfds: what is refused


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"len": 3}, errno.EINVAL),
        ({"len": 16}, errno.EINVAL),
        ({"len": 8, "addr": (1 << 64) - 8}, errno.EINVAL),
        ({"len": 8, "addr": (1 << 64) - 9}, 0),
        ({"flags": 1 << 5, "len": 4}, errno.EINVAL),
        ({"flags": 1 << 4, "len": 4}, 0),  # FAST_MMIO
        ({"flags": 1 << 3, "len": 4}, 0),  # VIRTIO_CCW_NOTIFY
        ({"flags": MATCH}, errno.EINVAL),
        ({"flags": MATCH, "len": 1, "datamatch": 7}, 0),
        ({}, 0),
    ],
)
def test_ioeventfd_when_it_is_impossible_is_einval(
    driver: Driver, event: int, fields: dict[str, int], code: int
) -> None:
    vm = driver.create_vm(0)
    assert ioeventfd(driver, vm, event, **fields) == (failed(code) if code else OK)


def test_ioeventfd_when_memory_is_unreadable_is_efault(driver: Driver) -> None:
    vm = driver.create_vm(0)
    assert tuple(driver.ioctl(vm, lib.KVM_IOEVENTFD, 8)) == failed(errno.EFAULT)
    assert tuple(driver.ioctl(vm, lib.KVM_IRQFD, 8)) == failed(errno.EFAULT)


@pytest.mark.parametrize("flags", [0, OFF])
def test_ioeventfd_when_the_descriptor_is_wrong_keeps_none(driver: Driver, flags: int) -> None:
    vm = driver.create_vm(0)
    before = set(os.listdir("/proc/self/fd"))
    with open("/dev/null", "rb") as other:
        assert ioeventfd(driver, vm, other.fileno(), flags=flags) == failed(errno.EINVAL)
    assert ioeventfd(driver, vm, -1, flags=flags) == failed(errno.EBADF)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"addr": 0x1000, "len": 4}, errno.EEXIST),
        ({"addr": 0x1000, "len": 4, "flags": MATCH}, errno.EEXIST),
        ({"addr": 0x1000}, errno.EEXIST),
        ({"addr": 0x1000, "len": 2}, 0),
        ({"addr": 0x1000, "len": 4, "flags": PIO}, 0),
        ({"addr": 0x2000, "len": 4, "flags": MATCH, "datamatch": 5}, errno.EEXIST),
        ({"addr": 0x2000, "len": 4, "flags": MATCH, "datamatch": 6}, 0),
        ({"addr": 0x2000, "len": 4}, errno.EEXIST),
        ({"addr": 0x3000, "len": 8}, errno.EEXIST),
    ],
)
def test_ioeventfd_when_the_place_is_taken_is_eexist(
    driver: Driver, event: int, fields: dict[str, int], code: int
) -> None:
    vm = driver.create_vm(0)
    assert ioeventfd(driver, vm, event, addr=0x1000, len=4) == OK
    assert ioeventfd(driver, vm, event, addr=0x2000, len=4, flags=MATCH, datamatch=5) == OK
    assert ioeventfd(driver, vm, event, addr=0x3000) == OK
    assert ioeventfd(driver, vm, event, **fields) == (failed(code) if code else OK)


def test_ioeventfd_when_taken_off_must_be_the_same(driver: Driver, event: int) -> None:
    vm, other = driver.create_vm(0), os.eventfd(0)
    place = {"addr": 0x1000, "len": 4}
    assert ioeventfd(driver, vm, event, **place) == OK
    missing = failed(errno.ENOENT)
    assert ioeventfd(driver, vm, other, flags=OFF, **place) == missing
    assert ioeventfd(driver, vm, event, flags=OFF, addr=0x1000, len=2) == missing
    assert ioeventfd(driver, vm, event, flags=OFF | MATCH, **place) == missing
    assert ioeventfd(driver, vm, event, flags=OFF | PIO, **place) == missing
    assert ioeventfd(driver, vm, event, flags=OFF, **place) == OK
    assert ioeventfd(driver, vm, event, flags=OFF, **place) == missing
    os.close(other)


# Ioeventfds: what a guest's writes do


def test_out_when_an_ioeventfd_is_there_signals_and_goes_on(event: int) -> None:
    vm = Vm(bytes.fromhex("baf803 b005 ee ee f4"))  # mov dx, 0x3f8; mov al, 5; out dx, al; twice
    assert ioeventfd(vm, vm.vm, event, addr=PORT, len=1, flags=PIO) == OK
    assert vm.enter() == HLT
    assert count(event) == 2


@pytest.mark.parametrize(
    ("fields", "signals"),
    [
        ({"len": 2, "datamatch": 0x1234}, True),
        ({"len": 2, "datamatch": 0x1235}, False),
        ({"len": 2, "datamatch": 0x10000 + 0x1234}, False),
        ({"len": 1, "datamatch": 0x34}, False),
        ({"len": 4, "flags": PIO}, False),
        ({"len": 0, "flags": PIO}, True),
        ({"len": 2, "flags": 0}, False),  # in memory
    ],
)
def test_out_when_an_ioeventfd_wants_another_write_exits(
    event: int, fields: dict[str, int], signals: bool
) -> None:
    vm = Vm(bytes.fromhex("b83412 baf803 ef f4"))  # mov ax, 0x1234; mov dx, 0x3f8; out dx, ax
    place = {"addr": PORT, "flags": PIO | MATCH, **fields}
    assert ioeventfd(vm, vm.vm, event, **place) == OK
    assert vm.enter() == (HLT if signals else (OK, lib.KVM_EXIT_IO))
    assert count(event) == signals


def test_mmio_write_when_an_ioeventfd_is_there_signals_and_goes_on(event: int) -> None:
    # mov dword [0x300000], 7; mov byte [0x300000], 7; hlt
    vm = Vm(bytes.fromhex("c7050000300007000000 c6050000300007 f4"), code32=True)
    assert ioeventfd(vm, vm.vm, event, addr=DEVICE, len=4, flags=MATCH, datamatch=7) == OK
    assert vm.enter() == (OK, lib.KVM_EXIT_MMIO)  # the second one
    assert (count(event), vm.run.mmio.len) == (1, 1)


def test_write_when_the_ioeventfd_was_taken_off_exits(event: int) -> None:
    vm = Vm(bytes.fromhex("baf803 ee f4"))
    place = {"addr": PORT, "len": 1}
    assert ioeventfd(vm, vm.vm, event, flags=PIO, **place) == OK
    assert ioeventfd(vm, vm.vm, event, flags=PIO | OFF, **place) == OK
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    assert count(event) == 0


def test_write_when_the_counter_is_full_does_not_wait() -> None:
    event = os.eventfd(0)  # whose writers wait
    os.eventfd_write(event, FULL)
    vm = Vm(bytes.fromhex("baf803 ee f4"))
    assert ioeventfd(vm, vm.vm, event, addr=PORT, len=1, flags=PIO) == OK
    assert vm.enter() == HLT
    assert os.eventfd_read(event) == FULL
    os.close(event)


# AMD 56421: SW_EXITCODE 0x7B is IOIO (EXITINFO1 as in APM volume 2, 15.10.2), 0x80000002 an
# MMIO write of EXITINFO2 bytes in the scratch area to EXITINFO1.


def ioio(size: int, *, string: bool = False, items: int = 0, **fields: int) -> dict[str, int]:
    info = PORT << 16 | size << 4 | string << 2
    return {"code": 0x7B, "info_1": info, "info_2": items, **fields}


def test_ghcb_out_when_an_ioeventfd_is_there_signals_and_goes_on(event: int) -> None:
    rig = asks(ioio(2, rax=0x551234), ioio(2, rax=0x551235))
    place = {"addr": PORT, "len": 2, "flags": PIO | MATCH, "datamatch": 0x1234}
    assert ioeventfd(rig.guest, rig.guest.vm, event, **place) == OK
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)  # the second one
    assert count(event) == 1
    assert (rig.enter(), rig.run.exit_reason) == HLT


def test_ghcb_string_out_when_an_ioeventfd_is_there_signals_for_each_item(event: int) -> None:
    rig = asks(ioio(1, string=True, items=3, scratch=GHCB_GPA + BUFFER))
    assert ioeventfd(rig.guest, rig.guest.vm, event, addr=PORT, len=1, flags=PIO) == OK
    assert (rig.enter(), rig.run.exit_reason) == HLT
    assert count(event) == 3


def test_ghcb_string_out_when_no_item_matches_exits_with_all(event: int) -> None:
    rig = asks(ioio(1, string=True, items=3, scratch=GHCB_GPA + BUFFER))
    place = {"addr": PORT, "len": 1, "flags": PIO | MATCH, "datamatch": 9}
    assert ioeventfd(rig.guest, rig.guest.vm, event, **place) == OK
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)
    assert (rig.run.io.count, count(event)) == (3, 0)


def test_ghcb_string_out_when_only_the_first_item_matches_loses_the_others(event: int) -> None:
    rig = asks(ioio(1, string=True, items=3, scratch=GHCB_GPA + PAGE), ghcb_version=1)
    rig.guest.ram.write(b"\1\2\1", GHCB_GPA + PAGE - rig.guest.GPA)
    place = {"addr": PORT, "len": 1, "flags": PIO | MATCH, "datamatch": 1}
    assert ioeventfd(rig.guest, rig.guest.vm, event, **place) == OK
    assert (rig.enter(), rig.run.exit_reason) == HLT
    assert count(event) == 1


def test_ghcb_mmio_write_when_an_ioeventfd_is_there_signals_and_goes_on(event: int) -> None:
    write = {"code": 0x80000002, "info_1": DEVICE, "scratch": GHCB_GPA + BUFFER}
    rig = asks({**write, "info_2": 4}, {**write, "info_2": 2})
    place = {"addr": DEVICE, "len": 4, "flags": MATCH, "datamatch": 0}
    assert ioeventfd(rig.guest, rig.guest.vm, event, **place) == OK
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_MMIO)  # the second one
    assert (count(event), rig.run.mmio.len) == (1, 2)


# Irqfds: what is refused


@pytest.mark.parametrize(
    ("kind", "flags", "code"),
    [
        ("none", 0, errno.EINVAL),
        ("none", 4, errno.EINVAL),
        ("split", 4, errno.EINVAL),
        ("split", lib.KVM_IRQFD_FLAG_RESAMPLE, errno.EINVAL),
        ("full", lib.KVM_IRQFD_FLAG_RESAMPLE, errno.ENOSYS),  # not simulated
        ("none", lib.KVM_IRQFD_FLAG_DEASSIGN, 0),
        ("split", 0, 0),
        ("full", 0, 0),
    ],
)
def test_irqfd_when_nothing_takes_interrupts_is_einval(
    driver: Driver, event: int, kind: str, flags: int, code: int
) -> None:
    assert irqfd(driver, new_vm(driver, kind), event, flags=flags) == (failed(code) if code else OK)


@pytest.mark.parametrize("flags", [0, lib.KVM_IRQFD_FLAG_DEASSIGN])
def test_irqfd_when_the_descriptor_is_wrong_keeps_none(driver: Driver, flags: int) -> None:
    vm = new_vm(driver, "split")
    before = set(os.listdir("/proc/self/fd"))
    with open("/dev/null", "rb") as other:
        assert irqfd(driver, vm, other.fileno(), flags=flags) == failed(errno.EINVAL)
    assert irqfd(driver, vm, -1, flags=flags) == failed(errno.EBADF)
    assert set(os.listdir("/proc/self/fd")) == before


def test_irqfd_when_the_eventfd_has_one_is_ebusy(driver: Driver, event: int) -> None:
    vm, same = new_vm(driver, "split"), os.dup(event)
    off = lib.KVM_IRQFD_FLAG_DEASSIGN
    assert irqfd(driver, vm, event, gsi=5) == OK
    assert irqfd(driver, vm, same, gsi=6) == failed(errno.EBUSY)
    assert irqfd(driver, vm, event, gsi=6, flags=off) == OK  # none of GSI 6
    assert irqfd(driver, vm, event, gsi=6) == failed(errno.EBUSY)
    assert irqfd(driver, vm, same, gsi=5, flags=off) == OK
    assert irqfd(driver, vm, event, gsi=6) == OK
    os.close(same)


# Irqfds: interrupts


class Interrupted(Vm):
    """A guest with an APIC that waits; by an interrupt of vector N it writes to port N."""

    GSI = 5

    def __init__(self) -> None:
        super().__init__(bytes.fromhex("fb f4 ebfc"))  # sti; hlt; again
        for vector in (0x40, 0x50):  # out N, al; iret
            self.ram.write(bytes([0xE6, vector, 0xCF]), 0x1100 + vector)
            self.ram.write(bytes([vector, 0x11, 0, 0]), 4 * vector)
        self.set_regs(rsp=0x8000)
        page = self.get(self.vcpu, lib.KVM_GET_LAPIC)
        ffi.buffer(page)[0xF0:0xF2] = b"\xff\x01"  # software enable
        self.ok(self.ioctl(self.vcpu, lib.KVM_SET_LAPIC, page))
        self.route(0x40)

    def create_vm(self, vm_type: int, kvm: int | None = None) -> int:
        vm = super().create_vm(vm_type, kvm)
        add_irqchip(self, vm, "split")
        return vm

    def route(self, vector: int) -> None:
        message = {"type": lib.KVM_IRQ_ROUTING_MSI, "address_lo": 0xFEE00000, "data": vector}
        table = route_table({"gsi": self.GSI, **message})
        self.ok(self.ioctl(self.vm, lib.KVM_SET_GSI_ROUTING, table))


INTERRUPTED = (OK, lib.KVM_EXIT_IO)


def waiters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "irqfd"]


@pytest.fixture
def guest() -> Iterator[Interrupted]:
    vm = Interrupted()
    yield vm
    vm.platform.shutdown()
    wait_until(lambda: not waiters())


def test_irqfd_when_signalled_wakes_the_vcpu_with_its_vector(
    guest: Interrupted, event: int
) -> None:
    assert irqfd(guest, guest.vm, event, gsi=guest.GSI) == OK
    for vector in (0x40, 0x50):
        guest.route(vector)
        later = threading.Timer(0.05, os.eventfd_write, (event, 1))
        later.start()
        assert guest.enter() == INTERRUPTED
        assert guest.run.io.port == vector
        later.join()
    assert count(event) == 0  # KVM has read it


def test_irqfd_when_the_eventfd_was_signalled_before_interrupts_at_once(
    guest: Interrupted, event: int
) -> None:
    os.eventfd_write(event, 3)
    assert irqfd(guest, guest.vm, event, gsi=guest.GSI) == OK
    assert guest.enter() == INTERRUPTED


def test_line_when_a_message_is_routed_to_it_interrupts(guest: Interrupted) -> None:
    line = struct("kvm_irq_level", irq=guest.GSI, level=1)
    assert tuple(guest.ioctl(guest.vm, lib.KVM_IRQ_LINE, line)) == OK
    assert guest.enter() == INTERRUPTED


def test_irqfd_when_taken_off_leaves_the_eventfd_alone(guest: Interrupted, event: int) -> None:
    assert irqfd(guest, guest.vm, event, gsi=guest.GSI) == OK
    off = lib.KVM_IRQFD_FLAG_DEASSIGN
    assert irqfd(guest, guest.vm, event, gsi=guest.GSI, flags=off) == OK
    os.eventfd_write(event, 1)
    (waiter,) = waiters()
    before = _cpu_seconds(waiter)
    time.sleep(0.2)
    assert _cpu_seconds(waiter) - before < 0.03  # it waits, and not for this eventfd
    assert count(event) == 1


def _cpu_seconds(thread: threading.Thread) -> float:
    times = {found.id: found for found in psutil.Process().threads()}[thread.native_id or 0]
    return float(times.user_time + times.system_time)


class Meanwhile(OwnProcess):
    """Something else happens in the middle of a call that names an eventfd."""

    does: Callable[[], object] = staticmethod(lambda: None)
    told = 0

    def eventfd(self, fd: int) -> Eventfd:
        self.does()
        return super().eventfd(fd)

    def has_written(self) -> None:
        self.told += 1


def test_irqfd_when_the_owner_reads_first_blocks_nobody() -> None:
    event, other = os.eventfd(0), os.eventfd(0)  # whose readers wait
    user = Meanwhile()
    with simulated(user=user) as platform:
        driver = Driver(platform)
        vm = new_vm(driver, "split")
        assert irqfd(driver, vm, event) == OK

        def owner_is_faster() -> None:
            os.eventfd_write(event, 1)
            time.sleep(0.05)  # KVM's thread has seen that, and waits for the end of this call
            os.eventfd_read(event)

        user.does = owner_is_faster
        assert irqfd(driver, vm, other) == OK
        time.sleep(0.05)
        caller = threading.Thread(target=driver.create_vm, args=(0,))
        caller.start()
        caller.join(1)
        is_blocked = caller.is_alive()
        os.eventfd_write(event, 1)
        caller.join()
        assert not is_blocked
        wait_until(lambda: not select.select([event], [], [], 0)[0])
        wait_until(lambda: user.told == 1)  # not for what the owner has read
    os.close(event)
    os.close(other)


def test_irqfd_when_the_vm_is_closed_meanwhile_ends_with_it(event: int) -> None:
    user = Meanwhile()
    with simulated(user=user) as platform:
        driver = Driver(platform)
        vm = new_vm(driver, "split")
        wait_until(lambda: not waiters())  # those of other tests
        before = set(os.listdir("/proc/self/fd"))
        user.does = lambda: driver.ok(platform.close(vm))
        assert irqfd(driver, vm, event) == OK
        wait_until(lambda: not waiters())
        assert set(os.listdir("/proc/self/fd")) == before


def test_irqfds_when_the_vm_is_closed_end_with_all_descriptors_and_the_thread(event: int) -> None:
    with simulated() as platform:
        driver = Driver(platform)
        wait_until(lambda: not waiters())  # those of other tests
        before = set(os.listdir("/proc/self/fd"))
        vm = new_vm(driver, "split")
        vcpu = driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
        assert irqfd(driver, vm, event, gsi=5) == OK
        assert ioeventfd(driver, vm, event, addr=PORT, len=1, flags=PIO) == OK
        assert len(os.listdir("/proc/self/fd")) > len(before)
        # kvm_vm_release(): irqfds end with the VM's descriptor, ioeventfds with the VM.
        platform.close(vm)
        wait_until(lambda: not waiters())
        os.eventfd_write(event, 1)
        assert len(set(os.listdir("/proc/self/fd")) - before) == 1
        platform.close(vcpu)
        assert set(os.listdir("/proc/self/fd")) == before
    assert count(event) == 1
