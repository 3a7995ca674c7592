"""The command line's parser: argparse's, with the commands that are asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from kvmlaunch.cli.talk import help_width
from kvmlaunch.version import __version__

__all__ = ["make_parser"]

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


class _Parser(argparse.ArgumentParser):
    """argparse's, which is not silent where standard output takes no help.

    And without a bug of older Pythons: the value in ``--option=--`` is [] to them.
    """

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        if not action.option_strings or action.nargs is not None or arg_strings != ["--"]:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")
        self._check_value(action, value)
        return value


def make_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of ``argv``, with all commands or the one that it names.

    A command's module imports what it needs, so that others are better left alone.
    """
    parser = _Parser(
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
