"""Real reports and certificates that others publish: from clones of theirs, or fetched.

``KVMLAUNCH_REPORTS`` names a folder with git repositories ``OWNER/NAME``. With
``KVMLAUNCH_FETCH=1`` single files are downloaded to ``$XDG_CACHE_HOME/kvmlaunch`` or
``~/.cache/kvmlaunch``. Nothing of it is committed here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.host import require

_SECONDS = 30
# All of them Apache-2.0.
COMMITS = {
    "virtee/sev": "9cf2adbffa209cc5becf7ff89ffdf624e7278ced",
    "google/go-sev-guest": "af1c107a648f47253da23a9de7a7c82ec073cfdb",
    "confidential-containers/trustee": "78962cd416dcc8a32f9377e0066a28fe21420f69",
    "project-oak/oak": "578b95116bac0dec45b852788c98d1fe19c168bd",
}


class Public(NamedTuple):
    """One published file, by its content."""

    repository: str
    path: str
    sha256: str

    def read(self) -> bytes:
        """Its bytes; skips where they can't be had."""
        data = _read(self.repository, self.path)
        if isinstance(data, str):
            require("reports", data)
        assert hashlib.sha256(data).hexdigest() == self.sha256, self.path
        return data


@cache
def _read(repository: str, path: str) -> bytes | str:
    """The file, or why there is none."""
    commit = COMMITS[repository]
    if clones := os.environ.get("KVMLAUNCH_REPORTS"):
        done = subprocess.run(
            ["git", "-C", Path(clones, repository), "show", f"{commit}:{path}"],
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        return done.stdout if done.returncode == 0 else done.stderr.decode(errors="replace")
    cached = _cache() / hashlib.sha256(f"{repository} {commit} {path}".encode()).hexdigest()
    if cached.is_file():
        return cached.read_bytes()
    if os.environ.get("KVMLAUNCH_FETCH") != "1":
        return f"{path} of {repository} is not here: KVMLAUNCH_REPORTS or KVMLAUNCH_FETCH=1"
    url = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            data: bytes = answer.read()
    except (OSError, urllib.error.URLError) as error:
        return f"{url}: {error}"
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(data)
    return data


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kvmlaunch")
