"""A Platform that notes every call it passes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmlaunch.uapi._ext import ffi
from kvmlaunch.uapi.inspection import Inspector
from kvmlaunch.uapi.ioctls import ARGUMENT, COMMAND_ARGUMENT, command_name, ioctl_name
from kvmlaunch.uapi.memory import peek
from kvmlaunch.uapi.platform import MeasuredPage, Platform, Result, RunResult

__all__ = ["Call", "Recorder"]

_HIDDEN = {"gosvw"}


@dataclass(frozen=True)
class Call:
    """One call: its name, the argument struct before and after, and the result.

    ``sent`` and ``received`` map field names to integers or hex strings; they are
    empty where the argument is a plain value (then ``arg`` holds it) or unreadable.
    ``fw_error`` is None where the call has no firmware word. ``ns`` is its duration.
    """

    name: str
    fd: int
    arg: int
    ret: int
    errno: int
    ns: int
    fw_error: int | None = None
    sent: Mapping[str, Any] = field(default_factory=dict)
    received: Mapping[str, Any] = field(default_factory=dict)


class Recorder:
    """Wraps a platform; each call goes to ``sink`` after it returned.

    ``read`` copies from the memory of who calls: raises OSError(EFAULT).
    """

    def __init__(
        self,
        platform: Platform,
        sink: Callable[[Call], None],
        *,
        read: Callable[[int, int], bytes] = peek,
    ) -> None:
        self._platform = platform
        self._sink = sink
        self._read = read

    def __repr__(self) -> str:
        return f"Recorder({self._platform!r})"

    @property
    def name(self) -> str:
        """Name of the wrapped platform."""
        return self._platform.name

    @property
    def profile(self) -> str:
        """Profile of the wrapped platform."""
        return self._platform.profile

    def open(self, path: str, flags: int) -> Result:
        """open(2)."""
        start = time.perf_counter_ns()
        result = self._platform.open(path, flags)
        self._note("open", -1, flags, result, start, sent={"path": path})
        return result

    def close(self, fd: int) -> Result:
        """close(2)."""
        start = time.perf_counter_ns()
        result = self._platform.close(fd)
        self._note("close", fd, 0, result, start)
        return result

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        """ioctl(2)."""
        name = ioctl_name(request)
        struct = ARGUMENT.get(name, "")
        sent = self._decode(struct, arg)
        if name == "KVM_MEMORY_ENCRYPT_OP" and "id" in sent:
            name = command_name(sent["id"])
        start = time.perf_counter_ns()
        result = self._platform.ioctl(fd, request, arg)
        received = self._decode(struct, arg)
        fw_error = received.get("error")
        self._note(name, fd, arg, result, start, fw_error=fw_error, sent=sent, received=received)
        return result

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> Result:
        """mmap(2)."""
        start = time.perf_counter_ns()
        result = self._platform.mmap(fd, length, prot, flags, offset)
        self._note("mmap", fd, length, result, start)
        return result

    def munmap(self, addr: int, length: int) -> Result:
        """munmap(2)."""
        start = time.perf_counter_ns()
        result = self._platform.munmap(addr, length)
        self._note("munmap", -1, addr, result, start)
        return result

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Result:
        """fallocate(2)."""
        start = time.perf_counter_ns()
        result = self._platform.fallocate(fd, mode, offset, length)
        self._note("fallocate", fd, mode, result, start, sent={"offset": offset, "length": length})
        return result

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        """KVM_RUN (one record for the calls that needed no Python)."""
        start = time.perf_counter_ns()
        result = self._platform.run(fd, run, uart)
        self._note("KVM_RUN", fd, 0, Result(result.ret, result.errno), start)
        return result

    def measured_pages(self, vm_fd: int) -> Sequence[MeasuredPage] | None:
        """What the wrapped platform says."""
        return self._platform.measured_pages(vm_fd)

    def inspector(self, vm_fd: int) -> Inspector | None:
        """What the wrapped platform has."""
        return self._platform.inspector(vm_fd)

    def _note(
        self,
        name: str,
        fd: int,
        arg: int,
        result: Result,
        start: int,
        *,
        fw_error: int | None = None,
        sent: Mapping[str, Any] | None = None,
        received: Mapping[str, Any] | None = None,
    ) -> None:
        ns = time.perf_counter_ns() - start
        self._sink(
            Call(name, fd, arg, *result, ns, fw_error, dict(sent or {}), dict(received or {}))
        )

    def _decode(self, struct: str, address: int) -> dict[str, Any]:
        """The struct at ``address`` by field name; nothing where it can't be read."""
        if not struct or not address:
            return {}
        try:
            content = self._read(address, ffi.sizeof(f"struct {struct}"))
        except OSError:
            return {}
        fields = _fields(struct, content)
        if struct == "kvm_sev_cmd":
            inner = COMMAND_ARGUMENT.get(command_name(fields["id"]), "")
            fields["data"] = self._decode(inner, fields["data"]) or fields["data"]
        return fields


def _fields(struct: str, content: bytes) -> dict[str, Any]:
    ctype = ffi.typeof(f"struct {struct}")
    value = ffi.new(ffi.getctype(ctype, "*"))
    ffi.buffer(value)[:] = content
    fields: dict[str, Any] = {}
    for name, info in ctype.fields:
        if "pad" in name or "reserved" in name or name in _HIDDEN:
            continue
        if info.type.kind == "primitive":
            fields[name] = int(getattr(value, name))
        else:
            size = ffi.sizeof(info.type) if info.type.kind != "array" or info.type.length else 0
            if size:
                offset = info.offset
                fields[name] = ffi.buffer(value)[offset : offset + size].hex()
    return fields
