"""``python -m tests.mainline`` on machines that lack something: one sentence, exit 4 or 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mainline import prepare
from tests.stubs import stub

REPOSITORY = Path(__file__).resolve().parents[2]
OLD = "linux-headers-6.12.9+deb12-amd64\nlinux-image-6.12.9+deb12-amd64\n"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with every tool that is looked for, and an apt that has no network."""
    folder = tmp_path / "bin"
    for tool in prepare._TOOLS:
        stub(folder, tool, "exit 1")
    stub(folder, "apt-cache", f"printf '{OLD}'")
    stub(folder, "apt-get", "echo 'E: Failed to fetch' >&2; exit 100")
    stub(folder, "dpkg", "exit 1")
    return folder


def run(path: Path, tmp_path: Path, *args: str, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "tests.mainline", *args],
        cwd=REPOSITORY,
        env={"PATH": str(path), "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_command_when_tools_are_missing_skips_and_names_them(tools: Path, tmp_path: Path) -> None:
    (tools / "qemu-system-x86_64").unlink()
    (tools / "busybox").unlink()
    done = run(tools, tmp_path)
    assert (done.returncode, done.stderr) == (4, "")
    assert done.stdout.splitlines() == [
        "TAP version 13",
        "1..0 # SKIP there is no qemu-system-x86_64, busybox "
        "(apt install qemu-system-x86 busybox-static)",
    ]


def test_command_when_skipping_counts_as_success_says_the_same(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path, "--skip-is-success")
    assert done.returncode == 0
    assert "1..0 # SKIP there is no qemu-system-x86_64" in done.stdout


def test_command_when_snp_is_required_fails(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path, "--skip-is-success", KVMLAUNCH_REQUIRE="kvm,snp")
    assert done.returncode == 1
    assert "\nBail out! KVMLAUNCH_REQUIRE names snp, but there is no qemu" in done.stdout


def test_command_when_there_is_no_network_skips(tools: Path, tmp_path: Path) -> None:
    done = run(tools, tmp_path)
    assert (done.returncode, done.stderr) == (4, "")
    assert done.stdout.splitlines()[-1] == (
        "1..0 # SKIP package linux-image-6.12.9+deb12-amd64 can't be fetched: E: Failed to fetch"
    )


def test_command_when_the_disk_is_full_fails(tools: Path, tmp_path: Path) -> None:
    stub(tools, "apt-get", "echo 'E: write error: No space left on device' >&2; exit 100")
    done = run(tools, tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("Bail out! package linux-image-6.12.9+deb12")
    assert done.stdout.splitlines()[-1].endswith("No space left on device")


def test_command_when_it_skips_leaves_nothing_behind(tools: Path, tmp_path: Path) -> None:
    run(tools, tmp_path)
    left = [path.name for path in (tmp_path / "cache/kvmlaunch").rglob("*")]
    assert left == ["mainline"]
