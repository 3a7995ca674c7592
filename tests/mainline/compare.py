"""Compares the outcomes of a script on the kernel and on the simulated host."""

from __future__ import annotations

import json
import pprint
from collections.abc import Sequence
from typing import Any

from tests.mainline.limits import mask
from tests.mainline.script import Script

__all__ = ["difference"]


def difference(
    script: Script, orders: Sequence[str], kernel: dict[str, Any], simulated: dict[str, Any]
) -> str | None:
    """What differs first, with the script as a literal; None where nothing does."""
    if "error" in kernel or "error" in simulated:
        found = f"played: {kernel.get('error', 'yes')}\nsimulated: {simulated.get('error', 'yes')}"
    else:
        found = _first(script, mask(script, kernel), mask(script, simulated))
    if not found:
        return None
    literal = pprint.pformat((script, tuple(orders)), width=100, sort_dicts=False)
    return f"{found}\n\nthe script, to be kept in kept/found.py:\n{literal}"


def _first(script: Script, kernel: dict[str, Any], simulated: dict[str, Any]) -> str:
    pairs = zip(script, kernel["steps"], simulated["steps"], strict=True)
    for number, (step, theirs, ours) in enumerate(pairs):
        if theirs != ours:
            return f"step {number}: {json.dumps(step)}\n" + _sides(theirs, ours)
    for key in ("memory", "guests", "vmsas", "log"):
        if key in kernel and key in simulated and kernel[key] != simulated[key]:
            if key == "guests" and kernel.get("vmsas") != simulated.get("vmsas"):
                continue  # the page says more than its hash
            theirs, ours = kernel[key], simulated[key]
            if key == "vmsas":
                theirs, ours = [_words(page) for page in theirs], [_words(page) for page in ours]
            return f"{key}:\n" + _sides(*_apart(theirs, ours))
    return ""


def _words(page: str) -> dict[str, str]:
    """The 8-byte words of a page that aren't zero, by offset."""
    data = bytes.fromhex(page)
    starts = range(0, len(data), 8)
    words = {at: int.from_bytes(data[at : at + 8], "little") for at in starts}
    return {f"{at:#05x}": f"{word:#x}" for at, word in words.items() if word}


def _apart(theirs: Any, ours: Any) -> tuple[Any, Any]:
    """Only what differs of two values of one kind."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
        return {k: theirs.get(k) for k in keys}, {k: ours.get(k) for k in keys}
    if isinstance(theirs, list) and isinstance(ours, list):
        for number, (left, right) in enumerate(zip(theirs, ours, strict=False)):
            if left != right:
                parts = _apart(left, right)
                return {number: parts[0]}, {number: parts[1]}
        shared = min(len(theirs), len(ours))
        return {"more": theirs[shared:]}, {"more": ours[shared:]}
    return theirs, ours


def _sides(theirs: Any, ours: Any) -> str:
    return f"  kernel:    {json.dumps(theirs)}\n  simulated: {json.dumps(ours)}"
