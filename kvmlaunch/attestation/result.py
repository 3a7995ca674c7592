"""What checking a report found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Check", "Verdict"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its ``name``, what there is and what there must be."""

    name: str
    ok: bool
    got: str
    expected: str

    def __str__(self) -> str:
        if self.ok:
            return f"ok    {self.name}: {self.got}"
        return f"FAIL  {self.name}: got {self.got}, expected {self.expected}"


@dataclass(frozen=True)
class Verdict:
    """All checks in order, and what else to know."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    is_simulated: bool = False

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that didn't."""
        return tuple(check for check in self.checks if not check.ok)

    def as_json(self) -> dict[str, Any]:
        """Return it for `json`."""
        return {
            "schema": "kvmlaunch.report-verify/1",
            "ok": self.ok,
            "simulated": self.is_simulated,
            "checks": [vars(check) for check in self.checks],
            "notes": list(self.notes),
        }
