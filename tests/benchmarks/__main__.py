"""python -m tests.benchmarks [--rounds N] [FIGURE…]: speed as ratios, measured side by side.

Each figure is the median over pairs that run in turn; a ratio compares what ran in the same
run on the same machine. Absolute times are for orientation only.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import ssl
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.hashing import hasher
from kvmlaunch.kvm import Kvm
from kvmlaunch.uapi import RealPlatform
from tests.benchmarks.native import NoCompiler
from tests.benchmarks.timing import table

NAMES = (
    *("command_start", "first_exit", "one_ioctl", "measured_page", "page_hashing"),
    *("whole_measure", "igvm_file", "explaining", "page_log", "softcpu"),
    *("simulated_run", "supervised"),
)


def main(argv: list[str] | None = None) -> int:
    """Print the table; what this machine can't measure is named on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="pairs per figure (default 21)")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(NAMES)}")
    args = parser.parse_args(argv)
    if args.rounds < 1 or not set(args.figures) <= set(NAMES):
        parser.error(f"--rounds is at least 1, and figures are {', '.join(NAMES)}")
    found = []
    for name in args.figures or NAMES:
        module = import_module(f"tests.benchmarks.{name}")
        missing = _no_kvm() if module.NEEDS_KVM else None
        try:
            if missing is None:
                with tempfile.TemporaryDirectory() as work:
                    found += module.figures(Path(work), args.rounds)
        except NoCompiler as error:
            missing = str(error)
        if missing is not None:
            print(f"{name}: skipped: {missing}", file=sys.stderr)
    if found:
        print(_machine())
        print(f"medians of {args.rounds} pairs that ran in turn (fewer of what takes seconds)")
        print(table(found))
    return 0


def _machine() -> str:
    """What it is that was measured on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    name = model[1] if model else platform.machine()
    return (
        f"{name}, {len(os.sched_getaffinity(0))} CPUs; Python {platform.python_version()}, "
        f"{ssl.OPENSSL_VERSION}; hashing: {hasher().name}"
    )


def _no_kvm() -> str | None:
    """Why plain KVM can't be used here, or None."""
    try:
        Kvm.open(RealPlatform()).close()
    except KvmLaunchError as error:
        return str(error).splitlines()[0]
    return None


if __name__ == "__main__":
    sys.exit(main())
