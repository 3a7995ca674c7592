"""Exits of KVM_RUN as values, open-ended: an unknown reason is an UnknownExit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvmlaunch.uapi import ffi, lib

__all__ = [
    "ApResetHoldExit",
    "DebugExit",
    "Exit",
    "FailEntryExit",
    "HltExit",
    "HypercallExit",
    "InternalErrorExit",
    "InterruptedExit",
    "IoExit",
    "MemoryFaultExit",
    "MmioExit",
    "ReqCertsExit",
    "RetryExit",
    "ShutdownExit",
    "SystemEventExit",
    "UnknownExit",
    "decode_exit",
    "exit_name",
    "req_certs",
]

_NOT_EXITS = ("KVM_EXIT_IO_IN", "KVM_EXIT_IO_OUT", "KVM_EXIT_HYPERCALL_LONG_MODE")
_NAMES = {
    getattr(lib, name): name
    for name in dir(lib)
    if name.startswith("KVM_EXIT_") and name not in _NOT_EXITS
}
_INTERNAL_ERRORS = {
    lib.KVM_INTERNAL_ERROR_EMULATION: "emulation failed",
    lib.KVM_INTERNAL_ERROR_SIMUL_EX: "simultaneous exceptions",
    lib.KVM_INTERNAL_ERROR_DELIVERY_EV: "an event could not be delivered",
    lib.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "unexpected exit of the processor",
}
_SYSTEM_EVENTS = {
    lib.KVM_SYSTEM_EVENT_SHUTDOWN: "SHUTDOWN",
    lib.KVM_SYSTEM_EVENT_RESET: "RESET",
    lib.KVM_SYSTEM_EVENT_CRASH: "CRASH",
    lib.KVM_SYSTEM_EVENT_WAKEUP: "WAKEUP",
    lib.KVM_SYSTEM_EVENT_SUSPEND: "SUSPEND",
    lib.KVM_SYSTEM_EVENT_SEV_TERM: "SEV_TERM",
}


def exit_name(reason: int) -> str:
    """The kernel's name of an exit reason, or ``KVM_EXIT_N`` with the number."""
    return _NAMES.get(reason, f"KVM_EXIT_{reason}")


@dataclass(frozen=True)
class Exit:
    """Base: why KVM_RUN came back. ``reason`` is the kernel's name."""

    reason: ClassVar[str] = ""

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class IoExit(Exit):
    """Port I/O (KVM_EXIT_IO). ``data`` holds ``count`` items of ``size`` bytes (OUT)."""

    reason: ClassVar[str] = "KVM_EXIT_IO"
    port: int
    size: int
    count: int
    is_write: bool
    data: bytes

    def __str__(self) -> str:
        way = "out" if self.is_write else "in"
        text = f"{self.reason} {way} port={self.port:#x} size={self.size} count={self.count}"
        return f"{text} data={self.data.hex()}" if self.is_write else text


@dataclass(frozen=True)
class MmioExit(Exit):
    """Access to a GPA without memory (KVM_EXIT_MMIO). ``data`` is what was written."""

    reason: ClassVar[str] = "KVM_EXIT_MMIO"
    gpa: int
    size: int
    is_write: bool
    data: bytes

    def __str__(self) -> str:
        way = "write" if self.is_write else "read"
        text = f"{self.reason} {way} gpa={self.gpa:#x} size={self.size}"
        return f"{text} data={self.data.hex()}" if self.is_write else text


@dataclass(frozen=True)
class HypercallExit(Exit):
    """A hypercall for user space (KVM_EXIT_HYPERCALL)."""

    reason: ClassVar[str] = "KVM_EXIT_HYPERCALL"
    nr: int
    args: tuple[int, ...]

    def __str__(self) -> str:
        if self.nr == lib.KVM_HC_MAP_GPA_RANGE:
            gpa, npages, attributes = self.args[:3]
            to = "private" if attributes & lib.KVM_MAP_GPA_RANGE_ENCRYPTED else "shared"
            return f"{self.reason} MAP_GPA_RANGE gpa={gpa:#x} pages={npages} to={to}"
        return f"{self.reason} nr={self.nr} args={[hex(arg) for arg in self.args]}"


