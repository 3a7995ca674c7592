"""Descriptors that are copied, closed behind our back, sent, reopened, or too many."""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.supervisor.rig import WELL, Ran, require_supervision, run, words

Client = Callable[..., Ran]

MILAN_SNP_ASIDS = 99
"""The simulated Milan's: CPUID 0x8000001F EDX (100, the first ASID that isn't SNP's) less one."""


@pytest.mark.parametrize(
    "what",
    [
        "copies",  # dup, F_DUPFD, dup2, FD_CLOEXEC
        "behind",  # dup2 over it, close_range
        "reopened",  # /proc/self/fd, /dev/fd
        "opened",  # relative, openat2, O_DIRECTORY, access
        "parameters",  # files below /sys/module
        "full",  # RLIMIT_NOFILE
        "misused",  # read, write, mmap, ftruncate, seals, fallocate
    ],
)
def test_descriptors_are_the_kernels_when_treated_so(client: Client, what: str) -> None:
    assert client("handles", what) == WELL


def test_vms_are_released_when_the_last_reference_goes(client: Client) -> None:
    assert client("handles", "released") == WELL


def test_vms_are_kept_when_only_their_vcpu_is_mapped(client: Client) -> None:
    assert client("handles", "held") == Ran(0, f"{MILAN_SNP_ASIDS}\n")


def test_the_host_is_full_when_the_supervisor_has_no_descriptors_left(
    clients: Path,
) -> None:
    command = shlex.join(words(clients / "handles", "crowded"))
    ran = run(["sh", "-c", f"ulimit -Sn 64; ulimit -Hn 600; {command}"])
    assert (ran.code, ran.err) == (0, "")
    # The limit is the hard one; some are left for the supervisor itself.
    assert 300 < int(ran.out) < 600


NO_WATCHES = """
import errno, os, sys
from types import SimpleNamespace
from kvmlaunch.sim.spec import parse_spec
from kvmlaunch.supervisor import Supervisor, descriptors

class Lib:
    def kl_watch_add(self, *arguments):
        return SimpleNamespace(ret=-1, err=errno.ENOSPC)

    def __getattr__(self, name, lib=descriptors.lib):
        return getattr(lib, name)

def run():
    assert not Supervisor(parse_spec("6.12")).run(sys.argv[1:])
    return os.listdir("/proc/self/fd")

before = run()
descriptors.lib = Lib()
assert run() == before
"""
OPENS = """
try:
    open("/dev/kvm")
    print("open")
except OSError as error:
    print(error.errno)
"""


def test_the_host_is_full_when_no_more_files_can_be_watched() -> None:
    require_supervision()
    program = (sys.executable, "-c", OPENS)
    ran = run([sys.executable, "-c", NO_WATCHES, *program])
    assert ran == Ran(0, f"open\n{errno.ENFILE}\n")
