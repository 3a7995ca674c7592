"""One measured page: its prediction against its two bare hashes, its launch against both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from kvmlaunch import Guest, LaunchPlan, PlanOptions, SimPlatform, load_image, measure
from tests.benchmarks.timing import Figure, compare, timed

NEEDS_KVM = False

_PAGES = 1024
_PAGE = 4096
_PAGE_INFO = 0x70  # bytes (AMD 56860, PAGE_INFO)


def figures(work: Path, rounds: int) -> list[Figure]:
    """Prediction and simulated launch of a 4 MiB image, per page."""
    path = work / "pages.bin"
    path.write_bytes(bytes(n // _PAGE * 7 + n & 0xFF for n in range(_PAGES * _PAGE)))
    plan = load_image(path, PlanOptions(load_addr=0x100000))
    predict = timed(lambda: measure(plan), plan.npages + 1)
    return [
        compare(
            "measured page: prediction",
            predict,
            "its two SHA-384",
            timed(_two_hashes(path.read_bytes()), _PAGES),
            rounds,
        ),
        compare("measured page: launch on sim", _launch(plan), "its prediction", predict, rounds),
    ]


def _two_hashes(image: bytes) -> Callable[[], None]:
    info = bytes(_PAGE_INFO)
    view = memoryview(image)

    def call() -> None:
        for at in range(0, len(view), _PAGE):
            hashlib.sha384(view[at : at + _PAGE]).digest()
            hashlib.sha384(info).digest()

    return call


def _launch(plan: LaunchPlan) -> Callable[[], float]:
    """SNP_LAUNCH_UPDATE of every page, prediction of its record included."""

    def once() -> float:
        with Guest(plan, SimPlatform("6.12")) as guest:
            guest.start()
            return timed(lambda: sum(1 for _ in guest.update()), plan.npages)()

    return once
