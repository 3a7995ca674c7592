"""Fixtures of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import Cli
from tests.guests import HALT, SPIN


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process."""
    return Cli(capfd)


@pytest.fixture
def halt(tmp_path: Path) -> Path:
    """A flat image of one HLT."""
    path = tmp_path / "halt.bin"
    path.write_bytes(HALT)
    return path


@pytest.fixture
def spin(tmp_path: Path) -> Path:
    """A flat image that never ends."""
    path = tmp_path / "spin.bin"
    path.write_bytes(SPIN)
    return path
