"""What a command says: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import os
import sys
import time

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from typing import TextIO

__all__ = [
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "SKIPPED",
    "TIMEOUT",
    "USAGE",
    "Talk",
    "drop",
    "help_width",
    "prepare_streams",
]

DONE = 0
FAILED = 1
USAGE = 2
SKIPPED = 4
TIMEOUT = 124
INTERRUPTED = 130

_SECONDS_SHOWN = 0.1  # at least, of something that changes often


def prepare_streams() -> None:
    """Make both streams usable whatever the caller left of them.

    What a stream's encoding lacks is escaped. A closed descriptor 1 or 2 is filled, so
    that no file opened later ends up there: writing results to it still fails, as it
    should, and talk to it is lost.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def help_width() -> int:
    """Columns for help, as argparse has it from shutil, whose import takes longer than a parser.

    It asks for each argument that is added.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns) - 2
    try:
        return (os.get_terminal_size(1).columns or 80) - 2
    except OSError:
        return 80 - 2


class Talk:
    """The voice on stderr, as loud as the user wants it (``verbose``: as can be)."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self._quiet = quiet
        self.verbose = verbose
        self._shown = 0
        self._next = 0.0

    def error(self, text: str) -> None:
        """Say what went wrong."""
        _say(f"kvmlaunch: {text}")

    def say(self, text: str) -> None:
        """Say something, unless the user wants it quiet."""
        if not self._quiet:
            _say(text)

    def detail(self, text: str) -> None:
        """Say something only to those who asked for more."""
        if self.verbose:
            _say(text)

    def progress(self, text: str) -> None:
        """Show on a terminal how far something is, in place of what was shown; "" ends it."""
        now = time.monotonic()
        if self._quiet or (text and now < self._next) or not sys.stderr.isatty():
            return
        self._next = now + _SECONDS_SHOWN
        # Blanks take the old text away on every terminal.
        _say("\r" + text.ljust(self._shown) + ("" if text else "\r"), end="")
        self._shown = len(text)


def _say(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)  # nobody can hear it; the exit code still tells


def drop(stream: TextIO) -> None:
    """Let what is left in a stream's buffer go nowhere, since Python tries again at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
