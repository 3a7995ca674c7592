"""The devices that a test guest sees: a 16550 console, at ports and in memory, and an exit port."""

from __future__ import annotations

from typing import Any

from kvmlaunch.kvm.exits import IoExit, MmioExit
from kvmlaunch.uapi import ffi, lib

__all__ = ["CONSOLE_GPA", "CONSOLE_PORT", "EXIT_PORT", "Uart"]

CONSOLE_PORT = 0x3F8
CONSOLE_GPA = 0xFEDC9000
"""Where AMD's chipsets have their first UART in memory; its registers are bytes, too."""
EXIT_PORT = 0xF4
_REGISTERS = 8


class Uart:
    """A 16550 at 0x3f8 without input (csrc/run.c).

    Each vCPU has its own, since the run loop works on it without a lock; what a
    vCPU prints stays in order.
    """

    def __init__(self, port: int = CONSOLE_PORT) -> None:
        self.port = port
        self.native: Any = ffi.new("struct kl_uart *", {"base": port})

    def owns(self, exit_: IoExit | MmioExit) -> bool:
        """True for a byte access to one of its registers."""
        return exit_.size == 1 and 0 <= self._register(exit_) < _REGISTERS

    def _register(self, exit_: IoExit | MmioExit) -> int:
        return exit_.port - self.port if isinstance(exit_, IoExit) else exit_.gpa - CONSOLE_GPA

    def access(self, exit_: IoExit | MmioExit) -> bytes:
        """Do an access that came back as an exit; returns the data of a read."""
        port = self.port + self._register(exit_)
        if exit_.is_write:
            for value in exit_.data:
                lib.kl_uart_out(self.native, port, value)
            return b""
        count = exit_.count if isinstance(exit_, IoExit) else 1
        return bytes(lib.kl_uart_in(self.native, port) for _ in range(count))

    def take(self) -> bytes:
        """The text since the last call."""
        text = bytes(ffi.buffer(self.native.text, self.native.used))
        self.native.used = 0
        return text
