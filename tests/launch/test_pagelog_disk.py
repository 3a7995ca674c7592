"""The page log has whole lines, whatever happens to its file and its process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.launch.pagelog import LogError, PageLog
from kvmlaunch.launch.session import Session
from kvmlaunch.sim import SimPlatform
from tests.cli.command import events

from .rig import small_plan

ROOT = Path(__file__).resolve().parents[2]


CRASH = """
import os, signal, sys
from kvmlaunch.launch.pagelog import PageLog
from kvmlaunch.launch.session import Session
from kvmlaunch.sim import SimPlatform
from tests.launch.rig import plan, step

pages = plan([step(0x1000, [b"x" * 4096] * 600)], memory=[(0, 4 << 20)])
session = Session(pages, SimPlatform(), log=PageLog(sys.argv[1]))

def crash(record):
    if record.seq == 500:
        os.kill(os.getpid(), signal.SIGKILL)

session.on_record = crash
session.launch()
"""


def child(code: str, *args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        capture_output=True,
        timeout=30,
        check=False,
        **options,
    )


def test_log_when_the_process_is_killed_has_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert child(CRASH, str(path)).returncode == -9
    # The buffer went out before it grew past 64 KiB: some of the 500 pages are there.
    assert len(events(path)) > 100


LIMITED = """
import json, os, resource, signal, sys
from kvmlaunch.launch.pagelog import LogError, PageLog

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

log = PageLog(sys.argv[1])
log.write({"line": 1})
log.flush()
limit(os.fstat(log._fd).st_size + 25)
for number in range(2, 6):
    log.write({"line": number})
try:
    log.flush()
except LogError as error:
    print(error, file=sys.stderr)
if sys.argv[2] == "go on":
    limit(hard)
    log.write({"line": 6})
log.close()
"""


def test_log_when_the_disk_fills_up_ends_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    child(LIMITED, str(path), "stop")
    assert [event["line"] for event in events(path)] == [1, 2, 3]


def test_log_when_the_disk_fills_up_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "log"
    done = child(LIMITED, str(path), "stop")
    assert done.stderr.decode() == f"log {path}: {os.strerror(errno.EFBIG)}\n"


def test_log_when_the_disk_has_room_again_goes_on_behind_the_last_whole_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    child(LIMITED, str(path), "go on")
    assert [event["line"] for event in events(path)] == [1, 2, 3, 6]


def test_log_when_the_disk_fills_up_keeps_what_standard_output_held_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "out"
    path.write_bytes(b'{"line":0}\n')
    with path.open("ab") as out:
        subprocess.run(
            [sys.executable, "-c", LIMITED, "-", "stop"],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=30,
            check=True,
        )
    assert [event["line"] for event in events(path)] == [0, 1, 2, 3]


def test_log_when_a_write_is_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    write = os.write
    with PageLog(str(path)) as log:
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))
        log.header(small_plan(), platform="sim", profile="6.12", vmsa_mode="sync")
        monkeypatch.undo()
    assert events(path)[0]["event"] == "header"


def test_log_when_the_device_is_full_is_an_error() -> None:
    log = PageLog("/dev/full")
    with pytest.raises(LogError, match="log /dev/full: No space left on device"):
        log.header(small_plan(), platform="sim", profile="6.12", vmsa_mode="sync")
    log.close()


def test_launch_when_the_log_can_not_be_written_stops(tmp_path: Path) -> None:
    with SimPlatform() as host:
        with pytest.raises(LogError), PageLog("/dev/full") as log:
            Session(small_plan(), host, log=log)
        assert host.open_fds == ()


def test_log_when_it_failed_can_be_closed() -> None:
    log = PageLog("/dev/full")
    log.write({"event": "x"})
    with pytest.raises(LogError):
        log.close()
    log.close()


def test_log_when_it_failed_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(LogError), PageLog("/dev/full") as log:
        log.write({"event": "x"})
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("path", "text"),
    [("/nonexistent/log", "No such file or directory"), ("/", "Is a directory")],
)
def test_log_when_the_file_can_not_be_made_is_an_error(path: str, text: str) -> None:
    with pytest.raises(LogError, match=text):
        PageLog(path)
