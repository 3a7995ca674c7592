"""What a launch loses when KVM makes the VMSAs that its image brings. Needs no host."""

from __future__ import annotations

from kvmlaunch.images import LaunchPlan, SyncFallback
from kvmlaunch.launch.measure import measure

__all__ = ["describe_fallback"]


def describe_fallback(plan: LaunchPlan, fallback: SyncFallback) -> tuple[tuple[str, ...], bool]:
    """What leaving the VMSAs to KVM changes, a sentence each; and whether the digest does."""
    lines = [
        f"vCPU {vcpu}: KVM can't carry {field.name} (offset {field.offset:#x}): "
        f"{_value(field.a)} in the VMSA, {_value(field.b)} measured"
        for vcpu, field in fallback.lost
    ]
    lines += [
        f"not launched: the VMSA at GPA {step.gpa:#x} ({step.origin}), which no vCPU starts from"
        for step in fallback.dropped
    ]
    before, after = measure(plan).digest, measure(fallback.plan).digest
    if before != after:
        lines.append(f"the launch digest changes from {before.hex()} to {after.hex()}")
    return tuple(lines), before != after


def _value(value: int | bytes) -> str:
    return f"{value:#x}" if isinstance(value, int) else value.hex()
