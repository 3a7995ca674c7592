"""In-kernel interrupt controllers of a VM: who has one, and which calls need it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmlaunch.sim.uaccess import copy_in, refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu
    from kvmlaunch.sim.vm import Vm

__all__ = ["HANDLERS", "MAX_ROUTES", "Irqchips", "LocalApic"]

MAX_ROUTES = 4096
"""KVM_MAX_IRQ_ROUTES."""


@dataclass
class Irqchips:
    """``pic``: full irqchip (PIC, IOAPIC); ``split``: only the local APICs."""

    pic: bool = False
    split: bool = False
    pit: bool = False

    @property
    def in_kernel(self) -> bool:
        """Whether vCPUs have a local APIC in the kernel."""
        return self.pic or self.split


class LocalApic:
    """The in-kernel local APIC of one vCPU, as the run loop sees it.

    It takes and sends no interrupts: its registers don't answer, so a guest that uses them gets
    #GP for an MSR and an MMIO exit for the page.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    def has_interrupt(self) -> bool:
        """Whether an interrupt is to be injected as soon as the guest takes one. No locks."""
        return False

    def accept_interrupt(self) -> int:
        """Return the vector of that interrupt, which is in service from now on."""
        raise NotImplementedError

    def read_msr(self, index: int) -> int | None:
        """RDMSR of an x2APIC register or of the TSC deadline; None is #GP."""
        return None

    def write_msr(self, index: int, value: int) -> bool:
        """WRMSR, as `read_msr`; False is #GP."""
        return False

    def read_mmio(self, gpa: int, size: int) -> bytes | None:
        """A read of the APIC page; None leaves it to user space."""
        return None

    def write_mmio(self, gpa: int, data: bytes) -> bool:
        """A write to the APIC page; False leaves it to user space."""
        return False


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
    return 0


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
"""Request -> handler. Interrupts of these calls go nowhere: no APIC takes them."""
