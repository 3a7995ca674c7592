"""Which QEMU is taken, and what is said where there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.clients import qemu
from tests.clients.qemu import Command
from tests.debian import Unavailable
from tests.stubs import stub

QEMU = "qemu-system-x86_64"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in PATH besides a shell's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("env", "mkdir", "cp", "sh"):
        (folder / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KVMLAUNCH_FETCH", "1")
    return folder


def installed(programs: Path, version: str) -> str:
    stub(programs, QEMU, f"echo 'QEMU emulator version {version} (Debian)'")
    return str(programs / QEMU)


def archive(programs: Path, tmp_path: Path, version: str) -> None:
    """An archive with that QEMU, which apt-get fetches and dpkg unpacks."""
    package = tmp_path / "package"
    stub(package, QEMU, f"echo 'QEMU emulator version {version} (Debian)'; echo \"$@\"")
    # -o Dir::Cache=FOLDER is where it goes.
    cache = "for word; do case $word in Dir::Cache=*) cache=${word#*=};; esac; done"
    fetch = (
        f'{cache}; case "$*" in *install*) cp "{package / QEMU}" "$cache/archives/qemu.deb";; esac'
    )
    stub(programs, "apt-get", fetch)
    stub(programs, "dpkg", f'mkdir -p "$3/usr/bin"; cp "$2" "$3/usr/bin/{QEMU}"')


@pytest.mark.timeout(300)
def test_qemu10_when_it_can_be_had_launches_snp_guests(qemu10: Command) -> None:
    done = subprocess.run(
        [*qemu10, "-object", "sev-snp-guest,help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert "\n  policy=<uint64>\n" in done.stdout


@pytest.mark.timeout(300)
def test_qemu10_when_it_can_be_had_finds_its_firmware(qemu10: Command) -> None:
    """A machine with BIOS and option ROMs is made, and nothing of it run."""
    devices = ("-nodefaults", "-device", "VGA", "-nic", "user")
    done = subprocess.run(
        [*qemu10, "-M", "q35,accel=tcg", *devices, "-display", "none", "-monitor", "stdio", "-S"],
        input="quit\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""


def test_qemu_when_installed_is_that_one(programs: Path) -> None:
    path = installed(programs, "7.2.22")
    assert qemu.qemu() == (path,)


def test_qemu10_when_a_newer_one_is_installed_is_that_one(programs: Path) -> None:
    path = installed(programs, "11.0.1")
    assert qemu.qemu10() == (path,)


def test_qemu10_when_the_installed_one_is_old_is_fetched(programs: Path, tmp_path: Path) -> None:
    installed(programs, "9.2.4")
    archive(programs, tmp_path, "10.0.2")
    command = qemu.qemu10()
    root = tmp_path / "cache/kvmlaunch/qemu-bookworm-backports"
    assert str(root / "usr/bin" / QEMU) in command
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[0] == "QEMU emulator version 10.0.2 (Debian)"
    assert done.stdout.splitlines()[1].startswith(f"-L {root}/usr/share/qemu ")


def test_qemu10_when_backports_have_an_old_one_says_so(programs: Path, tmp_path: Path) -> None:
    archive(programs, tmp_path, "9.2.4")
    with pytest.raises(Unavailable, match=r"bookworm-backports has QEMU 9, which"):
        qemu.qemu10()


def test_qemu10_when_nothing_may_be_fetched_says_so(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVMLAUNCH_FETCH")
    with pytest.raises(Unavailable, match=r"of bookworm-backports isn't installed and KVMLAUNCH_F"):
        qemu.qemu10()


def test_qemu10_when_the_archive_is_away_says_what_apt_said(programs: Path) -> None:
    stub(programs, "apt-get", "echo 'E: Failed to fetch it' >&2; exit 100")
    stub(programs, "dpkg", "exit 1")
    message = (
        "package qemu-system-x86 of bookworm-backports can't be fetched: E: Failed to fetch it"
    )
    with pytest.raises(Unavailable, match=f"^{message}$"):
        qemu.qemu10()


def test_qemu10_when_apt_finds_nothing_missing_says_so(programs: Path) -> None:
    """Its program was deleted, say."""
    stub(programs, "apt-get", "exit 0")
    stub(programs, "dpkg", "exit 1")
    with pytest.raises(Unavailable, match=r"can't be fetched: apt has nothing to fetch$"):
        qemu.qemu10()


def test_version_when_it_is_something_else_says_what_it_told(programs: Path) -> None:
    stub(programs, QEMU, "echo hello")
    with pytest.raises(Unavailable, match=r"QEMU doesn't tell its version: 'hello"):
        qemu.qemu10()
