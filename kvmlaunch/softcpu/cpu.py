"""The CPUs of a machine, as their owner sees them."""

from __future__ import annotations

from kvmlaunch.abi.vmsa import Vmsa

from .events import Event, InvalidState
from .memory import GuestMemory
from .options import CpuOptions

__all__ = ["Machine", "SoftCpu"]


class Machine:
    """CPUs that share the memory of one guest.

    Raises:
        MissingCapability: the engine isn't installed.
    """

    def __init__(self, memory: GuestMemory, options: CpuOptions) -> None:
        self.memory = memory
        self.options = options

    def new_cpu(self) -> SoftCpu:
        """Return a CPU without state; `SoftCpu.load` gives it one."""
        raise NotImplementedError

    def flush(self) -> None:
        """Forget all translations: pages have moved, changed sides or rights."""
        raise NotImplementedError


class SoftCpu:
    """One CPU (at one VMPL, which the VMSA names)."""

    ghcb: int
    """The GHCB MSR, for the hypervisor's answer. 0 after `load`."""
    want_window: bool
    """Stop with `InterruptWindow` as soon as an interrupt can be injected."""
    ticks: int
    """Ticks that this CPU has run since it was made."""

    def load(self, vmsa: Vmsa) -> InvalidState | None:
        """Take the whole state from a VMSA, as the first VMRUN does."""
        raise NotImplementedError

    def save(self) -> Vmsa:
        """Return the state, as the processor writes it to the VMSA when the guest exits."""
        raise NotImplementedError

    def run(self, ticks: int) -> Event:
        """Run until an event, or for about `ticks` ticks (one block more at most)."""
        raise NotImplementedError

    def complete(self, value: int = 0) -> None:
        """Finish the instruction of `IoRead`, `MmioRead`, `MsrRead` or `MsrWrite`."""
        raise NotImplementedError

    def refuse(self) -> None:
        """Answer `MsrRead` or `MsrWrite` with #GP(0)."""
        raise NotImplementedError

    def read(self, name: str) -> int:
        """Return a register: rax..r15, rip, rflags, cr0, cr2, cr3, cr4, cr8, efer, dr0..dr7."""
        raise NotImplementedError

    def write(self, name: str, value: int) -> None:
        """Change such a register."""
        raise NotImplementedError

    @property
    def interruptible(self) -> bool:
        """Whether an interrupt can be injected now: IF set, no interrupt shadow."""
        raise NotImplementedError

    def inject_interrupt(self, vector: int) -> Event | None:
        """Deliver an external interrupt through the guest's IDT, now; an event if that fails."""
        raise NotImplementedError

    def inject_nmi(self) -> Event | None:
        """Deliver an NMI; it waits while another one is being handled."""
        raise NotImplementedError

    def inject_exception(self, vector: int, error_code: int | None = None) -> Event | None:
        """Deliver an exception, with an error code or without one."""
        raise NotImplementedError

    def read_linear(self, address: int, size: int) -> bytes | None:
        """Return guest memory by linear address, as a debugger sees it; None if it isn't there."""
        raise NotImplementedError

    def write_linear(self, address: int, data: bytes) -> bool:
        """Write guest memory by linear address, as a debugger does; False if it isn't there."""
        raise NotImplementedError
