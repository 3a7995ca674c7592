"""Coalesced MMIO: writes that wait in a ring instead of exiting (virt/kvm/coalesced_mmio.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import ffi

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["RING_PAGE", "CoalescedZones"]

RING_PAGE = 2
"""KVM_COALESCED_MMIO_PAGE_OFFSET: the ring's page behind ``struct kvm_run``."""

_RING = ffi.sizeof("struct kvm_coalesced_mmio_ring")
_ENTRIES = (PAGE_SIZE - _RING) // ffi.sizeof("struct kvm_coalesced_mmio")
_MAX_ZONES = 1000  # NR_IOBUS_DEVS, of each bus


class CoalescedZones:
    """The zones of a VM, and its ring.

    The kernel's VM has one ring, which every vCPU fd shows. Here these fds have no memory in
    common: with more than one vCPU each write exits, as it may with a full ring.
    """

    def __init__(self) -> None:
        self._zones: list[tuple[bool, int, int]] = []

    def register(self, zone: Any) -> None:
        """KVM_REGISTER_COALESCED_MMIO."""
        pio = _bus(zone)
        if sum(at[0] == pio for at in self._zones) >= _MAX_ZONES:
            refuse(errno.ENOSPC)
        self._zones.append((pio, zone.addr, zone.size))

    def unregister(self, zone: Any) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: every zone that holds all of this one."""
        pio = _bus(zone)
        self._zones = [
            at for at in self._zones if at[0] != pio or not _holds(at, zone.addr, zone.size)
        ]

    def take(self, vcpu: Vcpu, address: int, data: bytes, *, pio: bool) -> bool:
        """Put a write into the ring; False where it has to go to user space."""
        if not any(at[0] == pio and _holds(at, address, len(data)) for at in self._zones):
            return False
        if len(vcpu.vm.vcpus) > 1:
            return False
        ring: Any = ffi.cast(
            "struct kvm_coalesced_mmio_ring *", vcpu.run_pages.address + RING_PAGE * PAGE_SIZE
        )
        at = ring.last
        if at >= _ENTRIES or (at + 1) % _ENTRIES == ring.first:
            return False
        entry = ring.coalesced_mmio[at]
        entry.phys_addr, entry.len, entry.pio = address, len(data), pio
        ffi.buffer(entry.data)[: len(data)] = data
        ring.last = (at + 1) % _ENTRIES
        return True


def _bus(zone: Any) -> bool:
    if zone.pio > 1:
        refuse(errno.EINVAL)
    return bool(zone.pio)


def _holds(zone: tuple[bool, int, int], address: int, size: int) -> bool:
    """coalesced_mmio_in_range(), whose length is an int."""
    _, start, length = zone
    if size >> 31:
        return False
    return address >= start and address + size <= start + length & (1 << 64) - 1
