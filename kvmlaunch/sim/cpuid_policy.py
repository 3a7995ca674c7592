"""What the simulated firmware accepts in a CPUID page.

This is the simulator's own rule, not AMD's: the real one is in the processor documents and
differs between products and releases. Public implementations show its outline (a host can't
claim more than the CPU has), and so does this table:

| kind    | the host's value                                              | corrected to      |
|---------|---------------------------------------------------------------|-------------------|
| SUBSET  | bits that the CPU has                                         | what both have    |
| AT_MOST | a number, not above the CPU's                                 | the smaller       |
| EQUAL   | the CPU's                                                     | the CPU's         |
| XSAVE   | size of an XSAVE area for XCR0_IN and XSS_IN of the entry     | that size         |
| FREE    | any: set by the guest, by its topology, or only descriptive   | as sent           |

Bits that `RULES` leaves out are SUBSET, so that a leaf nobody knows must be all zero.
Hypervisor leaves (0x4000_0000 and other ranges) pass.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from kvmlaunch.abi.cpuid_page import CpuidEntry, decode, encode
from kvmlaunch.errors import FormatError

from .cpuid_tables import INDEXED
from .cpumodel import CpuModel, xsave_size
from .firmware_profiles import CpuidPolicyName

__all__ = ["RULES", "Kind", "correct_entry", "correct_page"]

_ENTRIES_START = 0x10
_ENTRY_SIZE = 0x30
_REGISTERS = ("eax", "ebx", "ecx", "edx")
_ALL = 0xFFFF_FFFF


class Kind(enum.Enum):
    """How a field is compared."""

    SUBSET = enum.auto()
    AT_MOST = enum.auto()
    EQUAL = enum.auto()
    XSAVE = enum.auto()
    FREE = enum.auto()


SUBSET, AT_MOST, EQUAL, XSAVE, FREE = Kind

Fields: TypeAlias = tuple[tuple[int, Kind], ...]
"""Fields of one register: bits, and how they are compared."""
Rule: TypeAlias = Mapping[str, Fields]

_WHOLE_FREE: Fields = ((_ALL, FREE),)
_WHOLE_EQUAL: Fields = ((_ALL, EQUAL),)
_WHOLE_AT_MOST: Fields = ((_ALL, AT_MOST),)
_TEXT: Rule = dict.fromkeys(_REGISTERS, _WHOLE_FREE)
_VENDOR: Rule = {
    "eax": _WHOLE_AT_MOST,  # highest leaf
    "ebx": _WHOLE_EQUAL,
    "ecx": _WHOLE_EQUAL,
    "edx": _WHOLE_EQUAL,
}
_TLB: Fields = tuple((bits, AT_MOST) for bits in (0x0FFF, 0xF000, 0x0FFF0000, 0xF0000000))
_COMPONENT: Rule = dict.fromkeys(_REGISTERS, _WHOLE_EQUAL)

RULES: Mapping[tuple[int, int | None], Rule] = {
    # (function, index): index None stands for any other index.
    (0x0, None): _VENDOR,
    (0x1, None): {
        # Public VMMs launch with the signature of an older model (EPYC-v4).
        "eax": _WHOLE_FREE,
        # Initial APIC id and number of logical processors, CLFLUSH size, brand.
        "ebx": ((0xFFFF0000, FREE), (0x0000FF00, EQUAL), (0x000000FF, AT_MOST)),
        # OSXSAVE follows CR4; bit 31 says that there is a hypervisor.
        "ecx": ((1 << 27 | 1 << 31, FREE),),
        "edx": ((1 << 9, FREE),),  # APIC enabled
    },
    (0x5, None): dict.fromkeys(("eax", "ebx"), _WHOLE_AT_MOST),
    (0x7, 0): {"eax": _WHOLE_AT_MOST, "ecx": ((1 << 4, FREE),)},  # OSPKE follows CR4
    (0xB, None): {
        "eax": ((0x1F, AT_MOST),),
        "ebx": ((0xFFFF, AT_MOST),),
        # Level number is the index; level type; then the x2APIC id.
        "ecx": ((0x00FF, FREE), (0xFF00, AT_MOST)),
        "edx": _WHOLE_FREE,
    },
    (0xD, 0): {"ebx": ((_ALL, XSAVE),), "ecx": _WHOLE_AT_MOST},
    (0xD, 1): {"ebx": ((_ALL, XSAVE),)},
    (0xD, None): _COMPONENT,
    (0x80000000, None): _VENDOR,
    (0x80000001, None): {"eax": _WHOLE_FREE, "ebx": _WHOLE_FREE},
    (0x80000002, None): _TEXT,
    (0x80000003, None): _TEXT,
    (0x80000004, None): _TEXT,
    # Caches and TLBs of an older model are larger here and there, and describe only.
    (0x80000005, None): _TEXT,
    (0x80000006, None): _TEXT,
    (0x80000008, None): {
        # Physical and linear address bits; the third byte is the hypervisor's to give.
        "eax": ((0x000000FF, AT_MOST), (0x0000FF00, AT_MOST), (0x00FF0000, FREE)),
        "ecx": ((0x000000FF, AT_MOST), (0x0000F000, AT_MOST)),
        "edx": ((0x0000FFFF, AT_MOST), (0xFFFF0000, AT_MOST)),
    },
    (0x8000000A, None): {"eax": ((0xFF, AT_MOST),), "ebx": _WHOLE_AT_MOST},
    (0x80000019, None): {"eax": _TLB, "ebx": _TLB},
    (0x8000001D, None): {
        # Type and level, then the number of threads that share the cache.
        "eax": ((0x000000FF, EQUAL), (0x03FFC000, AT_MOST)),
        "ebx": ((0x00000FFF, AT_MOST), (0x003FF000, AT_MOST), (0xFFC00000, AT_MOST)),
        # Sets and WBINVD's reach only describe: EPYC-v4, with which AMD's own scripts launch, has
        # others than Milan. Complex indexing was seen to be refused (NVIDIA/nvtrust issue 91).
        "ecx": _WHOLE_FREE,
        "edx": ((0x3, FREE),),
    },
    (0x8000001E, None): {
        "eax": _WHOLE_FREE,  # extended APIC id
        "ebx": ((0x00FF, FREE), (0xFF00, AT_MOST)),  # core id, threads per core
        "ecx": ((0x00FF, FREE), (0x0700, AT_MOST)),  # node id, nodes per processor
    },
    (0x8000001F, None): {
        # C-bit position, address bits lost, number of VMPLs.
        "ebx": ((0x003F, EQUAL), (0x0FC0, AT_MOST), (0xF000, AT_MOST)),
        "ecx": _WHOLE_AT_MOST,  # number of encrypted guests
        "edx": _WHOLE_AT_MOST,  # lowest ASID without ES
    },
    (0x80000021, None): {"ebx": ((0x0FFF, AT_MOST),)},  # microcode patch size
    (0x80000022, None): {"ebx": ((0x000F, AT_MOST), (0x03F0, AT_MOST), (0xFC00, AT_MOST))},
}
"""Fields that aren't compared as feature bits, by leaf and register."""

