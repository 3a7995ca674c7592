"""One GDB that is connected: its packets, and the answers."""

from __future__ import annotations

import re
from collections.abc import Callable

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.launch.debug import SIGTRAP, Debugger, Stop
from kvmlaunch.launch.gdb_packets import MAX_PACKET, PacketReader
from kvmlaunch.launch.gdb_registers import (
    REGISTERS,
    TARGET_XML,
    decode_all,
    encode_all,
    encode_one,
)

__all__ = ["Closed", "GdbSession"]

_OK, _BAD, _FAULT, _UNKNOWN = b"OK", b"E01", b"E0e", b""
_MOST_MEMORY = MAX_PACKET // 2 - 16
_MOST_BREAKPOINTS = 1024
_ACTION = re.compile(rb"([cCsS])(?:[0-9a-fA-F]{2})?(?::(-?[0-9a-fA-F]+))?\Z")
_BREAKPOINTS = {b"0": b"swbreak", b"1": b"hwbreak"}
"""Kind -> what a stop reply calls it."""
_XFER = b"qXfer:features:read:target.xml:"


class Closed(Exception):
    """GDB doesn't want to go on."""


class GdbSession:
    """Answers packets while the guest stands still. No thread but one may use it.

    `answer` returns the payload of the answer, None where it comes later (the guest runs).
    """

    def __init__(self, debugger: Debugger) -> None:
        self.reader = PacketReader()
        self.acknowledges = True
        self._debugger = debugger
        self._places: set[tuple[bytes, int]] = set()
        """Breakpoints: kind (0 software, 1 hardware), address."""
        self._tells_kinds = False
        """Whether GDB wants to hear by which kind the guest stopped."""
        self._thread = 0
        self._step_thread: int | None = None
        self._simple: tuple[tuple[bytes, Callable[[bytes], bytes | None]], ...] = (
            (b"qSupported", self._supported),
            (b"QStartNoAckMode", self._no_acknowledgement),
            (_XFER, self._description),
            (b"qXfer:", lambda _rest: _UNKNOWN),
            (b"qAttached", lambda _rest: b"1"),
            (b"qfThreadInfo", self._threads),
            (b"qsThreadInfo", lambda _rest: b"l"),
            (b"qThreadExtraInfo,", self._thread_text),
            (b"qC", lambda _rest: b"QC%x" % (self._thread + 1)),
            (b"vCont?", lambda _rest: b"vCont;c;C;s;S"),
            (b"vCont;", self._continue),
            (b"vKill", self._kill),
            (b"?", lambda _rest: self.stop_reply(self._debugger.stop)),
            (b"H", self._select),
            (b"T", self._is_alive),
            (b"g", lambda _rest: encode_all(self._registers())),
            (b"G", self._set_all),
            (b"p", self._one),
            (b"P", self._set_one),
            (b"m", self._read),
            (b"M", self._write),
            (b"X", self._write_binary),
            (b"Z", lambda rest: self._breakpoint(rest, insert=True)),
            (b"z", lambda rest: self._breakpoint(rest, insert=False)),
            (b"c", lambda rest: self._resume(rest, step=False)),
            (b"s", lambda rest: self._resume(rest, step=True)),
            (b"D", self._detach),
            (b"k", self._kill),
        )

    def answer(self, packet: bytes) -> bytes | None:
        """The answer to a packet. Raises Closed."""
        try:
            for name, handler in self._simple:
                if packet.startswith(name):
                    return handler(packet[len(name) :])
        except (ValueError, IndexError, OverflowError, KvmLaunchError):
            return _BAD
        return _UNKNOWN

    def stop_reply(self, stop: Stop | None) -> bytes:
        """Why the guest stands still."""
        if stop is None:
            return b"S00"
        self._thread = stop.vcpu
        text = b"T%02xthread:%x;" % (stop.signal, stop.vcpu + 1)
        if self._tells_kinds and stop.signal == SIGTRAP:
            for kind, name in _BREAKPOINTS.items():
                if (kind, stop.address) in self._places:
                    return text + name + b":;"
        return text

    # What GDB asks first

    def _supported(self, rest: bytes) -> bytes:
        features = b"qXfer:features:read+;vContSupported+;QStartNoAckMode+"
        # Without it GDB takes RIP to be behind an INT3, and moves it back if there is a breakpoint.
        self._tells_kinds = b"swbreak+" in rest
        if self._tells_kinds:
            features += b";swbreak+;hwbreak+"
        return b"PacketSize=%x;" % MAX_PACKET + features

    def _no_acknowledgement(self, _rest: bytes) -> bytes:
        self.acknowledges = False
        return _OK

    def _description(self, rest: bytes) -> bytes:
        offset, length = (int(part, 16) for part in rest.split(b","))
        part = TARGET_XML[offset : offset + min(length, _MOST_MEMORY)]
        return (b"m" if offset + len(part) < len(TARGET_XML) else b"l") + part

    # Threads are vCPUs, counted from 1

    def _threads(self, _rest: bytes) -> bytes:
        return b"m" + b",".join(b"%x" % (index + 1) for index in range(self._debugger.vcpus))

    def _thread_text(self, rest: bytes) -> bytes:
        index = self._index(rest)
        gone = " (halted)" if self._debugger.is_gone(index) else ""
        return f"vCPU {index}{gone}".encode().hex().encode()

    def _is_alive(self, rest: bytes) -> bytes:
        self._index(rest)
        return _OK

    def _select(self, rest: bytes) -> bytes:
        every = rest[1:] in (b"0", b"-1", b"")
        if rest[:1] == b"g":
            if not every:
                self._thread = self._index(rest[1:])
            return _OK
        if rest[:1] == b"c":
            self._step_thread = None if every else self._index(rest[1:])
            return _OK
        return _BAD

    def _index(self, text: bytes) -> int:
        index = int(text, 16) - 1
        if not 0 <= index < self._debugger.vcpus:
            raise ValueError(text)
        return index

    # Registers and memory

    def _registers(self) -> dict[str, int] | None:
        found = self._debugger.target.registers(self._thread)
        return None if found is None else dict(found)

    def _set_all(self, rest: bytes) -> bytes:
        old = self._registers()
        changes = None if old is None else decode_all(rest, old)
        return _BAD if changes is None else self._set(changes)

    def _one(self, rest: bytes) -> bytes:
        return encode_one(REGISTERS[_number(rest)], self._registers())

    def _set_one(self, rest: bytes) -> bytes:
        number, value = rest.split(b"=")
        register = REGISTERS[_number(number)]
        data = bytes.fromhex(value.decode("ascii"))
        if len(data) != register.size:
            return _BAD
        return self._set({register.name: int.from_bytes(data, "little")})

    def _set(self, changes: dict[str, int]) -> bytes:
        return _OK if self._debugger.target.set_registers(self._thread, changes) else _BAD

    def _read(self, rest: bytes) -> bytes:
        address, size = _place(rest)
        found = self._debugger.target.read_memory(self._thread, address, min(size, _MOST_MEMORY))
        return found.hex().encode() if found or not size else _FAULT

    def _write(self, rest: bytes) -> bytes:
        place, digits = rest.split(b":")
        return self._store(place, bytes.fromhex(digits.decode("ascii")))

    def _write_binary(self, rest: bytes) -> bytes:
        place, data = rest.split(b":", 1)
        return self._store(place, data)

    def _store(self, place: bytes, data: bytes) -> bytes:
        address, size = _place(place)
        if size != len(data):
            return _BAD
        done = self._debugger.target.write_memory(self._thread, address, data)
        return _OK if done else _FAULT

    # Running

    def _breakpoint(self, rest: bytes, *, insert: bool) -> bytes:
        kind, text = rest.split(b",")[:2]
        if kind not in _BREAKPOINTS:
            return _UNKNOWN
        place = kind, _number(text)
        places = self._places | {place} if insert else self._places - {place}
        addresses = {address for _, address in places}
        if len(places) > _MOST_BREAKPOINTS or place[1] >> 64:
            return _BAD
        if self._debugger.target.set_breakpoints(addresses) is False:
            return _BAD
        self._places = places
        return _OK

    def _continue(self, rest: bytes) -> bytes | None:
        """The first action that fits a vCPU counts; those without one stay where they are."""
        wanted: dict[int, bytes] = {}
        for text in rest.split(b";"):
            found = _ACTION.match(text)
            if found is None:
                return _BAD
            thread = found[2]
            every = thread is None or thread == b"-1"
            indices = range(self._debugger.vcpus) if every else (self._index(thread),)
            for index in indices:
                wanted.setdefault(index, found[1].lower())
        steps = {index for index, action in wanted.items() if action == b"s"}
        return self._go(wanted.keys() - steps, steps)

    def _resume(self, rest: bytes, *, step: bool) -> bytes | None:
        if rest:
            changed = self._debugger.target.set_registers(self._thread, {"rip": _number(rest)})
            if not changed:
                return _BAD
        every = set(range(self._debugger.vcpus))
        if not step:
            return self._go(every, set())
        one = self._thread if self._step_thread is None else self._step_thread
        return self._go(every - {one}, {one})

    def _go(self, run: set[int], steps: set[int]) -> bytes | None:
        if all(map(self._debugger.is_gone, run | steps)):
            return _BAD  # none of them would ever stop again
        self._debugger.resume(run, steps)
        return None

    def _detach(self, _rest: bytes) -> bytes:
        self._debugger.present = False
        self._debugger.detach()
        return _OK

    def _kill(self, _rest: bytes) -> bytes:
        self._debugger.kill()
        raise Closed


def _number(text: bytes) -> int:
    value = int(text, 16)
    if value < 0:
        raise ValueError(text)
    return value


def _place(text: bytes) -> tuple[int, int]:
    address, size = (_number(part) for part in text.split(b","))
    if address >> 64:
        raise ValueError(text)
    return address, size
