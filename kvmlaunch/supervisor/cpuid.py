"""What the CPUID instruction shows to supervised programs: the simulated host's CPU.

Only its name and what SEV needs: which instructions may be used is this machine's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kvmlaunch.sim.cpumodel import CpuModel
from kvmlaunch.uapi import ffi, lib

__all__ = ["Masked", "cpuid_table", "differs", "masked_leaves"]

_ALL = (0xFFFFFFFF,) * 4
_VENDOR = (0, *_ALL[1:])
_EAX = (0xFFFFFFFF, 0, 0, 0)
_SIZES = (0xFFFFFFFF, 0, 0xFFFFFFFF, 0)
_XSAVE, _SEV = 0xD, 0x8000001F
_FIRST_EXTENDED = 0x80000000
# Intel's cache descriptions and AMD's are leaves of their own.
_PARTS = {
    **{0: _VENDOR, 1: _EAX, 2: _ALL, 4: _ALL},
    **{_FIRST_EXTENDED: _ALL, 0x80000001: _EAX, 0x80000005: _ALL, 0x80000006: _ALL},
    0x80000008: _SIZES,
}
_NOTHING = (0, 0, 0, 0)
_MOST_INDICES = 8


class Masked(NamedTuple):
    """A leaf, and the bits of EAX, EBX, ECX, EDX in it that are replaced.

    ``subleaf`` is None where ECX doesn't count.
    """

    function: int
    subleaf: int | None
    mask: tuple[int, ...]
    value: tuple[int, ...]


def differs(cpu: CpuModel) -> bool:
    """Whether a program would notice that it doesn't run on ``cpu``: vendor, or SEV's bits."""
    ours, theirs = cpu.hardware_cpuid(0), _native(0)
    assert ours is not None
    if ours[1:] != theirs[1:]:
        return True
    return _native(_FIRST_EXTENDED)[0] < _SEV or cpu.hardware_cpuid(_SEV) != _native(_SEV)


def masked_leaves(cpu: CpuModel, last_native: int) -> Iterator[Masked]:
    """What to replace where the machine's last extended leaf is ``last_native``."""
    for function, mask in _PARTS.items():
        yield Masked(function, None, mask, cpu.hardware_cpuid(function) or _NOTHING)
    highest = cpu.hardware_cpuid(_FIRST_EXTENDED)
    assert highest is not None
    for function in range(min(last_native + 1, _SEV), highest[0] + 1):
        if (function, 1) in cpu.table:
            for index in range(_MOST_INDICES):
                yield Masked(function, index, _ALL, cpu.hardware_cpuid(function, index) or _NOTHING)
        else:
            yield Masked(function, None, _ALL, cpu.hardware_cpuid(function) or _NOTHING)


def _absent_components(cpu: CpuModel) -> Iterator[Masked]:
    """XSAVE components that this machine lacks: a VMM takes their offsets for its guests."""
    for function, index in cpu.table:
        if function == _XSAVE and index > 1 and not any(_native(_XSAVE, index)):
            yield Masked(_XSAVE, index, _ALL, cpu.table[function, index])


def cpuid_table(cpu: CpuModel) -> Any:
    """``struct kl_cpuid[]`` for kl_wait()."""
    leaves = [*masked_leaves(cpu, _native(_FIRST_EXTENDED)[0]), *_absent_components(cpu)]
    table = ffi.new("struct kl_cpuid[]", len(leaves))
    for entry, leaf in zip(table, leaves, strict=True):
        entry.function, entry.index = leaf.function, leaf.subleaf or 0
        entry.is_indexed = leaf.subleaf is not None
        entry.mask, entry.value = leaf.mask, leaf.value
    return table


def _native(function: int, index: int = 0) -> tuple[int, ...]:
    registers = ffi.new("uint32_t[4]")
    lib.kl_native_cpuid(function, index, registers)
    return tuple(registers)
