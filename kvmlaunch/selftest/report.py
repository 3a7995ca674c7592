"""How results are written: KTAP, or JSON Lines (schema kvmlaunch.selftest/1).

KTAP as the kernel's selftests write it (Documentation/dev-tools/ktap.rst, kselftest.h). Under
KSFT_TAP_LEVEL, as there, the version line is left to the harness, which indents or prefixes
our lines as it nests them. Each line is flushed, so that it is there even through a pipe.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from kvmlaunch.selftest.case import Spec
from kvmlaunch.selftest.host import Host
from kvmlaunch.selftest.result import Result, Verdict
from kvmlaunch.version import __version__

__all__ = ["SCHEMA", "Json", "Ktap", "list_cases"]

SCHEMA = "kvmlaunch.selftest/1"


class Ktap:
    """Writes KTAP."""

    def __init__(self, out: TextIO, environment: Mapping[str, str] = os.environ) -> None:
        self._out = out
        self._nested = "KSFT_TAP_LEVEL" in environment
        self._number = 0

    def begin(self, host: Host, cases: int) -> None:
        """Version line, plan, and what is under test."""
        self._version()
        self._say(f"1..{cases}")
        self._say(f"# kvmlaunch {__version__}")
        self._say(f"# platform: {_named(host)}")

    def skip_all(self, reason: str) -> None:
        """A run without a case."""
        self._version()
        self._say(f"1..0 # SKIP {_one_line(reason)}")

    def result(self, result: Result) -> None:
        """Notes, then the result line."""
        self._number += 1
        for note in result.notes:
            self._say(f"# {_one_line(note)}")
        verdict, reason = result.verdict, _one_line(result.reason)
        line = f"{self._number} {result.spec.name}"
        if verdict is Verdict.PASS:
            self._say(f"ok {line}")
        elif verdict is Verdict.SKIP:
            self._say(f"ok {line} # SKIP {reason}")
        else:
            self._say(f"# {reason}")
            self._say(f"not ok {line}" + (" # ERROR" if verdict is Verdict.ERROR else ""))

    def end(self, verdicts: Counter[Verdict]) -> None:
        """The totals."""
        counts = {verdict: verdicts[verdict] for verdict in Verdict}
        self._say(
            f"# Totals: pass:{counts[Verdict.PASS]} fail:{counts[Verdict.FAIL]} xfail:0 xpass:0 "
            f"skip:{counts[Verdict.SKIP]} error:{counts[Verdict.ERROR]}"
        )

    def _version(self) -> None:
        if not self._nested:
            self._say("TAP version 13")

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)


class Json:
    """Writes JSON Lines: a ``header``, a ``case`` each, ``totals``."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._number = 0

    def begin(self, host: Host, cases: int) -> None:
        """What is under test."""
        self._say(
            {
                "event": "header",
                "schema": SCHEMA,
                "version": __version__,
                "platform": host.platform.name,
                "profile": host.platform.profile,
                "cases": cases,
            }
        )

    def skip_all(self, reason: str) -> None:
        """A run without a case."""
        self._say({"event": "skipped", "schema": SCHEMA, "reason": reason})

    def result(self, result: Result) -> None:
        """One case."""
        self._number += 1
        self._say(
            {
                "event": "case",
                "number": self._number,
                "name": result.spec.name,
                "about": result.spec.about,
                "result": result.verdict.value,
                "reason": result.reason,
                "checks": result.checks,
                "notes": list(result.notes),
            }
        )

    def end(self, verdicts: Counter[Verdict]) -> None:
        """The totals."""
        counts = {verdict.value: verdicts[verdict] for verdict in Verdict}
        self._say({"event": "totals", **counts})

    def _say(self, event: Mapping[str, Any]) -> None:
        print(json.dumps(event, ensure_ascii=False), file=self._out, flush=True)


def list_cases(specs: Iterable[Spec], *, as_json: bool) -> Iterable[str]:
    """A line per case: its name and what it checks."""
    for spec in specs:
        if as_json:
            yield json.dumps({"name": spec.name, "about": spec.about}, ensure_ascii=False)
        else:
            yield f"{spec.name:32} {spec.about}"


def _named(host: Host) -> str:
    platform = host.platform
    return f"{platform.name} ({platform.profile})" if platform.profile else platform.name


def _one_line(text: str) -> str:
    return " ".join(text.split())
