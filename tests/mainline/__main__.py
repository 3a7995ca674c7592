"""python -m tests.mainline: boot mainline KVM's SNP code and test against it; TAP on stdout.

Two machines run at the same time: one runs the tests of the real path as an SNP host
would, the other plays the scripts of the differential test, which runs here.
Exit code: 0 all well, 1 something failed or broke (its log is kept), 4 the machine lacks
something (``--skip-is-success``: 0). KVMLAUNCH_REQUIRE=snp makes lacking a failure.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import debian, guests
from tests.debian import DiskFull, Unavailable
from tests.mainline.errors import StepFailed
from tests.mainline.machine import PORT, Machine, Parts
from tests.mainline.prepare import home, prepare
from tests.mainline.tap import Stream

_PASSED, _FAILED, _SKIPPED = 0, 1, 4
_SECONDS = 240
_PYTEST = (sys.executable, "-m", "pytest", "-q")
_TAP = ("-p", "tests.mainline.tap", "--tap")
_REAL_PATH = (
    *("-m", "not simulated"),
    *("tests/hardware", "tests/launch/test_snp_run.py", "tests/launch/test_guest_ends.py"),
    *("tests/launch/test_apic.py", "tests/launch/test_plain.py"),
    *("tests/kvm/test_host.py", "tests/kvm/test_run.py"),
)
_DIFFERENTIAL = "tests/mainline/test_differential.py"


def main() -> int:
    """Run everything; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mainline", description=__doc__)
    parser.add_argument("--skip-is-success", action="store_true", help="exit 0 instead of 4")
    args = parser.parse_args()
    # A clean environment has nothing fetched.
    os.environ.setdefault("KVMLAUNCH_FETCH", "1")
    stream = Stream()
    try:
        return _run(stream)
    except DiskFull as error:
        return _broken(str(error))
    except Unavailable as error:
        if "snp" in os.environ.get("KVMLAUNCH_REQUIRE", "").replace(",", " ").split():
            return _broken(f"KVMLAUNCH_REQUIRE names snp, but {error}")
        print(f"1..0 # SKIP {error}")
        return _PASSED if args.skip_is_success else _SKIPPED
    except StepFailed as error:
        return _broken(str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _broken(str(error))


def _broken(why: str) -> int:
    print(f"Bail out! {why}")
    return _FAILED


def _run(stream: Stream) -> int:
    # Here the logs are kept when something fails.
    folder = Path(tempfile.mkdtemp(dir=home(), prefix="run-"))
    try:
        parts = prepare(stream.note)
    except Unavailable:
        shutil.rmtree(folder)
        raise
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(_guarded, name, job, parts, folder, stream)
            for name, job in (("hardware", _hardware_tests), ("differential", _differential_test))
        ]
    for job in jobs:
        job.result()
    if stream.end():
        shutil.rmtree(folder)
        return _PASSED
    stream.note(f"the logs are in {folder}")
    return _FAILED


_Job = Callable[[Parts, Path, Stream], None]


def _guarded(name: str, job: _Job, parts: Parts, folder: Path, stream: Stream) -> None:
    """Run a job; what breaks it is a failed test, and the other job goes on."""
    try:
        job(parts, folder, stream)
    except (StepFailed, OSError) as error:
        stream.failed(f"the {name} tests", str(error))


def _hardware_tests(parts: Parts, folder: Path, stream: Stream) -> None:
    """Inside a machine: the tests of the real path, as on an SNP host."""
    # The machine reads bytecode that is there and can't keep what it makes itself.
    subprocess.run(
        [*_PYTEST, *_REAL_PATH, "--collect-only", "-qq"], stdout=subprocess.DEVNULL, check=False
    )
    environment = {
        "KVMLAUNCH_REQUIRE": "kvm,snp",
        # The compiler is slow there.
        "KVMLAUNCH_GUESTS": str(guests.build_tests(guests.build(folder))),
        **_firmware(),
        # Each plugin costs time there; this is the one that the settings need.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "pytest_timeout",
        "NO_COLOR": "1",
    }
    log = folder / "hardware.log"
    command = (*_PYTEST, *_REAL_PATH, *_TAP, PORT)
    with Machine(parts, command, log=log, seconds=_SECONDS, environment=environment) as machine:
        stream.take(machine.lines())


def _firmware() -> dict[str, str]:
    """Where OVMF is; without it the tests inside that want it skip."""
    try:
        path = debian.debian_file("ovmf", "usr/share/ovmf/OVMF.fd", "KVMLAUNCH_OVMF")
    except Unavailable:
        return {}
    return {"KVMLAUNCH_OVMF": str(path)}


def _differential_test(parts: Parts, folder: Path, stream: Stream) -> None:
    """Here, with a machine that plays scripts (see conftest.py)."""
    environment = {**os.environ, "KVMLAUNCH_MAINLINE": str(folder)}
    reading, writing = os.pipe()
    with (folder / "differential.log").open("wb") as output:
        process = subprocess.Popen(
            [*_PYTEST, _DIFFERENTIAL, *_TAP, f"/dev/fd/{writing}"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
        )
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as lines:
            stream.take(line.rstrip("\n") for line in lines)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