_SEV_LEAF = 0x8000001F


def _checked(function: int) -> bool:
    """Whether firmware looks at this leaf: the standard and the extended range."""
    return function <= 0xFFFF or 0x80000000 <= function <= 0x8000FFFF


def correct_page(
    page: memoryview, model: CpuModel, policy: CpuidPolicyName
) -> tuple[bool, bytes | None]:
    """Check a CPUID page; return (accepted, corrected page or None).

    COUNT above 64 or a reserved field that isn't zero is refused without a correction
    (obs), so that a retry can't succeed. The corrected page keeps what stands behind the
    last entry.
    """
    sent = bytes(page)
    try:
        entries = decode(sent)
    except FormatError:
        return False, None
    corrected = tuple(correct_entry(entry, model, policy) for entry in entries)
    if corrected == entries:
        return True, None
    end = _ENTRIES_START + _ENTRY_SIZE * len(entries)
    return False, encode(corrected)[:end] + sent[end:]


def correct_entry(entry: CpuidEntry, model: CpuModel, policy: CpuidPolicyName) -> CpuidEntry:
    """Return the entry as firmware would take it; the same one if it does already."""
    if not _checked(entry.eax_in):
        return entry
    # All zero claims nothing: it is what the guest reads for a leaf without an entry.
    if entry.eax_in != _SEV_LEAF and not any(getattr(entry, r) for r in _REGISTERS):
        return entry
    index = entry.ecx_in if entry.eax_in in INDEXED else 0
    hardware = model.hardware_cpuid(entry.eax_in, index)
    if hardware is None:
        return replace(entry, eax=0, ebx=0, ecx=0, edx=0)
    rule = RULES.get((entry.eax_in, index)) or RULES.get((entry.eax_in, None), {})
    values: dict[str, int] = {}
    for register, limit in zip(_REGISTERS, hardware, strict=True):
        fields = rule.get(register, ())
        if policy == "permissive":
            fields = _permissive(fields)
        sent = getattr(entry, register)
        values[register] = _correct_register(sent, limit, fields, entry, model)
    return replace(entry, **values)


def _permissive(fields: Fields) -> Fields:
    """Counts and sizes are free; features, EQUAL fields and XSAVE sizes stay checked."""
    return tuple((bits, FREE if kind is AT_MOST else kind) for bits, kind in fields)


def _correct_register(
    sent: int, limit: int, fields: Fields, entry: CpuidEntry, model: CpuModel
) -> int:
    left = _ALL
    value = 0
    for bits, kind in fields:
        left &= ~bits
        value |= _correct_field(sent & bits, limit & bits, kind, entry, model)
    return value | sent & limit & left


def _correct_field(sent: int, limit: int, kind: Kind, entry: CpuidEntry, model: CpuModel) -> int:
    if kind is FREE:
        return sent
    if kind is EQUAL:
        return limit
    if kind is AT_MOST:
        return min(sent, limit)
    if kind is XSAVE:
        return _xsave_size(entry, model)
    return sent & limit


def _xsave_size(entry: CpuidEntry, model: CpuModel) -> int:
    """Size for XCR0_IN (leaf 0xD index 0) or XCR0_IN | XSS_IN (index 1), as the CPU knows them."""
    xcr0_features, _, _, _ = model.table[0xD, 0]
    _, _, xss_features, _ = model.table[0xD, 1]
    xcr0 = entry.xcr0_in & xcr0_features
    if entry.ecx_in == 0:
        return xsave_size(xcr0, compacted=False)
    return xsave_size(xcr0 | entry.xss_in & xss_features, compacted=True)
