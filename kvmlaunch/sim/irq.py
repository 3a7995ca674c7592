"""In-kernel interrupt controllers of a VM: who has one, and which calls need it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmlaunch.sim.interrupts import send_message
from kvmlaunch.sim.uaccess import copy_in, refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["HANDLERS", "MAX_ROUTES", "Irqchips"]

MAX_ROUTES = 4096
"""KVM_MAX_IRQ_ROUTES."""


@dataclass
class Irqchips:
    """``pic``: full irqchip (PIC, IOAPIC); ``split``: only the local APICs."""

    pic: bool = False
    split: bool = False
    pit: bool = False
    bus_cycle_ns: int = 1

    @property
    def in_kernel(self) -> bool:
        """Whether vCPUs have a local APIC in the kernel."""
        return self.pic or self.split


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
    copy_in(vm.host.user, "kvm_irq_level", arg)
    if not vm.irq.in_kernel:
        refuse(errno.ENXIO)
    return 0


def _set_gsi_routing(vm: Vm, arg: int) -> int:
    routing = copy_in(vm.host.user, "kvm_irq_routing", arg)
    if not vm.irq.in_kernel or routing.nr > MAX_ROUTES or routing.flags:
        refuse(errno.EINVAL)
    return 0


def _signal_msi(vm: Vm, arg: int) -> int:
    message = copy_in(vm.host.user, "kvm_msi", arg)
    if not vm.irq.in_kernel or message.flags:
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
        lib.KVM_IRQ_LINE_STATUS: _irq_line,
        lib.KVM_SET_GSI_ROUTING: _set_gsi_routing,
        lib.KVM_SIGNAL_MSI: _signal_msi,
    }
)
"""Request -> handler. Interrupt lines lead nowhere: the PIC and the IOAPIC aren't simulated."""
