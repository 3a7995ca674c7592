"""Start of the command: what it takes before anything is measured."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.first_exit import process
from tests.benchmarks.installed import installed_python
from tests.benchmarks.timing import Figure, compare
from tests.cli.command import PROGRAM

NEEDS_KVM = False


def figures(work: Path, rounds: int) -> list[Figure]:
    """Against a Python that does nothing, and one that doesn't even look for packages."""
    python = installed_python(work)
    ours = process([python, "-I", *PROGRAM, "--version"], b"kvmlaunch ")
    bare = process([python, "-I", "-S", "-c", "pass"], b"")
    usual = process([python, "-c", "pass"], b"")
    return [
        compare("start: kvmlaunch --version", ours, "python -I -S -c pass", bare, rounds, 3.0),
        compare("start: kvmlaunch --version", ours, "python -c pass", usual, rounds),
    ]
