"""Process start to the end of a guest on plain KVM: kvmlaunch, C, and Python that does nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests import guests
from tests.benchmarks.native import compiled
from tests.benchmarks.timing import Figure, compare, timed
from tests.cli.command import PROGRAM

NEEDS_KVM = True

_HELLO = b"hello from a kvmlaunch guest\n"


def figures(work: Path, rounds: int) -> list[Figure]:
    """Both comparisons."""
    guest = guests.build(work) / "hello.elf"
    command = ["run", "--platform", "kvm", "--vm-type", "plain", str(guest)]
    ours = process([sys.executable, *PROGRAM, *command], _HELLO)
    in_c = process([str(compiled("launcher", work)), str(guest)], _HELLO)
    bare = process([sys.executable, "-c", "pass"], b"")
    return [
        compare("first exit: kvmlaunch run hello.elf", ours, "the same in C", in_c, rounds),
        compare("first exit: kvmlaunch run hello.elf", ours, "python -c pass", bare, rounds),
    ]


def process(command: list[str], expected: bytes) -> Callable[[], float]:
    """A call that runs a command, whose output must begin so."""

    def once() -> None:
        # Without a timeout, which would wait for the end in steps of half a millisecond and more.
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stdout.startswith(expected)

    once()  # the first start pays for the file cache
    return timed(once)
