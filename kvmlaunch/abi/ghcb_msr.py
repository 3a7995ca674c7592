"""GHCB MSR protocol: what a guest says when it asks for its own termination.

Source: AMD 56421 (GHCB specification), MSR protocol value 0x100; Linux
arch/x86/include/asm/sev-common.h for the names of reason set 1. Set 15 is that of the
guests in examples/guests (runtime/runtime.h), set 14 that of kvmlaunch.selftest.payloads.
"""

from __future__ import annotations

from typing import NamedTuple

from .ghcb import GhcbError

__all__ = ["EXAMPLES_SET", "SELFTEST_SET", "Termination", "decode_termination"]

EXAMPLES_SET = 15
"""Reason set of the example guests."""
SELFTEST_SET = 14
"""Reason set of the selftest's guests, whose codes are what they found."""

_TERMINATE = 0x100
_REFUSED, _EXCEPTION = 0x20, 0x80
_SETS = {
    0: "GHCB specification",
    1: "Linux",
    SELFTEST_SET: "kvmlaunch's selftest",
    EXAMPLES_SET: "kvmlaunch's example guests",
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
    (EXAMPLES_SET, 1): "not an SNP guest",
    (EXAMPLES_SET, 2): "the hypervisor doesn't speak version 2 of the GHCB protocol",
    (EXAMPLES_SET, 3): "a C-bit position that no page table entry has",
    (EXAMPLES_SET, 4): "the hypervisor has no SNP support",
    (EXAMPLES_SET, 5): "page state change refused",
    (EXAMPLES_SET, 6): "PVALIDATE failed, or changed nothing",
    (EXAMPLES_SET, 7): "GHCB registration refused",
    (EXAMPLES_SET, 8): "the answer lacks a field, or is one to another request",
    (EXAMPLES_SET, 10): "#VC of an instruction that the runtime doesn't know",
    (EXAMPLES_SET, 11): "memory doesn't hold what was written, or isn't where it should be",
    (EXAMPLES_SET, 12): "a check failed",
    (EXAMPLES_SET, 13): "a private page was used that isn't validated",
    (EXAMPLES_SET, 14): "the secure processor didn't answer a guest message",
    (EXAMPLES_SET, 15): "the hypervisor runs no other VMPL than 0",
    (EXAMPLES_SET, 16): "more vCPUs than the guest has room for",
    **{
        (EXAMPLES_SET, _REFUSED + error): f"a request through the GHCB page was refused: {why}"
        for error, why in (
            (GhcbError.NOT_REGISTERED, "GHCB page not registered"),
            (GhcbError.INVALID_USAGE, "invalid usage"),
            (GhcbError.INVALID_SCRATCH, "invalid scratch area"),
            (GhcbError.MISSING_INPUT, "missing input"),
            (GhcbError.INVALID_INPUT, "invalid input"),
            (GhcbError.INVALID_EVENT, "invalid event"),
        )
    },
    **{(EXAMPLES_SET, _EXCEPTION + n): f"exception {n}" for n in range(32)},
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