@dataclass(frozen=True)
class HltExit(Exit):
    """HLT without an in-kernel APIC (KVM_EXIT_HLT)."""

    reason: ClassVar[str] = "KVM_EXIT_HLT"


@dataclass(frozen=True)
class ApResetHoldExit(Exit):
    """The guest holds its vCPU until a SIPI, without an in-kernel APIC (KVM_EXIT_AP_RESET_HOLD)."""

    reason: ClassVar[str] = "KVM_EXIT_AP_RESET_HOLD"


@dataclass(frozen=True)
class DebugExit(Exit):
    """A breakpoint or a single step (KVM_EXIT_DEBUG). ``pc`` is a linear address."""

    reason: ClassVar[str] = "KVM_EXIT_DEBUG"
    exception: int
    pc: int
    dr6: int

    def __str__(self) -> str:
        return f"{self.reason} exception={self.exception} pc={self.pc:#x}"


@dataclass(frozen=True)
class ShutdownExit(Exit):
    """Triple fault, or a fatal RMP violation (KVM_EXIT_SHUTDOWN)."""

    reason: ClassVar[str] = "KVM_EXIT_SHUTDOWN"


@dataclass(frozen=True)
class FailEntryExit(Exit):
    """VMRUN failed (KVM_EXIT_FAIL_ENTRY)."""

    reason: ClassVar[str] = "KVM_EXIT_FAIL_ENTRY"
    hardware_reason: int
    cpu: int

    def __str__(self) -> str:
        return f"{self.reason} hardware_reason={self.hardware_reason:#x} cpu={self.cpu}"


@dataclass(frozen=True)
class InternalErrorExit(Exit):
    """KVM could not go on (KVM_EXIT_INTERNAL_ERROR). ``insn`` is empty where unknown."""

    reason: ClassVar[str] = "KVM_EXIT_INTERNAL_ERROR"
    suberror: int
    data: tuple[int, ...]
    insn: bytes

    def __str__(self) -> str:
        what = _INTERNAL_ERRORS.get(self.suberror, "unknown")
        text = f"{self.reason} suberror={self.suberror} ({what})"
        return f"{text} insn={self.insn.hex()}" if self.insn else text


@dataclass(frozen=True)
class SystemEventExit(Exit):
    """KVM_EXIT_SYSTEM_EVENT. ``type`` is the number, ``data`` its words."""

    reason: ClassVar[str] = "KVM_EXIT_SYSTEM_EVENT"
    type: int
    data: tuple[int, ...]

    @property
    def type_name(self) -> str:
        """``SEV_TERM``, ``SHUTDOWN``, …, or the number."""
        return _SYSTEM_EVENTS.get(self.type, str(self.type))

    def __str__(self) -> str:
        return f"{self.reason} {self.type_name} data={[hex(word) for word in self.data]}"


@dataclass(frozen=True)
class MemoryFaultExit(Exit):
    """A private/shared mismatch or a missing page (KVM_EXIT_MEMORY_FAULT).

    KVM_RUN itself gave ``errno`` (EFAULT or EHWPOISON). ``private`` is what the
    guest wanted.
    """

    reason: ClassVar[str] = "KVM_EXIT_MEMORY_FAULT"
    gpa: int
    size: int
    private: bool
    errno: int

    def __str__(self) -> str:
        wanted = "private" if self.private else "shared"
        return f"{self.reason} gpa={self.gpa:#x} size={self.size:#x} access={wanted}"


@dataclass(frozen=True)
class ReqCertsExit(Exit):
    """The guest wants certificates with its report, in ``npages`` pages at ``gpa``.

    KVM_EXIT_SNP_REQ_CERTS, once KVM_SEV_SNP_ENABLE_REQ_CERTS was given.
    """

    reason: ClassVar[str] = "KVM_EXIT_SNP_REQ_CERTS"
    gpa: int
    npages: int

    def __str__(self) -> str:
        return f"{self.reason} gpa={self.gpa:#x} pages={self.npages}"


@dataclass(frozen=True)
class InterruptedExit(Exit):
    """KVM_RUN was interrupted by a signal or by immediate_exit (EINTR)."""

    reason: ClassVar[str] = "KVM_EXIT_INTR"


