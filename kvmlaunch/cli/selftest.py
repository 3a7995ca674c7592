"""kvmlaunch selftest: hold the kernel's SNP launch ABI to its rules; KTAP on stdout."""

from __future__ import annotations

import argparse
import sys

from kvmlaunch.cli.talk import DONE, Talk
from kvmlaunch.cli.vmsa_options import add_proposal_option, proposal_from

__all__ = ["add_parser"]

_EPILOG = """\
exit codes: 0 all well, 1 a case failed, 2 usage, 4 nothing could be run here
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "selftest",
        help="check the kernel's SNP launch ABI",
        description="Check what the kernel takes and refuses on the way of an SNP launch, with "
        "errno and firmware code, and what is measured. Each case makes VMs of its own and runs "
        "hardly any guest code. The output is KTAP, as of the kernel's selftests.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="list the cases, and run none")
    parser.add_argument(
        "--filter",
        metavar="GLOB",
        action="append",
        default=[],
        help="only cases whose name matches, as 'update.*' (may be given several times)",
    )
    parser.add_argument("--json", action="store_true", help="JSON Lines instead of KTAP")
    parser.add_argument(
        "--platform",
        choices=("auto", "kvm", "sim"),
        default="auto",
        help="auto: this machine's KVM where it has SNP, else the simulated host (default)",
    )
    parser.add_argument(
        "--sim", metavar="PROFILE[,KEY=VALUE...]", help="what to simulate (default 6.12)"
    )
    add_proposal_option(parser)
    parser.add_argument(
        "--risky",
        action="store_true",
        help="also on a real host run the cases that crash kernels with certain known bugs",
    )
    parser.set_defaults(command=_selftest)


def _selftest(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.platforms import DEFAULT_PROFILE, open_platform
    from kvmlaunch.selftest import Json, Ktap, conduct, list_cases, select

    specs = select(args.filter)
    proposal = proposal_from(args)
    if args.list:
        for line in list_cases(specs, as_json=args.json):
            print(line)
        return DONE
    choice = open_platform(args.platform, profile=args.sim or DEFAULT_PROFILE)
    talk.say(choice.why)
    report = Json(sys.stdout) if args.json else Ktap(sys.stdout)
    return conduct(choice.platform, specs, report, proposal=proposal, risky=args.risky)
