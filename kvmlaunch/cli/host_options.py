"""Options about the host of a launch, and how they become a platform and a settled plan."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvmlaunch.cli.options import plan_from
from kvmlaunch.cli.talk import Talk
from kvmlaunch.cli.vmsa_options import add_proposal_option, proposal_from
from kvmlaunch.errors import FormatError
from kvmlaunch.images import LaunchPlan

if TYPE_CHECKING:
    from kvmlaunch.platforms import Choice
    from kvmlaunch.uapi import Platform

__all__ = ["add_host_options", "open_host", "settle"]


def add_host_options(group: argparse._ArgumentGroup) -> None:
    """The host, and what the launch may do there."""
    group.add_argument(
        "--platform",
        choices=("auto", "kvm", "sim"),
        default="auto",
        help="auto: this machine's KVM where it can do it, else the simulated host (default)",
    )
    group.add_argument(
        "--sim",
        metavar="[PROFILE][,KEY=VALUE...]",
        help="what to simulate: kernel 6.12, 6.18, 7.0, vmsa-page or direct-vmsa for the "
        "proposals, or multi-vmpl for one that runs all VMPLs (default 6.12, or what the VMSA "
        "mode and an image's note about VMPLs need), seed=N "
        "for the order in which vCPUs run (default 0), product=Milan, Genoa or Turin "
        "(default Milan), debug-swap for a kernel that sets that SEV feature unasked",
    )
    group.add_argument(
        "--sim-fault",
        "--fault",
        metavar="FAULT",
        action="append",
        default=[],
        help="order a fault of the simulated host, as SNP_LAUNCH_UPDATE:fw=0x1a@3+",
    )
    group.add_argument(
        "--retry-cpuid",
        action="store_true",
        help="if the firmware refuses the CPUID page, take its correction and try once more",
    )
    add_proposal_option(group)
    group.add_argument(
        "--allow-digest-change",
        action="store_true",
        help="an image's VMSAs may be left to KVM, though that gives another launch digest",
    )


def open_host(
    args: argparse.Namespace,
    plan: LaunchPlan,
    *,
    confidential: bool = True,
    certificates: bool = False,
) -> Choice:
    """The platform that the options ask for. Raises FormatError.

    ``certificates``: it shall ask for those of extended guest requests, where it is simulated.
    """
    from kvmlaunch.platforms import open_platform, profile_for

    choice = open_platform(
        args.platform,
        profile=profile_for(plan, args.sim, certificates=certificates),
        confidential=confidential,
        faults=args.sim_fault,
    )
    if args.sim_fault and choice.platform.name != "sim":
        raise FormatError("--sim-fault is for the simulated host: add --platform sim")
    return choice


def settle(
    args: argparse.Namespace, plan: LaunchPlan, platform: Platform, talk: Talk
) -> LaunchPlan:
    """The plan as it will be launched on this host: its C-bit and its VMSA mode."""
    from kvmlaunch.launch.vmsa_mode import settle_vmsa_mode

    if plan.cbitpos is not None and args.cbitpos is None:
        cbitpos = _ask_cbitpos(plan, platform)
        plan = plan_from(args, confidential=plan.confidential, cbitpos=cbitpos)
    settled = settle_vmsa_mode(
        plan,
        platform,
        args.vmsa_mode,
        proposal=proposal_from(args),
        allow_digest_change=args.allow_digest_change,
    )
    for line in filter(None, (*settled.changes, settled.why)):
        talk.say(line)
    return settled.plan


def _ask_cbitpos(plan: LaunchPlan, platform: Platform) -> int:
    from kvmlaunch.platforms import host_cbitpos

    position = host_cbitpos(platform)
    if position is None:
        raise FormatError(
            f"{plan.image} needs page tables with the C-bit, and this host's CPUID doesn't say "
            "which bit that is: give --cbitpos BIT"
        )
    return position
