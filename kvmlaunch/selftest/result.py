"""How a case ended, and whom it is told to."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from kvmlaunch.selftest.case import Spec
from kvmlaunch.selftest.host import Host

__all__ = ["Report", "Result", "Verdict"]


class Verdict(enum.Enum):
    """How a case ended. ERROR: it broke, or ended without having checked anything."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"


@dataclass(frozen=True)
class Result:
    """One case's end: ``verdict``, ``reason`` (a sentence unless it passed), ``notes``, and how
    many ``checks`` were made.
    """

    spec: Spec
    verdict: Verdict
    reason: str
    notes: tuple[str, ...]
    checks: int


class Report(Protocol):
    """What a run is told to."""

    def begin(self, host: Host, cases: int) -> None:
        """Once, before the first case."""

    def skip_all(self, reason: str) -> None:
        """Instead of all that: the host can't run a single case."""

    def result(self, result: Result) -> None:
        """After each case."""

    def end(self, verdicts: Counter[Verdict]) -> None:
        """Once, after the last case."""
