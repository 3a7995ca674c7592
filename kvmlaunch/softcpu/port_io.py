"""IN, OUT, INS and OUTS: permission, and for plain guests the transfer itself.

Source: AMD APM volume 2, 12.2.4 (I/O permission map).
"""

from __future__ import annotations

from .core import Core
from .decode import Instruction
from .engine import DS, ES, TR, WRITE
from .events import IoRead, IoWrite
from .faults import GP, GuestFault
from .operand import segment_base

__all__ = ["PortIo", "check_permission", "is_port_io"]

_RAX, _RCX, _RDX, _RSI, _RDI = 0, 1, 2, 6, 7
_DF, _VM = 1 << 10, 1 << 17
_PAGE = 0x1000
_READ_AHEAD = 1024
"""Most bytes that a repeated INS asks for at once."""


def is_port_io(instruction: Instruction | None) -> bool:
    """Whether it is one of the family."""
    if instruction is None or instruction.table:
        return False
    op = instruction.opcode
    return 0xE4 <= op <= 0xE7 or 0xEC <= op <= 0xEF or 0x6C <= op <= 0x6F


def _port(core: Core, instruction: Instruction) -> int:
    if instruction.opcode & 0xFC == 0xE4:
        return instruction.immediate
    return core.state.gpr[_RDX] & 0xFFFF


def _size(instruction: Instruction) -> int:
    return min(instruction.operand_size, 4) if instruction.opcode & 1 else 1


def check_permission(core: Core, instruction: Instruction) -> None:
    """Raise #GP where IOPL and the TSS's permission map forbid the access."""
    state = core.state
    flags = state.rflags
    if not state.cr[0] & 1 or (state.cpl <= flags >> 12 & 3 and not flags & _VM):
        return
    port, size = _port(core, instruction), _size(instruction)
    base, limit = state.base(TR), state.limit(TR)
    if not state.attrib(TR) & 8 or limit < 0x67:
        raise GuestFault(GP, 0)
    at = core.load_int(base + 0x66, 2) + port // 8
    if at + 1 > limit:
        raise GuestFault(GP, 0)
    if core.load_int(base + at, 2) >> port % 8 & (1 << size) - 1:
        raise GuestFault(GP, 0)


class PortIo:
    """One transfer of a plain guest: of OUTS one element, of INS what it reads at once."""

    def __init__(self, core: Core, instruction: Instruction) -> None:
        self._core = core
        self._instruction = instruction
        self._size = _size(instruction)
        self._port = _port(core, instruction)
        self._string = instruction.opcode < 0xE0
        self._write = bool(instruction.opcode & 2)

    def start(self) -> IoRead | IoWrite | None:
        """Return the event, None for a repeated instruction that has nothing to do.

        A write is complete then. Raises GuestFault and the like if the memory operand is
        out of reach.
        """
        core = self._core
        if self._string and self._instruction.repeat and not self._count():
            core.advance(self._instruction.length)
            return None
        if not self._write:
            if self._string:
                user = core.state.cpl == 3
                core.host_ranges(self._address(_RDI), self._size, WRITE, user)
            return IoRead(self._port, self._size, self._items())
        if self._string:
            data = core.load(self._address(_RSI), self._size, user=core.state.cpl == 3)
            value = int.from_bytes(data, "little")
        else:
            value = core.state.gpr[_RAX] & (1 << 8 * self._size) - 1
        self._finish()
        return IoWrite(self._port, self._size, value)

    def complete(self, value: int) -> None:
        """Finish a read: as many items as the registers say by now."""
        core, size = self._core, self._size
        if not self._string:
            core.set_gpr(_RAX, value & (1 << 8 * size) - 1, size)
            self._finish()
            return
        if self._instruction.repeat and not self._count():
            core.advance(self._instruction.length)
            return
        for _ in range(self._items()):
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            core.store(self._address(_RDI), data, user=core.state.cpl == 3)
            value >>= 8 * size
            self._finish()

    def _items(self) -> int:
        """pio_in_emulated(): what a repeated INS reads ahead, as many items as bytes are left."""
        if not self._string or not self._instruction.repeat:
            return 1
        down = self._core.state.rflags & _DF
        offset = self._core.state.gpr[_RDI] & self._width() & _PAGE - 1
        in_page = offset if down else _PAGE - offset
        return max(1, min(in_page, _READ_AHEAD // self._size, self._count()))

    def _width(self) -> int:
        return (1 << 8 * self._instruction.address_size) - 1

    def _count(self) -> int:
        return self._core.state.gpr[_RCX] & self._width()

    def _address(self, register: int) -> int:
        override = self._instruction.segment
        segment = ES if register == _RDI else override if override >= 0 else DS
        core = self._core
        linear = segment_base(core, segment) + (core.state.gpr[register] & self._width())
        return linear & (0xFFFFFFFFFFFFFFFF if core.long else 0xFFFFFFFF)

    def _finish(self) -> None:
        core, instruction = self._core, self._instruction
        if self._string:
            register = _RSI if self._write else _RDI
            step = -self._size if core.state.rflags & _DF else self._size
            self._add(register, step)
            if instruction.repeat:
                self._add(_RCX, -1)
                if self._count():
                    return
        core.advance(instruction.length)

    def _add(self, register: int, step: int) -> None:
        value = self._core.state.gpr[register] + step
        self._core.set_gpr(register, value & self._width(), self._instruction.address_size)
