"""The descriptors that supervised processes have: memfds stand in for the kernel's files.

A memfd is known by its inode, so that dup, fork, SCM_RIGHTS and close need no help, and an
inotify watch tells when nobody has it open any more, or mapped.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.sim.fdtable import FdTable, File
from kvmlaunch.sim.guest_memfd import GuestMemfd
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.sim.vcpu import VcpuFile
from kvmlaunch.supervisor.clients import Clients
from kvmlaunch.supervisor.memory import new_memfd
from kvmlaunch.uapi import ffi, lib

__all__ = ["ClientFds"]

_EVENTS_AT_ONCE = 256
_NO_FD = (1 << 31) - 1

# Open for ioctl alone: neither to read nor to write (open(2), "File access mode" 3).
_IOCTL_ONLY = 3


class _StandIn(NamedTuple):
    file: File
    inode: int
    watch: int
    memfd: int


class ClientFds(FdTable):
    """Descriptor of a client -> the simulated kernel's file.

    ``kernel`` is what /proc shows of a file beside its kind: what is simulated.
    Raises OSError where this process can have no descriptor more, KvmLaunchError where its
    user can have no inotify instance more.
    """

    def __init__(self, clients: Clients, kernel: str) -> None:
        super().__init__()
        self._clients = clients
        self._kernel = kernel
        self._by_inode: dict[int, _StandIn] = {}
        self._by_watch: dict[int, _StandIn] = {}
        self._opens: dict[int, int] = {}
        self._lock = threading.RLock()
        probe = new_memfd("probe", 0)
        self.device = os.fstat(probe).st_dev
        os.close(probe)
        created = lib.kl_watch_new()
        if created.ret < 0:
            # Far from a limit of this process, it is that of its user's.
            why = os.strerror(created.err)
            raise KvmLaunchError(f"inotify_init: {why} (fs.inotify.max_user_instances?)")
        self.watch = int(created.ret)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._by_inode))

    def install(self, file: File) -> int:
        """Give the caller a descriptor; its number there. Raises OSError."""
        try:
            fd = self._stand_in(file)
        except OSError:
            file.release()
            raise
        return self._give(fd)

    def _give(self, fd: int) -> int:
        """Give the caller a descriptor of ours, which is closed here."""
        call = self._clients.call
        try:
            result = lib.kl_give_fd(self._clients.listener, call.id, fd, call.cloexec)
        finally:
            os.close(fd)
        if result.ret < 0:
            refuse(result.err)
        return int(result.ret)

    def give_text(self, content: str) -> int:
        """Give the caller a file to read. Raises OSError."""
        memfd = new_memfd("parameter", len(content))
        try:
            os.pwrite(memfd, content.encode("ascii"), 0)
            fd = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(memfd)
        return self._give(fd)

    def get(self, fd: int) -> File:
        """The file behind a descriptor of the caller; EBADF."""
        call = self._clients.call
        if fd == call.fd:
            return self._file(call.inode) or File()
        return self.find(call.thread.tid, fd) or File()

    def find(self, tid: int, fd: int) -> File | None:
        """The file behind a descriptor of a thread, None if it isn't simulated; EBADF."""
        # A struct may hold any number; no descriptor is above INT_MAX.
        result = lib.kl_memfd_inode(self.device, tid, min(fd, _NO_FD))
        if result.ret < 0:
            refuse(errno.EBADF)
        return self._file(result.ret)

    def _file(self, inode: int) -> File | None:
        with self._lock:
            known = self._by_inode.get(inode)
        return None if known is None else known.file

    def has(self, inode: int) -> bool:
        """Whether the memfd with that inode stands in for a file."""
        return inode in self._by_inode

    def close(self, fd: int) -> None:
        """Drop the file whose memfd has the inode ``fd``, as __iter__ gives them."""
        with self._lock:
            file = self._forget(self._by_inode[fd])
        file.release()

    def released(self) -> list[File]:
        """Files that nobody has open any more, since this was asked last."""
        released = []
        with self._lock:
            for watch, mask in self._events():
                if watch not in self._by_watch:
                    continue
                self._opens[watch] += 1 if mask & lib.KL_IN_OPEN else -1
                if self._opens[watch] <= 0:
                    released.append(self._forget(self._by_watch[watch]))
        return released

    def shut(self) -> None:
        """Close the watch."""
        os.close(self.watch)

    def _stand_in(self, file: File) -> int:
        """A new descriptor of this process, of a memfd that stands in for ``file``."""
        if isinstance(file, VcpuFile):
            assert file.vcpu.run_pages.fd is not None
            memfd, mode = os.dup(file.vcpu.run_pages.fd), os.O_RDWR
        else:
            size = file.size if isinstance(file, GuestMemfd) else 0
            name = f"{file.name},{self._kernel}"
            memfd, mode = new_memfd(name, size), _IOCTL_ONLY
        path = f"/proc/self/fd/{memfd}"
        with self._lock:
            watch = lib.kl_watch_add(self.watch, path.encode(), lib.KL_IN_OPEN | lib.KL_IN_CLOSE)
            if watch.ret < 0:
                os.close(memfd)
                refuse(errno.ENFILE)  # ENOSPC: no more watches
            known = _StandIn(file, os.fstat(memfd).st_ino, int(watch.ret), memfd)
            self._by_inode[known.inode] = self._by_watch[known.watch] = known
            self._opens[known.watch] = 0
            try:
                return os.open(path, mode | os.O_CLOEXEC)
            except OSError:
                self._forget(known)
                raise

    def _events(self) -> Iterator[tuple[int, int]]:
        """Watch and what happened, for every event that waits."""
        events = ffi.new("struct kl_event[]", _EVENTS_AT_ONCE)
        while count := lib.kl_watch_read(self.watch, events, _EVENTS_AT_ONCE):
            yield from [(event.watch, event.mask) for event in events[0:count]]

    def _forget(self, known: _StandIn) -> File:
        lib.kl_watch_remove(self.watch, known.watch)
        os.close(known.memfd)
        del self._by_inode[known.inode], self._by_watch[known.watch], self._opens[known.watch]
        return known.file
