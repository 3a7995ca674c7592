"""Memory slots and memory attributes of a VM (virt/kvm/kvm_main.c)."""

from __future__ import annotations

import bisect
import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim.dirty_log import DirtyBitmap
from kvmlaunch.sim.guest_memfd import GuestMemfd
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["NR_USER_SLOTS", "Attributes", "Slot", "Slots"]

NR_USER_SLOTS = 32764
"""KVM_CAP_NR_MEMSLOTS: the slot number proper is below this."""

_U64 = (1 << 64) - 1
_MAX_SLOT_PAGES = (1 << 31) - 1
_USER_END = (1 << 47) - PAGE_SIZE


@dataclass(eq=False)
class Slot:
    """One slot. ``gmem`` is None without a private side, or once that file is closed."""

    id: int
    flags: int
    base_gfn: int
    npages: int
    hva: int
    gmem: GuestMemfd | None = None
    gmem_first: int = 0
    dirty: DirtyBitmap | None = None
    """Where its writes are logged."""

    @property
    def end_gfn(self) -> int:
        """First frame behind the slot."""
        return self.base_gfn + self.npages

    @property
    def can_be_private(self) -> bool:
        """Whether it was made with a guest_memfd."""
        return bool(self.flags & lib.KVM_MEM_GUEST_MEMFD)

    @property
    def is_read_only(self) -> bool:
        """Writes of the guest are for user space."""
        return bool(self.flags & lib.KVM_MEM_READONLY)


