"""--explain: what 1000 launches cost, against predicting one, and with a larger image."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kvmlaunch import LaunchPlan, PlanOptions, explain_digest, load_image, measure
from tests.benchmarks.timing import Figure, compare, timed
from tests.images.builders import METADATA_FROM_END, ovmf

NEEDS_KVM = False

_TRIED = 50_000
_NO_DIGEST = bytes(48)


def figures(work: Path, rounds: int) -> list[Figure]:
    """Firmware of 4 MiB and of 16 KiB; a search takes a second, so that a few do."""
    large, small = (_plan(work, size) for size in (4 << 20, 16 << 10))
    few = -(-rounds // 4)
    tried = _searched(large)
    return [
        compare(
            *("--explain, 1000 launches of 4 MiB", tried, "predicting one"),
            *(timed(lambda: measure(large)), few, 5.0),
        ),
        compare(
            *("--explain, 1000 launches of 4 MiB", tried, "of 16 KiB", _searched(small), few, 2.0),
        ),
    ]


def _plan(work: Path, size: int) -> LaunchPlan:
    path = work / f"{size}.fd"
    tail = ovmf()[-METADATA_FROM_END:]
    path.write_bytes(os.urandom(size - len(tail)) + tail)
    return load_image(path, PlanOptions())


def _searched(plan: LaunchPlan) -> Callable[[], float]:
    def call() -> None:
        assert not explain_digest(plan, _NO_DIGEST, most=_TRIED)

    return timed(call, _TRIED // 1000)
