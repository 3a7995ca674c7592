"""Pages in one process: our hashing against OpenSSL's in C and against sev-snp-measure's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from sevsnpmeasure.gctx import GCTX  # type: ignore[import-untyped]

from kvmlaunch.hashing import hasher
from tests.benchmarks.native import compiled
from tests.benchmarks.timing import Figure, compare, timed
from tests.debian import Unavailable, debian_file

NEEDS_KVM = False

_PAGE = 4096
_PASSES = 3  # of each turn; the fastest counts


def figures(work: Path, rounds: int) -> list[Figure]:
    """Random 4 MiB with one and two threads, and Debian's OVMF where it can be had."""
    path = work / "random"
    path.write_bytes(os.urandom(4 << 20))
    data = path.read_bytes()
    one, two = (_ours(data, threads) for threads in (1, 2))
    openssl = _openssl(compiled("evp_pages", work, "-lcrypto"), path, data)
    what = "random 4 MiB, {}, a page"
    found = [
        compare(what.format("1 thread"), one, "OpenSSL in C", openssl, rounds, 1 / 1.5),
        compare(what.format("2 threads"), two, "OpenSSL in C", openssl, rounds, 1 / 2.3),
        compare(what.format("1 thread"), one, "GCTX", _gctx(data), rounds, 1 / 2),
    ]
    firmware = debian_ovmf()
    if firmware is not None:
        image = firmware.read_bytes()
        ours, theirs = _ours(image, 1), _gctx(image)
        found.append(compare("OVMF.fd, 1 thread, a page", ours, "GCTX", theirs, rounds, 1 / 4))
    return found


def debian_ovmf() -> Path | None:
    """Debian's OVMF.fd, if it is there or may be fetched."""
    try:
        return debian_file("ovmf", "usr/share/ovmf/OVMF.fd", "KVMLAUNCH_OVMF")
    except Unavailable:
        return None


def _best(call: Callable[[], float]) -> Callable[[], float]:
    return lambda: min(call() for _ in range(_PASSES))


def _ours(data: bytes, threads: int) -> Callable[[], float]:
    best, pages = hasher(), len(data) // _PAGE
    return _best(timed(lambda: best.extend(bytes(48), 1, 0, data, pages, threads=threads), pages))


def _gctx(data: bytes) -> Callable[[], float]:
    def call() -> None:
        context = GCTX()
        context.update_normal_pages(0, data)
        assert context.ld() == expected

    pages = len(data) // _PAGE
    expected = hasher().extend(bytes(48), 1, 0, data, pages)
    return _best(timed(call, pages))


def _openssl(program: Path, path: Path, data: bytes) -> Callable[[], float]:
    expected = hasher().extend(bytes(48), 1, 0, data, len(data) // _PAGE).hex()

    def call() -> float:
        command = [str(program), str(path), str(_PASSES)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        seconds, digest = done.stdout.split()
        assert digest == expected
        return float(seconds)

    return call
