"""Memory type range registers, which KVM only keeps (mtrr.c)."""

from __future__ import annotations

__all__ = ["CAPABILITIES", "DEFAULT_TYPE", "RESET", "is_valid"]

DEFAULT_TYPE = 0x2FF
_VARIABLE = range(0x200, 0x210)
_FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
_TYPES = (0, 1, 4, 5, 6)

CAPABILITIES = {0xFE: 0x500 | len(_VARIABLE) // 2}
"""MTRRcap, which only reads: write-combining, fixed ranges, and the number of variable ones."""

RESET = dict.fromkeys((*_VARIABLE, *_FIXED, DEFAULT_TYPE), 0)
"""Register -> reset value."""


def is_valid(index: int, value: int, reserved_gpa_bits: int) -> bool:
    """kvm_mtrr_valid(); ``reserved_gpa_bits`` are those of the width, the C-bit too."""
    if index == DEFAULT_TYPE:
        return not value & ~0xCFF and value & 0xFF in _TYPES
    if index in _FIXED:
        return all(byte in _TYPES for byte in value.to_bytes(8, "little"))
    if index % 2:
        return not value & (reserved_gpa_bits | 0x7FF)
    return value & 0xFF in _TYPES and not value & (reserved_gpa_bits | 0xF00)
