"""What went wrong between the packages and the tests inside the machine."""

from __future__ import annotations

from pathlib import Path


class StepFailed(Exception):
    """A step that broke: its name, the log that it left, and why in a few words."""

    def __init__(self, step: str, log: Path, why: str) -> None:
        super().__init__(step, log, why)
        self.step = step
        self.log = log
        self.why = why

    def __str__(self) -> str:
        return f"{self.step} failed: {self.why} (the log is {self.log})"
