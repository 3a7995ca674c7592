"""Start of the command: what it takes before anything is measured."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.benchmarks.first_exit import process
from tests.benchmarks.timing import Figure, compare

NEEDS_KVM = False


def figures(work: Path, rounds: int) -> list[Figure]:
    """Against a Python that does nothing, and one that doesn't even look for packages."""
    # As the installed command starts; an editable install would look for our files first.
    root = Path(__file__).resolve().parents[2]
    start = f"import sys; sys.path.insert(0, {str(root)!r}); from kvmlaunch.cli import main; "
    program = f"{start}sys.exit(main(['--version']))"
    ours = process([sys.executable, "-I", "-c", program], b"kvmlaunch ")
    bare = process([sys.executable, "-I", "-S", "-c", "pass"], b"")
    usual = process([sys.executable, "-c", "pass"], b"")
    return [
        compare("start: kvmlaunch --version", ours, "python -I -S -c pass", bare, rounds),
        compare("start: kvmlaunch --version", ours, "python -c pass", usual, rounds),
    ]
