"""Runs the command line, in this process or in one of its own, and reads its log."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.cli import main

SECONDS = 30
PROGRAM = ("-c", "import sys; from kvmlaunch.cli import command; sys.exit(command())")
"""Python's arguments for what is installed, as pip since 25.2 writes it."""


@dataclass(frozen=True)
class Done:
    """What a command gave: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The sentences that name the program: one per failure."""
        return [line for line in self.err.splitlines() if line.startswith("kvmlaunch: ")]


class Cli:
    """``cli("measure", path)`` runs a command in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *args: object) -> Done:
        """Run a command; argparse's exits count as its exit code."""
        self._capture.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = self._capture.readouterr()
        assert "Traceback" not in err
        return Done(code, out, err)


def spawn(*args: object, **options: Any) -> Done:
    """Run a command as a process; ``options`` are those of subprocess.run."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    done = subprocess.run(command(*args), check=False, timeout=SECONDS, **options)
    out = (done.stdout or b"").decode(errors="replace")
    err = (done.stderr or b"").decode(errors="replace")
    assert "Traceback" not in err
    return Done(done.returncode, out, err)


def refused(done: Done) -> str:
    """The one sentence of a refusal; checks that there is nothing else."""
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("kvmlaunch: ")
    return done.err.removeprefix("kvmlaunch: ").rstrip("\n")


def command(*args: object) -> list[str]:
    """The argument vector of a command as a process."""
    return [sys.executable, *PROGRAM, *(str(arg) for arg in args)]


def events(path: Path) -> list[dict[str, Any]]:
    """The events of a log. Fails unless it consists of whole lines."""
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def page_events(path: Path) -> list[dict[str, Any]]:
    """Only the events that tell what was measured."""
    return [event for event in events(path) if event["event"] in ("page", "vmsa")]


def shown(cli: Cli, *args: object) -> dict[str, Any]:
    """What ``igvm show --json`` says."""
    done = cli("igvm", "show", "--json", *args)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["schema"] == "kvmlaunch.igvm/1"
    return found  # type: ignore[no-any-return]
