"""The command `kvmlaunch measure` from start to end, against sev-snp-measure's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sevsnpmeasure.guest import calc_launch_digest  # type: ignore[import-untyped]
from sevsnpmeasure.sev_mode import SevMode  # type: ignore[import-untyped]
from sevsnpmeasure.vcpu_types import CPU_SIGS  # type: ignore[import-untyped]

from kvmlaunch import load_image, measure
from tests.benchmarks.first_exit import process
from tests.benchmarks.installed import installed_python
from tests.benchmarks.page_hashing import debian_ovmf
from tests.benchmarks.timing import MIB, Figure, compare, timed
from tests.cli.command import PROGRAM
from tests.images.builders import METADATA_FROM_END, metadata_bytes, ovmf

NEEDS_KVM = False

_THEIRS = "import sys; from sevsnpmeasure.cli import main; sys.exit(main())"
_SIZE = 256 << 20
_MOST = 40 << 20
_PEAK = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
    "stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def figures(work: Path, rounds: int) -> list[Figure]:
    """Debian's OVMF and 256 MiB, times and peak memory."""
    found = []
    python = installed_python(work)
    firmware = debian_ovmf()
    if firmware is not None:
        ours, theirs = _pair(python, ["--ovmf", str(firmware)], firmware)
        what = "kvmlaunch measure OVMF.fd"
        found.append(compare(what, ours, "sev-snp-measure", theirs, rounds, 1 / 2.5))
        bare = process([python, "-I", "-c", "pass"], b"")
        found.append(compare(what, ours, "python -c pass", bare, rounds))
        ours, theirs = _started(firmware)
        what = "the same, once started"
        found.append(compare(what, ours, "calc_launch_digest", theirs, rounds, 1 / 2.5))
    image = _large(work)
    options = ["--image-type", "flat", "--load-addr", hex((1 << 32) - _SIZE), str(image)]
    ours, theirs = _pair(python, options, image)
    what = "kvmlaunch measure, 256 MiB"
    found.append(compare(what, ours, "sev-snp-measure", theirs, rounds, 1 / 4))
    peak, few = _peak(_command(python, options)), min(rounds, 3)
    bare = _peak([python, "-c", "pass"])
    found.append(compare(f"{what}, peak", peak, "python -c pass", bare, few, unit=MIB))
    most = compare(f"{what}, peak", peak, "what it may have", lambda: _MOST, few, 1, unit=MIB)
    return [*found, most]


def _command(python: str, options: list[str]) -> list[str]:
    return [python, "-I", *PROGRAM, "measure", *options]


def _pair(
    python: str, options: list[str], image: Path
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Both commands, which must print the same digest."""
    words = ["--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC-v4", "--ovmf", str(image)]
    theirs = [python, "-I", "-c", _THEIRS, *words]
    digest = subprocess.run(theirs, capture_output=True, check=True, timeout=60).stdout
    return process(_command(python, options), digest), process(theirs, digest)


def _started(firmware: Path) -> tuple[Callable[[], float], Callable[[], float]]:
    """What both commands do when everything is imported."""

    def ours() -> bytes:
        return measure(load_image(firmware)).digest

    def theirs() -> bytes:
        mode, signature = SevMode.SEV_SNP, CPU_SIGS["EPYC-v4"]
        digest: bytes = calc_launch_digest(mode, 1, signature, str(firmware), "", "", "", 1)
        return digest

    assert ours() == theirs()
    return timed(ours), timed(theirs)


def _large(work: Path) -> Path:
    """A firmware of 256 MiB, no two pages alike, whose metadata has no sections.

    Launched flat it begins at the reset vector, as sev-snp-measure takes it.
    """
    path = work / "large.fd"
    noise = os.urandom(1 << 20)
    tail = ovmf(metadata=metadata_bytes(()))[-METADATA_FROM_END:]
    with path.open("wb") as file:
        for number in range(_SIZE >> 20):
            file.write(bytes(byte ^ number for byte in noise[:4096]) + noise[4096:])
        file.seek(-len(tail), os.SEEK_END)
        file.write(tail)
    return path


def _peak(command: list[str]) -> Callable[[], float]:
    """Peak memory of a command, in bytes."""

    def call() -> float:
        words = [sys.executable, "-c", _PEAK, *command]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        return float(done.stdout) * 1024

    return call
