"""Measured pages, hashed by whole ranges: the launch digest as fast as the machine allows.

`kvmlaunch.abi.digest` says what is hashed, and is the slow and simple form of the same. Here
the backends are, best first:

| backend  | hashes                                                                  |
|----------|-------------------------------------------------------------------------|
| avx512   | eight pages side by side, on several threads (csrc/hashing.c)           |
| avx2     | four pages side by side, on several threads                             |
| portable | page by page in C, on several threads                                   |
| hashlib  | page by page in Python; for installations without the compiled extension |

The environment variable ``KVMLAUNCH_HASH`` chooses one by name.
"""

from __future__ import annotations

import os

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.hashing.hasher import RECORD_SIZE, Hasher
from kvmlaunch.hashing.plain import PlainHasher

__all__ = ["RECORD_SIZE", "VARIABLE", "Hasher", "backends", "hasher"]

VARIABLE = "KVMLAUNCH_HASH"
"""Environment variable with the backend to use."""


_hashers: dict[str, Hasher] = {}  # by name, once somebody has asked


def _known() -> dict[str, Hasher]:
    if not _hashers:
        found: list[Hasher] = [PlainHasher()]
        try:
            from kvmlaunch.hashing.native import native_hashers
        except ImportError:  # the extension isn't there
            pass
        else:
            found = [*native_hashers(), *found]
        _hashers.update({hasher.name: hasher for hasher in found})
    return _hashers


def backends() -> tuple[str, ...]:
    """Names of what works on this machine, best first."""
    return tuple(_known())


def hasher(name: str | None = None) -> Hasher:
    """The hasher of that name; without one the environment's choice, else the best.

    Raises KvmLaunchError for a name that isn't among `backends`.
    """
    wanted = name or os.environ.get(VARIABLE) or backends()[0]
    found = _known().get(wanted)
    if found is None:
        raise KvmLaunchError(
            f"{VARIABLE}={wanted}: no such way of hashing here, there are {', '.join(backends())}"
        )
    return found
