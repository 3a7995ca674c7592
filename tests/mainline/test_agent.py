"""The agent over a pipe, as it runs inside the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mainline.kept import CASES
from tests.mainline.script import finish, launch, update
from tests.mainline.simulated import play_simulated

_TREE = Path(__file__).parents[2]


class Piped:
    """An agent as a child process; ``ask`` as the machine has it."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.mainline.agent", "--sim"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_TREE,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def ask(self, request: Any) -> Any:
        return self.send(json.dumps(request).encode())

    def send(self, line: bytes) -> Any:
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.write(line + b"\n")
        self._child.stdin.flush()
        return json.loads(self._child.stdout.readline())

    def close(self) -> int:
        self._child.communicate(timeout=20)
        return self._child.returncode


@pytest.fixture(scope="module")
def agent() -> Iterator[Piped]:
    piped = Piped()
    yield piped
    assert piped.close() == 0


def test_ping_is_answered(agent):
    assert agent.ask({"ping": 7}) == {"ping": 7}


def test_script_is_played_as_here(agent):
    script = launch(update(0, 3), finish(), vcpus=2)
    assert agent.ask({"play": script}) == json.loads(json.dumps(play_simulated(script)))


def test_orders_count_for_their_script_only(agent):
    script = launch(update())
    orders = ["SNP_LAUNCH_UPDATE:fw=0x1a"]
    first, second = agent.ask({"play": script, "orders": orders}), agent.ask({"play": script})
    assert [out["steps"][-1]["fw"] for out in (first, second)] == [0x1A, 0]


def test_several_scripts_are_one_request_when_asked_so(agent):
    names = list(CASES)[::20]
    plays = [{"play": CASES[name].script, "orders": list(CASES[name].orders)} for name in names]
    outcomes = agent.ask({"plays": plays})["outcomes"]
    assert outcomes == [agent.ask(play) for play in plays]


@pytest.mark.parametrize(
    "request_",
    [{}, {"play": 7}, {"play": [7]}, {"play": None}, {"play": [], "orders": ["nonsense"]}],
)
def test_bad_request_is_answered_and_the_next_one_too(agent, request_):
    answer = agent.ask(request_)
    assert "error" in answer or "bad step" in answer["steps"][0]
    assert agent.ask({"ping": 1}) == {"ping": 1}


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff"])
def test_line_that_is_no_request_is_an_error(agent, line):
    assert "error" in agent.send(line)
