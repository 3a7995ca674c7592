"""Fixtures of the supervisor's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.supervisor import rig


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built clients."""
    rig.require_supervision()
    return rig.build(tmp_path_factory.mktemp("clients"))


@pytest.fixture
def client(clients: Path, tmp_path: Path) -> Callable[..., rig.Ran]:
    """Runs a client: ``client("faults", "structs")``."""

    def run(name: str, *arguments: object, **how: Any) -> rig.Ran:
        return rig.sim(clients / name, *arguments, cwd=tmp_path, **how)

    return run
