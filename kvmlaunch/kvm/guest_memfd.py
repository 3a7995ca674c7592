"""guest_memfd: private memory of a guest."""

from __future__ import annotations

from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.kvm.descriptor import Descriptor
from kvmlaunch.uapi import Platform, lib

__all__ = ["GuestMemfd"]


class GuestMemfd(Descriptor):
    """A guest_memfd file (KVM_CREATE_GUEST_MEMFD). ``size`` in bytes."""

    def __init__(self, platform: Platform, fd: int, size: int) -> None:
        super().__init__(platform, fd, "guest_memfd")
        self.size = size

    def allocate(self, offset: int, length: int) -> None:
        """Allocate pages now (fallocate)."""
        self._fallocate(lib.KL_FALLOC_KEEP_SIZE, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Free pages (fallocate PUNCH_HOLE); they read as zero when next used."""
        self._fallocate(lib.KL_FALLOC_KEEP_SIZE | lib.KL_FALLOC_PUNCH_HOLE, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        result = self.platform.fallocate(self.fd, mode, offset, length)
        if result.ret < 0:
            fields = {"mode": mode, "offset": offset, "length": length}
            raise ioctl_error("fallocate guest_memfd", result.errno, fields=fields)
