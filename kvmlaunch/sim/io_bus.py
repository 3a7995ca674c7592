"""Writes to ports and devices that the kernel takes itself (x86.c: vcpu_mmio_write())."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["write"]


def write(vcpu: Vcpu, address: int, data: bytes, *, pio: bool) -> bool:
    """Give a write to what is in the kernel; False where it is for user space.

    The local APIC of the vCPU comes first, then ioeventfds and the coalesced ring.
    """
    if not pio and vcpu.apic.write_mmio(address, data):
        return True
    flags = lib.KVM_IOEVENTFD_FLAG_PIO if pio else 0
    vm = vcpu.vm
    return vm.ioeventfds.write(flags, address, data) or vm.coalesced.take(
        vcpu, address, data, pio=pio
    )
