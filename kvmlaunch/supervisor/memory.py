"""Memory of supervised processes, as the simulated kernel and its CPUs use it.

A CPU needs pages at an address of this process, where a client's anonymous memory can't be
mapped. So it works on copies: what either side changed is brought to the other when a vCPU
enters and leaves KVM_RUN, and between when the client has called or some time has passed.
A client that doesn't wait for either, but polls, may see what a guest wrote in another order.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
import time
from typing import Any

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim.uaccess import Eventfd, RunPages, own_eventfd, refuse
from kvmlaunch.supervisor.clients import Clients, ClientThread
from kvmlaunch.uapi import address_of, ffi, lib

__all__ = ["ClientMemory", "new_memfd"]

_CHUNK_PAGES = 512
_RESERVED = 128
_MERGE_SECONDS = 0.005
_MOST_PASSES = 3
"""A client that writes all the time would have it go on for ever."""
_REST = 9
"""How long a running guest is left alone after a merge, as a multiple of what that took."""


class ClientMemory:
    """The process whose call this thread answers. The simulated host's `UserSpace`."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._copies: dict[int, _Copies] = {}
        self._pages = _Pages()
        self._lock = threading.Lock()

    @property
    def mm(self) -> int:
        """Number of the address space."""
        return self._clients.call.thread.space.number

    @property
    def caller(self) -> ClientThread:
        """The client's thread."""
        return self._clients.call.thread

    def read(self, address: int, size: int) -> bytes:
        """Copy from the client, or from the copies that its guest works on."""
        if not size:
            return b""
        self._sync_range(address, size)
        pieces = [
            self._clients.call.read(at, count) if here is None else _read_here(here, count)
            for at, here, count in self._pieces(address, size)
        ]
        return b"".join(pieces)

    def write(self, address: int, data: bytes) -> None:
        """Copy to the client, and to the copies that its guest works on."""
        done = 0
        self._sync_range(address, len(data))
        for at, here, count in self._pieces(address, len(data)):
            part = data[done : done + count]
            if here is None:
                self._clients.call.write(at, part)
            else:
                ffi.memmove(ffi.cast("char *", here), part, count)
            done += count
        self._sync_range(address, len(data))

    def pin(self, address: int) -> int:
        """Where the copy of a page is."""
        with self._lock:
            copies = self._copies.setdefault(self.mm, _Copies())
            here = copies.find(address)
            if here is None:
                here = copies.add(address, self._clients.call.read(address, PAGE_SIZE), self._pages)
            return here

    def forget(self) -> None:
        """Bring what the guest wrote to the client, and drop the copies."""
        self.sync()
        with self._lock:
            copies = self._copies.pop(self.mm, None)
            if copies is not None:
                copies.drop(self._pages)

    def sync(self) -> bool:
        """Bring changes of either side to the other."""
        with self._lock:
            copies = self._copies.get(self.mm)
            # Once the caller is gone, its number may be another program's, as after an exec.
            if copies is None or not self._clients.still_waits():
                return False
            copies.calls = self._clients.calls
            return copies.merge(self.caller.tid, self._pages)

    def wants_sync(self, *, idle: bool) -> bool:
        """Whether a guest that runs on should be stopped for it; ``idle``: it waits, anyway."""
        copies = self._copies.get(self.mm)
        if copies is None:
            return False
        called = copies.calls != self._clients.calls
        return idle or called or time.monotonic() >= copies.next_merge

    def has_written(self) -> None:
        """It counts as a call."""
        self._clients.calls += 1

    def forget_signals(self) -> None:
        """A signal that came before the call has been handled by now."""
        self.caller.look_soon()

    def signal_pending(self, mask: int | None) -> bool:
        """Whether a signal waits for the client's thread, which may be gone; looks seldom."""
        if mask is None and not self.caller.is_time_to_look():
            return False
        try:
            return not self._clients.still_waits() or self._clients.signal_pending(mask)
        except OSError:
            return True

    def eventfd(self, fd: int) -> Eventfd:
        """A duplicate of the client's, by pidfd_getfd(2)."""
        taken = lib.kl_take_fd(self.caller.process, fd)
        if taken.ret < 0:
            refuse(taken.err)
        keep_reserve(taken.ret)
        return own_eventfd(int(taken.ret))

    def new_run_pages(self, size: int) -> RunPages:
        """A memfd, which is what the client maps."""
        fd = new_memfd("kvm-vcpu", size)
        result = lib.kl_mmap(fd, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, 0)
        if result.ret == -1:
            os.close(fd)
            refuse(result.err)
        return RunPages(result.ret, fd)

    def free_run_pages(self, pages: RunPages, size: int) -> None:
        """Unmap and close it."""
        lib.kl_munmap(pages.address, size)
        if pages.fd is not None:
            os.close(pages.fd)

    def forget_dead(self) -> None:
        """Drop the copies of processes that have ended."""
        alive = {space.number for space in self._clients.spaces()}
        with self._lock:
            for mm in self._copies.keys() - alive:
                self._copies.pop(mm).drop(self._pages)

    def _sync_range(self, address: int, size: int) -> None:
        """`sync` for the copies of a range. Raises OSError(EFAULT) where one was lost."""
        if not self._clients.still_waits():
            refuse(errno.EFAULT)  # as there; nobody gets to see it
        with self._lock:
            copies = self._copies.get(self.mm)
            if copies is not None and not copies.merge_range(self.caller.tid, address, size):
                refuse(errno.EFAULT)

    def _pieces(self, address: int, size: int) -> list[tuple[int, int | None, int]]:
        """Address, address of the copy if there is one, and size; copies page by page."""
        copies = self._copies.get(self.mm)
        if not copies:
            return [(address, None, size)]
        pieces = []
        while size:
            offset = address % PAGE_SIZE
            count = min(size, PAGE_SIZE - offset)
            here = copies.find(address - offset)
            pieces.append((address, None if here is None else here + offset, count))
            address, size = address + count, size - count
        return pieces


