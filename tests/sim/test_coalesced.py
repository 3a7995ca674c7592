"""Coalesced MMIO and port I/O (virt/kvm/coalesced_mmio.c)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, struct
from .plain_vm import Vm
from .scripted import IN_BUFFER, answered, asks, ioio
from .test_plain_run import OK

EINVAL = (-1, errno.EINVAL)
# mov ax, 0x1234; out 0x80, ax; out 0x80, ax; hlt
OUT_TWICE = bytes.fromhex("b83412 e780 e780 f4")
# mov ax, 0x1000; mov ds, ax; mov word [8], 0x5678; hlt: GPA 0x10008 is no memory
STORE = bytes.fromhex("b80010 8ed8 c70608007856 f4")


def zone(driver, vm, addr, size, pio=0, *, add=True):
    request = lib.KVM_REGISTER_COALESCED_MMIO if add else lib.KVM_UNREGISTER_COALESCED_MMIO
    return driver.ioctl(
        vm, request, struct("kvm_coalesced_mmio_zone", addr=addr, size=size, pio=pio)
    )


def ring_of(run):
    return ffi.cast("struct kvm_coalesced_mmio_ring *", ffi.cast("char *", run) + 2 * PAGE)


def entries(run):
    """What waits in the ring: address, bytes, port or not."""
    ring = ring_of(run)
    found = []
    for at in range(ring.first, ring.last):
        entry = ring.coalesced_mmio[at]
        found.append((entry.phys_addr, bytes(entry.data)[: entry.len], entry.pio))
    return found


def test_capabilities_name_the_page_of_the_ring(driver):
    kvm = driver.open_kvm()
    assert driver.ioctl(kvm, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_COALESCED_MMIO) == (2, 0)
    assert driver.ioctl(kvm, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_COALESCED_PIO) == (1, 0)


@pytest.mark.parametrize("add", [True, False])
def test_zone_that_is_neither_mmio_nor_port_is_einval(driver, vm, add):
    assert zone(driver, vm, 0, 8, 2, add=add) == EINVAL


@pytest.mark.parametrize("name", ["KVM_REGISTER_COALESCED_MMIO", "KVM_UNREGISTER_COALESCED_MMIO"])
def test_zone_that_is_out_of_reach_is_efault(driver, vm, name):
    assert driver.ioctl(vm, getattr(lib, name), 8) == (-1, errno.EFAULT)


def test_zones_of_a_bus_beyond_1000_are_enospc(driver, vm):
    # kvm_main.c: NR_IOBUS_DEVS.
    for at in range(1000):
        driver.ok(zone(driver, vm, at * 8, 8))
    assert zone(driver, vm, 0x8000, 8) == (-1, errno.ENOSPC)
    assert zone(driver, vm, 0x80, 8, 1) == OK


TOP = 1 << 64


@pytest.mark.parametrize(
    ("registered", "part"),
    [
        ((0, 0xFFFFFFFF), (0, 1 << 31)),  # a negative length
        ((TOP - 8, 8), (TOP - 8, 4)),  # an end beyond 64 bits is 0 and on
        ((TOP - 8, 16), (TOP - 8, 16)),
        ((0, 8), (4, 8)),
    ],
)
def test_zone_that_does_not_hold_a_range_stays_when_that_is_unregistered(
    driver, vm, registered, part
):
    for _ in range(1000):
        driver.ok(zone(driver, vm, *registered))
    driver.ok(zone(driver, vm, *part, add=False))
    assert zone(driver, vm, *registered) == (-1, errno.ENOSPC)


def test_writes_in_a_zone_wait_in_the_ring():
    vm = Vm(OUT_TWICE)
    vm.ok(zone(vm, vm.vm, 0x80, 2, 1))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert entries(vm.run) == [(0x80, b"\x34\x12", 1)] * 2


def test_mmio_writes_in_a_zone_wait_in_the_ring():
    vm = Vm(STORE)
    vm.ok(zone(vm, vm.vm, 0x10000, 10))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert entries(vm.run) == [(0x10008, b"\x78\x56", 0)]


@pytest.mark.parametrize(
    "where", [(0x80, 1, 1), (0x81, 8, 1), (0x80, 2, 0)], ids=["short", "above", "other bus"]
)
def test_write_that_is_not_all_in_a_zone_exits(where):
    vm = Vm(OUT_TWICE)
    vm.ok(zone(vm, vm.vm, *where))
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    assert entries(vm.run) == []


def test_write_exits_once_the_zone_is_gone():
    vm = Vm(OUT_TWICE)
    vm.ok(zone(vm, vm.vm, 0x80, 2, 1))
    vm.ok(zone(vm, vm.vm, 0x80, 4, 1, add=False))
    vm.ok(zone(vm, vm.vm, 0x80, 1, 0, add=False))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT), "it holds neither of those"
    vm.ok(zone(vm, vm.vm, 0x81, 1, 1, add=False))
    vm.set_regs(rip=0x1000)
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)


# (4096 - 8) / 24 = 170 entries, of which one stays free.
@pytest.mark.parametrize(("first", "last"), [(0, 169), (5, 4), (0, 170), (0, 0xFFFFFFFF)])
def test_write_exits_where_the_ring_is_full_or_spoiled(first, last):
    vm = Vm(OUT_TWICE)
    vm.ok(zone(vm, vm.vm, 0x80, 2, 1))
    ring = ring_of(vm.run)
    ring.first, ring.last = first, last
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    assert (ring.first, ring.last) == (first, last)


def test_ring_goes_round():
    vm = Vm(OUT_TWICE)
    vm.ok(zone(vm, vm.vm, 0x80, 2, 1))
    ring = ring_of(vm.run)
    ring.first = ring.last = 169
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (ring.first, ring.last) == (169, 1)
    assert ring.coalesced_mmio[0].phys_addr == ring.coalesced_mmio[169].phys_addr == 0x80


def test_every_write_exits_with_a_second_vcpu():
    vm = Vm(OUT_TWICE)
    vm.ok(zone(vm, vm.vm, 0x80, 2, 1))
    vm.ok(vm.ioctl(vm.vm, lib.KVM_CREATE_VCPU, 1))
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ioio(0x60, 2, rax=1), [(0x60, 2, 1)]),
        (ioio(0x60, 2, string=True, count=3, scratch=IN_BUFFER), [(0x60, 2, 1)] * 3),
        (
            {"code": 0x80000002, "info_1": 0xD0000000, "info_2": 4, "scratch": IN_BUFFER},
            [(0xD0000000, 4, 0)],
        ),
    ],
    ids=["out", "outs", "mmio"],
)
def test_writes_of_an_snp_guest_wait_in_the_ring(request_, expected):
    rig = asks(request_)
    rig.guest.ok(zone(rig.guest, rig.guest.vm, 0x60, 2, 1))
    rig.guest.ok(zone(rig.guest, rig.guest.vm, 0xD0000000, 8))
    assert answered(rig).error == (0, 0)
    found = [(address, len(data), pio) for address, data, pio in entries(rig.run)]
    assert found == expected
