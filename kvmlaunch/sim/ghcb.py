"""The GHCB page as KVM has it mapped between a VMGEXIT and the next entry (sev.c)."""

from __future__ import annotations

import struct
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmlaunch.abi.ghcb import (
    BUFFER,
    BUFFER_END,
    FIELDS,
    USAGE,
    VALID_BITMAP,
    VALID_BITMAP_SIZE,
    ApRequest,
    GhcbError,
    GhcbExit,
    is_valid,
)
from kvmlaunch.abi.page import PAGE_SIZE

if TYPE_CHECKING:
    from kvmlaunch.sim.guest_memory import VmMemory

__all__ = ["SCRATCH_LIMIT", "Ghcb", "ScratchArea", "refused"]

SCRATCH_LIMIT = 16 * PAGE_SIZE
"""GHCB_SCRATCH_AREA_LIMIT: of a scratch area outside the GHCB."""

_U64 = (1 << 64) - 1
_INFO_ERROR, _INFO_EXCEPTION = 2, 1
_EVENT_VALID, _EVENT_EXCEPTION = 1 << 31, 3 << 8
_IOIO_STRING, _IOIO_IN = 1 << 2, 1 << 0
_XCR0_LEAF = 0xD

_REQUIRED: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        GhcbExit.READ_DR7: (),
        GhcbExit.WRITE_DR7: ("rax",),
        GhcbExit.RDTSC: (),
        GhcbExit.RDPMC: ("rcx",),
        GhcbExit.CPUID: ("rax", "rcx"),
        GhcbExit.INVD: (),
        GhcbExit.IOIO: (),
        GhcbExit.MSR: ("rcx",),
        GhcbExit.VMMCALL: ("rax", "cpl"),
        GhcbExit.RDTSCP: (),
        GhcbExit.WBINVD: (),
        GhcbExit.MONITOR: ("rax", "rcx", "rdx"),
        GhcbExit.MWAIT: ("rax", "rcx"),
        GhcbExit.MMIO_READ: ("scratch",),
        GhcbExit.MMIO_WRITE: ("scratch",),
        GhcbExit.AP_CREATION: (),
        GhcbExit.NMI_COMPLETE: (),
        GhcbExit.AP_RESET_HOLD: (),
        GhcbExit.AP_JUMP_TABLE: (),
        GhcbExit.UNSUPPORTED: (),
        GhcbExit.HV_FEATURES: (),
        GhcbExit.TERMINATE: (),
        GhcbExit.PSC: ("scratch",),
        GhcbExit.GUEST_REQUEST: (),
        GhcbExit.EXT_GUEST_REQUEST: (),
        GhcbExit.APIC_ID_LIST: ("rax",),
        GhcbExit.RUN_VMPL: (),
    }
)
"""Events that some KVM knows -> what the guest must have marked as valid."""


