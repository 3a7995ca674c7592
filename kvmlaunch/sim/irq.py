"""In-kernel interrupt controllers of a VM: who has one, and which calls need it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim.interrupts import send_message
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["HANDLERS", "MAX_ROUTES", "Irqchips"]

MAX_ROUTES = 4096
"""KVM_MAX_IRQ_ROUTES."""

_MSI_VALID_DEVID = 1 << 0
_PINS = {0: 8, 1: 8, 2: 24}  # of both PICs and the IOAPIC


@dataclass
class Irqchips:
    """``pic``: full irqchip (PIC, IOAPIC); ``split``: only the local APICs."""

    pic: bool = False
    split: bool = False
    pit: bool = False
    bus_cycle_ns: int = 1
    messages: dict[int, tuple[int, int]] = field(default_factory=dict)
    """GSI -> address and data of the message that it sends."""

    @property
    def in_kernel(self) -> bool:
        """Whether vCPUs have a local APIC in the kernel."""
        return self.pic or self.split

    def raise_line(self, vm: Vm, gsi: int, level: int) -> int:
        """kvm_set_irq(): APICs that took it, -1 where it was ignored. No IOAPIC is simulated."""
        message = self.messages.get(gsi)
        return -1 if message is None or not level else send_message(vm, *message)


def _create_irqchip(vm: Vm, arg: int) -> int:
    if vm.irq.in_kernel:
        refuse(errno.EEXIST)
    if vm.vcpus:
        refuse(errno.EINVAL)
    vm.irq.pic = True
    return 0


def _create_pit2(vm: Vm, arg: int) -> int:
    copy_in(vm.host.user, "kvm_pit_config", arg)
    if vm.irq.pit:
        refuse(errno.EEXIST)
    if not vm.irq.pic:
        refuse(errno.ENOENT)
    vm.irq.pit = True
    return 0


def _irq_line(vm: Vm, arg: int) -> int:
    line = copy_in(vm.host.user, "kvm_irq_level", arg)
    if not vm.irq.in_kernel:
        refuse(errno.ENXIO)
    vm.irq.raise_line(vm, line.irq, line.level)
    return 0


def _irq_line_status(vm: Vm, arg: int) -> int:
    line = copy_in(vm.host.user, "kvm_irq_level", arg)
    if not vm.irq.in_kernel:
        refuse(errno.ENXIO)
    line.irq = vm.irq.raise_line(vm, line.irq, line.level) & 0xFFFFFFFF
    copy_out(vm.host.user, arg, line)
    return 0


def _set_gsi_routing(vm: Vm, arg: int) -> int:
    user = vm.host.user
    routing = copy_in(user, "kvm_irq_routing", arg)
    if not vm.irq.in_kernel or routing.nr > MAX_ROUTES or routing.flags:
        refuse(errno.EINVAL)
    size = ffi.sizeof("struct kvm_irq_routing_entry")
    table = user.read(arg + ffi.sizeof("struct kvm_irq_routing"), routing.nr * size)
    entries = ffi.from_buffer("struct kvm_irq_routing_entry[]", table)
    if any(entry.gsi >= MAX_ROUTES for entry in entries):
        refuse(errno.EINVAL)
    messages: dict[int, tuple[int, int]] = {}
    chips: set[tuple[int, int]] = set()
    for entry in entries:
        _check_route(vm, entry, messages, chips)
        if entry.type == lib.KVM_IRQ_ROUTING_MSI:
            messages[entry.gsi] = entry.u.msi.address_lo, entry.u.msi.data
        else:
            chips.add((entry.gsi, entry.u.irqchip.irqchip))
    vm.irq.messages = messages
    return 0


def _check_route(
    vm: Vm, entry: Any, messages: Mapping[int, object], chips: set[tuple[int, int]]
) -> None:
    """kvm_set_irq_routing() and setup_routing_entry(), for one entry."""
    is_message = entry.type == lib.KVM_IRQ_ROUTING_MSI
    if entry.flags & ~(_MSI_VALID_DEVID if is_message else 0):
        refuse(errno.EINVAL)
    taken = {chip for chip in _PINS if (entry.gsi, chip) in chips}
    if entry.gsi in messages or (taken if is_message else entry.u.irqchip.irqchip in taken):
        refuse(errno.EINVAL)
    if is_message:
        return
    chip, pin = entry.u.irqchip.irqchip, entry.u.irqchip.pin
    if entry.type != lib.KVM_IRQ_ROUTING_IRQCHIP or vm.irq.split or chip not in _PINS:
        refuse(errno.EINVAL)
    if pin >= _PINS[chip]:
        refuse(errno.EINVAL)


def _signal_msi(vm: Vm, arg: int) -> int:
    message = copy_in(vm.host.user, "kvm_msi", arg)
    if not vm.irq.in_kernel or message.flags & ~_MSI_VALID_DEVID:
        refuse(errno.EINVAL)
    taken = send_message(vm, message.address_lo, message.data)
    if taken < 0:
        refuse(errno.EPERM)  # kvm_set_msi() returns -1
    return taken


HANDLERS: Mapping[int, Callable[[Vm, int], int]] = MappingProxyType(
    {
        lib.KVM_CREATE_IRQCHIP: _create_irqchip,
        lib.KVM_CREATE_PIT2: _create_pit2,
        lib.KVM_IRQ_LINE: _irq_line,
        lib.KVM_IRQ_LINE_STATUS: _irq_line_status,
        lib.KVM_SET_GSI_ROUTING: _set_gsi_routing,
        lib.KVM_SIGNAL_MSI: _signal_msi,
    }
)
"""Request -> handler. Interrupt lines lead nowhere: the PIC and the IOAPIC aren't simulated."""
