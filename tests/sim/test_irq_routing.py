"""KVM_SET_GSI_ROUTING, KVM_IRQ_LINE, KVM_SIGNAL_MSI (irqchip.c, irq_comm.c), and task priority."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import ffi, lib, poke

from .driver import ANONYMOUS, PAGE, RW, Driver, Memory, struct
from .irqchips import new_vm, route_table

OK = (0, 0)
EINVAL = (-1, errno.EINVAL)
EFAULT = (-1, errno.EFAULT)
MSI, CHIP = lib.KVM_IRQ_ROUTING_MSI, lib.KVM_IRQ_ROUTING_IRQCHIP
MESSAGE = {"type": MSI, "address_lo": 0xFEE00000, "data": 0x30}
MAX_ROUTES = 4096  # KVM_MAX_IRQ_ROUTES
NOBODY = 0xFFFFFFFF  # -1: nothing is routed there, or nobody took it


def route(driver: Driver, vm: int, *entries: dict[str, int], flags: int = 0) -> tuple[int, int]:
    table = route_table(*entries, flags=flags)
    return tuple(driver.ioctl(vm, lib.KVM_SET_GSI_ROUTING, table))


def status(driver: Driver, vm: int, gsi: int, level: int) -> int:
    """What KVM_IRQ_LINE_STATUS puts in the place of the GSI."""
    line = struct("kvm_irq_level", irq=gsi, level=level)
    driver.ok(driver.ioctl(vm, lib.KVM_IRQ_LINE_STATUS, line))
    return int(line.irq)


@pytest.mark.parametrize("irqchip", ["none", "split", "full"])
def test_routes_when_no_irqchip_is_in_the_kernel_are_einval(driver: Driver, irqchip: str) -> None:
    expected = EINVAL if irqchip == "none" else OK
    assert route(driver, new_vm(driver, irqchip), MESSAGE) == expected
    assert route(driver, new_vm(driver, irqchip)) == expected


@pytest.mark.parametrize(
    "entries",
    [
        [{**MESSAGE, "gsi": MAX_ROUTES}],
        [{**MESSAGE, "flags": 2}],  # beyond KVM_MSI_VALID_DEVID
        [{"type": CHIP, "flags": 1}],
        [{"type": 0}],
        [{"type": 99}],
        [MESSAGE, MESSAGE],
        [MESSAGE, {"type": CHIP}],
        [{"type": CHIP}, MESSAGE],
        [{"type": CHIP}, {"type": CHIP, "pin": 1}],
        [{"type": CHIP, "irqchip": 0, "pin": 8}],
        [{"type": CHIP, "irqchip": 1, "pin": 8}],
        [{"type": CHIP, "irqchip": 2, "pin": 24}],
        [{"type": CHIP, "irqchip": 3}],
    ],
)
def test_routes_when_one_is_impossible_are_einval_and_the_old_stay(
    driver: Driver, entries: list[dict[str, int]]
) -> None:
    vm = new_vm(driver, "full")
    driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
    assert route(driver, vm, {**MESSAGE, "gsi": 7}) == OK
    before = status(driver, vm, 7, 1)
    assert before != NOBODY
    assert route(driver, vm, *entries) == EINVAL
    assert status(driver, vm, 7, 1) == before


@pytest.mark.parametrize(
    ("irqchip", "entries", "expected"),
    [
        ("split", [{**MESSAGE, "gsi": MAX_ROUTES - 1}], OK),
        ("split", [{**MESSAGE, "flags": 1}], OK),
        ("split", [MESSAGE, {**MESSAGE, "gsi": 1}], OK),
        ("split", [{"type": CHIP}], EINVAL),
        ("full", [{"type": CHIP}, {"type": CHIP, "irqchip": 2}], OK),
        ("full", [{"type": CHIP, "irqchip": 2, "pin": 23}], OK),
    ],
)
def test_routes_when_they_are_possible_depend_on_the_irqchip(
    driver: Driver, irqchip: str, entries: list[dict[str, int]], expected: tuple[int, int]
) -> None:
    assert route(driver, new_vm(driver, irqchip), *entries) == expected


def test_route_table_when_it_is_wrong_is_refused(driver: Driver) -> None:
    vm = new_vm(driver, "split")
    assert route(driver, vm, MESSAGE, flags=1) == EINVAL
    too_many = struct("kvm_irq_routing", nr=MAX_ROUTES + 1)
    assert tuple(driver.ioctl(vm, lib.KVM_SET_GSI_ROUTING, too_many)) == EINVAL
    assert tuple(driver.ioctl(vm, lib.KVM_SET_GSI_ROUTING, 8)) == EFAULT


def test_route_table_when_its_entries_are_out_of_reach_is_efault(driver: Driver) -> None:
    address = driver.ok(driver.platform.mmap(-1, 2 * PAGE, RW, ANONYMOUS))
    driver.ok(driver.platform.munmap(address + PAGE, PAGE))
    header = address + PAGE - 8
    vm = new_vm(driver, "split")
    for nr, expected in ((1, EFAULT), (0, OK)):
        poke(header, nr.to_bytes(8, "little"))
        assert tuple(driver.ioctl(vm, lib.KVM_SET_GSI_ROUTING, header)) == expected
    driver.ok(driver.platform.munmap(address, PAGE))


def test_line_when_no_irqchip_is_in_the_kernel_is_enxio(driver: Driver) -> None:
    vm = new_vm(driver, "none")
    for request in (lib.KVM_IRQ_LINE, lib.KVM_IRQ_LINE_STATUS):
        line = struct("kvm_irq_level", irq=1, level=1)
        assert tuple(driver.ioctl(vm, request, line)) == (-1, errno.ENXIO)
        assert tuple(driver.ioctl(vm, request, 8)) == EFAULT


def test_line_status_when_a_message_is_routed_tells_who_took_it(driver: Driver) -> None:
    vm = new_vm(driver, "split")
    vcpu = driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
    assert status(driver, vm, 5, 1) == NOBODY
    assert route(driver, vm, {**MESSAGE, "gsi": 5}) == OK
    assert status(driver, vm, 5, 1) == 0  # the APIC is off
    page = driver.get(vcpu, lib.KVM_GET_LAPIC)
    ffi.buffer(page)[0xF0:0xF2] = b"\xff\x01"
    driver.ok(driver.ioctl(vcpu, lib.KVM_SET_LAPIC, page))
    assert status(driver, vm, 5, 1) == 1
    assert status(driver, vm, 5, 0) == NOBODY  # a message has no end
    assert status(driver, vm, 4, 1) == NOBODY
    assert status(driver, vm, 0xFFFFFFFF, 1) == NOBODY
    page = driver.get(vcpu, lib.KVM_GET_LAPIC)
    assert bytes(ffi.buffer(page)[0x210:0x220])[2] == 1  # IRR: vector 0x30 waits


def test_line_when_it_has_no_status_keeps_its_number(driver: Driver) -> None:
    line = struct("kvm_irq_level", irq=5, level=1)
    assert tuple(driver.ioctl(new_vm(driver, "split"), lib.KVM_IRQ_LINE, line)) == OK
    assert line.irq == 5


@pytest.mark.parametrize(
    ("irqchip", "flags", "expected"),
    [("split", 0, OK), ("split", 1, OK), ("split", 2, EINVAL), ("none", 0, EINVAL)],
)
def test_signal_msi_when_it_has_a_device_id_is_the_same(
    driver: Driver, irqchip: str, flags: int, expected: tuple[int, int]
) -> None:
    vm = new_vm(driver, irqchip)
    driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
    message = struct("kvm_msi", address_lo=0xFEE00000, data=0x30, flags=flags, devid=9)
    assert tuple(driver.ioctl(vm, lib.KVM_SIGNAL_MSI, message)) == expected


@pytest.mark.parametrize(("flags", "expected"), [(0, OK), (1, EINVAL)])
def test_tpr_access_reporting_when_it_has_flags_is_einval(
    driver: Driver, flags: int, expected: tuple[int, int]
) -> None:
    vcpu = driver.ok(driver.ioctl(driver.create_vm(0), lib.KVM_CREATE_VCPU, 0))
    control = struct("kvm_tpr_access_ctl", enabled=1, flags=flags)
    assert tuple(driver.ioctl(vcpu, lib.KVM_TPR_ACCESS_REPORTING, control)) == expected
    assert tuple(driver.ioctl(vcpu, lib.KVM_TPR_ACCESS_REPORTING, 8)) == EFAULT


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (0, OK),
        (0x10000, OK),
        (0x11FFC, OK),
        (0x11FFD, EINVAL),  # over the end
        (0x12000, EINVAL),
        (0x20000, EINVAL),  # read-only
        ((1 << 64) - 1, EINVAL),
    ],
)
def test_vapic_addr_when_no_memory_is_there_is_einval(
    driver: Driver, address: int, expected: tuple[int, int]
) -> None:
    vm, memory = new_vm(driver, "split"), Memory(0x2000)
    for slot, gpa in enumerate((0x10000, 0x20000)):
        region = struct(
            "kvm_userspace_memory_region",
            slot=slot,
            flags=slot * lib.KVM_MEM_READONLY,
            guest_phys_addr=gpa,
            memory_size=0x2000,
            userspace_addr=memory.address,
        )
        driver.ok(driver.ioctl(vm, lib.KVM_SET_USER_MEMORY_REGION, region))
    vcpu = driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
    place = struct("kvm_vapic_addr", vapic_addr=address)
    assert tuple(driver.ioctl(vcpu, lib.KVM_SET_VAPIC_ADDR, place)) == expected


def test_vapic_addr_when_there_is_no_local_apic_is_einval_before_it_is_read(driver: Driver) -> None:
    for irqchip, expected in (("none", EINVAL), ("split", EFAULT)):
        vm = new_vm(driver, irqchip)
        vcpu = driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
        assert tuple(driver.ioctl(vcpu, lib.KVM_SET_VAPIC_ADDR, 8)) == expected
