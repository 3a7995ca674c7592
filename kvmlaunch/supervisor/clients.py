"""The processes whose calls are answered: their threads, memory and signals."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Collection
from typing import Any

from kvmlaunch.uapi import ffi, lib

__all__ = ["AddressSpace", "Call", "ClientThread", "Clients"]

_POLL_SECONDS = 0.002
_KNOWN = 4096
_LASTING = 3
_SIGNALS = ("SigPnd", "ShdPnd", "SigBlk")


class AddressSpace:
    """The memory of one process, from its start or exec to its exit or next exec.

    ``number`` tells it from every other, ``processes`` are those that were seen with it.
    """

    def __init__(self, number: int, tid: int, process: int) -> None:
        self.number = number
        self.processes = {process}
        # An open one keeps the address space, though not what is in it, and no other gets it.
        self._memory = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)

    def is_alive(self) -> bool:
        """Whether a process still has it."""
        if self._memory < 0:
            return False
        try:
            return bool(os.pread(self._memory, 1, 0))
        except OSError:
            return True  # nothing is mapped at 0

    def has(self, tid: int, process: int) -> bool:
        """Whether a thread of ``process`` is on it; that may have another since its last exec."""
        if process not in self.processes:
            # A process made by vfork has its parent's until it calls exec.
            return any(lib.kl_same_memory(tid, other) == 1 for other in self.processes)
        others = self.processes - {process}
        return self.is_alive() and all(lib.kl_same_memory(tid, other) for other in others)

    def close(self) -> None:
        """Forget it: it isn't alive any more."""
        os.close(self._memory)
        self._memory = -1


class ClientThread:
    """A thread of a supervised process: one object for each."""

    def __init__(self, tid: int, process: int, space: AddressSpace) -> None:
        self.tid = tid
        self.process = process
        self.space = space
        self._next_look = 0.0
        self._stops = 0

    def __repr__(self) -> str:
        return f"<ClientThread {self.tid}>"

    def belongs(self) -> bool:
        """Whether a thread of that number is of the same process: numbers are used again."""
        return self.tid == self.process or lib.kl_same_memory(self.tid, self.process) == 1

    def is_alive(self) -> bool:
        """Whether there still is such a thread."""
        return os.path.exists(f"/proc/{self.tid}")

    def look_soon(self) -> None:
        """A call begins: signals that came before it have been dealt with."""
        self._next_look = time.monotonic() + _POLL_SECONDS

    def is_time_to_look(self) -> bool:
        """Whether to look for signals again, which takes some microseconds."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + _POLL_SECONDS
        return True

    def signal_pending(self, mask: int | None, busy: Collection[int]) -> bool:
        """Whether a signal waits that ``mask`` doesn't block (None: the thread's own mask).

        One that stops all threads waits for none of them once another has it: those that
        aren't ``busy`` with a call have stopped then.
        """
        words = _status(self.tid)
        pending, shared, blocked = (int(words[name], 16) for name in _SIGNALS)
        if (pending | shared) & ~(blocked if mask is None else mask):
            return True
        # A thread that is traced stops for other things as well, though never for long.
        self._stops = self._stops + 1 if self._others_stopped(busy) else 0
        return self._stops >= _LASTING

    def _others_stopped(self, busy: Collection[int]) -> bool:
        for tid in os.listdir(f"/proc/{self.process}/task"):
            state = "" if int(tid) in busy else _state(int(tid))
            if state and state not in "ZX":
                return state in "Tt"
        return False


class Call:
    """One call that is being answered."""

    def __init__(self, raw: Any, thread: ClientThread) -> None:
        self.id = int(raw.id)
        self.nr = int(raw.nr)
        self.args = tuple(raw.args)
        self.inode = int(raw.inode)
        self.path = os.fsdecode(ffi.string(raw.path))
        self.thread = thread
        self.fd = self.args[4 if self.nr == lib.KL_NR_mmap else 0] & 0xFFFFFFFF
        """The descriptor whose file has ``inode``."""
        self.cloexec = True
        """Whether a descriptor that the call gives is closed by exec."""

    def read(self, address: int, size: int) -> bytes:
        """Copy from the caller's memory. Raises OSError(EFAULT)."""
        buffer = bytearray(size)
        _check(lib.kl_peek_at(self.thread.tid, address, ffi.from_buffer(buffer), size))
        return bytes(buffer)

    def write(self, address: int, data: bytes) -> None:
        """Copy to the caller's memory. Raises OSError(EFAULT)."""
        _check(lib.kl_poke_at(self.thread.tid, address, ffi.from_buffer(data), len(data)))


