"""TAP: a pytest plugin that writes it, and the join of several runs into one stream.

    pytest -p tests.mainline.tap --tap FILE

writes a line per test, without numbers (``ok - NAME``, ``not ok - NAME``), the text of a
failure in ``#`` lines before it, and ``# end STATUS`` at last. ``Stream`` numbers the lines
of several such runs as they come.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from threading import Lock
from typing import TextIO

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tap", metavar="FILE", help="write TAP lines to this file or device")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--tap")
    if path:
        config.pluginmanager.register(_Writer(path), "tap-writer")


class _Writer:
    """Writes each test's line as soon as the test is over."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1, encoding="utf-8")  # noqa: SIM115

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Set-up tells of skips and broken fixtures, tear-down only of errors.
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.replace("#", "_")
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected"
            self._write(f"ok - {name} # SKIP {reason.removeprefix('Skipped: ')}")
        elif report.failed:
            self._comment(report.longreprtext)
            self._write(f"not ok - {name}")
        else:
            self._write(f"ok - {name}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._comment(report.longreprtext)
            self._write(f"not ok - {report.nodeid}")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._write(f"# end {int(exitstatus)}")

    def _comment(self, text: str) -> None:
        for line in text.splitlines():
            self._write(f"#   {line}")

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")


class Stream:
    """One TAP stream out of the lines of several runs, which may come from threads."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._say("TAP version 13")

    def take(self, lines: Iterable[str]) -> None:
        """Pass on the lines of one run, numbered. A run without an end is a failed test."""
        ended = False
        block: list[str] = []
        for line in lines:
            ended = ended or line.startswith("# end ")
            block.append(line)
            if not line.startswith("#"):
                self._test(block)
                block = []
        if not ended:
            self._test([*block, "not ok - the run came to its end"])

    def failed(self, name: str, why: str) -> None:
        """A test of our own that failed."""
        self._test([f"# {why}", f"not ok - {name}"])

    def note(self, text: str) -> None:
        """A line for people."""
        with self._lock:
            self._say(f"# {text}")

    def end(self) -> bool:
        """Write the plan and the totals; true if nothing failed and something passed."""
        counts = self._counts
        self._say(f"1..{counts.total()}")
        self._say(
            f"# Totals: pass:{counts['pass']} fail:{counts['fail']} xfail:0 xpass:0 "
            f"skip:{counts['skip']} error:0"
        )
        return bool(counts["pass"]) and not counts["fail"]

    def _test(self, block: list[str]) -> None:
        *comments, line = block
        kind = "fail" if line.startswith("not ok") else "skip" if " # SKIP " in line else "pass"
        with self._lock:
            self._counts[kind] += 1
            for comment in comments:
                self._say(comment)
            self._say(line.replace("ok - ", f"ok {self._counts.total()} - ", 1))

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)
