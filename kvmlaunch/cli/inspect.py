"""kvmlaunch inspect: show what a launch would do."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from kvmlaunch.abi.policy import describe_policy
from kvmlaunch.abi.vmsa import SEGMENT_FIELDS, VMSA_FIELDS, Segment, Vmsa, describe_sev_features
from kvmlaunch.cli.mode_options import add_svsm_options
from kvmlaunch.cli.options import (
    add_image_options,
    add_launch_options,
    add_order_option,
    plan_from,
)
from kvmlaunch.cli.talk import DONE, Talk
from kvmlaunch.cli.vmsa_options import as_asked
from kvmlaunch.images import LaunchPlan, PageRange, VmsaMode

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "inspect",
        help="show the plan: memory map, pages by type, vCPU state",
        description="Show what launching an image would do, step by step. Nothing is launched.",
    )
    add_image_options(parser)
    add_svsm_options(parser)
    add_order_option(parser)
    add_launch_options(parser, log=False)
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(command=_inspect)


def _inspect(args: argparse.Namespace, talk: Talk) -> int:
    plan = as_asked(plan_from(args), args, talk)
    print(json.dumps(_as_json(plan), indent=2) if args.json else _as_text(plan))
    return DONE


def _as_json(plan: LaunchPlan) -> dict[str, Any]:
    return {
        "schema": "kvmlaunch.plan/1",
        "image": plan.image,
        "image_type": plan.image_type,
        "policy": f"{plan.policy:#x}",
        "sev_features": f"{plan.sev_features:#x}",
        "cbitpos": plan.cbitpos,
        "vmm": plan.vmm or None,
        "memory": [
            {"gpa": f"{m.gpa:#x}", "size": f"{m.size:#x}", "label": m.label} for m in plan.memory
        ],
        "steps": [
            {
                "gpa": f"{s.gpa:#x}",
                "pages": s.npages,
                "type": s.type.name,
                "label": s.label,
                "origin": s.origin,
            }
            for s in plan.steps
        ],
        "shared": [
            {"gpa": f"{s.gpa:#x}", "pages": s.npages, "label": s.label, "origin": s.origin}
            for s in plan.shared
        ],
        "vmsa_mode": str(plan.vmsa_mode),
        "vmsas": [
            {
                "gpa": f"{s.gpa:#x}",
                "vcpu": plan.vcpu_at(s),
                "origin": s.origin,
                "fields": dict(_registers(Vmsa.decode(s.page(0)))),
            }
            for s in plan.vmsas
        ],
        "pages": dict(_pages_by_type(plan)),
        "vcpus": [dict(_registers(vcpu)) for vcpu in plan.vcpus],
    }


def _as_text(plan: LaunchPlan) -> str:
    lines = [f"{plan.image}: {plan.image_type}", "", "memory"]
    lines += [
        f"  {m.gpa:#014x}..{m.end:#014x} {m.size >> 10:>9} KiB  {m.label}" for m in plan.memory
    ]
    lines += ["", "launch, in this order"]
    lines += [
        f"  {s.gpa:#014x}..{s.end:#014x} {s.npages:>6} {s.type.name:<10} {s.label} ({s.origin})"
        for s in plan.steps
    ]
    if plan.shared:
        lines += ["", "shared with the host, not launched"]
        lines += [
            f"  {s.gpa:#014x}..{s.end:#014x} {s.npages:>6} {s.label} ({s.origin})"
            for s in plan.shared
        ]
    counts = ", ".join(f"{count} {name}" for name, count in _pages_by_type(plan).items())
    lines += ["", f"pages: {counts}"]
    lines += ["", f"policy {plan.policy:#x}", *(f"  {bit}" for bit in describe_policy(plan.policy))]
    features = ", ".join(describe_sev_features(plan.sev_features))
    lines += ["", f"SEV features {plan.sev_features:#x}: {features}"]
    if plan.cbitpos is not None:
        lines += ["", f"C-bit {plan.cbitpos}, in the page tables"]
    if plan.vmm:
        how = "as they are" if plan.as_given else "as KVM makes them"
        lines += ["", f"VMM {plan.vmm}: VMSAs are measured {how}, at GPA {plan.vmsa_gpa:#x}"]
    lines += ["", *_vmsa_lines(plan)]
    return "\n".join(lines)


def _vmsa_lines(plan: LaunchPlan) -> list[str]:
    """The VMSAs with their fields, and who starts from which."""
    if plan.vmsa_mode is VmsaMode.SYNC:
        seen: dict[Vmsa, list[int]] = {}
        for index, vcpu in enumerate(plan.vcpus):
            seen.setdefault(vcpu, []).append(index)
        blocks = [(f"vCPU {_ranges(indices)}", vcpu) for vcpu, indices in seen.items()]
    else:
        blocks = [(_vmsa_title(plan, s), Vmsa.decode(s.page(0))) for s in plan.vmsas]
    lines = []
    for title, vmsa in blocks:
        lines += [f"{title} (fields that are not 0)"]
        lines += [f"  {name:<16} {value}" for name, value in _registers(vmsa).items()]
        lines += [""]
    if without := [vcpu for vcpu in range(len(plan.vcpus)) if not plan.starts(vcpu)]:
        lines += [f"vCPU {_ranges(without)} without a VMSA, until the guest makes one", ""]
    return lines[:-1]


def _vmsa_title(plan: LaunchPlan, step: PageRange) -> str:
    vcpu = plan.vcpu_at(step)
    who = "measured only, no vCPU starts from it" if vcpu is None else f"vCPU {vcpu}"
    return f"VMSA at GPA {step.gpa:#x}, {who}"


def _pages_by_type(plan: LaunchPlan) -> dict[str, int]:
    """Measured pages, the VMSAs that KVM adds included."""
    counts: Counter[str] = Counter()
    for step in plan.steps:
        counts[step.type.name] += step.npages
    if plan.vmsa_mode is VmsaMode.SYNC:
        counts["VMSA"] += len(plan.vcpus)
    return dict(counts)


def _registers(vcpu: Vmsa) -> dict[str, str]:
    out = {}
    for name in (field.name for field in VMSA_FIELDS):
        value = vcpu.get(name)
        if isinstance(value, Segment):
            parts = [(part.name, getattr(value, part.name)) for part in SEGMENT_FIELDS]
            if any(number for _, number in parts):
                out[name] = " ".join(f"{part}={number:#x}" for part, number in parts)
        elif isinstance(value, bytes):
            if any(value):
                out[name] = value.hex()
        elif value:
            out[name] = f"{value:#x}"
    return out


def _ranges(indices: list[int]) -> str:
    if len(indices) > 1 and indices[-1] - indices[0] == len(indices) - 1:
        return f"{indices[0]}-{indices[-1]}"
    return ", ".join(str(index) for index in indices)
