"""Why a CPU stopped running: what `SoftCpu.run` returns.

The guest's state is then that of an instruction boundary. RIP is at the instruction that caused
the event, unless the event says otherwise.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TypeAlias

from .memory import Access

__all__ = [
    "Budget",
    "DebugStop",
    "DebugTrap",
    "Event",
    "FaultReason",
    "Halt",
    "InterruptWindow",
    "InvalidState",
    "IoRead",
    "IoWrite",
    "MmioRead",
    "MmioWrite",
    "MsrRead",
    "MsrWrite",
    "NestedFault",
    "Pause",
    "Rsm",
    "Shutdown",
    "VmgExit",
    "Vmmcall",
]


class FaultReason(enum.Enum):
    """Why a page can't be used although the guest's page tables allow it."""

    ABSENT = "no page"
    NOT_ASSIGNED = "not assigned to a guest"
    ASID = "assigned to another guest"
    GPA = "assigned at another GPA"
    IMMUTABLE = "immutable"
    VMPL = "no permission at this VMPL"


@dataclasses.dataclass(frozen=True)
class NestedFault:
    """A nested page fault for the hypervisor; running again repeats the instruction.

    `gpa` has no C-bit, its low 12 bits are those of the access (0 where they are not known).
    `walk`: the page is one of the guest's page tables.
    """

    gpa: int
    access: Access
    private: bool
    reason: FaultReason
    walk: bool = False


@dataclasses.dataclass(frozen=True)
class VmgExit:
    """VMGEXIT. `ghcb` is the value of the GHCB MSR; RIP is behind the instruction.

    Write the answer to `SoftCpu.ghcb` (MSR protocol) or to the shared page at that GPA.
    """

    ghcb: int


@dataclasses.dataclass(frozen=True)
class Halt:
    """HLT; RIP is behind it. Run again when an event is pending."""


@dataclasses.dataclass(frozen=True)
class Pause:
    """PAUSE, where `CpuOptions.exit_on_pause` asks for it; RIP is behind it."""


@dataclasses.dataclass(frozen=True)
class Rsm:
    """RSM, plain guests only, which the owner does: the CPU knows no SMM."""


@dataclasses.dataclass(frozen=True)
class Shutdown:
    """A triple fault. `vectors`: the exceptions that led to it, the last one first."""

    vectors: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class InvalidState:
    """The processor refuses to enter the guest; `rule` is the broken rule."""

    rule: str


@dataclasses.dataclass(frozen=True)
class Budget:
    """The ticks given to `run` are used up."""


@dataclasses.dataclass(frozen=True)
class InterruptWindow:
    """What `SoftCpu.want_window` waits for, or `SoftCpu.stop_at_cr8`, has come."""


@dataclasses.dataclass(frozen=True)
class IoRead:
    """IN or INS, plain guests only; answer it with `SoftCpu.complete`.

    A repeated INS reads `count` items of `size` bytes at once, at most as many as the page it
    writes to has bytes left (as KVM does); the first is lowest in the answer.
    """

    port: int
    size: int
    count: int = 1


@dataclasses.dataclass(frozen=True)
class IoWrite:
    """OUT or one step of OUTS, plain guests only; it is done when `run` returns."""

    port: int
    size: int
    value: int


@dataclasses.dataclass(frozen=True)
class MmioRead:
    """A read from a device, plain guests only; answer it with `SoftCpu.complete`."""

    gpa: int
    size: int


@dataclasses.dataclass(frozen=True)
class MmioWrite:
    """A write to a device, plain guests only; the instruction is done."""

    gpa: int
    size: int
    value: int


@dataclasses.dataclass(frozen=True)
class MsrRead:
    """RDMSR of an MSR that the CPU leaves to its owner, plain guests only.

    Answer it with `SoftCpu.complete` or `SoftCpu.refuse` (#GP).
    """

    index: int


@dataclasses.dataclass(frozen=True)
class MsrWrite:
    """WRMSR, as `MsrRead`: accept it with `SoftCpu.complete`, or `SoftCpu.refuse` it."""

    index: int
    value: int


@dataclasses.dataclass(frozen=True)
class Vmmcall:
    """VMMCALL, plain guests only; RIP is behind it. Write RAX before running again."""


@dataclasses.dataclass(frozen=True)
class DebugStop:
    """Before an instruction where `Machine.watch` said stop; running again asks again."""


@dataclasses.dataclass(frozen=True)
class DebugTrap:
    """What `SoftCpu.set_debug` asks for: a vector (1 or 3), and the bits of DR6 that say why.

    RIP is at the instruction of an INT3, of an instruction breakpoint and of an access to a
    debug register; it is behind one that accessed watched data.
    """

    vector: int
    dr6: int


Event: TypeAlias = (
    Budget
    | DebugStop
    | DebugTrap
    | Halt
    | InterruptWindow
    | InvalidState
    | IoRead
    | IoWrite
    | MmioRead
    | MmioWrite
    | MsrRead
    | MsrWrite
    | NestedFault
    | Pause
    | Rsm
    | Shutdown
    | VmgExit
    | Vmmcall
)
