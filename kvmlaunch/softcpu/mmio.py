"""Device accesses of plain guests.

The instruction itself does the accesses, on scratch pages that stand for the device: the data
read is put there first, what is written is taken from there afterwards.
"""

from __future__ import annotations

import ctypes
import dataclasses

from .core import Core
from .engine import READ, WRITE
from .events import MmioWrite
from .faults import GP, GuestFault, MmioFault
from .stepping import step, unwatched

__all__ = ["Mmio"]

_PAGE = 0x1000


class _Scratch:
    """A page that stands for a device."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2 * _PAGE)
        self.host = (ctypes.addressof(self._buffer) + _PAGE - 1) & -_PAGE
        self.rights = 0


@dataclasses.dataclass(frozen=True)
class _DeviceAccess:
    """One access, within a page."""

    linear: int
    gpa: int
    size: int
    write: bool
    host: int


class Mmio:
    """What one instruction has to do with devices, by linear address.

    It is tried again with each page that it turns out to need; a page is read or written from the
    place where the instruction first did so.
    """

    def __init__(self, core: Core) -> None:
        instruction = core.instruction()
        if instruction is None:
            raise GuestFault(GP, 0)
        self._core = core
        self._size = instruction.access_size
        self._pages: dict[int, _Scratch] = {}
        self._accesses: list[_DeviceAccess] = []

    def add(self, linear: int, fault: MmioFault) -> tuple[int, int]:
        """Let the instruction do the access that was refused; return its GPA and size."""
        page, offset = linear & -_PAGE, linear & _PAGE - 1
        scratch = self._pages.setdefault(page, _Scratch())
        scratch.rights |= WRITE if fault.write else READ
        size = self._size
        for first in self._accesses:
            end = first.linear + self._size
            if first.write == fault.write and first.linear < linear < end:
                size = end - linear  # it began in the page before
        size = min(size, _PAGE - offset)
        access = _DeviceAccess(linear, fault.gpa | offset, size, fault.write, scratch.host + offset)
        self._accesses.append(access)
        return access.gpa, size

    def provide(self, value: int) -> None:
        """Give the data of the read that was added last."""
        access = self._accesses[-1]
        data = (value & (1 << 8 * access.size) - 1).to_bytes(access.size, "little")
        ctypes.memmove(access.host, data, access.size)

    def step(self) -> tuple[int | None, list[MmioWrite]]:
        """Execute the instruction; return the exit code if another one came, and the writes.

        A debugger has seen the instruction; its data breakpoints don't count here, as KVM's
        emulator doesn't know them.
        """
        core = self._core
        before = (core.linear_rip, list(core.state.gpr))
        core.scratch = {page: at.host | at.rights for page, at in self._pages.items()}
        try:
            with unwatched(core):
                code = step(core)
        finally:
            core.scratch = {}
        if code is not None and before == (core.linear_rip, list(core.state.gpr)):
            return code, []
        return code, [
            MmioWrite(
                access.gpa,
                access.size,
                int.from_bytes(ctypes.string_at(access.host, access.size), "little"),
            )
            for access in self._accesses
            if access.write
        ]