class _Copies:
    """Copied pages of one address space."""

    def __init__(self) -> None:
        self.calls = 0
        """How many calls there had been at the last merge of all."""
        self._at: dict[int, int] = {}
        self._table: Any = ffi.new("struct kl_copy[]", 8)
        self._changed = False
        self.next_merge = 0.0

    def __len__(self) -> int:
        return len(self._at)

    def find(self, address: int) -> int | None:
        at = self._at.get(address)
        return None if at is None else int(self._table[at].here)

    def add(self, address: int, content: bytes, pages: _Pages) -> int:
        at = len(self._at)
        if at == len(self._table):
            larger = ffi.new("struct kl_copy[]", 2 * at)
            ffi.memmove(larger, self._table, at * ffi.sizeof("struct kl_copy"))
            self._table = larger
        copy = self._table[at]
        copy.there, copy.here, copy.base = address, pages.take(), pages.take()
        copy.lost = 0  # another one may have been here
        for place in (copy.here, copy.base):
            ffi.memmove(ffi.cast("char *", place), content, PAGE_SIZE)
        self._at[address] = at
        return int(copy.here)

    def merge(self, tid: int, pages: _Pages) -> bool:
        """All of them; again where one was changed, for what was written before that elsewhere."""
        count, start = len(self._at), time.monotonic()
        changed, self._changed, lost = self._changed, False, False
        for _ in range(_MOST_PASSES):
            merged = lib.kl_merge(tid, self._table, count)
            lost |= bool(merged.lost)
            if not merged.changed:
                break
            changed = True
        now = time.monotonic()
        self.next_merge = now + max(_MERGE_SECONDS, _REST * (now - start))
        if lost:
            for at in reversed(range(count)):
                if self._table[at].lost:
                    self._remove(at, pages)
        return changed or lost

    def merge_range(self, tid: int, address: int, size: int) -> bool:
        """Those of a range. False where one was lost; a CPU may use it until all are merged."""
        for page in range(address & -PAGE_SIZE, address + size, PAGE_SIZE):
            at = self._at.get(page)
            if at is not None:
                merged = lib.kl_merge(tid, self._table + at, 1)
                self._changed |= bool(merged.changed)
                if merged.lost:
                    self._table[at].lost = 0
                    return False
        return True

    def drop(self, pages: _Pages) -> None:
        for at in reversed(range(len(self._at))):
            self._remove(at, pages)

    def _remove(self, at: int, pages: _Pages) -> None:
        """Put the last one in its place."""
        last = len(self._at) - 1
        copy = self._table[at]
        pages.give_back(copy.here, copy.base)
        del self._at[copy.there]
        if at != last:
            self._table[at] = self._table[last]
            self._at[self._table[at].there] = at


class _Pages:
    """Pages of this process. They are never unmapped: a CPU may still know one's address."""

    def __init__(self) -> None:
        self._chunks: list[mmap.mmap] = []
        self._free: list[int] = []

    def take(self) -> int:
        if not self._free:
            size = _CHUNK_PAGES * PAGE_SIZE
            chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._chunks.append(chunk)
            first = address_of(ffi.from_buffer(chunk))
            self._free = list(range(first, first + size, PAGE_SIZE))
        return self._free.pop()

    def give_back(self, *pages: int) -> None:
        self._free.extend(pages)


def new_memfd(name: str, size: int) -> int:
    """A file in memory whose size is fixed, named so that everybody sees what it is."""
    try:
        fd = os.memfd_create(f"simulated:{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        refuse(error.errno or errno.ENFILE)
    keep_reserve(fd)
    try:
        os.ftruncate(fd, size)
    except (OSError, OverflowError):
        os.close(fd)
        refuse(errno.ENOMEM)
    lib.kl_fix_size(fd)  # else a client could take pages away under our mapping
    return fd


def keep_reserve(fd: int) -> None:
    """Close a new descriptor where few are left: this process needs some for itself. ENFILE."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if fd >= most - _RESERVED:
        os.close(fd)
        refuse(errno.ENFILE)


def _read_here(address: int, size: int) -> bytes:
    return bytes(ffi.buffer(ffi.cast("char *", address), size))
