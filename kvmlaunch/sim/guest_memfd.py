"""guest_memfd: the file behind a slot's private pages (virt/kvm/guest_memfd.c)."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim.fdtable import File
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import address_of, ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.slots import Slot
    from kvmlaunch.sim.vm import Vm

__all__ = ["GuestMemfd"]

_ALLOCATE = lib.KL_FALLOC_KEEP_SIZE
_PUNCH = lib.KL_FALLOC_KEEP_SIZE | lib.KL_FALLOC_PUNCH_HOLE

_MAX_SIGNED = (1 << 63) - 1


class GuestMemfd(File):
    """A file of private pages. A page is absent, present, or present and populated.

    Present pages are zero until somebody fills them; populated ones ("prepared" in
    the kernel) have been given to the guest by LAUNCH_UPDATE.
    """

    name = "guest_memfd"

    def __init__(self, vm: Vm, size: int, flags: int) -> None:
        if flags & ~vm.guest_memfd_flags:
            refuse(errno.EINVAL)
        if not 0 < size <= _MAX_SIGNED or size % PAGE_SIZE:
            refuse(errno.EINVAL)
        self.vm = vm
        self.size = size
        self.flags = flags
        self.closed = False
        self.bindings: list[Slot] = []
        self.present: set[int] = set()
        self.populated: set[int] = set()
        self._mapping: mmap.mmap | None = None
        self._base = 0
        vm.get()

    def spa(self, index: int) -> int:
        """Physical address of page ``index``, made present. Raises OSError(ENOMEM)."""
        if self._mapping is None:
            # Mapped on first use: a file may be bigger than what this process can map.
            try:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                self._mapping = mmap.mmap(-1, self.size, flags=flags)
            except (OSError, OverflowError, ValueError):
                refuse(errno.ENOMEM)
            self._base = self.vm.host.memory.map_region(self._mapping)
        self.present.add(index)
        return self._base + index * PAGE_SIZE

    def address(self, index: int) -> int:
        """Where this process has page ``index``, made present. Raises OSError(ENOMEM)."""
        offset = self.spa(index) - self._base
        assert self._mapping is not None
        return address_of(ffi.from_buffer(self._mapping)) + offset

    def allocate(self, mode: int, offset: int, length: int) -> int:
        """Preallocate, or punch a hole: free pages and take them from the guest."""
        # vfs_fallocate(), then kvm_gmem_fallocate().
        if offset + length > _MAX_SIGNED:
            refuse(errno.EFBIG)
        if mode not in (_ALLOCATE, _PUNCH):
            refuse(errno.EOPNOTSUPP)
        if offset % PAGE_SIZE or length % PAGE_SIZE:
            refuse(errno.EINVAL)
        first, end = offset // PAGE_SIZE, (offset + length) // PAGE_SIZE
        if mode == _PUNCH:
            self._punch(first, end)
            self.vm.memory_changed(code=True)
        elif offset + length > self.size:
            refuse(errno.EINVAL)
        else:
            for index in range(first, end):
                self.spa(index)
        return 0

    def release(self) -> None:
        """The descriptor is closed: slots lose their private side, pages are freed."""
        self.closed = True
        for slot in self.bindings:
            slot.gmem = None
        self.bindings.clear()
        self._punch(0, self.size // PAGE_SIZE)
        self.vm.memory_changed(code=True)
        if self._mapping is not None:
            self.vm.host.memory.unmap_region(self._base)
            self._mapping = None
        self.vm.put()

    def overlaps(self, first: int, npages: int) -> bool:
        """Whether pages of the range are bound to a slot already."""
        return any(
            first < slot.gmem_first + slot.npages and slot.gmem_first < first + npages
            for slot in self.bindings
        )

    def mark_shared(self, spa: int) -> None:
        """sev_gmem_invalidate(): a page that the RMP won't give back stays as it is."""
        rmp = self.vm.host.rmp
        if rmp.lookup(spa).assigned:
            rmp.make_shared(spa)

    def _punch(self, first: int, end: int) -> None:
        pages = [index for index in self.present if first <= index < end]
        for index in pages:
            self.mark_shared(self._base + index * PAGE_SIZE)
            self.present.discard(index)
            self.populated.discard(index)
        last = min(end, self.size // PAGE_SIZE)
        if pages and self._mapping is not None:
            offset, length = first * PAGE_SIZE, (last - first) * PAGE_SIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, offset, length)
