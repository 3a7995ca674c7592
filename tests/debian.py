"""Files of Debian packages as test input: installed, named by a variable, or fetched.

With ``KVMLAUNCH_FETCH=1`` a package that is not installed is downloaded by apt-get and
unpacked (not installed) in ``$XDG_CACHE_HOME/kvmlaunch`` or ``~/.cache/kvmlaunch``.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from tests.host import require

_APT_SECONDS = 240
_DIGITS = re.compile(r"(\d+)")


class Unavailable(Exception):
    """Why a package can't be had here, as a reason to skip."""


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
    path = unpacked(package_glob) / path_in_package
    if not path.is_file():
        raise Unavailable(f"package {package_glob} has no {path_in_package} any more")
    return path


@functools.cache
def unpacked(package_glob: str) -> Path:
    """The unpacked newest package whose name fits, from the cache or fetched into it.

    Raises Unavailable without ``KVMLAUNCH_FETCH=1``, apt, or network.
    """
    if os.environ.get("KVMLAUNCH_FETCH") != "1":
        raise Unavailable(f"package {package_glob} isn't installed and KVMLAUNCH_FETCH is not 1")
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Unavailable(f"package {package_glob} isn't installed and this is no Debian")
    try:
        return _fetch(_newest_name(package_glob))
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        raise Unavailable(f"package {package_glob} can't be fetched: {' '.join(last)}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"package {package_glob} can't be fetched: {error}") from None


def _or_skip(package_glob: str, path_in_package: str, variable: str) -> Path:
    try:
        return debian_file(package_glob, path_in_package, variable)
    except Unavailable as error:
        require("ovmf", f"{error} (or set {variable})")


def _newest_name(glob: str) -> str:
    prefix = re.split(r"[*?\[]", glob)[0]
    names = [n for n in _run("apt-cache", "pkgnames", prefix).split() if fnmatchcase(n, glob)]
    if not names:
        raise Unavailable(f"apt knows no package {glob} (apt-get update?)")
    return max(names, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key under which 6.12.9 comes before 6.12.10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in _DIGITS.split(name)]


def _fetch(package: str) -> Path:
    # 'http://…/ovmf_2022.11-6_all.deb' ovmf_2022.11-6_all.deb 6158864 SHA256:…
    file_name = _run("apt-get", "download", "--print-uris", package).split()[1]
    target = cache_dir() / file_name.removesuffix(".deb")
    if target.is_dir():
        return target
    cache_dir().mkdir(parents=True, exist_ok=True)
    # Unpacked aside and renamed, so that a broken download leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as work:
        _run("apt-get", "download", package, cwd=work)
        (archive,) = Path(work).glob("*.deb")
        fresh = Path(work, "root")
        _run("dpkg", "-x", str(archive), str(fresh))
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():  # else another test run was faster
                raise
    return target


def cache_dir() -> Path:
    """Where packages are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kvmlaunch")


def _run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=True, timeout=_APT_SECONDS
    )
    return done.stdout
