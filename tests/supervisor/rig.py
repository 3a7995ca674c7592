"""Runs programs on the simulated host as users do, and builds those that are hostile to it."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.command import command

SOURCES = Path(__file__).resolve().parent / "clients"
CSRC = Path(__file__).resolve().parents[2] / "csrc"
SECONDS = 30


class Ran(NamedTuple):
    """What a supervised program gave."""

    code: int
    out: str = ""
    err: str = ""


WELL = Ran(0)
"""Each check of a client held, and nobody said a word."""


def words(program: object, *arguments: object, options: tuple[str, ...] = ()) -> list[str]:
    """The command line that runs ``program`` on the simulated host."""
    return command("-q", "sim", *options, "--", program, *arguments)


def sim(program: object, *arguments: object, options: tuple[str, ...] = (), **how: Any) -> Ran:
    """Run ``program`` on the simulated host to its end; ``how`` is that of `run`."""
    return run(words(program, *arguments, options=options), **how)


def run(line: list[str], *, seconds: float = SECONDS, **how: Any) -> Ran:
    """Run a command line to its end; ``how`` is subprocess.run's."""
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=seconds, **how)
    return Ran(done.returncode, done.stdout, done.stderr)


@functools.cache
def require_supervision() -> None:
    """Skip where the kernel doesn't let a program be supervised."""
    ran = sim("true")
    if "seccomp" in ran.err:
        pytest.skip(ran.err.strip())
    assert ran == WELL


def build(into: Path) -> Path:
    """Build every client, statically; skips where that can't be done."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to build clients with (apt install gcc)")
    common = SOURCES / "client.c"
    options = ("-std=gnu11", "-O1", "-static", "-pthread", "-Wall", f"-I{CSRC}")
    for source in sorted(SOURCES.glob("*.c")):
        if source != common:
            built = ("-o", into / source.stem, common, source)
            subprocess.run(["gcc", *options, *built], check=True, timeout=60)
    return into
