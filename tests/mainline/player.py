"""Plays a script on a platform and notes what user space can see of the answers."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import mmap
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from kvmlaunch.uapi import (
    ARGUMENT,
    COMMAND_ARGUMENT,
    Result,
    address_of,
    ffi,
    ioctl_name,
    lib,
    peek,
    poke,
)
from tests.mainline.layout import decode_changes, encode
from tests.mainline.script import ARENA_PAGES, PAGE, ROM_PAGES, Script, Step, Value

__all__ = ["Host", "Player", "play"]

Outcome = dict[str, Any]

_U64 = (1 << 64) - 1
_RW = mmap.PROT_READ | mmap.PROT_WRITE
_NO_ACCESS = 0
_KERNEL_HALF = 0xFFFF_8000_0000_0000
_RUN_SIZE = 3 * PAGE
# Behind each struct: a call may believe a count that is too high (256 entries at most).
_SLACK = 4 * PAGE
# No script means to run a guest for long: what blocks is interrupted.
_RUN_SECONDS = 0.2
_MAKES_FD = {
    "KVM_CREATE_VM",
    "KVM_CREATE_VCPU",
    "KVM_CREATE_GUEST_MEMFD",
    "KVM_GET_STATS_FD",
}
_EXITS = {
    "KVM_EXIT_FAIL_ENTRY": ("fail_entry", ("hardware_entry_failure_reason",)),
    "KVM_EXIT_MEMORY_FAULT": ("memory_fault", ("flags", "gpa", "size")),
    "KVM_EXIT_INTERNAL_ERROR": ("internal", ("suberror",)),
}


class Host(Protocol):
    """What is under a platform: firmware that takes orders and tells what it did."""

    phys_bits: int
    vcpu_ids: int

    def begin(self, orders: Sequence[str]) -> None:
        """Forget what was, and take orders for failures (kvmlaunch.sim.faults)."""

    def end(self) -> Outcome:
        """What firmware did since; a key is missing where the host can't tell.

        ``guests`` are pages as [type, GPA, contents, digest], ``vmsas`` the newest guest's in hex
        without the zeros at the end, ``log`` is [command, status].
        """


def play(script: Script, platform: Any, host: Host, orders: Sequence[str] = ()) -> Outcome:
    """Play one script. See Player; this one has its memory for itself."""
    return Player(platform, host).play(script, orders)


class Player:
    """Memory for scripts, used again by each one. No script makes it raise.

    An outcome is ``steps`` (one dict each: ``ret`` -- "fd" for a new descriptor --, ``errno``
    by name, ``fw`` the word of KVM_MEMORY_ENCRYPT_OP, ``back`` the fields that the call
    changed), ``memory`` (hash per changed page of the regions), and what the host adds.
    """

    def __init__(self, platform: Any, host: Host) -> None:
        self._platform = platform
        self._host = host
        self._memory = _memory()

    def play(self, script: Script, orders: Sequence[str] = ()) -> Outcome:
        """Play ``script`` with ``orders`` for the firmware; everything is closed at the end."""
        self._memory.reset()
        self._host.begin(orders)
        limits = {"top": 1 << self._host.phys_bits, "ids": self._host.vcpu_ids}
        scene = _Scene(self._platform, self._memory, limits)
        try:
            steps = [scene.step(step) for step in script]
        finally:
            scene.close()
        return {"steps": steps, "memory": self._memory.changes(), **self._host.end()}


class _Memory:
    """The regions of user memory that scripts name."""

    def __init__(self) -> None:
        pages = ARENA_PAGES + 1 + ROM_PAGES + 1
        self._map = mmap.mmap(-1, pages * PAGE)
        self._view = ffi.from_buffer(self._map)
        self.arena = address_of(self._view)
        self.guard = self.arena + ARENA_PAGES * PAGE
        self.rom = self.guard + PAGE
        self._expected = bytearray()
        self._fresh = b"".join(bytes([n + 1]) * PAGE for n in range(ARENA_PAGES))
        self._libc = ctypes.CDLL(None, use_errno=True)
        for page in (self.guard, self.rom + ROM_PAGES * PAGE):
            self._protect(page, 1, _NO_ACCESS)
        self._protect(self.rom, ROM_PAGES, mmap.PROT_READ)

    def reset(self) -> None:
        self._map.seek(0)
        self._map.write(self._fresh)
        self._expected = bytearray(self._fresh)

    def write(self, address: int, data: bytes) -> None:
        """A step's own write: not a change that a call made."""
        poke(address, data)
        offset = address - self.arena
        self._expected[offset : offset + len(data)] = data

    @contextmanager
    def placed(self, address: int, data: bytes) -> Iterator[None]:
        """``data`` at ``address`` as far as there is memory, and what was there afterwards."""
        before = self._look(address, len(data))
        self._put(address, data)
        yield
        self._put(address, before)

    def changes(self) -> dict[str, str]:
        now = peek(self.arena, ARENA_PAGES * PAGE)
        if now == self._expected:
            return {}
        return {
            f"arena+{at:#x}": hashlib.sha256(now[at : at + PAGE]).hexdigest()[:16]
            for at in range(0, len(now), PAGE)
            if now[at : at + PAGE] != self._expected[at : at + PAGE]
        }

    def _look(self, address: int, size: int) -> bytes:
        """What can be read from ``address`` up to a page that can't."""
        room = size if address < self.arena else min(size, max(0, self.guard - address))
        if address >= self.rom:
            room = min(size, max(0, self.rom + ROM_PAGES * PAGE - address))
        with suppress(OSError):
            return peek(address, room) if room else b""
        return b""

    def _put(self, address: int, data: bytes) -> None:
        in_rom = self.rom <= address < self.rom + ROM_PAGES * PAGE
        if in_rom:
            self._protect(self.rom, ROM_PAGES, _RW)
        room = len(self._look(address, len(data)))
        with suppress(OSError):
            if room:
                poke(address, data[:room])
        if in_rom:
            self._protect(self.rom, ROM_PAGES, mmap.PROT_READ)

    def _protect(self, address: int, pages: int, protection: int) -> None:
        where = ctypes.c_void_p(address)
        if self._libc.mprotect(where, ctypes.c_size_t(pages * PAGE), protection):
            raise OSError(ctypes.get_errno(), "mprotect")


