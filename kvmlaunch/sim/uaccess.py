"""User space as the simulated kernel sees it: who calls, and copies of its memory by address."""

from __future__ import annotations

import bisect
import errno
import mmap
import os
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.uapi import RealPlatform, ffi, lib, peek, poke

__all__ = [
    "Caller",
    "Eventfd",
    "OwnProcess",
    "RunPages",
    "UserSpace",
    "copy_in",
    "copy_out",
    "own_eventfd",
    "refuse",
]

_NOWHERE = 1 << 64


class Caller(Protocol):
    """A thread that issues calls; the same object for the same thread."""

    def is_alive(self) -> bool:
        """False once it has ended."""


class RunPages(NamedTuple):
    """The pages behind a vCPU fd: where they are here, and the file that they are (or None)."""

    address: int
    fd: int | None


class Eventfd(NamedTuple):
    """A descriptor of this process for somebody's eventfd, and what tells it from others."""

    fd: int
    id: int


class UserSpace(Protocol):
    """The process that issues the calls: the one whose call is being served by this thread."""

    @property
    def mm(self) -> int:
        """Identity of the address space (a VM answers only the one that created it)."""

    def read(self, address: int, size: int) -> bytes:
        """Copy from user memory. Raises OSError(EFAULT)."""

    def write(self, address: int, data: bytes) -> None:
        """Copy to user memory. Raises OSError(EFAULT)."""

    def pin(self, address: int) -> int:
        """Where this process can use a page of user memory in place. Raises OSError(EFAULT)."""

    def forget(self) -> None:
        """User memory was unmapped: what `pin` has found out doesn't hold any more."""

    def forget_dead(self) -> None:
        """The same for processes that have ended. No guest code may run meanwhile."""

    def sync(self) -> bool:
        """Make pinned pages what user space has in them, and the other way round.

        No guest code may run meanwhile. True if user space had changed any.
        """

    def wants_sync(self, *, idle: bool) -> bool:
        """Whether it is time for `sync` while a guest runs, or (``idle``) waits."""

    def has_written(self) -> None:
        """User space says, but not by a call, that it has written what a guest must see now."""

    @property
    def caller(self) -> Caller:
        """The thread that issues the call."""

    def forget_signals(self) -> None:
        """A signal from before the call won't end it."""

    def signal_pending(self, mask: int | None) -> bool:
        """Whether a signal wants to end the call; ``mask``: those that KVM_RUN blocks.

        Bit N-1 is signal N; None is the thread's own mask.
        """

    def eventfd(self, fd: int) -> Eventfd:
        """A duplicate of an eventfd. Raises OSError (EBADF, EINVAL where it isn't one)."""

    def new_run_pages(self, size: int) -> RunPages:
        """Zeroed memory that a vCPU shares with user space. Raises OSError."""

    def free_run_pages(self, pages: RunPages, size: int) -> None:
        """The vCPU is gone."""


class OwnProcess:
    """This process. Of the signals that end a call only the launcher's kick is seen."""

    def __init__(self) -> None:
        self._writable: list[tuple[int, int]] = []

    @property
    def mm(self) -> int:
        """The process id: a forked child has another address space."""
        return os.getpid()

    def read(self, address: int, size: int) -> bytes:
        """Copy ``size`` bytes from ``address``."""
        return peek(address, size) if size else b""

    def write(self, address: int, data: bytes) -> None:
        """Copy ``data`` to ``address``."""
        if data:
            poke(address, data)

    def pin(self, address: int) -> int:
        """A page that is mapped to be read and written, at its own address.

        Guest code that touched another one would end this process.
        """
        at = bisect.bisect_right(self._writable, (address, _NOWHERE)) - 1
        if at < 0 or self._writable[at][1] < address + PAGE_SIZE:
            self._writable = _writable_ranges()
            at = bisect.bisect_right(self._writable, (address, _NOWHERE)) - 1
        if at < 0 or self._writable[at][1] < address + PAGE_SIZE:
            refuse(errno.EFAULT)
        peek(address, 1)
        return address

    def forget(self) -> None:
        """Look again before the next page is used."""
        self._writable = []

    def forget_dead(self) -> None:
        """This one hasn't."""

    def sync(self) -> bool:
        """Pinned pages are user space's own."""
        return False

    def wants_sync(self, *, idle: bool) -> bool:
        """Never."""
        return False

    def has_written(self) -> None:
        """The guest sees it already."""

    @property
    def caller(self) -> threading.Thread:
        """This thread."""
        return threading.current_thread()

    def forget_signals(self) -> None:
        """Drop a kick."""
        lib.kl_take_kick()

    def signal_pending(self, mask: int | None) -> bool:
        """Whether this thread was kicked since it asked last."""
        return bool(lib.kl_take_kick())

    def eventfd(self, fd: int) -> Eventfd:
        """dup(2)."""
        return own_eventfd(os.dup(fd))

    def new_run_pages(self, size: int) -> RunPages:
        """Anonymous memory."""
        result = RealPlatform().mmap(
            -1, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        if result.ret == -1:
            refuse(result.errno)
        return RunPages(result.ret, None)

    def free_run_pages(self, pages: RunPages, size: int) -> None:
        """Unmap it."""
        RealPlatform().munmap(pages.address, size)


def _writable_ranges() -> list[tuple[int, int]]:
    """Mappings of this process that can be read and written, adjacent ones as one."""
    ranges: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights = line.split(maxsplit=2)[:2]
        if rights.startswith("rw"):
            first, end = (int(part, 16) for part in place.split("-"))
            if ranges and ranges[-1][1] == first:
                first = ranges.pop()[0]
            ranges.append((first, end))
    return ranges


def own_eventfd(fd: int) -> Eventfd:
    """A descriptor of ours with the kernel's number of the eventfd.

    Where it is another file it is closed: OSError(EINVAL).
    """
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    found = re.search(r"^eventfd-id:\s*(\d+)$", info, re.MULTILINE)
    if found is None:
        os.close(fd)
        refuse(errno.EINVAL)
    return Eventfd(fd, int(found[1]))


def refuse(code: int) -> NoReturn:
    """Fail the system call with errno ``code``."""
    raise OSError(code, os.strerror(code))


def copy_in(user: UserSpace, struct: str, address: int) -> Any:
    """Copy ``struct NAME`` from user memory (copy_from_user); a cdata pointer."""
    value = ffi.new(f"struct {struct} *")
    ffi.buffer(value)[:] = user.read(address, ffi.sizeof(value[0]))
    return value


def copy_out(user: UserSpace, address: int, value: Any) -> None:
    """Copy the struct behind a cdata pointer to user memory (copy_to_user)."""
    user.write(address, bytes(ffi.buffer(value)))
