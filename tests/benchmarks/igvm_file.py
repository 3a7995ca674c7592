"""An IGVM file of 256 MiB: loaded and measured, and shown, against hashing its pages alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kvmlaunch import PlanOptions, load_image, measure
from kvmlaunch.hashing import hasher
from kvmlaunch.images import open_image
from kvmlaunch.images.igvm.parse import parse
from kvmlaunch.images.source import forget
from kvmlaunch.launch.igvm_orders import order_digests
from tests.benchmarks.timing import Figure, compare, timed
from tests.images.igvm_files import write_large

NEEDS_KVM = False

_PAGES = 65536
_PAGE = 4096
_CHUNK = 2048
_OPTIONS = PlanOptions(memory=512 << 20)
_GPA = 256 * _PAGE  # of the file's first page


def figures(work: Path, rounds: int) -> list[Figure]:
    """No more than twice what the bare hashing takes."""
    path = work / "large.igvm"
    write_large(path, _PAGES)
    rounds = min(rounds, 5)
    raw = timed(_raw(path), _PAGES)
    measured = timed(lambda: measure(load_image(path, _OPTIONS)), _PAGES)
    shown = timed(lambda: order_digests(parse(open_image(path)), _OPTIONS), _PAGES)
    what, against = "IGVM file of 256 MiB, {}, a page", "hashing its pages"
    return [
        compare(what.format("measured"), measured, against, raw, rounds, 2),
        compare(what.format("in all orders"), shown, against, raw, rounds, 2),
    ]


def _raw(path: Path) -> Callable[[], None]:
    """Hash the file's pages in one go after the other, as they lie."""
    start = os.path.getsize(path) - _PAGES * _PAGE

    def call() -> None:
        data, digest, best = open_image(path).data[start:], bytes(48), hasher()
        for first in range(0, _PAGES, _CHUNK):
            pages = data[first * _PAGE : (first + _CHUNK) * _PAGE]
            digest = best.extend(digest, 1, _GPA + first * _PAGE, pages, _CHUNK)
            forget(pages)

    return call
