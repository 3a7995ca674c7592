"""GHCB: the page by which an SNP guest and its hypervisor talk, and the events it carries.

Source: AMD 56421 (GHCB specification); exit codes below 0x400 are those of APM volume 2,
appendix C. Linux: asm/svm.h (struct ghcb), uapi/asm/svm.h, asm/sev-common.h.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

__all__ = [
    "BUFFER",
    "BUFFER_END",
    "FIELDS",
    "MAX_PSC_ENTRIES",
    "USAGE",
    "VALID_BITMAP",
    "VALID_BITMAP_SIZE",
    "ApRequest",
    "GhcbError",
    "GhcbExit",
    "MsrRequest",
    "PageOperation",
    "ioio_size",
    "is_valid",
]

FIELDS: Mapping[str, int] = MappingProxyType(
    {
        "cpl": 0x0CB,
        "xss": 0x140,
        "dr7": 0x160,
        "rip": 0x178,
        "rsp": 0x1D8,
        "rax": 0x1F8,
        "rcx": 0x308,
        "rdx": 0x310,
        "rbx": 0x318,
        "rbp": 0x328,
        "rsi": 0x330,
        "rdi": 0x338,
        **{f"r{n}": 0x340 + 8 * (n - 8) for n in range(8, 16)},
        "exit_code": 0x390,
        "exit_info_1": 0x398,
        "exit_info_2": 0x3A0,
        "scratch": 0x3A8,
        "xcr0": 0x3E8,
    }
)
"""Field -> offset in the page; 8 bytes each, but for `cpl`, which is one."""

VALID_BITMAP, VALID_BITMAP_SIZE = 0x3F0, 16
"""A bit for every 8 bytes: bit offset / 8."""
BUFFER, BUFFER_END = 0x800, 0xFF0
"""The shared buffer."""
USAGE = 0xFFC
"""u32: 0 for the format described here."""
MAX_PSC_ENTRIES = 253
"""Entries of a page state change list that fit into the buffer behind their header."""


class GhcbExit(enum.IntEnum):
    """SW_EXITCODE of the events that the specification has."""

    READ_DR7 = 0x27
    WRITE_DR7 = 0x37
    RDTSC = 0x6E
    RDPMC = 0x6F
    CPUID = 0x72
    INVD = 0x76
    IOIO = 0x7B
    MSR = 0x7C
    VMMCALL = 0x81
    RDTSCP = 0x87
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MMIO_READ = 0x80000001
    MMIO_WRITE = 0x80000002
    NMI_COMPLETE = 0x80000003
    AP_RESET_HOLD = 0x80000004
    AP_JUMP_TABLE = 0x80000005
    PSC = 0x80000010
    GUEST_REQUEST = 0x80000011
    EXT_GUEST_REQUEST = 0x80000012
    AP_CREATION = 0x80000013
    HV_DOORBELL = 0x80000014
    HV_IPI = 0x80000015
    APIC_ID_LIST = 0x80000017
    RUN_VMPL = 0x80000018
    HV_FEATURES = 0x8000FFFD
    TERMINATE = 0x8000FFFE
    UNSUPPORTED = 0x8000FFFF


class GhcbError(enum.IntEnum):
    """SW_EXITINFO2 where SW_EXITINFO1 is 2: the hypervisor refuses the request."""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


class MsrRequest(enum.IntEnum):
    """Bits 11:0 of the GHCB MSR; the answer is the number behind it (SEV_INFO: before it)."""

    SEV_INFO = 0x002
    CPUID = 0x004
    AP_RESET_HOLD = 0x006
    PREFERRED_GPA = 0x010
    REGISTER_GPA = 0x012
    PSC = 0x014
    RUN_VMPL = 0x016
    HV_FEATURES = 0x080
    TERMINATE = 0x100


class ApRequest(enum.IntEnum):
    """SW_EXITINFO1 bits 31:0 of AP_CREATION, at VMPL0."""

    CREATE_ON_INIT = 0
    CREATE = 1
    DESTROY = 2


class PageOperation(enum.IntEnum):
    """What a page state change asks for."""

    PRIVATE = 1
    SHARED = 2
    PSMASH = 3
    UNSMASH = 4


def is_valid(bitmap: bytes, field: str) -> bool:
    """Whether the guest has marked a field as valid."""
    bit = FIELDS[field] // 8
    return bool(bitmap[bit // 8] >> bit % 8 & 1)


def ioio_size(info_1: int) -> int:
    """Bytes of an item of IOIO, from SW_EXITINFO1 bits 6:4; 1, 2 or 4 unless it is bad."""
    return info_1 >> 4 & 7