@dataclass(frozen=True)
class RetryExit(Exit):
    """KVM_RUN gave EAGAIN: a vCPU that waits to be started was woken; run it again."""

    reason: ClassVar[str] = "EAGAIN"


@dataclass(frozen=True)
class UnknownExit(Exit):
    """An exit that has no type here. ``number`` is the kernel's."""

    number: int

    def __str__(self) -> str:
        return exit_name(self.number)


def decode_exit(run: Any) -> Exit:
    """The exit that ``struct kvm_run *run`` describes."""
    number = int(run.exit_reason)
    decoder = _DECODERS.get(number)
    return decoder(run) if decoder else UnknownExit(number)


def _io(run: Any) -> IoExit:
    io = run.io
    start = ffi.cast("char *", run) + io.data_offset
    is_write = io.direction == lib.KVM_EXIT_IO_OUT
    data = bytes(ffi.buffer(start, io.size * io.count)) if is_write else b""
    return IoExit(int(io.port), int(io.size), int(io.count), is_write, data)


def _mmio(run: Any) -> MmioExit:
    mmio = run.mmio
    size = min(int(mmio.len), 8)
    is_write = bool(mmio.is_write)
    data = bytes(ffi.buffer(mmio.data))[:size] if is_write else b""
    return MmioExit(int(mmio.phys_addr), size, is_write, data)


def _hypercall(run: Any) -> HypercallExit:
    return HypercallExit(int(run.hypercall.nr), tuple(int(arg) for arg in run.hypercall.args))


def _fail_entry(run: Any) -> FailEntryExit:
    entry = run.fail_entry
    return FailEntryExit(int(entry.hardware_entry_failure_reason), int(entry.cpu))


def _internal_error(run: Any) -> InternalErrorExit:
    internal = run.internal
    words = tuple(int(internal.data[i]) for i in range(min(int(internal.ndata), 16)))
    insn = b""
    failure = run.emulation_failure
    has_insn = lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    if internal.suberror == lib.KVM_INTERNAL_ERROR_EMULATION and words and words[0] & has_insn:
        insn = bytes(failure.insn_bytes)[: min(int(failure.insn_size), 15)]
    return InternalErrorExit(int(internal.suberror), words, insn)


def _system_event(run: Any) -> SystemEventExit:
    event = run.system_event
    words = tuple(int(event.data[i]) for i in range(min(int(event.ndata), 16)))
    return SystemEventExit(int(event.type), words)


def _memory_fault(run: Any) -> MemoryFaultExit:
    fault = run.memory_fault
    private = bool(fault.flags & lib.KVM_MEMORY_EXIT_FLAG_PRIVATE)
    return MemoryFaultExit(int(fault.gpa), int(fault.size), private, 0)


def req_certs(run: Any) -> Any:
    """The ``struct kvm_exit_snp_req_certs *`` of a run page, which kvm_run of 6.12 doesn't name."""
    return ffi.cast("struct kvm_exit_snp_req_certs *", ffi.addressof(run[0], "io"))


def _req_certs(run: Any) -> ReqCertsExit:
    exit_ = req_certs(run)
    return ReqCertsExit(int(exit_.gpa), int(exit_.npages))


def _debug(run: Any) -> DebugExit:
    arch = run.debug.arch
    return DebugExit(int(arch.exception), int(arch.pc), int(arch.dr6))


_DECODERS = {
    lib.KVM_EXIT_DEBUG: _debug,
    lib.KVM_EXIT_IO: _io,
    lib.KVM_EXIT_HYPERCALL: _hypercall,
    lib.KVM_EXIT_HLT: lambda run: HltExit(),
    lib.KVM_EXIT_AP_RESET_HOLD: lambda run: ApResetHoldExit(),
    lib.KVM_EXIT_MMIO: _mmio,
    lib.KVM_EXIT_SHUTDOWN: lambda run: ShutdownExit(),
    lib.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    lib.KVM_EXIT_INTR: lambda run: InterruptedExit(),
    lib.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    lib.KVM_EXIT_SYSTEM_EVENT: _system_event,
    lib.KVM_EXIT_MEMORY_FAULT: _memory_fault,
    lib.KVM_EXIT_SNP_REQ_CERTS: _req_certs,
}
