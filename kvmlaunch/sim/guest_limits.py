"""What CPUID allows a vCPU to have in CR4, EFER and the APIC base.

KVM asks twice: the table that it supports itself, and the one that user space set
(arch/x86/kvm/x86.h: __cr4_reserved_bits(); x86.c: kvm_valid_efer(); lapic.c:
kvm_apic_set_base()). Bits are hardware's (APM 2, 3.1 and CPUID, APM 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["NOTHING_KNOWN", "GuestLimits", "canonical", "limits"]

_Feature = tuple[int, int, str, int]

# Bit -> function, index, register and bit of the feature that it needs.
_CR4_FEATURES: Mapping[int, _Feature] = MappingProxyType(
    {
        11: (0x7, 0, "ecx", 2),  # UMIP
        12: (0x7, 0, "ecx", 16),  # LA57
        13: (0x1, 0, "ecx", 5),  # VMX
        16: (0x7, 0, "ebx", 0),  # FSGSBASE
        17: (0x1, 0, "ecx", 17),  # PCID
        18: (0x1, 0, "ecx", 26),  # XSAVE
        20: (0x7, 0, "ebx", 7),  # SMEP
        21: (0x7, 0, "ebx", 20),  # SMAP
        22: (0x7, 0, "ecx", 3),  # PKU
        28: (0x7, 1, "eax", 26),  # LAM
    }
)
_EFER_FEATURES: Mapping[int, _Feature] = MappingProxyType(
    {
        8: (0x80000001, 0, "edx", 29),  # LME needs LM
        10: (0x80000001, 0, "edx", 29),  # LMA, too
        11: (0x80000001, 0, "edx", 20),  # NX
        12: (0x80000001, 0, "ecx", 2),  # SVM
        14: (0x80000001, 0, "edx", 25),  # FXSR_OPT
        21: (0x80000021, 0, "eax", 8),  # AUTOIBRS
    }
)
_CR4_ALWAYS = 0x7FF  # VME to OSXMMEXCPT
_EFER_ALWAYS = 1 << 0  # SCE; KVM takes LMSLE only where guests have SVM
_AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")
_X2APIC: _Feature = (0x1, 0, "ecx", 21)
_XSAVES: _Feature = (0xD, 1, "eax", 3)


@dataclass(frozen=True)
class GuestLimits:
    """Bits that a table forbids: ``cr4``, and ``efer`` (``efer_features``: for want of a feature).

    ``x2apic``, ``xsaves`` and ``la57`` are whether the table has these, ``amd`` whether its
    vendor is AMD or Hygon.
    """

    cr4: int
    efer: int
    efer_features: int
    x2apic: bool
    xsaves: bool
    la57: bool
    amd: bool

    @property
    def virtual_bits(self) -> int:
        """Width of a linear address."""
        return 57 if self.la57 else 48


NOTHING_KNOWN = GuestLimits(
    0, 0, sum(1 << bit for bit in _EFER_FEATURES), x2apic=False, xsaves=False, la57=False, amd=False
)
"""A vCPU before KVM_SET_CPUID2: CR4 isn't limited yet, features there are none."""


def limits(entry: Callable[[int, int], Any]) -> GuestLimits:
    """Limits of the table in which ``entry(function, index)`` finds an entry, or None."""

    def has(feature: _Feature) -> bool:
        function, index, register, bit = feature
        found = entry(function, index)
        return found is not None and bool(getattr(found, register) >> bit & 1)

    cr4 = sum(1 << bit for bit, feature in _CR4_FEATURES.items() if has(feature))
    efer = sum(1 << bit for bit, feature in _EFER_FEATURES.items() if has(feature))
    every = (1 << 64) - 1
    return GuestLimits(
        every & ~(_CR4_ALWAYS | cr4),
        every & ~(_EFER_ALWAYS | efer),
        NOTHING_KNOWN.efer_features & ~efer,
        has(_X2APIC),
        has(_XSAVES),
        has(_CR4_FEATURES[12]),
        _vendor(entry(0, 0)) in _AMD_VENDORS,
    )


def canonical(address: int, bits: int) -> int:
    """The address with its highest implemented bit repeated above."""
    low = address & (1 << bits) - 1
    return low | (1 << 64) - (1 << bits) if low >> bits - 1 else low


def _vendor(leaf: Any) -> bytes:
    if leaf is None:
        return b""
    return b"".join(int(word).to_bytes(4, "little") for word in (leaf.ebx, leaf.edx, leaf.ecx))
