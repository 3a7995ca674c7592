"""Interrupt controllers in the kernel, and the messages and pins that lines are routed to."""

from __future__ import annotations

from typing import Any

from kvmlaunch.uapi import ffi, lib

from .driver import Driver, struct


def add_irqchip(driver: Driver, vm: int, kind: str) -> None:
    """``kind`` is "none", "split" (local APICs alone) or "full"."""
    if kind == "full":
        driver.ok(driver.ioctl(vm, lib.KVM_CREATE_IRQCHIP))
    elif kind == "split":
        cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_SPLIT_IRQCHIP)
        driver.ok(driver.ioctl(vm, lib.KVM_ENABLE_CAP, cap))


def new_vm(driver: Driver, irqchip: str) -> int:
    """A plain VM that has it."""
    vm = driver.create_vm(0)
    add_irqchip(driver, vm, irqchip)
    return vm


def route_table(*entries: dict[str, int], flags: int = 0) -> Any:
    """What KVM_SET_GSI_ROUTING wants; an entry has fields of a pin or of a message."""
    size = ffi.sizeof("struct kvm_irq_routing_entry")
    table = ffi.new("char[]", ffi.sizeof("struct kvm_irq_routing") + len(entries) * size)
    routing = ffi.cast("struct kvm_irq_routing *", table)
    routing.nr, routing.flags = len(entries), flags
    for at, fields in enumerate(entries):
        entry = routing.entries[at]
        parts = {"irqchip": entry.u.irqchip, "pin": entry.u.irqchip}
        parts |= dict.fromkeys(("gsi", "type", "flags"), entry)
        for name, value in fields.items():
            setattr(parts.get(name, entry.u.msi), name, value)
    return table