class Slots:
    """The slots of one VM by id, and by frame for each address space."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._slots: dict[int, Slot] = {}
        self._by_gfn: tuple[list[Slot], ...] = ([], [])
        self._space = 0
        self.manual_dirty_log = 0
        """Options of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""

    def check_id(self, slot_id: int) -> None:
        """EINVAL for a number that no slot can have."""
        if slot_id >> 16 >= self._vm.address_spaces or slot_id & 0xFFFF >= NR_USER_SLOTS:
            refuse(errno.EINVAL)

    def get(self, slot_id: int) -> Slot | None:
        """The slot of that number."""
        return self._slots.get(slot_id)

    def use_space(self, number: int) -> None:
        """Find frames in this address space: 1 while the vCPU that runs is in SMM."""
        if number != self._space:
            self._space = number
            self._vm.memory_changed(code=True)

    def writable(self, gpa: int, size: int) -> bool:
        """Whether KVM could write there, outside SMM (kvm_gfn_to_hva_cache_init())."""
        first, last = gpa // PAGE_SIZE, (gpa + size - 1 & _U64) // PAGE_SIZE
        slots = [_holding(self._by_gfn[0], gfn) for gfn in range(first, last + 1)]
        return bool(slots) and not any(slot is None or slot.is_read_only for slot in slots)

    def find(self, gfn: int) -> Slot | None:
        """The slot that holds a guest frame."""
        return _holding(self._by_gfn[self._space], gfn)

    def set_region(self, region: Any, *, v1: bool = False) -> None:
        """KVM_SET_USER_MEMORY_REGION and ...REGION2: check by check in the kernel's order."""
        flags = region.flags
        if v1 and flags & ~(lib.KVM_MEM_LOG_DIRTY_PAGES | lib.KVM_MEM_READONLY):
            refuse(errno.EINVAL)
        if region.slot & 0xFFFF >= NR_USER_SLOTS:
            refuse(errno.EINVAL)
        self._check_flags(flags)
        size, gpa, hva = region.memory_size, region.guest_phys_addr, region.userspace_addr
        if size % PAGE_SIZE or gpa % PAGE_SIZE:
            refuse(errno.EINVAL)
        if hva % PAGE_SIZE or not hva + size <= _USER_END:
            refuse(errno.EINVAL)
        if flags & lib.KVM_MEM_GUEST_MEMFD:
            offset = region.guest_memfd_offset
            if offset % PAGE_SIZE or offset + size > _U64:
                refuse(errno.EINVAL)
        if region.slot >> 16 >= self._vm.address_spaces:
            refuse(errno.EINVAL)
        if gpa + size > _U64 or size // PAGE_SIZE > _MAX_SLOT_PAGES:
            refuse(errno.EINVAL)
        old = self._slots.get(region.slot)
        if not size:
            self._delete(old)
        elif old is not None:
            self._change(old, region)
        else:
            self._create(region)
        self._vm.memory_changed(code=True)

    def remove_all(self) -> None:
        """The VM is gone."""
        for slot in list(self._slots.values()):
            self._delete(slot)

    def _check_flags(self, flags: int) -> None:
        known = lib.KVM_MEM_LOG_DIRTY_PAGES
        gmem = flags & lib.KVM_MEM_GUEST_MEMFD
        if self._vm.guest_memfd_slots:
            known |= lib.KVM_MEM_GUEST_MEMFD
        if gmem:
            known &= ~lib.KVM_MEM_LOG_DIRTY_PAGES
        if not self._vm.has_protected_state and not gmem:
            known |= lib.KVM_MEM_READONLY
        if flags & ~known:
            refuse(errno.EINVAL)

    def _delete(self, old: Slot | None) -> None:
        if old is None:
            refuse(errno.EINVAL)
        if old.gmem is not None:
            # The file keeps its pages, and what the RMP says of them.
            old.gmem.bindings.remove(old)
        self._remove(old)

    def _add(self, slot: Slot) -> None:
        self._slots[slot.id] = slot
        bisect.insort(self._by_gfn[slot.id >> 16], slot, key=_base_gfn)

    def _remove(self, slot: Slot) -> None:
        del self._slots[slot.id]
        slots = self._by_gfn[slot.id >> 16]
        del slots[bisect.bisect_left(slots, slot.base_gfn, key=_base_gfn)]

    def _change(self, old: Slot, region: Any) -> None:
        """Only the place in guest memory and the dirty log can change."""
        if old.can_be_private or region.flags & lib.KVM_MEM_GUEST_MEMFD:
            refuse(errno.EINVAL)
        same = old.hva == region.userspace_addr
        same &= old.npages == region.memory_size // PAGE_SIZE
        if not same or (old.flags ^ region.flags) & lib.KVM_MEM_READONLY:
            refuse(errno.EINVAL)
        moved = replace(old, base_gfn=region.guest_phys_addr // PAGE_SIZE, flags=region.flags)
        if moved.base_gfn != old.base_gfn:
            self._check_overlap(old.id, moved.base_gfn, moved.npages)
            self._check_place(moved)
        self._set_log(moved)
        self._remove(old)
        self._add(moved)

    def _create(self, region: Any) -> None:
        base, npages = region.guest_phys_addr // PAGE_SIZE, region.memory_size // PAGE_SIZE
        self._check_overlap(region.slot, base, npages)
        slot = Slot(region.slot, region.flags, base, npages, region.userspace_addr)
        if slot.can_be_private:
            gmem = self._gmem(region.guest_memfd, region.guest_memfd_offset, npages)
            slot.gmem, slot.gmem_first = gmem, region.guest_memfd_offset // PAGE_SIZE
        self._check_place(slot)
        if slot.gmem is not None:
            slot.gmem.bindings.append(slot)
        self._set_log(slot)
        self._add(slot)

    def _set_log(self, slot: Slot) -> None:
        """kvm_prepare_memory_region(): a log begins, goes on or ends."""
        if not slot.flags & lib.KVM_MEM_LOG_DIRTY_PAGES:
            slot.dirty = None
        elif slot.dirty is None:
            all_dirty = bool(self.manual_dirty_log & lib.KVM_DIRTY_LOG_INITIALLY_SET)
            slot.dirty = DirtyBitmap(slot.npages, all_dirty=all_dirty)

    def _gmem(self, fd: int, offset: int, npages: int) -> GuestMemfd:
        gmem = self._vm.host.fds.get_kind(fd, GuestMemfd, errno.EINVAL)
        if gmem.vm is not self._vm or offset + npages * PAGE_SIZE > gmem.size:
            refuse(errno.EINVAL)
        if gmem.overlaps(offset // PAGE_SIZE, npages):
            refuse(errno.EINVAL)
        return gmem

    def _check_place(self, slot: Slot) -> None:
        """kvm_arch_prepare_memory_region(): the CPU must be able to address it."""
        if slot.end_gfn > 1 << self._vm.host.phys_bits - 12:
            refuse(errno.EINVAL)

    def _check_overlap(self, slot_id: int, base: int, npages: int) -> None:
        slots = self._by_gfn[slot_id >> 16]
        first = max(0, bisect.bisect_right(slots, base, key=_base_gfn) - 1)
        end = bisect.bisect_left(slots, base + npages, key=_base_gfn)
        for other in slots[first:end]:
            if other.id != slot_id and base < other.end_gfn:
                refuse(errno.EEXIST)


def _base_gfn(slot: Slot) -> int:
    return slot.base_gfn


def _holding(slots: list[Slot], gfn: int) -> Slot | None:
    at = bisect.bisect_right(slots, gfn, key=_base_gfn) - 1
    return slots[at] if at >= 0 and gfn < slots[at].end_gfn else None


class Attributes:
    """Which guest frames are private: disjoint, sorted ranges."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._ranges: list[tuple[int, int]] = []
        self.on_change: Callable[[int, int, bool], object] | None = None
        """Told GPA and size of a range, and whether it is private now."""

    def is_private(self, gfn: int) -> bool:
        """Whether a frame has KVM_MEMORY_ATTRIBUTE_PRIVATE."""
        at = bisect.bisect_right(self._ranges, (gfn, _U64)) - 1
        return at >= 0 and gfn < self._ranges[at][1]

    def set(self, attributes: Any) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        address, size = attributes.address, attributes.size
        if attributes.flags or attributes.attributes & ~self._vm.memory_attributes:
            refuse(errno.EINVAL)
        if not size or address + size > _U64:
            refuse(errno.EINVAL)
        if address % PAGE_SIZE or size % PAGE_SIZE:
            refuse(errno.EINVAL)
        first, end = address // PAGE_SIZE, (address + size) // PAGE_SIZE
        kept = [(a, b) for low, high in self._ranges for a, b in _outside(low, high, first, end)]
        if attributes.attributes:
            kept.append((first, end))
        self._ranges = sorted(kept)
        if self.on_change is not None:
            self.on_change(address, size, bool(attributes.attributes))
        self._vm.memory_changed()


def _outside(low: int, high: int, first: int, end: int) -> list[tuple[int, int]]:
    """What of [low, high) is left without [first, end)."""
    pieces = [(low, min(high, first)), (max(low, end), high)]
    return [(a, b) for a, b in pieces if a < b]
