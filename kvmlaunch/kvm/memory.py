"""Memory of this process that backs a guest's shared pages."""

from __future__ import annotations

import mmap

from kvmlaunch.errors import ClosedError
from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.uapi import Platform, ffi, lib

__all__ = ["HostMemory"]


class HostMemory:
    """Anonymous private memory: ``address``, ``size``, and ``view`` of its bytes.

    Nothing is allocated before it is touched.
    """

    def __init__(self, platform: Platform, size: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        result = platform.mmap(-1, size, protection, lib.KL_MAP_GUEST_RAM)
        if result.ret < 0:
            raise ioctl_error("mmap of guest memory", result.errno, fields={"size": size})
        self.platform = platform
        self.size = size
        self._address = result.ret

    @property
    def address(self) -> int:
        """Where it is mapped. Raises ClosedError."""
        if not self._address:
            raise ClosedError("guest memory")
        return self._address

    @property
    def view(self) -> memoryview:
        """The bytes, writable; not to be used after close()."""
        return memoryview(ffi.buffer(ffi.cast("char *", self.address), self.size)).cast("B")

    def discard(self, offset: int, size: int) -> None:
        """Give pages back; they read as zero afterwards."""
        result = lib.kl_discard(self.address + offset, size)
        if result.ret < 0:
            raise ioctl_error("madvise", result.err, fields={"offset": offset, "size": size})

    def close(self) -> None:
        """Unmap; nothing happens the second time."""
        address, self._address = self._address, 0
        if address:
            self.platform.munmap(address, self.size)

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
