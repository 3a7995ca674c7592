"""A VM's memory as its CPUs reach it, and as KVM itself does (mmu.c, kvm_main.c, sev.c).

Private pages are those of the guest_memfd, shared ones those at the slot's userspace_addr.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim.guest_memfd import GuestMemfd
from kvmlaunch.sim.rmp import RmpEntry
from kvmlaunch.sim.slots import Slot
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.softcpu import Missing

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["MemoryFault", "VmMemory"]


class MemoryFault(Exception):
    """KVM_EXIT_MEMORY_FAULT; ``errno`` is what KVM_RUN fails with."""

    def __init__(self, gpa: int, private: bool, code: int = errno.EFAULT) -> None:
        super().__init__(gpa, private, code)
        self.gpa = gpa
        self.private = private
        self.errno = code


class VmMemory:
    """Guest physical memory of one VM. The softcpu's `GuestMemory`, and KVM's own accesses."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def resolve(self, gpa: int, private: bool, write: bool = False) -> int | Missing:
        """Host address of a page for a CPU. A private page is assigned to the guest at once."""
        with self._vm.host.lock:
            try:
                return self._address(gpa // PAGE_SIZE, private, write)
            except (MemoryFault, OSError):
                return Missing.ABSENT

    def write_protected(self, gpa: int) -> bool:
        """Whether a shared page is read-only, or clean in the log of its slot."""
        gfn = gpa // PAGE_SIZE
        with self._vm.host.lock:
            slot = self._vm.slots.find(gfn)
            if slot is None:
                return False
            clean = slot.dirty is not None and not slot.dirty.is_dirty(gfn - slot.base_gfn)
            return clean or slot.is_read_only

    def rmp_lookup(self, gpa: int) -> RmpEntry:
        """RMP entry of the page that backs ``gpa`` privately."""
        with self._vm.host.lock:
            return self._vm.host.rmp.lookup(self._private_spa(gpa // PAGE_SIZE))

    def rmp_update(
        self,
        gpa: int,
        *,
        validated: bool | None = None,
        vmsa: bool | None = None,
        perms: tuple[int, int, int, int] | None = None,
    ) -> None:
        """What PVALIDATE and RMPADJUST change in that entry."""
        rmp = self._vm.host.rmp
        with self._vm.host.lock:
            spa = self._private_spa(gpa // PAGE_SIZE)
            old = rmp.lookup(spa)
            new = dataclasses.replace(
                old,
                validated=old.validated if validated is None else validated,
                vmsa=old.vmsa if vmsa is None else vmsa,
                perms=old.perms if perms is None else perms,
            )
            rmp.store(spa, new)

    def handle_fault(self, gpa: int, private: bool, write: bool = False) -> bool:
        """kvm_mmu_page_fault() where a CPU found no page, or one that the RMP denies it.

        True if the guest is to try again, False where it would take emulating an instruction in
        a device. Raises MemoryFault, and OSError for what KVM_RUN fails with otherwise.
        """
        # For a page that is there sev_handle_rmp_fault() has 2 MiB entries to split, no more.
        return self._address(gpa // PAGE_SIZE, private, write) is not Missing.MMIO

    def read(self, gpa: int, size: int) -> bytes:
        """kvm_read_guest(): the shared side, whatever the attribute says. Raises OSError."""
        user = self._vm.host.user
        return b"".join(user.read(address, count) for address, count in self._pieces(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        """kvm_write_guest(). Raises OSError."""
        done = 0
        for address, count in self._pieces(gpa, len(data), write=True):
            self._vm.host.user.write(address, data[done : done + count])
            done += count

    def private_page(self, gpa: int) -> int | None:
        """SPA of the page behind ``gpa``, assigned; None if there is none."""
        try:
            return self.guest_page(gpa)
        except OSError:
            return None

    def guest_page(self, gpa: int) -> int:
        """kvm_gmem_get_pfn(): SPA of the page behind ``gpa``, assigned. Raises OSError."""
        slot = self._vm.slots.find(gpa // PAGE_SIZE)
        if slot is None or slot.gmem is None:
            refuse(errno.EINVAL if slot is None else errno.EFAULT)
        return self._prepared(slot, slot.gmem, gpa // PAGE_SIZE)

    def _address(self, gfn: int, private: bool, write: bool) -> int | Missing:
        """kvm_faultin_pfn(), check by check."""
        vm = self._vm
        slot = vm.slots.find(gfn)
        if private != vm.attributes.is_private(gfn):
            raise MemoryFault(gfn * PAGE_SIZE, private)
        if not private:
            if slot is None or (write and slot.is_read_only):
                return Missing.MMIO
            host = vm.host.user.pin(_user_address(slot, gfn))
            if write and slot.dirty is not None:
                slot.dirty.mark(gfn - slot.base_gfn)
            return host
        if slot is None or slot.gmem is None:
            raise MemoryFault(gfn * PAGE_SIZE, private)
        try:
            self._prepared(slot, slot.gmem, gfn)
        except OSError as error:
            raise MemoryFault(gfn * PAGE_SIZE, private, error.errno or errno.EFAULT) from None
        return slot.gmem.address(_file_index(slot, gfn))

    def _prepared(self, slot: Slot, gmem: GuestMemfd, gfn: int) -> int:
        """The page, assigned to the guest if it wasn't (sev_gmem_prepare)."""
        vm = self._vm
        index = _file_index(slot, gfn)
        spa = gmem.spa(index)
        rmp, asid = vm.host.rmp, vm.sev.asid
        assigned = rmp.lookup(spa).assigned
        if not assigned and rmp.make_private(spa, gfn * PAGE_SIZE, asid, immutable=False):
            refuse(errno.EINVAL)
        gmem.populated.add(index)
        return spa

    def _private_spa(self, gfn: int) -> int:
        slot = self._vm.slots.find(gfn)
        if slot is None or slot.gmem is None:
            raise ValueError(f"GPA {gfn * PAGE_SIZE:#x} has no private page")
        return slot.gmem.spa(_file_index(slot, gfn))

    def _pieces(self, gpa: int, size: int, *, write: bool = False) -> Iterator[tuple[int, int]]:
        """User addresses and sizes of a range, page by page. Raises OSError(EFAULT)."""
        while size:
            offset = gpa % PAGE_SIZE
            count = min(size, PAGE_SIZE - offset)
            slot = self._vm.slots.find(gpa // PAGE_SIZE)
            if slot is None or (write and slot.is_read_only):
                refuse(errno.EFAULT)
            yield _user_address(slot, gpa // PAGE_SIZE) + offset, count
            if write and slot.dirty is not None:
                slot.dirty.mark(gpa // PAGE_SIZE - slot.base_gfn)
            gpa, size = gpa + count, size - count


def _user_address(slot: Slot, gfn: int) -> int:
    return slot.hva + (gfn - slot.base_gfn) * PAGE_SIZE


def _file_index(slot: Slot, gfn: int) -> int:
    return slot.gmem_first + gfn - slot.base_gfn
