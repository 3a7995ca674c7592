"""One CPU's registers and memory together: what emulated instructions and event delivery need."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

from .debug import NO_DEBUG, DebugControl
from .decode import Instruction, decode
from .engine import CS, FETCH, GDTR, LDTR, READ, TR, WRITE, Engine, EngineState
from .faults import GP, PF, GuestFault, HostFault, MmioFault, WatchFault
from .options import CpuOptions
from .pages import Pages
from .walk import Walker

__all__ = ["VM86", "Core", "Descriptor", "parse_descriptor"]

_PAGE = 0xFFF
_WORD = 0xFFFFFFFF
_QUAD = 0xFFFFFFFFFFFFFFFF
VM86 = 1 << 17
"""RFLAGS.VM."""


class Descriptor(NamedTuple):
    """A segment as it is loaded, with the parts of `Segment` (which checks them, and is slow)."""

    selector: int = 0
    attrib: int = 0
    limit: int = 0
    base: int = 0


def parse_descriptor(selector: int, low: int, base_high: int = 0) -> Descriptor:
    """Return the segment that an 8-byte descriptor describes."""
    limit = (low & 0xFFFF) | (low >> 32 & 0xF0000)
    if low >> 55 & 1:
        limit = limit << 12 | 0xFFF
    base = (low >> 16 & 0xFFFFFF) | (low >> 32 & 0xFF000000) | base_high << 32
    return Descriptor(selector, (low >> 40 & 0xFF) | (low >> 44 & 0xF00), limit, base)


class Core:
    """The inside of a `SoftCpu`."""

    def __init__(
        self, engine: Engine, state: EngineState, pages: Pages, options: CpuOptions
    ) -> None:
        self.engine = engine
        self.state = state
        self.pages = pages
        self.options = options
        self.walker = Walker(pages, options)
        self.vmpl = 0
        self.wants_msr: Callable[[int, bool], bool] | None = None
        """(MSR, whether it is written) -> whether that is the owner's, as `Machine` was told."""
        self.fault: GuestFault | HostFault | MmioFault | WatchFault | None = None
        self.debug: DebugControl = NO_DEBUG
        self.watched: dict[int, int] = {}
        """Linear pages with data that the owner watches, and the kinds of access it wants."""
        self.scratch: dict[int, int] = {}
        """Linear pages that stand for devices, with host address | rights: see `mmio`."""

    def flush(self) -> None:
        """Forget translations: the RMP has changed."""
        self.engine.flush_tlb()
        self.pages.flush()

    # -- translation

    def fill(self, page: int, kind: int) -> int:
        """Translate for the engine."""
        state = self.state
        cr = state.cr
        if self.scratch and (granted := self._scratch(page, kind)):
            return granted
        wanted = self.watched.get(page, 0)
        if wanted & kind:
            self.fault = WatchFault(kind == WRITE)
            return 0
        user = state.cpl == 3
        try:
            gpa, private, rights = self.walker.walk(
                page,
                kind,
                user,
                self.vmpl,
                cr[0],
                cr[3],
                cr[4],
                state.efer,
                state.rflags,
            )
            granted = self.pages.use(gpa, private, kind, user, self.vmpl)
            return granted & (rights & ~wanted | ~7)
        except GuestFault as fault:
            if fault.vector == PF and user and self._reads_system_table(page):
                return self._fill_system(page, kind)
            self.fault = fault
        except (HostFault, MmioFault) as fault:
            self.fault = fault
        return 0

    def _scratch(self, page: int, kind: int) -> int:
        granted = self.scratch.get(page if self.long else page & _WORD, 0)
        return granted if granted & kind else 0

    def _fill_system(self, page: int, kind: int) -> int:
        """A user's instruction reads a descriptor: that is a supervisor's access."""
        try:
            return self.resolve(page, kind) & ~7 | kind
        except (GuestFault, HostFault, MmioFault) as fault:
            self.fault = fault
            return 0

    def _reads_system_table(self, page: int) -> bool:
        state = self.state
        tables = ((state.base(n), state.limit(n)) for n in (GDTR, LDTR, TR))
        if not any(base & ~_PAGE <= page <= base + limit for base, limit in tables):
            return False
        instruction = self.instruction()
        return instruction is not None and instruction.reads_descriptors

    def resolve(self, linear: int, kind: int, user: bool = False) -> int:
        """Return host page | rights for a linear address, as a supervisor's access by default."""
        state = self.state
        cr = state.cr
        page = linear & ~_PAGE & _QUAD
        if self.scratch and (granted := self._scratch(page, kind)):
            return granted
        gpa, private, rights = self.walker.walk(
            page, kind, user, self.vmpl, cr[0], cr[3], cr[4], state.efer, state.rflags
        )
        return self.pages.use(gpa, private, kind, user, self.vmpl) & (rights | ~7)

    def translate(self, linear: int, kind: int) -> tuple[int, bool]:
        """Return the GPA of a linear address, and whether it is private."""
        state = self.state
        cr = state.cr
        gpa, private, _ = self.walker.walk(
            linear & ~_PAGE,
            kind,
            state.cpl == 3,
            self.vmpl,
            cr[0],
            cr[3],
            cr[4],
            state.efer,
            state.rflags,
        )
        return gpa | (linear & _PAGE), private

    def host_ranges(
        self, linear: int, size: int, kind: int, user: bool = False
    ) -> list[tuple[int, int]]:
        """Return (host address, size) of the parts of a range, each in one page.

        Raises:
            GuestFault: #PF has the address of the first byte out of reach.
        """
        mask = _QUAD if self.long else _WORD
        found = []
        while size > 0:
            linear &= mask
            part = min(size, _PAGE + 1 - (linear & _PAGE))
            try:
                host = self.resolve(linear, kind, user)
            except GuestFault as fault:
                if fault.vector == PF:
                    fault.address = linear
                raise
            found.append(((host & ~_PAGE) + (linear & _PAGE), part))
            linear, size = linear + part, size - part
        return found

    def load(self, linear: int, size: int, kind: int = READ, user: bool = False) -> bytes:
        """Read guest memory."""
        if linear & _PAGE <= _PAGE + 1 - size and (linear <= _WORD or self.long):
            try:
                host = self.resolve(linear, kind, user)
            except GuestFault as fault:
                fault.address = linear
                raise
            return ctypes.string_at((host & ~_PAGE) + (linear & _PAGE), size)
        ranges = self.host_ranges(linear, size, kind, user)
        return b"".join(ctypes.string_at(host, part) for host, part in ranges)

    def load_int(self, linear: int, size: int) -> int:
        """Read a number from guest memory, as a supervisor."""
        return int.from_bytes(self.load(linear, size), "little")

    def store(self, linear: int, data: bytes, user: bool = False) -> None:
        """Write guest memory; all of it or nothing."""
        at = 0
        for host, part in self.host_ranges(linear, len(data), WRITE, user):
            self.engine.write(host, data[at : at + part])
            at += part

    # -- instructions

    @property
    def long(self) -> bool:
        """Whether long mode is active, 64-bit code or not."""
        return bool(self.state.efer & 0x400)

    @property
    def protected(self) -> bool:
        """Whether CR0.PE is set and this isn't virtual-8086 mode."""
        return bool(self.state.cr[0] & 1) and not self.state.rflags & VM86

    @property
    def linear_rip(self) -> int:
        """RIP as a linear address."""
        state = self.state
        if state.bits == 64:
            return state.rip
        linear = state.base(CS) + state.rip
        return linear & (_QUAD if self.long else _WORD)

    def code(self, size: int = 15) -> bytes:
        """Return the bytes at RIP, fewer where the next page is out of reach."""
        linear, found = self.linear_rip, b""
        user = self.state.cpl == 3
        first = min(size, _PAGE + 1 - (linear & _PAGE))
        try:
            found = self.load(linear, first, FETCH, user)
            if first < size:
                found += self.load(linear + first, size - first, FETCH, user)
        except (GuestFault, HostFault, MmioFault):
            pass
        return found

    def instruction(self) -> Instruction | None:
        """Return the instruction at RIP."""
        return decode(self.code(), self.state.bits)

    def advance(self, length: int) -> None:
        """Go behind an instruction of that length."""
        state = self.state
        mask = {64: _QUAD, 32: _WORD, 16: 0xFFFF}[state.bits]
        state.rip = state.rip + length & mask
        state.shadow = False

    def skip(self) -> None:
        """Go behind the instruction at RIP."""
        instruction = self.instruction()
        if instruction is None:
            raise GuestFault(GP, 0)
        self.advance(instruction.length)

    def set_gpr(self, number: int, value: int, size: int) -> None:
        """Write a general register as an instruction of that operand size does."""
        gpr = self.state.gpr
        if size >= 4:
            gpr[number] = value & ((1 << 8 * size) - 1)
        else:
            mask = (1 << 8 * size) - 1
            gpr[number] = gpr[number] & ~mask | value & mask

    # -- descriptors

    def descriptor(self, selector: int, vector: int = GP) -> int:
        """Return the 8 bytes of a descriptor as a number.

        Raises:
            GuestFault: the selector is outside its table; `vector` with the selector.
        """
        table = LDTR if selector & 4 else GDTR
        state = self.state
        offset = selector & 0xFFF8
        in_range = offset + 7 <= state.limit(table)
        if not in_range or (table == LDTR and not state.attrib(LDTR) & 0x80):
            raise GuestFault(vector, selector & 0xFFFC)
        return self.load_int(state.base(table) + offset, 8)

    def stack_segment(self, selector: int, dpl: int, vector: int) -> Descriptor:
        """Return the stack segment of an inner privilege level, checked."""
        if not selector & 0xFFFC:
            raise GuestFault(vector, 0)
        found = parse_descriptor(selector, self.descriptor(selector, vector))
        right_kind = found.attrib & 0x1A == 0x12  # S, data, writable
        if selector & 3 != dpl or found.attrib >> 5 & 3 != dpl or not right_kind:
            raise GuestFault(vector, selector & 0xFFFC)
        if not found.attrib & 0x80:
            raise GuestFault(12, selector & 0xFFFC)
        return found
