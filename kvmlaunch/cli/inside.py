"""run --trace, --gdb, and what is shown of a guest that failed."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvmlaunch.cli.options import number
from kvmlaunch.cli.talk import Talk
from kvmlaunch.errors import FormatError, KvmLaunchError

if TYPE_CHECKING:
    from kvmlaunch.launch.guest import Guest
    from kvmlaunch.launch.run import Outcome
    from kvmlaunch.launch.session import Session
    from kvmlaunch.launch.trace import Trace
    from kvmlaunch.uapi import Platform

__all__ = ["Inside", "add_inside_options", "describe_end"]

_KINDS = ("exits", "pages", "insn")
_SIM_ONLY = ("pages", "insn")
_MOST_PORT = 65535
_SHOWN = ("failed", "shutdown", "terminated", "timeout")
_MOST_VCPUS = 8


def add_inside_options(parser: argparse.ArgumentParser) -> None:
    """Add --trace and its like, and --gdb."""
    group = parser.add_argument_group("looking inside")
    group.add_argument(
        "--trace",
        choices=_KINDS,
        action="append",
        default=[],
        help="show each exit; on the simulated host also page states and instructions "
        "(may be given several times)",
    )
    group.add_argument("--trace-out", metavar="FILE", help="where the trace goes (default: stderr)")
    group.add_argument(
        "--trace-format",
        choices=("text", "json"),
        default="text",
        help="lines for people, or JSON Lines",
    )
    group.add_argument(
        "--gdb",
        type=number,
        metavar="PORT",
        help="wait for GDB on 127.0.0.1 before the first instruction (0: a free port); for "
        "simulated guests, and plain ones",
    )


class Inside:
    """What the options ask for. Raises FormatError where they can't be had."""

    def __init__(self, args: argparse.Namespace, platform: Platform) -> None:
        self._args = args
        if args.trace_out is not None and not args.trace:
            raise FormatError("--trace-out needs --trace")
        for kind in args.trace:
            if kind in _SIM_ONLY and platform.name != "sim":
                raise FormatError(f"--trace {kind} is for the simulated host: add --platform sim")
        if args.gdb is None:
            return
        if not 0 <= args.gdb <= _MOST_PORT:
            raise FormatError(f"--gdb {args.gdb}: ports are 0 to {_MOST_PORT}")
        if platform.name != "sim" and args.vm_type == "snp":
            raise FormatError(
                "--gdb can't look into a protected guest on real hardware: add --platform sim, "
                "or --vm-type plain"
            )

    def run(self, session: Session, console: Callable[[bytes], object], talk: Talk) -> Outcome:
        """Run the guest, traced and debugged as asked."""
        from kvmlaunch.launch.gdb import serve_gdb

        with contextlib.ExitStack() as stack:
            trace = stack.enter_context(self._trace())
            debugger = None
            if self._args.gdb is not None:
                server = stack.enter_context(serve_gdb(session.guest, self._args.gdb))
                debugger = server.debugger
                talk.error(f"waiting for gdb: target remote 127.0.0.1:{server.port}")
            outcome = session.run(
                console, timeout=self._args.timeout, trace=trace, debugger=debugger
            )
            if trace is not None and trace.error is not None:
                where = self._args.trace_out or "stderr"
                talk.error(f"trace {where}: {trace.error.strerror}; it isn't complete")
            return outcome

    @contextlib.contextmanager
    def _trace(self) -> Iterator[Trace | None]:
        from kvmlaunch.launch.trace import Trace

        args = self._args
        if not args.trace:
            yield None
            return
        as_json = args.trace_format == "json"
        if args.trace_out is None:
            yield Trace(args.trace, _to_stderr, as_json=as_json)
            return
        with contextlib.ExitStack() as stack:
            try:
                # Unbuffered: what was traced is there even if this process dies.
                file = stack.enter_context(open(args.trace_out, "wb", buffering=0))
            except OSError as error:
                raise KvmLaunchError(f"trace {args.trace_out}: {error.strerror}") from None
            yield Trace(args.trace, lambda line: file.write(line.encode()), as_json=as_json)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


def describe_end(guest: Guest, outcome: Outcome) -> list[str]:
    """The last exits and the registers of a guest that failed, as lines; else nothing."""
    if outcome.kind not in _SHOWN or outcome.ok:
        return []
    from kvmlaunch.launch.registers import format_registers

    lines = []
    if outcome.last_exits:
        lines.append("last exits:")
        lines += [f"  vCPU {vcpu}: {exit_}" for vcpu, exit_ in outcome.last_exits]
    for index in range(min(len(guest.vcpus), _MOST_VCPUS)):
        try:
            registers = guest.registers(index)
        except KvmLaunchError:
            registers = None  # a VM that the kernel has killed answers nothing
        if registers is not None:
            lines += format_registers(index, registers)
    if len(guest.vcpus) > _MOST_VCPUS:
        lines.append(f"(and {len(guest.vcpus) - _MOST_VCPUS} more vCPUs)")
    return lines
