"""What the CPU does when an instruction stopped the engine: emulate it, #VC, or an event."""

from __future__ import annotations

from collections.abc import Callable

from . import control, snp_instructions, vc
from .core import Core
from .decode import Instruction
from .engine import Stop
from .events import (
    DebugStop,
    DebugTrap,
    Event,
    Halt,
    InterruptWindow,
    IoRead,
    MsrRead,
    MsrWrite,
    Pause,
    Rsm,
    VmgExit,
    Vmmcall,
)
from .faults import AC, BP, DB, DF, GP, NP, PF, SS_FAULT, TS, UD, VC, GuestFault
from .inject import Delivery, deliver
from .msr import NativeMsrs
from .port_io import PortIo, check_permission, is_port_io

__all__ = ["Exits"]

_RAX, _RCX, _RDX, _RBX = 0, 1, 2, 3
_WORD = 0xFFFFFFFF
_XSETBV = b"\x0f\x01\xd1"
_WITH_ERROR_CODE = frozenset((DF, TS, NP, SS_FAULT, GP, PF, AC))
_BD = 1 << 13
"""Bit of DR6: an access to a debug register."""
_INT3, _INTN, _INTO = 0xCC, 0xCD, 0xCE
_VMMCALL = bytes.fromhex("0f01d9")


