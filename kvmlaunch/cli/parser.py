"""One run of the command line, from its arguments to its exit code."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence
from functools import partial

from kvmlaunch.cli.talk import (
    FAILED,
    INTERRUPTED,
    SKIPPED,
    USAGE,
    Talk,
    drop,
    help_width,
    prepare_streams,
)
from kvmlaunch.errors import FormatError, IoctlError, KvmLaunchError, MissingCapability
from kvmlaunch.version import __version__

__all__ = ["parse_command", "run_command"]

_COMMANDS = (
    *("run", "measure", "inspect", "verify", "bisect"),
    *("igvm", "id-block", "report", "selftest", "sim"),
)

_EPILOG = """\
exit codes:
  0    done (run: the guest ended well, or was launched on a host without a CPU)
  1    failed
  2    usage, or bad input
  4    skipped: the host that was asked for lacks something
  124  timeout
  130  interrupted
"""


def parse_command(argv: Sequence[str]) -> argparse.Namespace:
    """The command that ``argv`` names, and its options; with its module imported."""
    prepare_streams()
    return _parser(argv).parse_args(argv)


def run_command(args: argparse.Namespace) -> int:
    """Run one command; returns its exit code."""
    talk = Talk(quiet=args.quiet, verbose=args.verbose)
    try:
        code = int(args.command(args, talk))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        drop(sys.stdout)  # its reader has gone: nothing more can be said to it
        return FAILED
    except FormatError as error:
        talk.error(str(error))
        return USAGE
    except KvmLaunchError as error:
        talk.error(str(error))
        asked = getattr(args, "platform", "auto") == "kvm"
        return SKIPPED if asked and _host_lacks(error) else FAILED
    except KeyboardInterrupt:
        talk.error("interrupted")
        return INTERRUPTED
    except OSError as error:
        # Files are named by those who open them; what is left is the output.
        talk.error(f"{error.filename or 'standard output'}: {error.strerror or error}")
        if error.filename is None:
            drop(sys.stdout)
        return FAILED


def _host_lacks(error: KvmLaunchError) -> bool:
    """True if the host has no such device or capability (not: if it may not be used)."""
    if isinstance(error, IoctlError):
        missing = (errno.ENOENT, errno.ENXIO, errno.ENODEV)
        return error.ioctl.startswith("open ") and error.errno in missing
    return isinstance(error, MissingCapability)


def _parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of ``argv``, with all commands or the one that it names.

    A command's module imports what it needs, so that others are better left alone.
    """
    parser = argparse.ArgumentParser(
        prog="kvmlaunch",
        description="Launch, measure, debug and test AMD SEV-SNP guests on Linux/KVM.",
        epilog=_EPILOG,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=help_width()),
    )
    parser.add_argument("--version", action="version", version=f"kvmlaunch {__version__}")
    parser.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more (on stderr)")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    first = next((word for word in argv if not word.startswith("-")), "")
    for name in (first,) if first in _COMMANDS else _COMMANDS:
        importlib.import_module(f"kvmlaunch.cli.{name.replace('-', '_')}").add_parser(commands)
    return parser
