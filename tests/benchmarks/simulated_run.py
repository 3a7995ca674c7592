"""SNP guests on the simulated host: a GHCB exit, and hello from process start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import run_guest
from kvmlaunch.sim import SimPlatform
from tests import guests
from tests.benchmarks.first_exit import process
from tests.benchmarks.softcpu import bare_hook
from tests.benchmarks.timing import Figure, compare
from tests.cli.command import PROGRAM

NEEDS_KVM = False

_EXITS = 2000  # ghcb_exits.c
_SOURCE = Path(__file__).with_name("ghcb_exits.c")
_BUILD = guests.EXAMPLES / "guests" / "build.sh"


def figures(work: Path, rounds: int) -> list[Figure]:
    """Both; the baselines are a bare engine's hook and a Python that does nothing."""
    hello = guests.build(work) / "hello.elf"
    command = [sys.executable, *PROGRAM, "-q", "run", "--platform", "sim", str(hello)]
    ours = process(command, b"hello from a kvmlaunch guest\nSEV-SNP guest, ")
    bare = process([sys.executable, "-c", "pass"], b"")
    exits = _exits(_built(work))
    return [
        compare("a GHCB exit (CPUID by #VC)", exits, "a plain engine hook", bare_hook(), rounds),
        compare("simulated: kvmlaunch run hello.elf", ours, "python -c pass", bare, rounds),
    ]


def _built(work: Path) -> Path:
    source = work / _SOURCE.name
    source.write_bytes(_SOURCE.read_bytes())
    subprocess.run(["sh", _BUILD, source], check=True, stdout=subprocess.DEVNULL, timeout=60)
    return source.with_suffix(".elf")


def _exits(image: Path) -> Callable[[], float]:
    """Seconds of one exit, the guest's few others counted in."""
    plan = load_image(image, PlanOptions(memory=16 << 20))

    def run() -> float:
        with SimPlatform() as platform, Guest(plan, platform) as guest:
            guest.launch()
            begin = time.perf_counter()
            outcome = run_guest(guest, console=lambda text: None, timeout=60)
            took = time.perf_counter() - begin
        assert outcome.ok, str(outcome)
        return took / _EXITS

    return run
