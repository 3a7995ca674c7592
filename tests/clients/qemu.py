"""QEMU: the installed one, and the first that launches SNP guests.

What isn't installed is fetched from Debian's archive together with the libraries that the
machine lacks, by an apt with sources of its own; nothing is installed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests import debian
from tests.clients.kept import made_once
from tests.debian import Unavailable

_PROGRAM = "qemu-system-x86_64"
_PACKAGE = "qemu-system-x86"
_ARCHIVE = "http://deb.debian.org/debian"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_RELEASE, _BACKPORTS = "bookworm", "bookworm-backports"
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
_MODULES = "usr/lib/x86_64-linux-gnu/qemu"
_FIRMWARE = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
_SNP_VERSION = 10
_SECONDS = 240
_VERSION = re.compile(r"^QEMU emulator version (\d+)\.")

Command = tuple[str, ...]
"""How a program is started; its own arguments follow."""


def qemu() -> Command:
    """The installed QEMU, else Debian 12's. Raises Unavailable."""
    return _installed() or _fetched(_RELEASE)


def qemu10() -> Command:
    """A QEMU 10 or newer, which has ``-object sev-snp-guest``. Raises Unavailable.

    Without ``-nodefaults`` it complains about modules of an older QEMU that is installed, too.
    """
    command = _installed()
    if command is None or version(command) < _SNP_VERSION:
        command = _fetched(_BACKPORTS)
    if (found := version(command)) < _SNP_VERSION:
        raise Unavailable(f"{_BACKPORTS} has QEMU {found}, which doesn't launch SNP guests")
    return command


def version(command: Command) -> int:
    """The first number of a QEMU's version. Raises Unavailable for one that doesn't start."""
    said = debian.run("QEMU doesn't start", *command, "--version", seconds=_SECONDS)
    found = _VERSION.match(said)
    if found is None:
        raise Unavailable(f"QEMU doesn't tell its version: {said[:80]!r}")
    return int(found[1])


def _installed() -> Command | None:
    path = shutil.which(_PROGRAM)
    return None if path is None else (path,)


def _fetched(suite: str) -> Command:
    debian.check_fetching(f"{_PACKAGE} of {suite}")
    root = made_once(f"qemu-{suite}", lambda work: _fetch(suite, work))
    libraries = ":".join(str(root / path) for path in _LIBRARIES)
    firmware = [word for path in _FIRMWARE for word in ("-L", str(root / path))]
    variables = (f"LD_LIBRARY_PATH={libraries}", f"QEMU_MODULE_DIR={root / _MODULES}")
    return ("env", *variables, str(root / "usr/bin" / _PROGRAM), *firmware)


def _fetch(suite: str, work: Path) -> Path:
    apt = ("apt-get", *_private(work))
    failure = f"package {_PACKAGE} of {suite} can't be fetched"
    debian.run(failure, *apt, "update", seconds=_SECONDS)
    # Only what the machine lacks, or has too old.
    what = ("--download-only", "--yes", "--no-install-recommends", f"{_PACKAGE}/{suite}")
    debian.run(failure, *apt, "install", *what, seconds=_SECONDS)
    root = work / "root"
    for archive in sorted((work / "cache/archives").glob("*.deb")):
        debian.run(failure, "dpkg", "-x", str(archive), str(root), seconds=_SECONDS)
    if not (root / "usr/bin" / _PROGRAM).is_file():
        raise Unavailable(f"{failure}: apt has nothing to fetch")
    return root


def _private(work: Path) -> list[str]:
    """Options of an apt that changes nothing outside ``work``, and knows what is installed."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    sources = work / "sources.list"
    lines = [f"deb [signed-by={_KEYRING}] {_ARCHIVE} {s} main\n" for s in (_RELEASE, _BACKPORTS)]
    sources.write_text("".join(lines), encoding="utf-8")
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Default-Release": "",
        # apt's own user can't enter a temporary folder; dpkg's locks aren't needed to download.
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
