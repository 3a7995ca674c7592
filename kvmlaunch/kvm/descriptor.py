"""Owner of one file descriptor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from kvmlaunch.errors import ClosedError
from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.uapi import Platform, Result, address_of, ffi, lib

__all__ = ["Descriptor", "struct_to_dict"]

_Self = TypeVar("_Self", bound="Descriptor")


class Descriptor:
    """One open file of a platform.

    A context manager; ``close()`` may be called twice; every use afterwards is a
    ClosedError. Synchronization: one thread per Vcpu, all else may be shared.
    """

    def __init__(self, platform: Platform, fd: int, what: str) -> None:
        self.platform = platform
        self._fd = fd
        self._what = what

    @property
    def fd(self) -> int:
        """The descriptor's number. Raises ClosedError."""
        if self._fd < 0:
            raise ClosedError(self._what)
        return self._fd

    def fileno(self) -> int:
        """Same as ``fd``."""
        return self.fd

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; nothing happens the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.platform.close(fd)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "CLOSED" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {self._what} {state} platform={self.platform.name}>"

    def ioctl_raw(self, name: str, arg: Any = 0) -> Result:
        """Issue the ioctl ``name`` (a kernel define); the result is not checked.

        ``arg`` is a value, or a cffi pointer, which this frame keeps alive meanwhile.
        """
        address = arg if isinstance(arg, int) else address_of(arg)
        return self.platform.ioctl(self.fd, getattr(lib, name), address)

    def ioctl(self, name: str, arg: Any = 0, *, fields: Mapping[str, Any] | None = None) -> int:
        """Issue the ioctl ``name``. Raises IoctlError with ``fields`` in its message."""
        result = self.ioctl_raw(name, arg)
        if result.ret < 0:
            raise self._failed(name, result.errno, fields)
        return result.ret

    def _failed(self, name: str, errno: int, fields: Mapping[str, Any] | None) -> Exception:
        return ioctl_error(name, errno, fields=fields)

    def _get(self, name: str, struct: str) -> dict[str, Any]:
        """A GET ioctl that fills ``struct``, as nested dicts and ints."""
        value = ffi.new(f"struct {struct} *")
        self.ioctl(name, value)
        return struct_to_dict(value)

    def _set(self, name: str, struct: str, values: Mapping[str, Any]) -> None:
        """A SET ioctl from nested mappings; a field the struct lacks is a KeyError."""
        self.ioctl(name, ffi.new(f"struct {struct} *", dict(values)))


def struct_to_dict(value: Any) -> dict[str, Any]:
    """A cffi struct as nested dicts; byte arrays become bytes, other arrays lists."""
    out: dict[str, Any] = {}
    ctype = ffi.typeof(value)
    if ctype.kind == "pointer":
        ctype = ctype.item
    for name, info in ctype.fields:
        out[name] = _plain(getattr(value, name), info.type)
    return out


def _plain(value: Any, ctype: Any) -> Any:
    if ctype.kind in ("struct", "union"):
        return struct_to_dict(value)
    if ctype.kind == "array":
        if ctype.item.kind == "primitive" and ffi.sizeof(ctype.item) == 1:
            return bytes(ffi.buffer(value))
        return [_plain(item, ctype.item) for item in value]
    return int(value)
