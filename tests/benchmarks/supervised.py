"""What a program pays for running on the simulated host: one ioctl, and a launch.

A supervised ioctl is held against one of this machine's own /dev/kvm, in the same C program;
a launch of our own launcher, supervised, against the same launch in process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.native import compiled
from tests.benchmarks.timing import Figure, compare

NEEDS_KVM = True

_CALLS = 20_000
_PAGES = 65536
_SECONDS = 240

# What it prints is the time of the launch alone: START to FINISH.
_LAUNCH = """
import sys, time
from kvmlaunch import PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.platforms import open_platform

plan = load_image(sys.argv[1], PlanOptions(load_addr=0x100000, memory=512 << 20))
with Guest(plan, open_platform(sys.argv[2]).platform) as guest:
    begin = time.perf_counter()
    guest.start()
    for record in guest.update():
        pass
    guest.finish()
    print((time.perf_counter() - begin) / int(sys.argv[3]))
"""


def figures(work: Path, rounds: int) -> list[Figure]:
    """A launch takes seconds, so that a few pairs do."""
    program = [str(compiled("ioctls", work)), str(_CALLS)]
    image = work / "pages.bin"
    noise = os.urandom(4096)
    with image.open("wb") as file:
        for page in range(_PAGES):
            file.write(page.to_bytes(8, "little") + noise[8:])
    launch = [sys.executable, "-c", _LAUNCH, str(image)]
    few = -(-rounds // 7)
    return [
        compare(
            *("one ioctl: supervised, in C", _printed(_supervised(program)), "this kernel's"),
            *(_printed(program), few),
        ),
        compare(
            "launch of 65,536 pages: supervised, a page",
            _printed(_supervised([*launch, "kvm", str(_PAGES)])),
            "in process",
            _printed([*launch, "sim", str(_PAGES)]),
            few,
        ),
    ]


def _supervised(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "kvmlaunch.cli", "-q", "sim", "--", *command]


def _printed(command: list[str]) -> Callable[[], float]:
    def call() -> float:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    return call
