"""Runs whose exits come from a script."""

from __future__ import annotations

from typing import Any

from kvmlaunch.kvm.exits import Exit
from kvmlaunch.launch.run import Outcome, run_guest

from .rig import (
    Script,
    Scripted,
    playing,
)

TIMEOUT = 20.0
CONSOLE, EXIT = 0x3F8, 0xF4


class Result:
    """Outcome, console and exits of one run."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.exits: list[tuple[int, Exit]] = []
        self.outcome = Outcome("none", False, "")


def play(*scripts: Scripted, **options: Any) -> Result:
    result = Result()
    with playing(*scripts, **options) as (guest, _):
        result.outcome = run_guest(
            guest,
            console=result.text.extend,
            on_exit=lambda vcpu, exit_: result.exits.append((vcpu, exit_)),
            timeout=TIMEOUT,
        )
    return result


def one(make: Any) -> Scripted:
    """A script of one exit."""

    def script(run: Any) -> Script:
        yield make(run)

    return script


def outcome_of(make: Any, **options: Any) -> Outcome:
    return play(one(make), **options).outcome