class Ghcb:
    """A copy of what the guest wrote, and the way to write answers to its page.

    Attributes: ``gpa``; ``registers`` RAX, RBX, RCX, RDX and RSI, 0 where they are not valid, and
    what handlers make of them; ``exit_code``, ``info_1``, ``info_2``, ``cpl``; ``scratch`` GPA
    (0 if not valid); ``xcr0`` (None if not valid); ``valid``, the bitmap.

    Raises:
        OSError: there is no memory at ``gpa``.
    """

    def __init__(self, memory: VmMemory, gpa: int) -> None:
        """sev_es_sync_from_ghcb()."""
        self.gpa = gpa
        self._memory = memory
        self._page = memory.read(gpa, PAGE_SIZE)
        self.valid = self._page[VALID_BITMAP : VALID_BITMAP + VALID_BITMAP_SIZE]
        self.registers = {
            name: self._if_valid(name) for name in ("rax", "rbx", "rcx", "rdx", "rsi")
        }
        self.cpl = self._if_valid("cpl") & 0xFF
        self.xcr0 = self._field("xcr0") if is_valid(self.valid, "xcr0") else None
        self.exit_code = self._field("exit_code")
        self.info_1 = self._field("exit_info_1")
        self.info_2 = self._field("exit_info_2")
        self.scratch = self._if_valid("scratch")
        self._answered = bytearray(VALID_BITMAP_SIZE)
        memory.write(gpa + VALID_BITMAP, bytes(VALID_BITMAP_SIZE))

    def is_valid(self, field: str) -> bool:
        """Whether the guest has marked a field as valid."""
        return is_valid(self.valid, field)

    def register(self, name: str) -> int | None:
        """A register that the guest gave; None if it didn't."""
        return self.registers[name] if self.is_valid(name) else None

    def put(self, field: str, value: int) -> None:
        """Write a field of the answer and mark it as valid."""
        offset = FIELDS[field]
        bit = offset // 8
        self._answered[bit // 8] |= 1 << bit % 8
        _write(self._memory, self.gpa + offset, (value & _U64).to_bytes(8, "little"))
        _write(self._memory, self.gpa + VALID_BITMAP, bytes(self._answered))

    def refuse(self, reason: GhcbError) -> int:
        """The guest gets an error code and goes on."""
        self.put("exit_info_1", _INFO_ERROR)
        self.put("exit_info_2", reason)
        return 1

    def raise_exception(self, vector: int) -> int:
        """The guest is told to raise an exception, with the error code 0 that #GP has."""
        self.put("exit_info_1", _INFO_EXCEPTION)
        self.put("exit_info_2", vector | _EVENT_EXCEPTION | _EVENT_VALID)
        return 1

    def open_scratch(self, size: int, version: int, *, sync: bool) -> ScratchArea | None:
        """setup_vmgexit_scratch(): the area, or None where the guest has got an error code.

        ``version`` is that of the VM. Raises OSError(EFAULT) for memory that isn't there.
        """
        first, end = self.scratch, self.scratch + size
        if not first or end > _U64:
            self.refuse(GhcbError.INVALID_SCRATCH)
            return None
        if first & -PAGE_SIZE == self.gpa:
            if first < self.gpa + BUFFER or end > self.gpa + BUFFER_END:
                self.refuse(GhcbError.INVALID_SCRATCH)
                return None
            return ScratchArea(self._memory, first, self.gpa + BUFFER_END - first)
        if version >= 2 or size > SCRATCH_LIMIT:
            self.refuse(GhcbError.INVALID_SCRATCH)
            return None
        copy = bytearray(self._memory.read(first, size))
        return ScratchArea(self._memory, first, size, copy=copy, sync=sync)

    def _field(self, name: str) -> int:
        offset = FIELDS[name]
        return int.from_bytes(self._page[offset : offset + (1 if name == "cpl" else 8)], "little")

    def _if_valid(self, name: str) -> int:
        return self._field(name) if is_valid(self.valid, name) else 0

    @property
    def usage(self) -> int:
        """Format of the page."""
        (usage,) = struct.unpack_from("<I", self._page, USAGE)
        return int(usage)


class ScratchArea:
    """``size`` bytes that belong to an exit: in the GHCB, or KVM's copy of other memory."""

    def __init__(
        self,
        memory: VmMemory,
        gpa: int,
        size: int,
        *,
        copy: bytearray | None = None,
        sync: bool = False,
    ) -> None:
        self._memory = memory
        self._gpa = gpa
        self._copy = copy
        self._sync = sync
        self.size = size

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the area; zeros where its memory has gone."""
        if self._copy is not None:
            return bytes(self._copy[offset : offset + size])
        try:
            return self._memory.read(self._gpa + offset, size)
        except OSError:
            return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Change bytes of the area."""
        if self._copy is not None:
            self._copy[offset : offset + len(data)] = data
        else:
            _write(self._memory, self._gpa + offset, data)

    def finish(self) -> None:
        """Write a copy back, if the guest is to see what became of it."""
        if self._copy is not None and self._sync:
            _write(self._memory, self._gpa, bytes(self._copy))


def refused(ghcb: Ghcb, lacking: Container[int] = ()) -> GhcbError | None:
    """sev_es_validate_vmgexit(): why KVM refuses the event, before it looks at it.

    ``lacking`` are the events that this kernel doesn't have.
    """
    if ghcb.usage:
        return GhcbError.INVALID_USAGE
    if not all(map(ghcb.is_valid, ("exit_code", "exit_info_1", "exit_info_2"))):
        return GhcbError.MISSING_INPUT
    required = _REQUIRED.get(ghcb.exit_code)
    if required is None or ghcb.exit_code in lacking:
        return GhcbError.INVALID_EVENT
    if not all(map(ghcb.is_valid, (*required, *_also_required(ghcb)))):
        return GhcbError.MISSING_INPUT
    if ghcb.exit_code in (GhcbExit.GUEST_REQUEST, GhcbExit.EXT_GUEST_REQUEST):
        unaligned = ghcb.info_1 % PAGE_SIZE or ghcb.info_2 % PAGE_SIZE
        if unaligned or ghcb.info_1 == ghcb.info_2:
            return GhcbError.MISSING_INPUT
    return None


def _also_required(ghcb: Ghcb) -> tuple[str, ...]:
    """What depends on the other inputs."""
    code, info_1 = ghcb.exit_code, ghcb.info_1
    if code == GhcbExit.CPUID and ghcb.registers["rax"] == _XCR0_LEAF:
        return ("xcr0",)
    if code == GhcbExit.IOIO:
        if info_1 & _IOIO_STRING:
            return ("scratch",)
        return () if info_1 & _IOIO_IN else ("rax",)
    if code == GhcbExit.MSR and info_1:
        return ("rax", "rdx")
    if code == GhcbExit.AP_CREATION and info_1 & 0xFFFFFFFF != ApRequest.DESTROY:
        return ("rax",)
    return ()


def _write(memory: VmMemory, gpa: int, data: bytes) -> None:
    """Write what KVM has mapped; where user space took the memory away, nobody will see it."""
    try:
        memory.write(gpa, data)
    except OSError:
        return