@functools.cache
def _memory() -> _Memory:
    """One for all players of a process: they play one at a time."""
    return _Memory()


class _Scene:
    """One script's descriptors and mappings."""

    def __init__(self, platform: Any, memory: _Memory, limits: dict[str, int]) -> None:
        self._platform = platform
        self._memory = memory
        self._regions = {
            "arena": memory.arena,
            "rom": memory.rom,
            "guard": memory.guard,
            "kernel": _KERNEL_HALF,
            **limits,
        }
        self._fds: dict[str, int] = {}
        self._open: list[int] = []
        self._runs: dict[str, Any] = {}
        self._mapped: list[int] = []

    def step(self, step: Step) -> Outcome:
        """Do one step; a step that makes no sense is an outcome, too."""
        try:
            return _OPERATIONS[step["op"]](self, step)
        except Exception as error:
            return {"bad step": f"{type(error).__name__}: {error}"}

    def close(self) -> None:
        for address in reversed(self._mapped):
            self._platform.munmap(address, _RUN_SIZE)
        for fd in reversed(self._open):
            self._platform.close(fd)

    def do_open(self, step: Step) -> Outcome:
        result = self._platform.open(step["path"], step["flags"])
        return self._outcome(step, result, makes_fd=True)

    def do_close(self, step: Step) -> Outcome:
        fd = self._fd(step["fd"])
        result = self._platform.close(fd)
        if result.ret == 0 and fd in self._open:
            self._open.remove(fd)
        return self._outcome(step, result)

    def do_ioctl(self, step: Step) -> Outcome:
        fd, request = self._fd(step["fd"]), _request(step["request"])
        name, arg = ioctl_name(request), step.get("arg", 0)
        makes_fd = name in _MAKES_FD
        if not isinstance(arg, dict):
            result = self._platform.ioctl(fd, request, self._value(arg))
            return self._outcome(step, result, makes_fd=makes_fd)
        struct = step.get("struct") or ARGUMENT[name]
        sent = encode(struct, arg, step.get("entries", ()), step.get("room", 0), self._value)
        with self._placed(sent, step.get("at")) as (address, received):
            result = self._platform.ioctl(fd, request, address)
            back = decode_changes(struct, sent, received())
        return {**self._outcome(step, result, makes_fd=makes_fd), **_if("back", back)}

    def do_sev(self, step: Step) -> Outcome:
        command, data = _command(step["id"]), step.get("data", 0)
        struct = step.get("struct") or COMMAND_ARGUMENT.get(str(step["id"]), "")
        fields = {"id": command, "error": step.get("error", 0), "sev_fd": step.get("sev_fd", 0)}
        if not isinstance(data, dict) or not struct:
            return self._encrypt_op(step, {**fields, "data": data if struct else 0})
        sent = encode(struct, data, (), 0, self._value)
        with self._placed(sent, step.get("data_at")) as (address, received):
            out = self._encrypt_op(step, {**fields, "data": address})
            back = decode_changes(struct, sent, received())
        # Where the caller's memory went on is what matters, not where it is.
        if "uaddr" in back:
            back["uaddr"] = f"+{back['uaddr'] - self._value(data['uaddr']) & _U64:#x}"
        return {**out, **_if("back", back)}

    def _encrypt_op(self, step: Step, fields: dict[str, Any]) -> Outcome:
        sent = encode("kvm_sev_cmd", fields, (), 0, self._value)
        fd = self._fd(step["fd"])
        with self._placed(sent, step.get("at")) as (address, received):
            result = self._platform.ioctl(fd, lib.KVM_MEMORY_ENCRYPT_OP, address)
            changes = decode_changes("kvm_sev_cmd", sent, received())
        word = changes.pop("error", fields["error"])
        return {**self._outcome(step, result), "fw": word, **_if("command", changes)}

    def do_fallocate(self, step: Step) -> Outcome:
        fd, offset, length = self._fd(step["fd"]), step["offset"], step["length"]
        return self._outcome(step, self._platform.fallocate(fd, step["mode"], offset, length))

    def do_mmap(self, step: Step) -> Outcome:
        fd, length, offset = self._fd(step["fd"]), step["length"], step.get("offset", 0)
        result = self._platform.mmap(fd, length, _RW, mmap.MAP_SHARED, offset)
        if result.ret == -1:
            return self._outcome(step, result)
        self._platform.munmap(result.ret, length)
        return {"ret": "mapping"}

    def do_run(self, step: Step) -> Outcome:
        fd, fields = self._fd(step["fd"]), step.get("in", {})
        run = self._run_pages(step["fd"], fd)
        if run is not None:
            run.exit_reason = run.immediate_exit = run.kvm_valid_regs = run.kvm_dirty_regs = 0
            for name, value in fields.items():
                setattr(run, name, self._value(value))
        with _limited(_RUN_SECONDS):
            result = self._platform.ioctl(fd, lib.KVM_RUN, self._value(step.get("arg", 0)))
        return {**self._outcome(step, result), **({} if run is None else _exit(run))}

    def do_write(self, step: Step) -> Outcome:
        self._memory.write(self._value(step["to"]), bytes.fromhex(step["bytes"]))
        return {}

    def _run_pages(self, name: str, fd: int) -> Any:
        if name not in self._runs:
            result = self._platform.mmap(fd, _RUN_SIZE, _RW, mmap.MAP_SHARED, 0)
            if result.ret == -1:
                return None
            self._mapped.append(result.ret)
            self._runs[name] = ffi.cast("struct kvm_run *", result.ret)
        return self._runs[name]

    @contextmanager
    def _placed(self, data: bytes, at: Value | None) -> Iterator[tuple[int, Any]]:
        """The address of ``data``, and a function that reads it back (b"" where it can't)."""
        if at is None:
            buffer = ffi.new("unsigned char[]", len(data) + _SLACK)
            ffi.memmove(buffer, data, len(data))
            yield address_of(buffer), lambda: bytes(ffi.buffer(buffer, len(data)))
            return
        address = self._value(at)

        def received() -> bytes:
            with suppress(OSError):
                return peek(address, len(data))
            return b""

        with self._memory.placed(address, data):
            yield address, received

    def _fd(self, name: str) -> int:
        return self._fds.get(name, -1)

    def _value(self, value: Value) -> int:
        if isinstance(value, int):
            return value
        if value.startswith("fd:"):
            return self._fd(value.removeprefix("fd:"))
        region, sign, offset = value.partition("-" if "-" in value else "+")
        distance = int(offset or "0", 0)
        return self._regions[region] + (-distance if sign == "-" else distance) & _U64

    def _outcome(self, step: Step, result: Result, *, makes_fd: bool = False) -> Outcome:
        if result.ret == -1:
            return {"ret": -1, "errno": errno.errorcode.get(result.errno, result.errno)}
        if not makes_fd:
            return {"ret": result.ret}
        self._open.append(result.ret)
        if "as" in step:
            self._fds[step["as"]] = result.ret
        return {"ret": "fd"}


_OPERATIONS = {
    name.removeprefix("do_"): getattr(_Scene, name) for name in dir(_Scene) if name[:3] == "do_"
}


def _if(key: str, content: Any) -> Outcome:
    return {key: content} if content else {}


def _request(request: str | int) -> int:
    return int(request if isinstance(request, int) else getattr(lib, request))


def _command(command: str | int) -> int:
    return int(command if isinstance(command, int) else getattr(lib, command))


def _exit(run: Any) -> Outcome:
    names = [n for n in _EXITS if getattr(lib, n) == run.exit_reason]
    if not names:
        return {"exit": run.exit_reason}
    union, fields = _EXITS[names[0]]
    part = getattr(run, union)
    return {"exit": names[0], **{field: getattr(part, field) for field in fields}}


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """A signal after so many seconds, so that a call that blocks ends with EINTR."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
