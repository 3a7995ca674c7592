"""Which pages of a slot were written (virt/kvm/kvm_main.c: the dirty bitmap and its ioctls)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.slots import Slot
    from kvmlaunch.sim.vm import Vm

__all__ = ["DirtyBitmap", "clear_dirty_log", "enable_manual_protect", "get_dirty_log"]

_LONG = 64  # bits of a word of the bitmap


class DirtyBitmap:
    """A bit per page of a slot; a page whose bit is clear is write-protected."""

    def __init__(self, npages: int, *, all_dirty: bool) -> None:
        self._bits = bytearray(_bytes(npages))
        if all_dirty:
            self._bits[:] = ((1 << npages) - 1).to_bytes(len(self._bits), "little")

    def mark(self, page: int) -> None:
        """The page is written."""
        self._bits[page >> 3] |= 1 << (page & 7)

    def is_dirty(self, page: int) -> bool:
        """Whether it was written since its bit was cleared."""
        return bool(self._bits[page >> 3] >> (page & 7) & 1)

    def content(self) -> bytes:
        """What user space gets: little endian words of 64 bits."""
        return bytes(self._bits)

    def clear(self, first_page: int, bits: bytes) -> bool:
        """Clear those that are set in ``bits``, from a word's first page on; True if any was."""
        at = slice(first_page // 8, first_page // 8 + len(bits))
        old = int.from_bytes(self._bits[at], "little")
        new = old & ~int.from_bytes(bits, "little")
        self._bits[at] = new.to_bytes(len(bits), "little")
        return new != old


def enable_manual_protect(vm: Vm, options: int) -> None:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""
    allowed = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    if options & allowed:
        allowed |= lib.KVM_DIRTY_LOG_INITIALLY_SET
    if options & ~allowed:
        refuse(errno.EINVAL)
    vm.slots.manual_dirty_log = options


def get_dirty_log(vm: Vm, log: Any) -> None:
    """KVM_GET_DIRTY_LOG: the bits, which are clear afterwards unless they are cleared by hand."""
    vm.slots.check_id(log.slot)
    _, dirty = _logged(vm, log.slot)
    # Who reads the pages that are dirty now must find there what the guest wrote.
    vm.sync_user_memory()
    bits = dirty.content()
    if not vm.slots.manual_dirty_log and dirty.clear(0, bits):
        vm.memory_changed()
    vm.host.user.write(log.dirty_bitmap, bits)


def clear_dirty_log(vm: Vm, log: Any) -> None:
    """KVM_CLEAR_DIRTY_LOG."""
    vm.slots.check_id(log.slot)
    first, count = log.first_page, log.num_pages
    if first % _LONG:
        refuse(errno.EINVAL)
    slot, dirty = _logged(vm, log.slot)
    left = slot.npages - first
    if count > left or (count < left and count % _LONG):
        refuse(errno.EINVAL)
    bits = vm.host.user.read(log.dirty_bitmap, _bytes(count))
    vm.sync_user_memory()
    if dirty.clear(first, bits):
        vm.memory_changed()


def _logged(vm: Vm, slot_id: int) -> tuple[Slot, DirtyBitmap]:
    slot = vm.slots.get(slot_id)
    if slot is None or slot.dirty is None:
        refuse(errno.ENOENT)
    return slot, slot.dirty


def _bytes(npages: int) -> int:
    return -(-npages // _LONG) * _LONG // 8
