"""What is fetched or built once, and kept in the cache for later runs."""

from __future__ import annotations

import errno
import fcntl
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests import debian
from tests.debian import DiskFull, Unavailable


def made_once(name: str, make: Callable[[Path], Path]) -> Path:
    """The folder ``name`` in the cache, made where it isn't there yet.

    ``make`` gets an empty folder to work in, and returns what of it is to be kept. Other test
    runs wait meanwhile. Raises Unavailable.
    """
    home = debian.cache_dir()
    target = home / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with open(home / f".{name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                # Renamed when it is whole, so that a failure leaves nothing behind.
                with tempfile.TemporaryDirectory(dir=home, prefix=f".{name}-") as work:
                    make(Path(work)).rename(target)
    except OSError as error:
        kind = DiskFull if error.errno == errno.ENOSPC else Unavailable
        raise kind(f"{target} can't be made: {error}") from None
    return target
