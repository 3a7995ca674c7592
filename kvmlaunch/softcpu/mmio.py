"""Device accesses of plain guests.

The instruction itself does the access, on a scratch page that stands for the device: the data
read is put there first, what is written is taken from there afterwards.
"""

from __future__ import annotations

import ctypes

from .core import Core
from .events import MmioWrite
from .faults import GP, GuestFault
from .stepping import step

__all__ = ["Mmio"]

_PAGE = 0x1000


class Mmio:
    """One access at a linear address, to the device page at `gpa`."""

    def __init__(self, core: Core, linear: int, gpa: int) -> None:
        instruction = core.instruction()
        if instruction is None:
            raise GuestFault(GP, 0)
        self._core = core
        self._linear = linear
        self.gpa = gpa | (linear & _PAGE - 1)
        self.size = min(instruction.access_size, _PAGE - (linear & _PAGE - 1))
        self._buffer = ctypes.create_string_buffer(2 * _PAGE)
        self._host = (ctypes.addressof(self._buffer) + _PAGE - 1) & -_PAGE

    def provide(self, value: int) -> None:
        """Give the data of a read."""
        data = (value & (1 << 8 * self.size) - 1).to_bytes(self.size, "little")
        ctypes.memmove(self._host + (self._linear & _PAGE - 1), data, self.size)

    def step(self) -> tuple[int | None, MmioWrite | None]:
        """Execute the instruction; return the exit code if another one came, and the write."""
        core = self._core
        before = (core.linear_rip, list(core.state.gpr))
        core.scratch, core.scratch_written = (self._linear & -_PAGE, self._host), False
        core.engine.flush_tlb()
        core.engine.watching = False  # a debugger has seen this instruction
        code = step(core)
        core.engine.watching = True
        written, core.scratch = core.scratch_written, None
        core.engine.flush_tlb()
        done = code is None or before != (core.linear_rip, list(core.state.gpr))
        if not (written and done):
            return code, None
        at = self._host + (self._linear & _PAGE - 1)
        value = int.from_bytes(ctypes.string_at(at, self.size), "little")
        return code, MmioWrite(self.gpa, self.size, value)
