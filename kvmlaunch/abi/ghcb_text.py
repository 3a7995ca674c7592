"""What a guest asks of its hypervisor, in words: GHCB MSR protocol and GHCB events.

Source: AMD 56421 (GHCB specification).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

from .ghcb import ApRequest, GhcbExit, MsrRequest, PageOperation, ioio_size
from .ghcb_msr import decode_termination
from .page import PAGE_SIZE

__all__ = ["EVENT_REGISTERS", "describe_event", "describe_msr"]

EVENT_REGISTERS = ("rax", "rcx", "rdx")
"""Registers that `describe_event` wants."""

_CPUID_REGISTERS = ("EAX", "EBX", "ECX", "EDX")


def describe_msr(value: int) -> tuple[str, str]:
    """Name of a request by the MSR protocol, and its arguments."""
    request = value & 0xFFF
    name = _name(MsrRequest, request)
    if name is None:
        return f"request {request:#x}", f"msr={value:#x}"
    detail = ""
    if request == MsrRequest.CPUID:
        detail = f"leaf={value >> 32:#x} register={_CPUID_REGISTERS[value >> 30 & 3]}"
    elif request == MsrRequest.PSC:
        gpa = (value >> 12 & (1 << 40) - 1) * PAGE_SIZE
        detail = f"gpa={gpa:#x} to={_operation(value >> 52 & 0xF)}"
    elif request in (MsrRequest.REGISTER_GPA, MsrRequest.PREFERRED_GPA):
        detail = f"gpa={value & ~0xFFF:#x}"
    elif request == MsrRequest.TERMINATE:
        detail = str(decode_termination(value))
    elif value >> 12:
        detail = f"data={value >> 12:#x}"
    return name, detail


def describe_event(
    code: int, info_1: int, info_2: int, registers: Mapping[str, int]
) -> tuple[str, str]:
    """Name of a GHCB event, and its arguments; ``registers`` are `EVENT_REGISTERS`."""
    name = _name(GhcbExit, code)
    if name is None:
        return f"event {code:#x}", f"info_1={info_1:#x} info_2={info_2:#x}"
    describe = _EVENTS.get(code)
    if describe is not None:
        return name, describe(info_1, info_2, registers)
    return name, f"info_1={info_1:#x} info_2={info_2:#x}"


def _name(kind: type[enum.IntEnum], number: int) -> str | None:
    try:
        return kind(number).name
    except ValueError:
        return None


def _operation(number: int) -> str:
    return (_name(PageOperation, number) or f"operation {number}").lower()


def _ioio(info_1: int, _info_2: int, registers: Mapping[str, int]) -> str:
    size = ioio_size(info_1)
    text = f"{'in' if info_1 & 1 else 'out'} port={info_1 >> 16 & 0xFFFF:#x} size={size}"
    if info_1 & 4:
        return f"{text} string"
    if info_1 & 1:
        return text
    return f"{text} value={registers['rax'] & (1 << 8 * size) - 1:#x}"


def _msr(info_1: int, _info_2: int, registers: Mapping[str, int]) -> str:
    index = f"index={registers['rcx'] & 0xFFFFFFFF:#x}"
    if not info_1:
        return f"read {index}"
    value = registers["rdx"] << 32 & 0xFFFFFFFF00000000 | registers["rax"] & 0xFFFFFFFF
    return f"write {index} value={value:#x}"


def _cpuid(_info_1: int, _info_2: int, registers: Mapping[str, int]) -> str:
    return f"leaf={registers['rax'] & 0xFFFFFFFF:#x} index={registers['rcx'] & 0xFFFFFFFF:#x}"


def _mmio(info_1: int, info_2: int, _registers: Mapping[str, int]) -> str:
    return f"gpa={info_1:#x} size={info_2}"


def _ap_creation(info_1: int, info_2: int, _registers: Mapping[str, int]) -> str:
    request = info_1 & 0xFFFFFFFF
    name = _name(ApRequest, request) or f"request {request}"
    return f"{name} apic_id={info_1 >> 32} vmpl={info_1 >> 16 & 0xF} vmsa={info_2:#x}"


def _apic_id_list(info_1: int, _info_2: int, registers: Mapping[str, int]) -> str:
    return f"gpa={info_1:#x} pages={registers['rax']}"


def _terminate(info_1: int, _info_2: int, _registers: Mapping[str, int]) -> str:
    return f"reason set {info_1 & 0xF} code {info_1 >> 4 & 0xFF}"


def _guest_request(info_1: int, info_2: int, _registers: Mapping[str, int]) -> str:
    return f"request={info_1:#x} response={info_2:#x}"


_EVENTS: Mapping[int, Callable[[int, int, Mapping[str, int]], str]] = {
    GhcbExit.APIC_ID_LIST: _apic_id_list,
    GhcbExit.AP_CREATION: _ap_creation,
    GhcbExit.CPUID: _cpuid,
    GhcbExit.EXT_GUEST_REQUEST: _guest_request,
    GhcbExit.GUEST_REQUEST: _guest_request,
    GhcbExit.IOIO: _ioio,
    GhcbExit.MMIO_READ: _mmio,
    GhcbExit.MMIO_WRITE: _mmio,
    GhcbExit.MSR: _msr,
    GhcbExit.TERMINATE: _terminate,
}
