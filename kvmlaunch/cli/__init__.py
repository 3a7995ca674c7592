"""Command line: kvmlaunch [-q] [-v] COMMAND …

Nothing is imported before it is needed: most of what a short command takes is its start.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's, which takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["command", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if list(words) == ["--version"] and None not in (sys.stdout, sys.stderr):
        from kvmlaunch.version import __version__

        try:
            print(f"kvmlaunch {__version__}", flush=True)
        except OSError as error:
            from kvmlaunch.cli.entry import output_lost

            return output_lost(error)
        return 0
    import gc

    # What a command imports stays for good: looking for garbage in it, over and over and once
    # more at the end, is time for nothing. But in somebody else's process that is his affair.
    alone = argv is None
    if alone:
        gc.disable()
    from kvmlaunch.cli.entry import parse_command, run_command

    args = parse_command(words)
    if alone:
        gc.freeze()
        gc.enable()
    return run_command(args)


def command() -> NoReturn:
    """The installed command: `main`, whose output is written then, and the process's end.

    To take the interpreter apart first would take as long as the measurement of firmware.
    """
    import os

    os._exit(main())
