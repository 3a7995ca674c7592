"""SNP_LAUNCH_UPDATE: page after page until one fails (sev.c, guest_memfd.c: kvm_gmem_populate)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.sim.guest_memfd import GuestMemfd
from kvmlaunch.sim.sevdev import SevDevice
from kvmlaunch.sim.slots import Slot
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["launch_update"]

# Fields of a VMSA (APM 2): what KVM looks at in a page of user space.
_VMPL = 0xCA
_SEV_FEATURES = slice(0x3B0, 0x3B8)

_TYPES = frozenset(
    {
        lib.KVM_SEV_SNP_PAGE_TYPE_NORMAL,
        lib.KVM_SEV_SNP_PAGE_TYPE_ZERO,
        lib.KVM_SEV_SNP_PAGE_TYPE_UNMEASURED,
        lib.KVM_SEV_SNP_PAGE_TYPE_SECRETS,
        lib.KVM_SEV_SNP_PAGE_TYPE_CPUID,
    }
)


def launch_update(vm: Vm, command: Any) -> None:
    """Check the call, then measure pages; one page done is success."""
    sev, profile, user = vm.sev, vm.host.profile, vm.host.user
    if not sev.is_snp or sev.context is None:
        refuse(errno.EINVAL)
    update = copy_in(user, "kvm_sev_snp_launch_update", command.data)
    is_vmsa = profile.vmsa.is_vmsa(update.type)
    if update.len % PAGE_SIZE or update.flags or not (is_vmsa or update.type in _TYPES):
        refuse(errno.EINVAL)
    if not update.len and not profile.update_zero_length:
        refuse(errno.EINVAL)
    if is_vmsa:
        _check_vmsa_update(vm, update)
    has_source = update.type != lib.KVM_SEV_SNP_PAGE_TYPE_ZERO
    if has_source and profile.update_aligned_source and update.uaddr % PAGE_SIZE:
        refuse(errno.EINVAL)
    slot = vm.slots.find(update.gfn_start)
    if slot is None or not slot.can_be_private:
        refuse(errno.EINVAL)
    done = _Populate(vm, slot, update, command).run()
    if is_vmsa and profile.vmsa.generation == "page":
        sev.launch_vmsa_gpa = update.gfn_start * PAGE_SIZE
    update.gfn_start += done
    update.len -= done * PAGE_SIZE
    if has_source:
        update.uaddr = update.uaddr + done * PAGE_SIZE & (1 << 64) - 1
    copy_out(user, command.data, update)


def _check_vmsa_update(vm: Vm, update: Any) -> None:
    """VMSA pages: what the call itself must be like."""
    sev, rules = vm.sev, vm.host.profile.vmsa
    if rules.one_page_per_update and update.len != PAGE_SIZE:
        refuse(errno.EINVAL)
    if rules.page_needs_capability and not sev.direct_vmsa:
        refuse(errno.EINVAL)
    if sev.launch_vmsa_gpa is not None and rules.second_page_errno:
        refuse(rules.second_page_errno)


class _PageFailed(Exception):
    """This page can't be done; ``status`` is firmware's word, 0 where it wasn't asked."""

    def __init__(self, status: int = 0) -> None:
        super().__init__(status)
        self.status = status


class _BadVmsa(_PageFailed):
    """KVM itself doesn't take this VMSA; firmware's word isn't written."""


class _Populate:
    """One UPDATE's walk over the pages of one slot."""

    def __init__(self, vm: Vm, slot: Slot, update: Any, command: Any) -> None:
        self._vm = vm
        self._slot = slot
        self._command = command
        self._first: int = update.gfn_start
        self._npages: int = min(update.len // PAGE_SIZE, slot.end_gfn - update.gfn_start)
        self._is_vmsa = vm.host.profile.vmsa.is_vmsa(update.type)
        self._type = int(PageType.VMSA if self._is_vmsa else update.type)
        self._source = update.uaddr if update.type != lib.KVM_SEV_SNP_PAGE_TYPE_ZERO else None

    def run(self) -> int:
        """Pages done. EIO and the status word if it is none because the first one failed."""
        stop = self._vm.host.faults.update_stop()
        for done in range(self._npages):
            try:
                if done == stop or self._slot.gmem is None:
                    raise _PageFailed
                self._page(self._slot.gmem, done)
            except _PageFailed as failure:
                if done:
                    # The cause is lost: the caller sees it when it goes on from here.
                    return done
                if isinstance(failure, _BadVmsa):
                    refuse(self._vm.host.profile.vmsa.bad_page_errno)
                self._command.error = failure.status
                refuse(errno.EIO)
        return self._npages

    def _page(self, gmem: GuestMemfd, number: int) -> None:
        host = self._vm.host
        gfn = self._first + number
        index = self._slot.gmem_first + gfn - self._slot.base_gfn
        try:
            spa = gmem.spa(index)
        except OSError:
            raise _PageFailed from None
        if host.profile.update_prepared_check and index in gmem.populated:
            raise _PageFailed
        if not self._vm.attributes.is_private(gfn) or host.rmp.lookup(spa).assigned:
            raise _PageFailed
        self._copy_source(spa, number)
        if self._is_vmsa:
            self._check_vmsa(host.memory.page(spa))
        if host.rmp.make_private(spa, gfn * PAGE_SIZE, self._vm.sev.asid, immutable=True):
            raise _PageFailed
        status = self._encrypt(spa)
        if status is not None:
            self._undo(spa, number, status)
            raise _PageFailed(status)
        gmem.populated.add(index)

    def _copy_source(self, spa: int, number: int) -> None:
        if self._source is None:
            return
        address = self._source + number * PAGE_SIZE
        if not self._source or address >> 64:
            raise _PageFailed
        try:
            self._vm.host.memory.page(spa)[:] = self._vm.host.user.read(address, PAGE_SIZE)
        except OSError:
            raise _PageFailed from None

    def _check_vmsa(self, page: memoryview) -> None:
        """The rest of it is the guest's business."""
        features = int.from_bytes(page[_SEV_FEATURES], "little")
        if page[_VMPL] or features != self._vm.sev.features:
            raise _BadVmsa

    def _encrypt(self, spa: int) -> int | None:
        """Give the page to firmware: None if taken, else its status (0: it wasn't asked)."""
        host, context = self._vm.host, self._vm.sev.context
        assert context is not None
        try:
            host.fds.get_kind(self._command.sev_fd, SevDevice, errno.EBADF)
        except OSError:
            return 0
        return host.psp.launch_update(context, spa, self._type) or None

    def _undo(self, spa: int, number: int, status: int) -> None:
        """Take the page back; a CPUID page goes to the caller as firmware corrected it."""
        reclaimed = self._vm.sev.reclaim(spa)
        rejected = status == lib.SEV_RET_INVALID_PARAM
        if reclaimed and rejected and self._type == lib.KVM_SEV_SNP_PAGE_TYPE_CPUID:
            assert self._source is not None
            page = bytes(self._vm.host.memory.page(spa))
            try:
                self._vm.host.user.write(self._source + number * PAGE_SIZE, page)
            except OSError:
                return  # the kernel only logs it
