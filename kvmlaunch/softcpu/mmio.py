"""Device accesses of plain guests.

The instruction itself does the access, on a scratch page that stands for the device: the data
read is put there first, what is written is taken from there afterwards.
"""

from __future__ import annotations

import ctypes

from .core import Core
from .engine import CS
from .events import MmioWrite
from .faults import GP, GuestFault

__all__ = ["Mmio"]

_TF = 1 << 8
_DR6_BS = 1 << 14
_PAGE = 0x1000
_STEP_TICKS = 1 << 14
_SINGLE_STEP = 0x41


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
        state, engine = core.state, core.engine
        flags, dr6 = state.rflags, state.dr[6]
        before = (state.base(CS), state.rip)
        state.rflags = flags | _TF
        core.scratch, core.scratch_written = (self._linear & -_PAGE, self._host), False
        engine.flush_tlb()
        engine.watching = False  # a debugger has seen this instruction
        code: int | None = engine.run(state, core, _STEP_TICKS)
        engine.watching = True
        written = core.scratch_written
        core.scratch = None
        engine.flush_tlb()
        moved = before != (state.base(CS), state.rip) or state.dr[6] & _DR6_BS & ~dr6
        if not flags & _TF:
            state.rflags = state.rflags & ~_TF
            if code == _SINGLE_STEP:
                code, state.dr[6] = None, dr6
        if not (written and moved):
            return code, None
        at = self._host + (self._linear & _PAGE - 1)
        value = int.from_bytes(ctypes.string_at(at, self.size), "little")
        return code, MmioWrite(self.gpa, self.size, value)
