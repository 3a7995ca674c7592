"""The page log of 65,536 pages: what it adds to a simulated launch and to a prediction.

Most of that is the SHA-256 of the image, which its header has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kvmlaunch import LaunchPlan, PlanOptions, SimPlatform, load_image, measure
from kvmlaunch.launch.measure import record_batches
from kvmlaunch.launch.pagelog import PageLog, open_log
from kvmlaunch.launch.session import Session
from tests.benchmarks.timing import Figure, compare, timed

NEEDS_KVM = False

_PAGES = 65536


def figures(work: Path, rounds: int) -> list[Figure]:
    """A launch takes seconds, so that a few pairs do."""
    path, log = work / "pages.bin", str(work / "log")
    noise = os.urandom(4096)
    with path.open("wb") as file:
        for page in range(_PAGES):
            file.write(page.to_bytes(8, "little") + noise[8:])
    plan = load_image(path, PlanOptions(load_addr=0x100000, memory=512 << 20))
    few = -(-rounds // 7)
    launch = compare(
        *("launch on sim with a page log, a page", _launched(plan, log), "without"),
        *(_launched(plan, None), few, 1.15),
    )
    predicted = timed(lambda: measure(plan), _PAGES)
    return [
        launch,
        compare(
            "prediction with a page log, a page", _logged(plan, log), "without", predicted, few
        ),
    ]


def _launched(plan: LaunchPlan, path: str | None) -> Callable[[], float]:
    def call() -> None:
        with open_log(path) as log, Session(plan, SimPlatform(), log=log) as session:
            assert session.launch().agrees

    return timed(call, _PAGES)


def _logged(plan: LaunchPlan, path: str) -> Callable[[], float]:
    def call() -> None:
        with PageLog(path) as log:
            log.header(plan, platform="prediction", profile="", vmsa_mode=str(plan.vmsa_mode))
            for batch in record_batches(plan):
                log.records(batch)

    return timed(call, _PAGES)
