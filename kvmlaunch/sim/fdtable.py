"""The simulated kernel's file descriptor table."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from threading import RLock

__all__ = ["FIRST_FD", "FdTable", "File"]

FIRST_FD = 10000
"""Lowest virtual descriptor: high enough that no real one is mistaken for it."""

_FALLOCATE_MODES = frozenset(
    {
        0,
        lib.KL_FALLOC_KEEP_SIZE,
        lib.KL_FALLOC_KEEP_SIZE | lib.KL_FALLOC_PUNCH_HOLE,
        lib.KL_FALLOC_COLLAPSE_RANGE,
        lib.KL_FALLOC_ZERO_RANGE,
        lib.KL_FALLOC_KEEP_SIZE | lib.KL_FALLOC_ZERO_RANGE,
        lib.KL_FALLOC_INSERT_RANGE,
        lib.KL_FALLOC_UNSHARE_RANGE,
        lib.KL_FALLOC_KEEP_SIZE | lib.KL_FALLOC_UNSHARE_RANGE,
    }
)

_FileT = TypeVar("_FileT", bound="File")


class File:
    """An open file. Calls that a kind of file doesn't have fail as the kernel's do."""

    name = "file"

    def ioctl(self, request: int, arg: int) -> int:
        """ioctl(2) on this file."""
        refuse(errno.ENOTTY)

    def ioctl_names(self, request: int, arg: int) -> tuple[str, ...]:
        """The kernel's names of a call, for ordered faults: the ioctl, then its command."""
        return ()

    def locks(self, request: int, arg: int) -> Sequence[RLock]:
        """What a call holds besides the platform's lock, taken before it and in this order."""
        return ()

    def fallocate(self, mode: int, offset: int, length: int) -> int:
        """fallocate(2): what vfs_fallocate() checks before it asks the file."""
        if offset < 0 or length <= 0:
            refuse(errno.EINVAL)
        if mode not in _FALLOCATE_MODES:
            refuse(errno.EOPNOTSUPP)
        return self.allocate(mode, offset, length)

    def allocate(self, mode: int, offset: int, length: int) -> int:
        """fallocate(2) on this file, with a mode that the VFS knows."""
        refuse(errno.ENODEV)

    def mmap(self, length: int, offset: int) -> int:
        """mmap(2) of this file; returns the address."""
        refuse(errno.ENODEV)

    def hold(self) -> None:
        """A call begins: what it is about stays, whoever closes it (fdget)."""

    def let_go(self, *, last: bool) -> bool:
        """It has ended (fdput). False, and nothing done, where ``last`` must be but isn't set."""
        return True

    def release(self) -> None:
        """The last reference is gone."""


class FdTable:
    """Descriptor number -> file; the lowest free number is used next."""

    def __init__(self) -> None:
        self._files: dict[int, File] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._files))

    def install(self, file: File) -> int:
        """Give ``file`` the lowest free number."""
        fd = FIRST_FD
        while fd in self._files:
            fd += 1
        self._files[fd] = file
        return fd

    def get(self, fd: int) -> File:
        """The file behind ``fd``; EBADF."""
        if fd not in self._files:
            refuse(errno.EBADF)
        return self._files[fd]

    def get_kind(self, fd: int, kind: type[_FileT], wrong_kind: int) -> _FileT:
        """The file behind ``fd`` if it is a ``kind``: else EBADF or ``wrong_kind``."""
        file = self.get(fd)
        if not isinstance(file, kind):
            refuse(wrong_kind)
        return file

    def close(self, fd: int) -> None:
        """close(2)."""
        file = self.get(fd)
        del self._files[fd]
        file.release()
