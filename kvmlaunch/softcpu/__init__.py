"""A software CPU: x86-64 with the SNP instructions. Knows neither KVM nor files.

    machine = Machine(memory, CpuOptions(snp=True, c_bit=51, asid=1))
    cpu = machine.new_cpu()
    cpu.load(vmsa)
    event = cpu.run(1_000_000)

All CPUs of a machine share one engine and belong to one thread: run them in turns. Time is
counted in ticks: a tick is one byte of executed code, counted when its block is entered, so an
instruction is about four. The count depends on the guest alone, never on the host's clock.

The engine is unicorn, an optional extra: `pip install 'kvmlaunch[softcpu]'`. Importing this
package doesn't need it, making a `Machine` does.
"""

from .cpu import SoftCpu
from .debug import DebugControl
from .events import (
    Budget,
    DebugStop,
    DebugTrap,
    Event,
    FaultReason,
    Halt,
    InterruptWindow,
    InvalidState,
    IoRead,
    IoWrite,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    NestedFault,
    Pause,
    Rsm,
    Shutdown,
    VmgExit,
    Vmmcall,
)
from .machine import Machine
from .memory import Access, GuestMemory, Missing, RmpEntry
from .options import Cpuid, CpuOptions
from .unicorn_engine import UnsupportedEngine

__all__ = [
    "Access",
    "Budget",
    "CpuOptions",
    "Cpuid",
    "DebugControl",
    "DebugStop",
    "DebugTrap",
    "Event",
    "FaultReason",
    "GuestMemory",
    "Halt",
    "InterruptWindow",
    "InvalidState",
    "IoRead",
    "IoWrite",
    "Machine",
    "Missing",
    "MmioRead",
    "MmioWrite",
    "MsrRead",
    "MsrWrite",
    "NestedFault",
    "Pause",
    "RmpEntry",
    "Rsm",
    "Shutdown",
    "SoftCpu",
    "UnsupportedEngine",
    "VmgExit",
    "Vmmcall",
]
