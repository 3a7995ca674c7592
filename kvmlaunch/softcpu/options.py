"""What a guest is: the part that is the same for all its CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["CpuOptions", "Cpuid"]

Cpuid: TypeAlias = Callable[[int, int], tuple[int, int, int, int]]
"""(leaf, index) -> EAX, EBX, ECX, EDX."""


def _never() -> bool:
    return False


def _no_cpuid(_leaf: int, _index: int) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class CpuOptions:
    """How the CPUs of one guest behave.

    Args:
        snp: an SNP guest: encrypted state, #VC, RMP; else a plain guest without all that.
        c_bit: position of the C-bit in page table entries, 32..51; SNP guests only.
        asid: the guest's ASID, as in its RMP entries.
        physical_bits: width of a GPA; entries with higher bits set are reserved-bit faults.
        cpuid: answers CPUID of a plain guest; the answer must fit what the CPU can do.
        patches_vmcall: whether the hypervisor makes a VMMCALL of a plain guest's VMCALL, which
            the CPU doesn't have; asked each time.
        intercept_rdtsc: RDTSC and RDTSCP are #VC (SNP guests only).
        exit_on_pause: PAUSE is an event.
        ticks_per_tsc: TSC increments once in so many ticks.
    """

    snp: bool
    c_bit: int = 51
    asid: int = 0
    physical_bits: int = 48
    cpuid: Cpuid = _no_cpuid
    patches_vmcall: Callable[[], bool] = _never
    intercept_rdtsc: bool = False
    exit_on_pause: bool = False
    ticks_per_tsc: int = 1