class Clients:
    """Every thread that has called so far, and the call that each of ours is answering."""

    def __init__(self, listener: int) -> None:
        self.listener = listener
        self.calls = 0
        """Calls so far."""
        self._threads: dict[int, ClientThread] = {}
        self._spaces: list[AddressSpace] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._serving = threading.local()
        self._busy: set[int] = set()

    @property
    def call(self) -> Call:
        """What this thread is answering."""
        call: Call = self._serving.call
        return call

    def read(self, address: int, size: int) -> bytes:
        """Copy from the memory of who calls. Raises OSError(EFAULT)."""
        return self.call.read(address, size)

    def serve(self, call: Call) -> None:
        """From now on this thread answers ``call``."""
        self.calls += 1
        self._serving.call = call
        self._busy.add(call.thread.tid)

    def answered(self, tid: int) -> None:
        """The caller is about to get its answer."""
        self._busy.discard(tid)

    def signal_pending(self, mask: int | None) -> bool:
        """Whether a signal waits for the caller, see there. Raises OSError where it is gone."""
        return self.call.thread.signal_pending(mask, self._busy)

    def thread(self, tid: int) -> ClientThread:
        """The caller. Raises OSError where it is gone, or may not be looked into."""
        with self._lock:
            known = self._threads.get(tid)
            if known is not None and known.belongs() and known.space.has(tid, known.process):
                return known
            if len(self._threads) >= _KNOWN:
                self._threads = {t: c for t, c in self._threads.items() if c.is_alive()}
            process = int(_status(tid)["Tgid"])
            thread = ClientThread(tid, process, self._space_of(tid, process))
            self._threads[tid] = thread
            return thread

    def spaces(self) -> list[AddressSpace]:
        """Address spaces that are alive; what is known of others is dropped."""
        with self._lock:
            return self._living()

    def still_waits(self) -> bool:
        """Whether the caller still wants its answer: it may have been killed."""
        return bool(lib.kl_still_waits(self.listener, self.call.id))

    def close(self) -> None:
        """Forget everybody; the listener is closed."""
        os.close(self.listener)
        with self._lock:
            for space in self._spaces:
                space.close()
            self._spaces.clear()
            self._threads.clear()

    def _living(self) -> list[AddressSpace]:
        living = [space for space in self._spaces if space.is_alive()]
        for space in self._spaces:
            if space not in living:
                space.close()
        self._spaces = living
        return living

    def _space_of(self, tid: int, process: int) -> AddressSpace:
        for space in self._living():
            if space.has(tid, process):
                space.processes.add(process)
                return space
            space.processes.discard(process)
        space = AddressSpace(next(self._numbers), tid, process)
        self._spaces.append(space)
        return space


def _status(tid: int) -> dict[str, str]:
    """/proc/TID/status."""
    with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as status:
        return dict(line.split(":", 1) for line in status)


def _state(tid: int) -> str:
    """The state's letter, none of a thread that is gone."""
    try:
        return _status(tid)["State"].split()[0]
    except OSError:
        return ""


def _check(result: Any) -> None:
    if result.ret < 0:
        # ESRCH and EPERM come to the same for who doesn't get an answer any more.
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
