"""The machine that plays scripts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host import require
from tests.mainline.machine import PORT, Machine
from tests.mainline.prepare import prepare

_AGENT = (sys.executable, "-m", "tests.mainline.agent", PORT)
_SECONDS = 240


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """An emulated machine with the agent; KVMLAUNCH_MAINLINE names a folder for its log."""
    given = os.environ.get("KVMLAUNCH_MAINLINE")
    if not given:
        require("snp", "it needs an emulated machine: python -m tests.mainline")
    folder = Path(given)
    parts = prepare(folder).parts
    with Machine(parts, _AGENT, log=folder / "agent.log", seconds=_SECONDS) as booted:
        booted.ask({"ping": 1})
        yield booted
