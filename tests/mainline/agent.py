"""The end inside the machine: requests in, answers out, one JSON object a line.

    python -m tests.mainline.agent PATH     PATH is a character device, read and written
    python -m tests.mainline.agent          stdin and stdout
    ... --sim                               plays on a simulated host, for tests of this end

| request | answer |
|---|---|
| {"ping": ...} | the same |
| {"play": script, "orders": [...]} | the outcome (tests.mainline.player) |
| {"plays": [{"play": ..., "orders": ...}, ...]} | {"outcomes": [...]} |

What goes wrong is {"error": text}.
"""

from __future__ import annotations

import io
import json
import sys
import tty
from collections.abc import Callable
from typing import Any

from tests.mainline.player import Player

__all__ = ["Agent", "main"]


class Agent:
    """Answers requests with one player."""

    def __init__(self, player: Player) -> None:
        self._player = player

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer; never an exception."""
        try:
            if "ping" in request:
                return {"ping": request["ping"]}
            if "plays" in request:
                return {"outcomes": [self.answer(one) for one in request["plays"]]}
            return self._player.play(request["play"], request.get("orders", ()))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def serve(self, lines: Any, out: Any) -> None:
        """Answer line by line until the other end is gone."""
        while line := lines.readline():
            out.write(json.dumps(self._answer_line(line)).encode() + b"\n")
            out.flush()

    def _answer_line(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except ValueError as error:
            return {"error": f"no JSON: {error}"}
        return self.answer(request) if isinstance(request, dict) else {"error": "no object"}


def _real_player() -> Player:
    from kvmlaunch.uapi import RealPlatform
    from tests.mainline.fake import FakeHost

    # The plain platform: scripts don't ask for the pages of one VM, and it is quicker.
    return Player(RealPlatform(), FakeHost())


def _simulated_player() -> Player:
    from kvmlaunch.sim import SimPlatform
    from tests.mainline.simulated import SimHost

    platform = SimPlatform("6.12", random=bytes)
    return Player(platform, SimHost(platform))


def main(args: list[str]) -> None:
    """Serve until the channel closes."""
    make: Callable[[], Player] = _simulated_player if "--sim" in args else _real_player
    paths = [arg for arg in args if not arg.startswith("--")]
    agent = Agent(make())
    if not paths:
        agent.serve(sys.stdin.buffer, sys.stdout.buffer)
        return
    # A virtio port can be open only once.
    with open(paths[0], "r+b", buffering=0) as channel:
        if channel.isatty():
            tty.setraw(channel)
        agent.serve(io.BufferedReader(channel), io.BufferedWriter(channel))


if __name__ == "__main__":
    main(sys.argv[1:])
