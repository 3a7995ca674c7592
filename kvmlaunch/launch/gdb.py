"""A GDB server for a guest: `target remote :PORT`, on the loopback interface only."""

from __future__ import annotations

import contextlib
import select
import socket
import threading

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.launch.debug import Debugger
from kvmlaunch.launch.gdb_packets import INTERRUPT, Packet, encode
from kvmlaunch.launch.gdb_session import Closed, GdbSession
from kvmlaunch.launch.guest import Guest

__all__ = ["GdbError", "GdbServer", "serve_gdb"]

_ADDRESS = "127.0.0.1"
_MOST_PORT = 65535
_SEND_SECONDS = 2.0
"""How long GDB may take to read what it asked for."""


class GdbError(KvmLaunchError):
    """The server can't listen."""


def serve_gdb(guest: Guest, port: int = 0) -> GdbServer:
    """Listen for GDB on 127.0.0.1; port 0 takes a free one (``GdbServer.port``).

        with serve_gdb(guest) as server:
            run_guest(guest, console=..., debugger=server.debugger)

    The guest waits before its first instruction until GDB lets it go. Raises MissingCapability
    where the host doesn't let a debugger in, and GdbError.
    """
    return GdbServer(Debugger(guest), port)


class GdbServer:
    """Serves one GDB after the other, by a thread of its own. A context manager."""

    def __init__(self, debugger: Debugger, port: int) -> None:
        if not 0 <= port <= _MOST_PORT:
            raise GdbError(f"gdb port {port}: ports are 0 to {_MOST_PORT}")
        self.debugger = debugger
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((_ADDRESS, port))
            self._listener.listen(1)
        except OSError as error:
            self._listener.close()
            raise GdbError(f"gdb port {port}: {error.strerror}") from None
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._closing = False
        debugger.on_change = self._ring
        self._thread = threading.Thread(target=self._serve, name="gdb", daemon=True)
        self._thread.start()

    def __enter__(self) -> GdbServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Tell GDB how it ended, and stop; nothing happens the second time."""
        if self._closing:
            return
        self._closing = True
        self._ring()
        self._thread.join()
        for sock in (self._listener, self._wake, self._waker):
            sock.close()

    def _ring(self) -> None:
        # A full pipe wakes as well, and after close() nobody listens.
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def _serve(self) -> None:
        while not self._closing:
            if self._listener in self._ready(self._listener):
                with contextlib.suppress(OSError):
                    connection, _ = self._listener.accept()
                    with connection:
                        connection.settimeout(_SEND_SECONDS)
                        _Connection(self, connection).serve()
                self._leave()

    def _leave(self) -> None:
        """GDB has gone: the guest goes on by itself."""
        debugger = self.debugger
        debugger.present = False
        # Its vCPUs must stand still for that: ioctls on a running one would wait.
        while debugger.stop is None and not self.is_over():
            debugger.interrupt()
            self.wait_for_change()
        if not self.is_over():
            with contextlib.suppress(KvmLaunchError):
                debugger.detach()

    def _ready(self, *sockets: socket.socket) -> list[socket.socket]:
        ready: list[socket.socket] = select.select([*sockets, self._wake], [], [])[0]
        if self._wake in ready:
            self._wake.recv(4096)
        return ready

    def is_over(self) -> bool:
        """Whether there is nothing to be served any more."""
        return self._closing or self.debugger.ended is not None

    def wait(self, connection: socket.socket) -> bool:
        """Wait for bytes of GDB (then True), or for anything else."""
        return connection in self._ready(connection)

    def wait_for_change(self) -> None:
        """Wait for the guest alone."""
        self._ready()


class _Connection:
    """A GDB that is connected."""

    def __init__(self, server: GdbServer, connection: socket.socket) -> None:
        self._server = server
        self._debugger = server.debugger
        self._connection = connection
        self._session = GdbSession(self._debugger)
        self._waits = False
        """Whether GDB waits to be told that the guest stands still."""

    def serve(self) -> None:
        """Until GDB leaves or the run is over. Raises OSError where it breaks or reads nothing."""
        self._debugger.present = True
        self._debugger.interrupt()
        with contextlib.suppress(Closed):
            while not self._server.is_over():
                if self._server.wait(self._connection):
                    data = self._connection.recv(4096)
                    if not data:
                        return
                    for packet in self._session.reader.feed(data):
                        self._take(packet)
                self._report()
            if self._waits:
                self._send(b"W%02x" % (not getattr(self._debugger.ended, "ok", False)))

    def _report(self) -> None:
        stop = self._debugger.stop if self._waits else None
        if stop is not None:
            self._waits = False
            self._send(self._session.stop_reply(stop))

    def _take(self, packet: Packet) -> None:
        if packet == INTERRUPT:
            self._debugger.interrupt()
            return
        if self._session.acknowledges:
            self._connection.sendall(b"+" if packet.ok else b"-")
        if not packet.ok:
            return
        if self._waits:
            return  # GDB has to interrupt it first
        if not self._still():
            return
        answer = self._session.answer(packet.data)
        if answer is None:
            self._waits = True
            return
        self._send(answer)
        if not self._debugger.present:
            raise Closed

    def _still(self) -> bool:
        """Wait until all vCPUs stand still: False if the run is over before."""
        while self._debugger.stop is None:
            if self._server.is_over():
                return False
            self._debugger.interrupt()
            self._server.wait_for_change()
        return True

    def _send(self, answer: bytes) -> None:
        self._connection.sendall(encode(answer))