class Exits:
    """The exits of one CPU. Handlers raise GuestFault for #VC and other exceptions."""

    def __init__(self, core: Core, msrs: NativeMsrs, tsc: Callable[[], int]) -> None:
        self._core = core
        self._msrs = msrs
        self._tsc = tsc
        self._answer: Callable[[int], None] | None = None
        self.cr8 = 0
        self.stop_at_cr8 = False
        self.sev_features = 0
        self._handlers: dict[int, Callable[[int], Event | None]] = {
            Stop.BUDGET: lambda _code: None,
            Stop.DEBUG: self._stop_before,
            Stop.IO: self._port_io,
            Stop.SYSCALL: lambda _code: control.syscall(core),
            Stop.SYSENTER: lambda _code: control.sysenter(core),
            vc.WRITE_CR0: lambda _code: control.write_control(core, 0),
            vc.WRITE_CR4: lambda _code: control.write_control(core, 4),
            vc.READ_CR8: self._read_cr8,
            vc.WRITE_CR8: self._write_cr8,
            **dict.fromkeys((*vc.READ_DRS, *vc.WRITE_DRS), self._debug_register),
            vc.LTR: lambda _code: control.load_task_register(core),
            vc.RDTSC: self._rdtsc,
            vc.IRET: self._iret,
            vc.SOFTWARE_INTERRUPT: self._software_interrupt,
            vc.PAUSE: self._pause,
            vc.HLT: self._halt,
            vc.MSR: self._msr,
            vc.VMMCALL: self._vmmcall,
        }
        if not core.options.snp:
            self._handlers[vc.CPUID] = self._cpuid
            self._handlers[vc.RSM] = lambda _code: Rsm()
            for code in (vc.INVD, vc.WBINVD, vc.MONITOR, vc.MWAIT):
                self._handlers[code] = lambda _code: core.skip()

    def reset(self, *, keep_waiting: bool) -> None:
        """Forget what an earlier state left."""
        if not keep_waiting:
            self._answer = None
        self.cr8 = 0

    def handle(self, code: int) -> Event | None:
        """Handle a stop of the engine.

        Raises:
            GuestFault, HostFault: the instruction didn't get through.
        """
        if vc.EXCEPTION <= code < vc.EXCEPTION + 32:
            return self._exception(code - vc.EXCEPTION)
        if code == vc.WBINVD and self._instruction().opcode == 0x08:
            code = vc.INVD  # unicorn takes them for the same
        handler = self._handlers.get(code)
        if handler is not None:
            return handler(code)
        if self._core.options.snp and code in vc.VC_EXITS:
            raise GuestFault(VC, code)
        raise GuestFault(UD)  # SVM and the like in a plain guest

    # -- answers

    @property
    def waiting(self) -> bool:
        """Whether the last event wants an answer."""
        return self._answer is not None

    def wait(self, answer: Callable[[int], None]) -> None:
        """Call `answer` when the owner completes the event."""
        self._answer = answer

    def complete(self, value: int) -> None:
        """Pass the owner's answer on."""
        if self._answer is None:
            raise RuntimeError("nothing waits for an answer")
        answer, self._answer = self._answer, None
        answer(value)

    def forget(self) -> None:
        """Drop what waits for an answer."""
        if self._answer is None:
            raise RuntimeError("nothing waits for an answer")
        self._answer = None

    # -- exceptions and interrupts

    def _exception(self, vector: int) -> Event | None:
        core = self._core
        if vector == UD:
            instruction = core.instruction()
            if instruction is not None and (found := self._extension(instruction)):
                return found()
        if vector == GP and not core.options.snp and core.code(3) == _XSETBV:
            control.write_xcr0(core)
            return None
        snp = core.options.snp
        swapped = vector == 1 and self.sev_features & vc.DEBUG_SWAP
        if snp and vector in vc.VC_EXCEPTIONS and not swapped:
            raise GuestFault(VC, vc.EXCEPTION + vector)
        error = core.state.error_code if vector in _WITH_ERROR_CODE else None
        raise GuestFault(vector, error)

    def _extension(self, instruction: Instruction) -> Callable[[], Event | None] | None:
        """What an instruction does that the engine doesn't know."""
        if instruction.table != 0x0F or instruction.opcode != 0x01:
            return None
        if instruction.modrm == 0xD9:  # the engine knows VMMCALL only with EFER.SVME
            return lambda: self._vmmcall(vc.VMMCALL)
        if instruction.modrm == 0xC1 and not self._core.options.snp:
            return self._vmcall
        if self._core.options.snp and snp_instructions.is_snp_instruction(instruction):
            return lambda: snp_instructions.execute(self._core, instruction)
        return None

    def _vmcall(self) -> None:
        """Intel's way to call a hypervisor: KVM puts the CPU's own there, to be executed."""
        core = self._core
        if core.state.cpl:
            raise GuestFault(GP, 0)
        if not core.options.patches_vmcall():
            raise GuestFault(UD)
        core.store(core.linear_rip, _VMMCALL)

    def _stop_before(self, _code: int) -> Event:
        hit = self._core.debug.hits_code(self._core.linear_rip)
        return DebugTrap(DB, hit) if hit else DebugStop()

    def _software_interrupt(self, _code: int) -> Event | None:
        core = self._core
        instruction = self._instruction()
        opcode = instruction.opcode
        if opcode == _INT3 and core.debug.breakpoints:
            return DebugTrap(BP, 0)
        vector = {_INT3: 3, _INTO: 4}.get(opcode, instruction.immediate)
        state = core.state
        if opcode == _INTN and state.rflags & 1 << 17 and state.rflags >> 12 & 3 < 3:
            raise GuestFault(GP, 0)
        what = Delivery(vector, software=True, length=instruction.length)
        deliver(core, what)
        return None

    def _iret(self, _code: int) -> None:
        """The end of an NMI's handler: NMIs are open again, the IRET itself is still to come."""
        self._core.state.catch_iret = False

    # -- instructions

    def _instruction(self) -> Instruction:
        found = self._core.instruction()
        if found is None:
            raise GuestFault(GP, 0)
        return found

    def _vmmcall(self, code: int) -> Event | None:
        core = self._core
        instruction = self._instruction()
        if not core.options.snp:
            core.advance(instruction.length)
            return Vmmcall()
        if not instruction.repeat:
            raise GuestFault(VC, code)
        core.advance(instruction.length)
        return VmgExit(self._msrs.ghcb)

    def _halt(self, _code: int) -> Event:
        self._core.skip()
        return Halt()

    def _pause(self, _code: int) -> Event:
        self._core.skip()
        return Pause()

    def _cpuid(self, _code: int) -> None:
        core = self._core
        gpr = core.state.gpr
        answer = core.options.cpuid(gpr[_RAX] & _WORD, gpr[_RCX] & _WORD)
        for register, value in zip((_RAX, _RBX, _RCX, _RDX), answer, strict=True):
            gpr[register] = value & _WORD
        core.skip()

    def _rdtsc(self, _code: int) -> None:
        core = self._core
        instruction = self._instruction()
        with_aux = instruction.opcode == 0x01  # RDTSCP
        if core.options.snp and core.options.intercept_rdtsc:
            raise GuestFault(VC, vc.RDTSCP if with_aux else vc.RDTSC)
        self._put_pair(self._tsc())
        if with_aux:
            core.state.gpr[_RCX] = core.state.get("tsc_aux") & _WORD
        core.advance(instruction.length)

    def _put_pair(self, value: int) -> None:
        gpr = self._core.state.gpr
        gpr[_RAX], gpr[_RDX] = value & _WORD, value >> 32 & _WORD

    def _msr(self, code: int) -> Event | None:
        core = self._core
        instruction = self._instruction()
        gpr = core.state.gpr
        index, write = gpr[_RCX] & _WORD, instruction.opcode == 0x30
        owners = core.wants_msr is not None and core.wants_msr(index, write)
        if write:
            value = (gpr[_RAX] & _WORD) | (gpr[_RDX] & _WORD) << 32
            if not owners and self._msrs.write(index, value):
                core.advance(instruction.length)
                return None
            if core.options.snp:
                raise GuestFault(VC, code)
            self.wait(lambda _value: core.advance(instruction.length))
            return MsrWrite(index, value)
        found = None if owners else self._msrs.read(index, self._tsc())
        if found is not None:
            self._put_pair(found)
            core.advance(instruction.length)
            return None
        if core.options.snp:
            raise GuestFault(VC, code)

        def answer(value: int) -> None:
            self._put_pair(value)
            core.advance(instruction.length)

        self.wait(answer)
        return MsrRead(index)

    def _read_cr8(self, _code: int) -> None:
        instruction = self._instruction()
        size = 8 if self._core.state.bits == 64 else 4
        self._core.set_gpr(instruction.rm, self.cr8, size)
        self._core.advance(instruction.length)

    def _write_cr8(self, _code: int) -> Event | None:
        instruction = self._instruction()
        value = self._core.state.gpr[instruction.rm]
        if value >> 4:
            raise GuestFault(GP, 0)
        self.cr8 = value
        self._core.advance(instruction.length)
        return InterruptWindow() if self.stop_at_cr8 else None

    def _debug_register(self, code: int) -> Event | None:
        if self._core.debug.general_detect:
            return DebugTrap(DB, _BD)
        if self._core.options.snp and not self.sev_features & vc.DEBUG_SWAP:
            raise GuestFault(VC, code)
        if code in vc.READ_DRS:
            control.read_debug(self._core)
        else:
            control.write_debug(self._core)
        return None

    def _port_io(self, _code: int) -> Event | None:
        core = self._core
        instruction = core.instruction()
        if instruction is None or not is_port_io(instruction):
            core.engine.pass_io(core.linear_rip)  # other code at an address that had I/O before
            return None
        check_permission(core, instruction)
        if core.options.snp:
            raise GuestFault(VC, vc.IOIO)
        transfer = PortIo(core, instruction)
        event = transfer.start()
        if isinstance(event, IoRead):
            self.wait(transfer.complete)
        return event
