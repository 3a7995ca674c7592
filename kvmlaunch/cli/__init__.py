"""Command line: kvmlaunch [-q] [-v] COMMAND …

Nothing is imported before it is needed: most of what a short command takes is its start.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's, which takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if list(words) == ["--version"] and sys.stdout is not None:
        from kvmlaunch.version import __version__

        print(f"kvmlaunch {__version__}")
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
