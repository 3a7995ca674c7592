"""A GDB in few lines: raw packets, so that tests see what stock GDB hides."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.gdb import GdbServer, serve_gdb
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.uapi import Platform

SECONDS = 20.0
RIP = 16  # its number and its place among 8-byte registers


class Client:
    """``client(b"g")`` is the answer to a packet."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self._stream = self.socket.makefile("rb")

    def __call__(self, packet: bytes) -> bytes:
        self.send(packet)
        return self.receive()

    def send(self, packet: bytes) -> None:
        self.socket.sendall(b"$%s#%02x" % (packet, sum(packet) & 0xFF))

    def receive(self) -> bytes:
        """The next packet; nothing where the server has hung up."""
        byte = self._stream.read(1)
        while byte in (b"+", b"-"):
            byte = self._stream.read(1)
        if not byte:
            return b""
        assert byte == b"$", byte
        data = bytearray()
        while (byte := self._stream.read(1)) != b"#":
            assert byte, "the server hung up in a packet"
            data += byte
        assert int(self._stream.read(2), 16) == sum(data) & 0xFF
        return bytes(data)

    def close(self) -> None:
        self._stream.close()
        self.socket.close()

    @property
    def rip(self) -> int:
        """RIP of the selected vCPU."""
        return int(struct.unpack_from("<Q", bytes.fromhex(self(b"p%x" % RIP).decode()))[0])


class Debugged:
    """A guest that runs under a GDB server."""

    def __init__(self, guest: Guest, server: GdbServer, text: bytearray) -> None:
        self.guest = guest
        self.server = server
        self.text = text
        self._done: list[Outcome] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._done.append(
            run_guest(
                self.guest,
                console=self.text.extend,
                timeout=SECONDS,
                debugger=self.server.debugger,
            )
        )

    def outcome(self) -> Outcome:
        """How the run ended."""
        self._thread.join(SECONDS + 5)
        assert self._done, "the run hangs"
        return self._done[0]


@contextmanager
def debugged(
    image: bytes, platform: Platform, *, confidential: bool = False, vcpus: int = 1
) -> Iterator[tuple[Debugged, Client]]:
    """An image that runs, and a client that is connected to it."""
    options = PlanOptions(memory=4 << 20, confidential=confidential, vcpus=vcpus)
    text = bytearray()
    with Guest(load_image(image, options), platform) as guest:
        if confidential:
            guest.launch()
        with serve_gdb(guest) as server:
            run = Debugged(guest, server, text)
            client = Client(server.port)
            try:
                yield run, client
            finally:
                client.close()
                server.debugger.kill()
                run.outcome()


def until(done: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    ends = threading.Event()
    for _ in range(2000):
        if done():
            return
        ends.wait(0.01)
    raise AssertionError("it never happened")
