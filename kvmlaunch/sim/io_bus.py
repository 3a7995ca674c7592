"""Writes to ports and devices that the kernel takes itself (kvm_main.c: kvm_io_bus_write)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["write"]


def write(vcpu: Vcpu, address: int, data: bytes, *, pio: bool) -> bool:
    """Give a write to an ioeventfd or the coalesced ring; False where it is for user space."""
    flags = lib.KVM_IOEVENTFD_FLAG_PIO if pio else 0
    vm = vcpu.vm
    return vm.ioeventfds.write(flags, address, data) or vm.coalesced.take(
        vcpu, address, data, pio=pio
    )
