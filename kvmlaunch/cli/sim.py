"""kvmlaunch sim: run an unmodified program on the simulated host."""

from __future__ import annotations

import argparse
import os

from kvmlaunch.cli.talk import Talk
from kvmlaunch.errors import FormatError

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from kvmlaunch.uapi import Call

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "sim",
        help="run an unmodified program on the simulated host",
        usage="kvmlaunch sim [options] -- COMMAND ...",
        description="Run a program whose /dev/kvm and /dev/sev are the simulated host's. All "
        "else it does goes to this machine's kernel: Linux 5.19 or newer on x86-64, with or "
        "without KVM and root's rights. The exit code is the program's, or 128 and the signal "
        "that ended it; processes that it leaves behind are waited for. kvmlaunch -v sim says "
        "which calls failed, and with what errno.",
    )
    parser.add_argument(
        "--sim",
        metavar="[PROFILE][,KEY=VALUE...]",
        default="",
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
    parser.add_argument("--log", metavar="FILE", help="write the page log of its launches")
    parser.add_argument("--ioctls", action="store_true", help="put every call into the log, too")
    parser.add_argument(
        "program", metavar="COMMAND", nargs=argparse.REMAINDER, help="a program and its arguments"
    )
    parser.set_defaults(command=_sim)


def _sim(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.launch.pagelog import PageLog, open_log
    from kvmlaunch.platforms import DEFAULT_PROFILE
    from kvmlaunch.sim.faults import Faults
    from kvmlaunch.sim.spec import parse_spec, with_profile
    from kvmlaunch.supervisor import Supervisor

    command = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not command:
        raise FormatError("name a program: kvmlaunch sim [options] -- COMMAND ...")
    if args.ioctls and args.log is None:
        raise FormatError("--ioctls needs --log FILE")
    profile = with_profile(args.sim, DEFAULT_PROFILE)
    spec, faults = parse_spec(profile), Faults.parse(args.fault)
    with open_log(args.log) as log:

        def on_call(tid: int, call: Call) -> None:
            if call.ret < 0:
                talk.detail(f"thread {tid}: {describe(call)}")
            if args.ioctls:
                log.call(call)

        watching = talk.verbose or args.ioctls
        supervisor = Supervisor(
            spec,
            faults=faults,
            log=log if isinstance(log, PageLog) else None,
            on_call=on_call if watching else None,
        )
        talk.say(f"platform sim ({profile}): a simulated host, for {command[0]} alone")
        return supervisor.run(command)


def describe(call: Call) -> str:
    """A call that failed, on one line."""
    text = f"{call.name} ret=-{call.errno} ({os.strerror(call.errno)})"
    return text if call.fw_error is None else f"{text} fw_error={call.fw_error}"
