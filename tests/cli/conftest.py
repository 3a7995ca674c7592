"""Fixtures of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import Cli
from tests.guests import HALT, SPIN
from tests.idblock import AUTHOR_PRIVATE, ID_PRIVATE, sec1
from tests.images import igvm_files as f


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


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """ID key and author key of tests/idblock.py, as files."""
    paths = tmp_path / "id.pem", tmp_path / "author.pem"
    for path, private in zip(paths, (ID_PRIVATE, AUTHOR_PRIVATE), strict=True):
        path.write_bytes(sec1(private))
    return paths


@pytest.fixture
def signed(cli: Cli, halt: Path, keys: tuple[Path, Path], tmp_path: Path) -> tuple[object, ...]:
    """Options that name an ID block of the image, with an author key."""
    cli(
        *("id-block", "create", "--id-key", keys[0], "--author-key", keys[1]),
        *("--out-dir", tmp_path, halt),
    )
    return ("--id-block", tmp_path / "id-block", "--id-auth", tmp_path / "id-auth")


@pytest.fixture
def halting(tmp_path: Path) -> Path:
    """An IGVM file of one page with HLT whose VMSA is measured before it, at a GPA of its own."""
    data = HALT.ljust(4096, b"\0") + f.vmsa()
    headers = (f.policy(0xB0000), f.context(0x5000, 0x1000), f.page(0x1000, 0))
    return f.write(tmp_path / "halt.igvm", *headers, data=data)
