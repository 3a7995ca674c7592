"""User memory as the simulated kernel sees it: copies by address, EFAULT instead of a crash."""

from __future__ import annotations

import os
from typing import Any, NoReturn, Protocol

from kvmlaunch.uapi import ffi, peek, poke

__all__ = ["ProcessMemory", "UserMemory", "copy_in", "copy_out", "refuse"]


class UserMemory(Protocol):
    """The address space of the process that issues the calls."""

    @property
    def mm(self) -> int:
        """Identity of the address space (a VM answers only the one that created it)."""

    def read(self, address: int, size: int) -> bytes:
        """Copy from user memory. Raises OSError(EFAULT)."""

    def write(self, address: int, data: bytes) -> None:
        """Copy to user memory. Raises OSError(EFAULT)."""


class ProcessMemory:
    """Memory of this process."""

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
