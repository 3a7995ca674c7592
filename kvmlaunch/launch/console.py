"""The devices that a test guest sees: a 16550 console and an exit port."""

from __future__ import annotations

from typing import Any

from kvmlaunch.kvm.exits import IoExit
from kvmlaunch.uapi import ffi, lib

__all__ = ["CONSOLE_PORT", "EXIT_PORT", "Uart"]

CONSOLE_PORT = 0x3F8
EXIT_PORT = 0xF4
_PORTS = 8


class Uart:
    """A 16550 at 0x3f8 without input (csrc/run.c).

    Each vCPU has its own, since the run loop works on it without a lock; what a
    vCPU prints stays in order.
    """

    def __init__(self, port: int = CONSOLE_PORT) -> None:
        self.port = port
        self.native: Any = ffi.new("struct kl_uart *", {"base": port})

    def owns(self, exit_: IoExit) -> bool:
        """True for a byte access to one of its ports."""
        return exit_.size == 1 and self.port <= exit_.port < self.port + _PORTS

    def access(self, exit_: IoExit) -> bytes:
        """Do an access that came back as an exit; returns the data of an IN."""
        if exit_.is_write:
            for value in exit_.data:
                lib.kl_uart_out(self.native, exit_.port, value)
            return b""
        return bytes(lib.kl_uart_in(self.native, exit_.port) for _ in range(exit_.count))

    def take(self) -> bytes:
        """The text since the last call."""
        text = bytes(ffi.buffer(self.native.text, self.native.used))
        self.native.used = 0
        return text
