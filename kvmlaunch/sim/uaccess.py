"""User memory as the simulated kernel sees it: copies by address, EFAULT instead of a crash."""

from __future__ import annotations

import bisect
import errno
import os
from pathlib import Path
from typing import Any, NoReturn, Protocol

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.uapi import ffi, peek, poke

__all__ = ["ProcessMemory", "UserMemory", "copy_in", "copy_out", "refuse"]

_NOWHERE = 1 << 64


class UserMemory(Protocol):
    """The address space of the process that issues the calls."""

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


class ProcessMemory:
    """Memory of this process."""

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


def refuse(code: int) -> NoReturn:
    """Fail the system call with errno ``code``."""
    raise OSError(code, os.strerror(code))


def copy_in(user: UserMemory, struct: str, address: int) -> Any:
    """Copy ``struct NAME`` from user memory (copy_from_user); a cdata pointer."""
    value = ffi.new(f"struct {struct} *")
    ffi.buffer(value)[:] = user.read(address, ffi.sizeof(value[0]))
    return value


def copy_out(user: UserMemory, address: int, value: Any) -> None:
    """Copy the struct behind a cdata pointer to user memory (copy_to_user)."""
    user.write(address, bytes(ffi.buffer(value)))
