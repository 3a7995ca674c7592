"""One run of the command line, from its arguments to its exit code."""

from __future__ import annotations

import sys

from kvmlaunch.cli.talk import (
    FAILED,
    INTERRUPTED,
    SKIPPED,
    USAGE,
    Talk,
    drop,
    prepare_streams,
)
from kvmlaunch.errors import FormatError, IoctlError, KvmLaunchError, MissingCapability

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["output_lost", "parse_command", "run_command"]


def parse_command(argv: Sequence[str]) -> argparse.Namespace:
    """The command that ``argv`` names, and its options; with its module imported."""
    prepare_streams()
    if argv and argv[0] == "measure" and (args := _quickly(argv[1:])) is not None:
        return args
    from kvmlaunch.cli.parser import make_parser

    try:
        try:
            return make_parser(argv).parse_args(argv)
        finally:
            sys.stdout.flush()  # of --help
    except OSError as error:
        sys.exit(output_lost(error))


def _quickly(words: Sequence[str]) -> argparse.Namespace | None:
    """The options of ``measure``, unless they are for argparse to understand."""
    from kvmlaunch.cli.measure import add_options
    from kvmlaunch.cli.quick import QuickParser

    parser = QuickParser()
    parser.set_defaults(quiet=False)
    add_options(parser)
    args: argparse.Namespace | None = parser.parse(words)
    return args


def run_command(args: argparse.Namespace) -> int:
    """Run one command; returns its exit code."""
    talk = Talk(quiet=args.quiet, verbose=args.verbose)
    try:
        code = int(args.command(args, talk))
    except FormatError as error:
        talk.error(str(error))
        code = USAGE
    except KvmLaunchError as error:
        talk.error(str(error))
        asked = getattr(args, "platform", "auto") == "kvm"
        code = SKIPPED if asked and _host_lacks(error) else FAILED
    except KeyboardInterrupt:
        talk.error("interrupted")
        code = INTERRUPTED
    except OSError as error:
        code = output_lost(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        lost = output_lost(error)
        code = code or lost
    return code


def output_lost(error: OSError) -> int:
    """Say what can't be written, unless its reader has gone; returns the exit code."""
    # Files are named by those who open them; what is left is the output.
    if not isinstance(error, BrokenPipeError):
        talk = Talk(quiet=False, verbose=False)
        talk.error(f"{error.filename or 'standard output'}: {error.strerror or error}")
    if error.filename is None:
        drop(sys.stdout)
    return FAILED


def _host_lacks(error: KvmLaunchError) -> bool:
    if isinstance(error, IoctlError):
        return error.no_device
    return isinstance(error, MissingCapability)
