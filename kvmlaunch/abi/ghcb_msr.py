"""GHCB MSR protocol: what a guest says when it asks for its own termination.

Source: AMD 56421 (GHCB specification), MSR protocol value 0x100; Linux
arch/x86/include/asm/sev-common.h for the names of reason set 1. Set 15 is that of the
guests in examples/guests (runtime/runtime.h).
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Termination", "decode_termination"]

_TERMINATE = 0x100
_EXAMPLES = 15
_EXCEPTION = 0x80
_SETS = {
    0: "GHCB specification",
    1: "Linux",
    _EXAMPLES: "kvmlaunch's example guests",
}
_CODES = {
    (0, 0): "general termination request",
    (0, 1): "the GHCB protocol range is not supported",
    (0, 2): "SNP features of the hypervisor are not supported",
    (1, 0): "GHCB registration failed",
    (1, 1): "page state change failed",
    (1, 2): "PVALIDATE failed",
    (1, 3): "the guest is not at VMPL0",
    (1, 4): "bad CPUID table",
    (1, 5): "CPUID from the hypervisor failed",
    (1, 6): "no usable secrets page",
    (1, 7): "an SVSM is needed and missing",
    (1, 8): "an SVSM runs at VMPL0 with the guest",
    (1, 9): "no SVSM calling area",
    (_EXAMPLES, 1): "encrypted state, but SEV_STATUS doesn't say SNP",
    (_EXAMPLES, 2): "the hypervisor doesn't speak version 2 of the GHCB protocol",
    (_EXAMPLES, 3): "a C-bit position that no page table entry has",
    (_EXAMPLES, 4): "the hypervisor has no SNP support",
    (_EXAMPLES, 5): "page state change refused",
    (_EXAMPLES, 6): "PVALIDATE failed, or changed nothing",
    (_EXAMPLES, 7): "GHCB registration refused",
    (_EXAMPLES, 8): "the answer lacks a field, or is one to another request",
    (_EXAMPLES, 9): "a request through the GHCB page was refused",
    (_EXAMPLES, 10): "#VC of an instruction that the runtime doesn't know",
    (_EXAMPLES, 11): "memory doesn't hold what was written, or isn't where it should be",
    **{(_EXAMPLES, _EXCEPTION + n): f"exception {n}" for n in range(32)},
}


class Termination(NamedTuple):
    """Decoded request: ``reason_set`` and ``reason_code`` (None: not in the value)."""

    reason_set: int | None
    reason_code: int | None

    def __str__(self) -> str:
        if self.reason_set is None or self.reason_code is None:
            return (
                "the guest asked for termination through its GHCB page; "
                "the reason is only in the host's kernel log"
            )
        what = _CODES.get((self.reason_set, self.reason_code), "unknown code")
        whose = _SETS.get(self.reason_set, "unknown set")
        return (
            f"the guest asked for termination: reason set {self.reason_set} ({whose}), "
            f"code {self.reason_code} ({what})"
        )


def decode_termination(value: int) -> Termination:
    """Decode the GHCB MSR value of a SEV_TERM event: bits 15:12 set, 23:16 code."""
    if value & 0xFFF != _TERMINATE:
        return Termination(None, None)
    return Termination(value >> 12 & 0xF, value >> 16 & 0xFF)
