"""What the CPU needs of an engine: something that executes x86 instructions.

The engine knows nothing of SNP, page tables or devices. It asks `fill` for each page it touches,
and stops for whatever a hypervisor can intercept; the rest of the package decides what that
means. Another engine than unicorn has to provide these classes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, MutableSequence
from typing import Protocol, TypeAlias

from kvmlaunch.abi.segment import Segment

__all__ = [
    "CS",
    "DS",
    "ES",
    "FETCH",
    "FS",
    "GDTR",
    "GPR_NAMES",
    "GS",
    "IDTR",
    "LDTR",
    "READ",
    "SEGMENT_NAMES",
    "SS",
    "TR",
    "WORD_NAMES",
    "WRITE",
    "Engine",
    "EngineState",
    "Fill",
    "Stop",
    "Watch",
]

ES, CS, SS, DS, FS, GS, LDTR, TR, GDTR, IDTR = range(10)
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr", "gdtr", "idtr")
"""Fields of a VMSA, in the order of the numbers above."""

GPR_NAMES = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""Fields of a VMSA, in the order of `EngineState.gpr`."""

WORD_NAMES = (
    *("star", "lstar", "cstar", "sfmask", "kernel_gs_base"),
    *("sysenter_cs", "sysenter_esp", "sysenter_eip"),
    *("tsc_aux", "xcr0", "g_pat", "pkru", "spec_ctrl"),
)
"""Fields of a VMSA for `EngineState.get` and `put`."""

Watch: TypeAlias = Callable[[int, int], bool]
"""(linear address, size) of an instruction -> whether to stop before it."""

READ, WRITE, FETCH = 1, 2, 4
"""Kinds of access, and the rights that `Fill.fill` grants."""


class Stop(enum.IntEnum):
    """Why the engine stopped, where it isn't an SVM exit code (those are positive)."""

    BUDGET = -1
    MEMORY = -2
    """`fill` refused a page that the instruction needs."""
    IO = -3
    """At an instruction of the IN, OUT, INS, OUTS family."""
    SYSCALL = -4
    """RIP is behind SYSCALL, which did nothing yet."""
    SYSENTER = -5
    DEBUG = -6
    """Before an instruction, by `Engine.watch`."""


class Fill(Protocol):
    """Translates addresses for the engine."""

    def fill(self, page: int, kind: int) -> int:
        """Return host address | rights for a linear page address, or 0 to refuse.

        What is returned is used until the engine flushes, which it does by itself where the
        architecture says so (INVLPG, MOV to CR3 ...). The state is exact during the call.
        """
        ...


class EngineState(Protocol):
    """Registers of one CPU, exact whenever the engine doesn't run."""

    gpr: MutableSequence[int]
    """RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15."""
    cr: MutableSequence[int]
    """CR0..CR4 as stored; use `set_cr0` and so on to change CR0 and CR4."""
    dr: MutableSequence[int]
    rip: int
    rflags: int
    """Without CF, PF, AF, ZF, SF, OF and DF during `Fill.fill`."""
    cpl: int
    shadow: bool
    """Interrupt shadow of STI or MOV SS."""
    catch_iret: bool
    """Stop at IRET (exit code 0x74)."""
    catch_debug_registers: bool
    """Stop at MOV of each debug register (exit codes 0x20 and 0x30 + number), not of DR7 only."""

    @property
    def bits(self) -> int:
        """Size of the code segment: 16, 32 or 64."""
        ...

    @property
    def efer(self) -> int:
        """EFER."""
        ...

    @property
    def error_code(self) -> int:
        """Error code of the exception that was intercepted last."""
        ...

    def segment(self, number: int) -> Segment:
        """Return a segment or table register."""
        ...

    def set_segment(self, number: int, selector: int, attrib: int, limit: int, base: int) -> None:
        """Load a segment or table register, with the parts of `Segment`; not the CPL."""
        ...

    def base(self, number: int) -> int:
        """Return the base of a segment or table register."""
        ...

    def limit(self, number: int) -> int:
        """Return its limit."""
        ...

    def selector(self, number: int) -> int:
        """Return its selector."""
        ...

    def attrib(self, number: int) -> int:
        """Return its attributes, in the form of `Segment`."""
        ...

    def set_cr0(self, value: int) -> None:
        """Change CR0; enters and leaves long mode as EFER.LME says."""
        ...

    def set_cr4(self, value: int) -> None:
        """Change CR4."""
        ...

    def set_efer(self, value: int) -> None:
        """Change EFER, LMA as well."""
        ...

    def get(self, name: str) -> int:
        """Return one of `WORD_NAMES`."""
        ...

    def put(self, name: str, value: int) -> None:
        """Change one of `WORD_NAMES`."""
        ...

    def get_fpu(self) -> dict[str, int | bytes]:
        """Return x87 and SSE registers as fields of a VMSA."""
        ...

    def put_fpu(self, fields: dict[str, int | bytes]) -> None:
        """Load what `get_fpu` returns."""
        ...


class Engine(Protocol):
    """One engine serves all CPUs of a machine, one after the other."""

    ticks_left: int
    """What `run` left of its ticks; may be negative."""
    fault_address: int
    """Linear address of the access that `fill` refused, after `Stop.MEMORY`."""

    def new_state(self) -> EngineState:
        """Return the registers of one more CPU."""
        ...

    def run(self, state: EngineState, fill: Fill, ticks: int) -> int:
        """Execute until something happens; return a `Stop` or an SVM exit code."""
        ...

    def pass_io(self, address: int) -> None:
        """Execute what is at a linear address where `run` stopped for `Stop.IO`."""
        ...

    def flush_tlb(self) -> None:
        """Forget what `fill` has answered."""
        ...

    def write(self, host: int, data: bytes) -> None:
        """Write memory that may hold code which the engine has translated."""
        ...

    def flush_code(self) -> None:
        """Forget translated code: memory was written behind the engine's back."""
        ...

    def code(self, linear: int, size: int) -> bytes:
        """Return the code at an address, for what `watch` calls; empty if it is out of reach."""
        ...

    def intercept_msrs(self) -> None:
        """Stop at each RDMSR and WRMSR, those of the system call MSRs and FS/GS bases too."""
        ...

    watching: bool
    """Whether what `watch` wants is heeded."""

    def watch(self, ask: Watch | None, places: Collection[int] | None) -> None:
        """Call ``ask`` before the instructions at these linear addresses (None: before all).

        It gets address and size (0 where unknown); `run` stops for `Stop.DEBUG` where it says
        True. An ``ask`` of None ends it.
        """
        ...
