"""kvmlaunch sim: run an unmodified program on the simulated host."""

from __future__ import annotations

import argparse

from kvmlaunch.cli.talk import Talk
from kvmlaunch.errors import FormatError

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "sim",
        help="run an unmodified program on the simulated host",
        usage="kvmlaunch sim [options] -- COMMAND ...",
        description="Run a program whose /dev/kvm and /dev/sev are the simulated host's. All "
        "else it does goes to this machine's kernel. The exit code is the program's, or 128 "
        "and the signal that ended it.",
    )
    parser.add_argument(
        "--sim",
        metavar="PROFILE[,KEY=VALUE...]",
        default="6.12",
        help="what to simulate, as for run (default 6.12)",
    )
    parser.add_argument(
        "--fault",
        "--sim-fault",
        metavar="FAULT",
        action="append",
        default=[],
        help="order a fault, as for run",
    )
    parser.add_argument("program", metavar="COMMAND", nargs=argparse.REMAINDER)
    parser.set_defaults(command=_sim)


def _sim(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.sim.spec import parse_spec
    from kvmlaunch.supervisor import Supervisor

    command = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not command:
        raise FormatError("name a program: kvmlaunch sim [options] -- COMMAND ...")
    supervisor = Supervisor(parse_spec(args.sim), faults=args.fault)
    return supervisor.run(command)
