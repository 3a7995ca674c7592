"""How KVM fills ``struct kvm_run`` for each exit (x86.c, kvm_host.h, sev.c).

Only what KVM writes: the rest of the union keeps what an earlier exit left there.
"""

from __future__ import annotations

from typing import Any

from kvmlaunch.uapi import ffi, lib

__all__ = [
    "FAULT_USER",
    "NESTED_FAULT",
    "PIO_DATA_OFFSET",
    "debug",
    "emulation_failure",
    "fail_entry",
    "hypercall",
    "io",
    "io_data",
    "memory_fault",
    "mmio",
    "mmio_data",
    "msr",
    "put_io_data",
    "req_certs",
    "req_certs_answer",
    "sev_term",
    "unexpected_exit",
]

PIO_DATA_OFFSET = 0x1000
"""KVM_PIO_PAGE_OFFSET, in bytes."""

NESTED_FAULT, FAULT_USER = 0x400, 1 << 2
"""Exit code of a nested page fault, and its bit for a user's access, which all are."""

_ENTRY_FAILED = 0xFFFFFFFF  # SVM_EXIT_ERR, which 6.12 keeps in 32 bits
_LAST_CPU = 0
_NOP = b"\x90"
_DEBUG_VECTOR = 1


def io(run: Any, *, is_in: bool, port: int, size: int, count: int) -> None:
    """KVM_EXIT_IO (emulator_pio_in_out); the data page isn't touched."""
    run.exit_reason = lib.KVM_EXIT_IO
    run.io.direction = lib.KVM_EXIT_IO_IN if is_in else lib.KVM_EXIT_IO_OUT
    run.io.size = size
    run.io.data_offset = PIO_DATA_OFFSET
    run.io.count = count
    run.io.port = port


def io_data(run: Any, size: int) -> bytes:
    """The first ``size`` bytes of the data page."""
    return bytes(ffi.buffer(ffi.cast("char *", run) + PIO_DATA_OFFSET, size))


def put_io_data(run: Any, data: bytes) -> None:
    """Fill the data page."""
    ffi.buffer(ffi.cast("char *", run) + PIO_DATA_OFFSET, len(data))[:] = data


def debug(run: Any, pc: int, vector: int = _DEBUG_VECTOR, dr6: int = 0, dr7: int = 0) -> None:
    """KVM_EXIT_DEBUG at ``pc`` (linear)."""
    run.exit_reason = lib.KVM_EXIT_DEBUG
    arch = run.debug.arch
    arch.exception, arch.pc, arch.dr6, arch.dr7 = vector, pc, dr6, dr7


def mmio(run: Any, gpa: int, size: int, data: bytes | None) -> None:
    """KVM_EXIT_MMIO; ``data`` is None for a read. ``size`` is at most 8."""
    run.mmio.phys_addr = gpa
    run.mmio.len = size
    run.mmio.is_write = data is not None
    if data is not None:
        ffi.buffer(run.mmio.data)[: len(data)] = data
    run.exit_reason = lib.KVM_EXIT_MMIO


def mmio_data(run: Any, size: int) -> bytes:
    """What user space answered a read, or left of a write."""
    return bytes(ffi.buffer(run.mmio.data))[:size]


def msr(run: Any, exit_reason: int, reason: int, index: int, data: int) -> None:
    """KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR (kvm_msr_user_space)."""
    run.exit_reason = exit_reason
    run.msr.error = 0
    run.msr.pad = bytes(len(run.msr.pad))
    run.msr.reason, run.msr.index, run.msr.data = reason, index, data


def hypercall(run: Any, args: tuple[int, int, int], *, flags: int | None, clear_ret: bool) -> None:
    """KVM_EXIT_HYPERCALL of MAP_GPA_RANGE; ``flags`` None where KVM leaves them alone."""
    run.exit_reason = lib.KVM_EXIT_HYPERCALL
    run.hypercall.nr = lib.KVM_HC_MAP_GPA_RANGE
    if clear_ret:
        run.hypercall.ret = 0
    for at, value in enumerate(args):
        run.hypercall.args[at] = value
    if flags is not None:
        run.hypercall.flags = flags


def sev_term(run: Any, ghcb_msr: int) -> None:
    """KVM_EXIT_SYSTEM_EVENT: the guest wants to end, or asked what it must not."""
    run.exit_reason = lib.KVM_EXIT_SYSTEM_EVENT
    run.system_event.type = lib.KVM_SYSTEM_EVENT_SEV_TERM
    run.system_event.ndata = 1
    run.system_event.data[0] = ghcb_msr


def memory_fault(run: Any, gpa: int, size: int, *, private: bool) -> None:
    """KVM_EXIT_MEMORY_FAULT (kvm_prepare_memory_fault_exit)."""
    run.exit_reason = lib.KVM_EXIT_MEMORY_FAULT
    run.memory_fault.gpa = gpa
    run.memory_fault.size = size
    run.memory_fault.flags = lib.KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0


def fail_entry(run: Any) -> None:
    """KVM_EXIT_FAIL_ENTRY: VMRUN refuses the guest's state."""
    run.exit_reason = lib.KVM_EXIT_FAIL_ENTRY
    run.fail_entry.hardware_entry_failure_reason = _ENTRY_FAILED
    run.fail_entry.cpu = _LAST_CPU


def emulation_failure(
    run: Any, exit_code: int, info_1: int, info_2: int, code: bytes = b""
) -> None:
    """KVM_EXIT_INTERNAL_ERROR, with what was fetched (prepare_emulation_failure_exit)."""
    run.exit_reason = lib.KVM_EXIT_INTERNAL_ERROR
    run.emulation_failure.suberror = lib.KVM_INTERNAL_ERROR_EMULATION
    run.emulation_failure.flags = 0
    if code:
        failure = run.emulation_failure
        failure.flags = lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        failure.insn_size = len(code)
        ffi.buffer(failure.insn_bytes)[:] = code.ljust(len(failure.insn_bytes), _NOP)
    first = 3 if code else 1
    for at, value in enumerate((exit_code, info_1, info_2, 0, 0), first):
        run.internal.data[at] = value
    run.emulation_failure.ndata = first + 5


def unexpected_exit(run: Any, exit_code: int) -> None:
    """KVM_EXIT_INTERNAL_ERROR for an exit code without a handler (svm_handle_invalid_exit)."""
    run.exit_reason = lib.KVM_EXIT_INTERNAL_ERROR
    run.internal.suberror = lib.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
    run.internal.ndata = 2
    run.internal.data[0] = exit_code
    run.internal.data[1] = _LAST_CPU


def req_certs(run: Any, gpa: int, npages: int) -> None:
    """KVM_EXIT_SNP_REQ_CERTS (7.0)."""
    run.exit_reason = lib.KVM_EXIT_SNP_REQ_CERTS
    exit_ = _req_certs_exit(run)
    exit_.gpa, exit_.npages, exit_.ret = gpa, npages, 0


def req_certs_answer(run: Any) -> tuple[int, int]:
    """What user space made of it: ``ret`` and ``npages``."""
    exit_ = _req_certs_exit(run)
    return int(exit_.ret), int(exit_.npages)


def _req_certs_exit(run: Any) -> Any:
    return ffi.cast("struct kvm_exit_snp_req_certs *", ffi.addressof(run[0], "io"))
