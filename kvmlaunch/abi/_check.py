"""Checks that the formats share. Every failure is a FormatError that names the field."""

from __future__ import annotations

from kvmlaunch.errors import FormatError

from .page import Buffer

__all__ = ["exact_size", "sized_bytes", "uint", "zeros"]


def uint(name: str, value: int, bits: int) -> int:
    """Return `value` if it is an unsigned integer of `bits` bits."""
    if not 0 <= value < 1 << bits:
        raise FormatError(f"{name} {value:#x} does not fit in {bits} bits")
    return value


def sized_bytes(name: str, value: Buffer, size: int) -> bytes:
    """Return a copy of `value` if it is `size` bytes long."""
    if len(value) != size:
        raise FormatError(f"{name} is {len(value)} bytes, must be {size}")
    return bytes(value)


def exact_size(what: str, buf: Buffer, size: int) -> bytes:
    """Return a copy of the input `buf`, which must be `size` bytes long."""
    if len(buf) != size:
        raise FormatError(f"{what} is {size} bytes, the input has {len(buf)}")
    return bytes(buf)


def zeros(what: str, buf: bytes, start: int, end: int) -> None:
    """Refuse a non-zero byte in `buf[start:end]`."""
    if any(buf[start:end]):
        first = next(at for at in range(start, end) if buf[at])
        raise FormatError(f"reserved byte of {what} is not zero", offset=first)
