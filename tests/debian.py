"""Files of Debian packages as test input: installed, named by a variable, or fetched.

With ``KVMLAUNCH_FETCH=1`` a package that is not installed is downloaded by apt-get and
unpacked (not installed) in ``$XDG_CACHE_HOME/kvmlaunch`` or ``~/.cache/kvmlaunch``.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from tests.host import require

_APT_SECONDS = 240
_DIGITS = re.compile(r"(\d+)")
_MADISON = ("apt-cache", "madison")
# The second is tar's, where there is room for a part of a block.
_FULL = re.compile(r"^.*(?:No space left on device|Wrote only \d+ of \d+ bytes).*$", re.MULTILINE)
_COMPILERS = re.compile(r"^.*(?: error: | undefined reference |cannot find ).*$", re.MULTILINE)


class Unavailable(Exception):
    """Why a package can't be had here, as a reason to skip."""


class DiskFull(Unavailable):
    """There is a package, but no room for it."""


def ovmf() -> Path:
    """Debian's OVMF.fd, which has SEV metadata; skips with a reason where there is none."""
    return _or_skip("ovmf", "usr/share/ovmf/OVMF.fd", "KVMLAUNCH_OVMF")


def ovmf_code_4m() -> Path:
    """Debian's OVMF_CODE_4M.fd, which has no SEV metadata; skips where there is none."""
    return _or_skip("ovmf", "usr/share/OVMF/OVMF_CODE_4M.fd", "KVMLAUNCH_OVMF_CODE_4M")


def debian_file(package_glob: str, path_in_package: str, variable: str) -> Path:
    """A file of a package: what ``variable`` names, else the installed one, else fetched.

    Raises Unavailable.
    """
    named = os.environ.get(variable)
    if named:
        if not Path(named).is_file():
            raise Unavailable(f"{variable}={named} is not a file")
        return Path(named)
    installed = Path("/", path_in_package)
    if installed.is_file():
        return installed
    path = unpacked(newest(package_glob)) / path_in_package
    if not path.is_file():
        raise Unavailable(f"package {package_glob} has no {path_in_package} any more")
    return path


def newest(glob: str) -> str:
    """The name of the newest package that fits. Raises Unavailable."""
    return known(glob)[-1]


def known(glob: str) -> list[str]:
    """Names of the packages that fit, oldest first: 6.12.9 comes before 6.12.10.

    Raises Unavailable without ``KVMLAUNCH_FETCH=1`` or apt, or if there is none.
    """
    check_fetching(glob)
    prefix = re.split(r"[*?\[]", glob)[0]
    listed = _run(glob, "apt-cache", "pkgnames", prefix).split()
    names = sorted((name for name in listed if fnmatchcase(name, glob)), key=_natural)
    if not names:
        raise Unavailable(f"apt knows no package {glob} (apt-get update?)")
    return names


def check_fetching(package: str) -> None:
    """Raises Unavailable without ``KVMLAUNCH_FETCH=1`` or apt."""
    if os.environ.get("KVMLAUNCH_FETCH") != "1":
        raise Unavailable(f"package {package} isn't installed and KVMLAUNCH_FETCH is not 1")
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Unavailable(f"package {package} isn't installed and this is no Debian")


def check_commands(packages: Mapping[str, str]) -> None:
    """Raises Unavailable, naming every command that is missing and the package to install."""
    missing = [command for command in packages if shutil.which(command) is None]
    if missing:
        names = " ".join(packages[command] for command in missing)
        raise Unavailable(f"there is no {', '.join(missing)} (apt install {names})")


def versions(package: str) -> list[str]:
    """The versions of a package that can be fetched, newest first. Raises Unavailable."""
    # linux-source-6.12 | 6.12.117-1~deb12u1 | http://… bookworm-security/main amd64 Packages
    return [line.split("|")[1].strip() for line in _run(package, *_MADISON, package).splitlines()]


@functools.cache
def unpacked(*packages: str) -> Path:
    """A folder with ``packages`` (``NAME`` or ``NAME=VERSION``), unpacked together.

    It is named after the first one's file. Raises Unavailable where they can't be had.
    """
    target = cache_dir() / _file_name(packages[0]).removesuffix(".deb")
    try:
        if not target.is_dir():
            _fetch(packages, target)
    except OSError as error:
        kind = DiskFull if error.errno == errno.ENOSPC else Unavailable
        raise kind(f"package {packages[0]} can't be unpacked: {error}") from None
    return target


def _file_name(package: str) -> str:
    # 'http://…/ovmf_2022.11-6_all.deb' ovmf_2022.11-6_all.deb 6158864 SHA256:…
    return _run(package, "apt-get", "download", "--print-uris", package).split()[1]


def _or_skip(package_glob: str, path_in_package: str, variable: str) -> Path:
    try:
        return debian_file(package_glob, path_in_package, variable)
    except Unavailable as error:
        require("ovmf", f"{error} (or set {variable})")


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key under which 6.12.9 comes before 6.12.10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in _DIGITS.split(name)]


def _fetch(packages: tuple[str, ...], target: Path) -> None:
    cache_dir().mkdir(parents=True, exist_ok=True)
    # Unpacked aside and renamed, so that a broken download leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as work:
        fresh = Path(work, "root")
        _run(packages[0], "apt-get", "download", *packages, cwd=work)
        for archive in sorted(Path(work).glob("*.deb")):
            _run(packages[0], "dpkg", "-x", str(archive), str(fresh))
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():  # else another test run was faster
                raise


def cache_dir() -> Path:
    """Where packages are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kvmlaunch")


def run(failure: str, *command: str, cwd: Path | str | None = None, seconds: int) -> str:
    """What a command prints. Raises Unavailable: ``failure``, and what the command said last."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            # Their messages are read below.
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds,
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip()
        if full := _FULL.search(said):
            raise DiskFull(f"{failure}, the disk is full: {full[0]}") from None
        # The last word of make is only that there was an error.
        errors = _COMPILERS.findall(said) or said.splitlines()[-1:]
        raise Unavailable(f"{failure}: {''.join(errors[:1])}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{failure}: no answer in {seconds} s") from None
    return done.stdout


def _run(package: str, *command: str, cwd: str | None = None) -> str:
    failure = f"package {package} can't be fetched"
    return run(failure, *command, cwd=cwd, seconds=_APT_SECONDS)
