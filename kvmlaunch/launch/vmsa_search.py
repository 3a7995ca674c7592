"""What KVM may have measured instead of a VMSA that was predicted: known causes, likely first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvmlaunch.abi.kvm_sync import sregs_round_trip, synced
from kvmlaunch.abi.reset import VCPU_TYPES, kvm_untouched
from kvmlaunch.abi.segment import SEGMENT_FIELDS, Segment
from kvmlaunch.abi.vmsa import SEV_FEATURES, VMSA_FIELDS, Vmsa, diff
from kvmlaunch.errors import FormatError

__all__ = ["Guess", "guess_unasked", "guess_vmsas"]

_FPU_FIELDS = (
    *("x87_dp", "mxcsr", "x87_ftw", "x87_fsw", "x87_fcw", "x87_fop", "x87_rip"),
    *("fpreg_x87", "fpreg_xmm", "fpreg_ymm"),
)
_SNP_ACTIVE = 1


class Guess(NamedTuple):
    """The VMSAs that would have been measured, in order, and why; ``changes`` field by field."""

    vmsas: tuple[Vmsa, ...]
    why: str
    changes: tuple[str, ...] = ()


def guess_vmsas(before: Sequence[Vmsa], expected: Vmsa, others: Sequence[Vmsa]) -> Iterator[Guess]:
    """Guesses for the VMSA that should be ``expected``, behind those that are as predicted.

    ``others``: VMSAs of the plan's other vCPUs. No guess comes twice.
    """
    seen = {_pages((*before, expected))}
    for guess in _all_guesses(before, expected, others):
        pages = _pages(guess.vmsas)
        if pages not in seen:
            seen.add(pages)
            yield guess


def _all_guesses(before: Sequence[Vmsa], expected: Vmsa, others: Sequence[Vmsa]) -> Iterator[Guess]:
    for why, vmsa in _instead(expected, others):
        changes = tuple(
            f"{field.name} (offset {field.offset:#x}): {_value(field.a)} predicted, "
            f"{_value(field.b)} measured"
            for field in diff(expected, vmsa)
        )
        yield Guess((*before, vmsa), why, changes)
    yield Guess(tuple(before), "the host measures no such VMSA")
    if before:
        swapped = (*before[:-1], expected, before[-1])
        yield Guess(swapped, "the last two VMSAs are in the other order")
    for vmsa in _distinct(kvm_untouched(sev_features=expected.sev_features), expected, *others):
        yield Guess((*before, expected, vmsa), "the host measures one VMSA more behind it")
        yield Guess((*before, vmsa, expected), "the host measures one VMSA more before it")


def _pages(vmsas: Sequence[Vmsa]) -> tuple[bytes, ...]:
    return tuple(vmsa.encode() for vmsa in vmsas)


def guess_unasked(others: Sequence[Vmsa], sev_features: int) -> Iterator[Guess]:
    """Guesses for what is measured where nothing should be."""
    for vmsa in _distinct(kvm_untouched(sev_features=sev_features), *others):
        yield Guess((vmsa,), "the host measures a VMSA that nobody asked for")


def _distinct(*vmsas: Vmsa) -> list[Vmsa]:
    return list({vmsa.encode(): vmsa for vmsa in vmsas}.values())


def _instead(expected: Vmsa, others: Sequence[Vmsa]) -> Iterator[tuple[str, Vmsa]]:
    no_fpu = expected.replace(**{name: _zero(expected, name) for name in _FPU_FIELDS})
    for state, fpu in ((expected, ""), (no_fpu, "without FPU state, as kernels before 6.10 do")):
        if fpu:
            yield fpu, state
        for name, bit in sorted(SEV_FEATURES.items(), key=lambda item: item[0] != "debug_swap"):
            if 1 << bit != _SNP_ACTIVE:
                flipped = state.replace(sev_features=state.sev_features ^ 1 << bit)
                word = "set" if flipped.sev_features >> bit & 1 else "clear"
                yield ", ".join(filter(None, (f"SEV feature {name} is {word}", fpu))), flipped
    untouched = kvm_untouched(sev_features=expected.sev_features)
    yield "as KVM makes a vCPU that nobody touched", untouched
    yield "as after KVM_GET_SREGS and KVM_SET_SREGS", sregs_round_trip(expected)
    with contextlib.suppress(FormatError):  # a state that KVM refuses is none that it measures
        made = synced(expected, sev_features=expected.sev_features)
        yield "as KVM makes it of these registers", made
    for vmsa in others:
        yield "the VMSA of another vCPU", vmsa
    for name, signature in (("none", 0), ("KVM's own", untouched.rdx), *VCPU_TYPES.items()):
        yield f"another vCPU signature: {name}", expected.replace(rdx=signature)
    yield from _field_by_field(expected, untouched)


def _field_by_field(expected: Vmsa, untouched: Vmsa) -> Iterator[tuple[str, Vmsa]]:
    """One field was not applied: it is as in an untouched vCPU, or zero."""
    for name in (field.name for field in VMSA_FIELDS):
        reset = expected.replace(**{name: getattr(untouched, name)})
        yield f"{name} as in a vCPU that nobody touched", reset
        yield f"{name} is zero", expected.replace(**{name: _zero(expected, name)})
        if isinstance(getattr(expected, name), Segment):
            for part in (field.name for field in SEGMENT_FIELDS):
                value = untouched.get(f"{name}.{part}")
                yield (
                    f"{name}.{part} as in a vCPU that nobody touched",
                    expected.with_field(f"{name}.{part}", value),
                )


def _zero(vmsa: Vmsa, name: str) -> int | bytes | Segment:
    value = getattr(vmsa, name)
    if isinstance(value, Segment):
        return Segment()
    return bytes(len(value)) if isinstance(value, bytes) else 0


def _value(value: int | bytes) -> str:
    return f"{value:#x}" if isinstance(value, int) else value.hex()
