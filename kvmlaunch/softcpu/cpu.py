"""One CPU, as its owner sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmlaunch.abi.vmsa import Vmsa

from .core import Core
from .debug import NO_DEBUG, DebugControl
from .engine import GPR_NAMES, READ, Stop
from .events import (
    Budget,
    DebugTrap,
    Event,
    InterruptWindow,
    InvalidState,
    MmioRead,
    MmioWrite,
    Shutdown,
)
from .exits import Exits
from .faults import DB, GP, PF, GuestFault, HostFault, MmioFault, WatchFault
from .inject import Delivery, TripleFault, deliver
from .mmio import Mmio
from .msr import NativeMsrs
from .stepping import STEP_TICKS, step, step_over
from .vmsa_state import Loaded, broken_rule, load, save

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["SoftCpu"]

_EXIT_TICKS = 16
"""What a stop of the engine costs, so that no loop of exceptions runs for ever."""
_QUAD = 0xFFFFFFFFFFFFFFFF
_IF = 1 << 9
_AC = 1 << 18
_NMI = 2


class SoftCpu:
    """One CPU (at one VMPL, which the VMSA names)."""

    def __init__(self, machine: Machine, core: Core) -> None:
        self._machine = machine
        self._core = core
        self._msrs = NativeMsrs(core)
        self._exits = Exits(core, self._msrs, self._tsc)
        self._loaded: Loaded | None = None
        self._stopped: Event | None = InvalidState("no VMSA was loaded")
        self._pending: tuple[Delivery, int] | None = None
        self._mmio: Mmio | None = None
        self._writes: list[MmioWrite] = []
        """What an instruction that is done has written to devices."""
        self.ticks = 0
        """Ticks that this CPU has run since it was made."""
        self.tsc_offset = 0
        """What its TSC is ahead of the machine's."""
        self.on_exception: Callable[[int, int | None], object] | None = None
        """Told the vector and error code of each exception before the guest gets it."""
        self.want_window = False
        """Stop with `InterruptWindow` as soon as an interrupt can be injected."""

    # -- state

    def load(self, vmsa: Vmsa, *, keep_waiting: bool = False) -> InvalidState | None:
        """Take the whole state from a VMSA, as the first VMRUN does; None if it can run.

        ``keep_waiting``: an event that waits for `complete` still does.
        """
        self._pending = self._mmio = None
        self._writes.clear()
        self._exits.reset(keep_waiting=keep_waiting)
        rule = broken_rule(vmsa, self._core.options)
        if rule is not None:
            self._stopped = invalid = InvalidState(rule)
            return invalid
        self._stopped = None
        self._loaded = load(self._core.state, vmsa)
        self._core.vmpl = vmsa.vmpl
        self._msrs.load(vmsa)
        self._exits.sev_features = vmsa.sev_features
        return None

    def save(self) -> Vmsa:
        """Return the state, as the processor writes it to the VMSA when the guest exits.

        Raises:
            RuntimeError: no VMSA was loaded.
        """
        if self._loaded is None:
            raise RuntimeError("a CPU without state has no VMSA")
        return self._msrs.save(save(self._core.state, self._loaded))

    @property
    def ghcb(self) -> int:
        """The GHCB MSR, for the hypervisor's answer. 0 after `load`."""
        return self._msrs.ghcb

    @ghcb.setter
    def ghcb(self, value: int) -> None:
        self._msrs.ghcb = value

    @property
    def vmpl(self) -> int:
        """The VMPL, from the VMSA."""
        return self._core.vmpl

    def read(self, name: str) -> int:
        """Return a register: rax..r15, rip, rflags, efer, cpl, cr0, 2, 3, 4, 8, dr0..dr7, xcr0.

        Raises:
            KeyError: no such register.
        """
        state = self._core.state
        if name in GPR_NAMES:
            return state.gpr[GPR_NAMES.index(name)]
        if name in ("rip", "rflags", "efer", "cpl"):
            return int(getattr(state, name))
        if name == "cr8":
            return self._exits.cr8
        if name in ("cr0", "cr2", "cr3", "cr4"):
            return state.cr[int(name[2])]
        if name == "xcr0":
            return state.get(name)
        if name[:2] == "dr" and name[2:] in ("0", "1", "2", "3", "6", "7"):
            return state.dr[int(name[2])]
        raise KeyError(name)

    def write(self, name: str, value: int) -> None:
        """Change a general register, rip, rflags, cr2 or cr8.

        Others by `save`, a change and `load`, which drops what is pending.

        Raises:
            KeyError: no such register, or not one of these.
        """
        state = self._core.state
        if name in GPR_NAMES:
            state.gpr[GPR_NAMES.index(name)] = value
        elif name == "rip":
            state.rip = value
        elif name == "rflags":
            state.rflags = value
        elif name == "cr2":
            state.cr[2] = value
        elif name == "cr8":
            self._exits.cr8 = value & 0xF
        else:
            raise KeyError(name)

    def set_debug(self, control: DebugControl = NO_DEBUG) -> None:
        """Stop with `DebugTrap` for this: plain guests."""
        core = self._core
        core.debug, core.watched = control, control.watched_pages()
        core.state.catch_debug_registers = control.general_detect
        core.engine.flush_tlb()
        self._machine.update_watch()

    # -- running

    def run(self, ticks: int) -> Event:
        """Run until an event, or for about `ticks` ticks (one block more at most).

        Raises:
            RuntimeError: an `IoRead`, `MmioRead` or the like waits for `complete`.
        """
        if self._stopped is not None:
            return self._stopped
        self._check_answered()
        core, left = self._core, ticks
        self._machine.current = core
        while True:
            event = self._before_entry()
            if event is not None:
                return event
            if self.want_window and self.interruptible:
                return InterruptWindow()
            if left <= 0:
                return Budget()
            given = 1 if self.want_window else left
            code = core.engine.run(core.state, core, given)
            left -= self._count(given)
            event = self._after_exit(code)
            if event is not None:
                return event

    def step(self) -> Event | None:
        """Execute one instruction, or deliver one event; for debuggers.

        Raises:
            RuntimeError: as `run`.
        """
        if self._stopped is not None:
            return self._stopped
        self._check_answered()
        if self.unfinished:
            return self._before_entry()
        self._machine.current = self._core
        code = step(self._core)
        self._count(STEP_TICKS)
        return None if code is None else self._after_exit(code)

    def _check_answered(self) -> None:
        if self._exits.waiting:
            raise RuntimeError("the last event wants an answer: complete() or refuse()")

    def _count(self, given: int) -> int:
        """Add up what the engine used of its ticks."""
        used = given - self._core.engine.ticks_left + _EXIT_TICKS
        self.ticks += used
        self._machine.ticks += used
        return used

    def _before_entry(self) -> Event | None:
        """Do what was left undone: an event to deliver, a device access to finish."""
        if self._writes:
            return self._writes.pop(0)
        if self._pending is not None:
            (what, address), self._pending = self._pending, None
            return self._deliver(what, address)
        if self._mmio is not None:
            mmio, self._mmio = self._mmio, None
            return self._step(mmio)
        return None

    def _after_exit(self, code: int) -> Event | None:
        try:
            if code == Stop.MEMORY:
                return self._memory_fault()
            return self._exits.handle(code)
        except GuestFault as fault:
            what = Delivery(fault.vector, fault.error_code)
            return self._deliver(what, fault.address)
        except HostFault as fault:
            return fault.event
        except TripleFault as fault:
            return self._shut_down(fault.vectors)
        except MmioFault as fault:
            # Not by the engine's own access: INS to a device and the like.
            return self._deliver(Delivery(GP, 0), fault.gpa)

    def _memory_fault(self) -> Event | None:
        core = self._core
        fault, core.fault = core.fault, None
        address = self._fault_address
        if isinstance(fault, GuestFault):
            if fault.vector == PF:
                fault.address = address
                if self._is_change(fault):
                    fault.error_code = (fault.error_code or 0) | 2
            raise fault
        if isinstance(fault, MmioFault):
            return self._access_device(Mmio(core), fault)
        if isinstance(fault, WatchFault):
            code, hit = step_over(core, fault, address)
            event = None if code is None else self._after_exit(code)
            return DebugTrap(DB, hit) if hit else event
        assert fault is not None
        event = fault.event
        if not event.walk:
            event = dataclasses.replace(event, gpa=event.gpa | (address & 0xFFF))
        return event

    @property
    def _fault_address(self) -> int:
        address = self._core.engine.fault_address
        return address if self._core.long else address & 0xFFFFFFFF

    def _is_change(self, fault: GuestFault) -> bool:
        """Whether a refused read is the first half of a read-modify-write."""
        if (fault.error_code or 0) & 0x12:
            return False
        instruction = self._core.instruction()
        return instruction is not None and instruction.changes_memory

    def _access_device(self, mmio: Mmio, fault: MmioFault) -> Event | None:
        gpa, size = mmio.add(self._fault_address, fault)
        if fault.write:
            return self._step(mmio)
        self._exits.wait(lambda value: self._finish_read(mmio, value))
        return MmioRead(gpa, size)

    def _finish_read(self, mmio: Mmio, value: int) -> None:
        mmio.provide(value)
        self._mmio = mmio

    def _step(self, mmio: Mmio) -> Event | None:
        core = self._core
        code, self._writes = mmio.step()
        if code == Stop.MEMORY and isinstance(core.fault, MmioFault):
            fault, core.fault = core.fault, None
            return self._access_device(mmio, fault)
        event = None if code is None else self._after_exit(code)
        return self._writes.pop(0) if self._writes else event

    def complete(self, value: int = 0) -> None:
        """Finish the instruction of `IoRead`, `MmioRead`, `MsrRead` or `MsrWrite`.

        Raises:
            RuntimeError: nothing waits for an answer.
        """
        try:
            self._exits.complete(value)
        except GuestFault as fault:
            self._pending = (Delivery(fault.vector, fault.error_code), fault.address)
        except (HostFault, MmioFault):
            pass  # INS whose memory went away meanwhile: it is repeated, and meets that itself

    def refuse(self) -> None:
        """Answer `MsrRead` or `MsrWrite` with #GP(0).

        Raises:
            RuntimeError: nothing waits for an answer.
        """
        self._exits.forget()
        self._pending = (Delivery(GP, 0), 0)

    def _tsc(self) -> int:
        return self._machine.ticks // self._core.options.ticks_per_tsc + self.tsc_offset & _QUAD

    # -- events for the guest

    @property
    def unfinished(self) -> bool:
        """Whether an event or a device access has to be finished before an event is injected."""
        return bool(self._writes) or self._pending is not None or self._mmio is not None

    @property
    def interruptible(self) -> bool:
        """Whether an interrupt can be injected now: IF set, no interrupt shadow."""
        state = self._core.state
        return bool(state.rflags & _IF) and not (self.unfinished or state.shadow)

    @property
    def stop_at_cr8(self) -> bool:
        """Stop with `InterruptWindow` when the guest has written to CR8."""
        return self._exits.stop_at_cr8

    @stop_at_cr8.setter
    def stop_at_cr8(self, value: bool) -> None:
        self._exits.stop_at_cr8 = value

    @property
    def shadow(self) -> bool:
        """The interrupt shadow of STI or MOV SS."""
        return self._core.state.shadow

    @shadow.setter
    def shadow(self, value: bool) -> None:
        self._core.state.shadow = value

    @property
    def nmi_blocked(self) -> bool:
        """Whether an NMI is being handled (until IRET)."""
        return self._core.state.catch_iret

    @nmi_blocked.setter
    def nmi_blocked(self, value: bool) -> None:
        self._core.state.catch_iret = value

    def inject_interrupt(self, vector: int) -> Event | None:
        """Deliver an external interrupt through the guest's IDT, now; an event if that fails.

        Raises:
            RuntimeError: the CPU isn't `interruptible`.
        """
        if not self.interruptible:
            raise RuntimeError("the CPU can't take an interrupt now")
        return self._deliver(Delivery(vector, external=True), 0)

    def inject_nmi(self) -> Event | None:
        """Deliver an NMI; an event if that fails.

        Raises:
            RuntimeError: another one is being handled.
        """
        if self.nmi_blocked or self._pending is not None:
            raise RuntimeError("the CPU can't take an NMI now")
        self._core.state.catch_iret = True
        return self._deliver(Delivery(_NMI, external=True), 0)

    def inject_exception(
        self, vector: int, error_code: int | None = None, address: int = 0
    ) -> Event | None:
        """Deliver an exception, with an error code or without one; `address` is CR2 of a #PF."""
        return self._deliver(Delivery(vector, error_code), address)

    def _deliver(self, what: Delivery, address: int) -> Event | None:
        if self._stopped is not None:
            return self._stopped
        if self.on_exception is not None and not what.external:
            self.on_exception(what.vector, what.error_code)
        try:
            deliver(self._core, what, address)
        except TripleFault as fault:
            return self._shut_down(fault.vectors)
        except HostFault as fault:
            self._pending = (what, address)
            return fault.event
        except MmioFault:  # IDT or stack in a device
            return self._shut_down((what.vector,))
        return None

    def _shut_down(self, vectors: tuple[int, ...]) -> Shutdown:
        self._stopped = shutdown = Shutdown(vectors)
        return shutdown

    # -- looking in

    def code(self) -> bytes:
        """Return 15 bytes at RIP, fewer where the next page is out of reach."""
        return self._core.code()

    def read_linear(self, address: int, size: int) -> bytes | None:
        """Return guest memory by linear address, as a debugger sees it; None if it isn't there."""
        try:
            return self._core.load(address, size, READ)
        except (GuestFault, HostFault, MmioFault):
            return None

    def write_linear(self, address: int, data: bytes) -> bool:
        """Write guest memory by linear address, as a debugger does; False if it isn't there."""
        try:
            self._core.store(address, data)
        except (GuestFault, HostFault, MmioFault):
            return False
        return True

    def translate(self, linear: int) -> tuple[int, bool] | None:
        """GPA of a linear address, and whether it is private; None where nothing is mapped."""
        core = self._core
        state, cr = core.state, core.state.cr
        page = linear & ~0xFFF & (0xFFFFFFFFFFFFFFFF if core.long else 0xFFFFFFFF)
        try:
            gpa, private, _ = core.walker.walk(
                page, READ, False, core.vmpl, cr[0], cr[3], cr[4], state.efer, state.rflags | _AC
            )
        except (GuestFault, HostFault):
            return None
        return gpa | linear & 0xFFF, private

    @property
    def linear_rip(self) -> int:
        """RIP as a linear address."""
        return self._core.linear_rip

    @property
    def code_bits(self) -> int:
        """Size of the code segment: 16, 32 or 64."""
        return self._core.state.bits
