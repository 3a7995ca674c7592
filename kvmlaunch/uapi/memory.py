"""Memory of this process by address: EFAULT instead of a crash."""

from __future__ import annotations

import errno
from typing import Any

from kvmlaunch.uapi._ext import ffi, lib

__all__ = ["address_of", "peek", "poke"]


def address_of(cdata: Any) -> int:
    """The address that a cdata pointer or array holds."""
    return int(ffi.cast("uintptr_t", cdata))


def peek(address: int, size: int) -> bytes:
    """Copy ``size`` bytes from ``address``. Raises OSError(EFAULT)."""
    buffer = bytearray(size)
    result = lib.kl_peek(address, ffi.from_buffer(buffer), size)
    if result.ret < 0:
        raise OSError(result.err, errno.errorcode.get(result.err, "?"))
    return bytes(buffer)


def poke(address: int, data: bytes | bytearray | memoryview) -> None:
    """Copy ``data`` to ``address``. Raises OSError(EFAULT)."""
    result = lib.kl_poke(address, ffi.from_buffer(data), len(data))
    if result.ret < 0:
        raise OSError(result.err, errno.errorcode.get(result.err, "?"))
