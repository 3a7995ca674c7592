"""Where the kernel in the machine and the simulated host may differ, each with its reason.

Everything else is compared. A limit names the step and the field; nothing is left out
because it is inconvenient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.mainline.script import Script, Step

__all__ = ["COMMANDS", "LIMITS", "NOT_PLAYED", "Limit", "mask"]

_MXCSR_MASK = "region.7"


class Limit(NamedTuple):
    """``fields`` of ``back`` that aren't compared in steps that ``step`` picks, and why."""

    name: str
    reason: str
    step: Callable[[Step], bool]
    fields: tuple[str, ...]


LIMITS = (
    Limit(
        "MXCSR mask",
        "XSAVE tells the CPU's MXCSR_MASK, and the emulated CPU has no misaligned SSE",
        lambda step: step.get("request") in ("KVM_GET_XSAVE", "KVM_GET_XSAVE2"),
        (_MXCSR_MASK,),
    ),
)
"""Every limit."""


NOT_PLAYED = {
    "a CPUID page's features": "the fake refuses on order only, real firmware by a policy of its "
    "own",
    "XSAVE state of a vCPU after KVM_RUN": "the emulated XSAVE calls every component in use, where "
    "hardware leaves out initial ones, so that a run alone changes the state",
    "a failing SNP_DECOMMISSION in random scripts": "it loses an ASID for good, and the machine "
    "has 99 of them (a kept case does it once)",
    "CR4.PCIDE and EFER.FFXSR": "the emulated CPU lacks both",
    "guest code": "there is no CPU in the simulated host",
    "SEV and SEV-ES guests": "the simulated host initialises them, no more",
}
"""What neither cases nor strategies do, and why."""

COMMANDS = {
    "SNP_DF_FLUSH": "the machine's pool of ASIDs is worn by earlier scripts; a script is played on "
    "a simulated host of its own",
}
"""Firmware commands that aren't compared, and why."""


def mask(script: Script, outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome without what may differ."""
    steps = [_masked(step, done) for step, done in zip(script, outcome["steps"], strict=True)]
    log = [entry for entry in outcome.get("log", ()) if entry[0] not in COMMANDS]
    return {**outcome, "steps": steps, **({"log": log} if "log" in outcome else {})}


def _masked(step: Step, done: dict[str, Any]) -> dict[str, Any]:
    hidden = {field for limit in LIMITS if limit.step(step) for field in limit.fields}
    if not hidden or "back" not in done:
        return done
    return {**done, "back": {k: v for k, v in done["back"].items() if k not in hidden}}
