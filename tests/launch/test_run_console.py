"""The console in memory, and what of its text becomes part of an outcome."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvmlaunch.launch.checks import FailedCheck
from kvmlaunch.launch.run import Outcome
from kvmlaunch.uapi import RunResult, ffi, lib

from .rig import Script, exited, io_data, io_in, io_out, plain_exit, system_event
from .scripted import CONSOLE, EXIT, TIMEOUT, outcome_of, play

UART = 0xFEDC9000


def register(run: Any, gpa: int, data: bytes, *, write: bool) -> RunResult:
    """KVM_EXIT_MMIO of as many bytes as ``data`` has."""
    run.exit_reason = lib.KVM_EXIT_MMIO
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = gpa, len(data), write
    ffi.buffer(run.mmio.data)[: len(data)] = data
    return exited()


def test_console_when_in_memory_is_the_same() -> None:
    seen = []

    def script(run: Any) -> Script:
        yield register(run, UART, b"m", write=True)
        yield register(run, UART + 7, b"\x5a", write=True)
        yield io_in(run, CONSOLE + 7)
        seen.append(io_data(run))
        yield register(run, UART + 5, b"\0", write=False)
        seen.append(bytes(run.mmio.data)[:1])
        yield io_out(run, EXIT, b"\0")

    result = play(script)
    assert (result.text, seen) == (b"m", [b"\x5a", b"\x60"])
    # Console traffic is no exit for anyone else.
    assert [str(exit_) for _, exit_ in result.exits] == [
        "KVM_EXIT_IO out port=0xf4 size=1 count=1 data=00"
    ]


@pytest.mark.parametrize(
    ("gpa", "data"), [(0xFEDC9000 - 1, b"x"), (0xFEDC9008, b"x"), (0xFEDC9000, b"xx")]
)
def test_mmio_when_not_a_register_of_the_console_ends_the_run(gpa: int, data: bytes) -> None:
    outcome = outcome_of(lambda run: register(run, gpa, data, write=True))
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert f"gpa={gpa:#x}" in str(outcome)


# Failed checks

FAILED_CHECK = b"check failed: psc.c:41: unchanged is 0x0, expected 0x1\n"


def checked(end: Any, *, text: bytes = FAILED_CHECK) -> Outcome:
    def script(run: Any) -> Script:
        yield io_out(run, CONSOLE, text)
        yield end(run)

    return play(script).outcome


@pytest.mark.parametrize(
    "end",
    [
        lambda run: io_out(run, EXIT, b"\x0c\0\0\0", size=4),
        lambda run: system_event(run, lib.KVM_SYSTEM_EVENT_SEV_TERM, 0x0CF100),
    ],
    ids=["plain", "snp"],
)
def test_check_when_the_guest_says_that_it_failed_is_in_the_outcome(end: Any) -> None:
    outcome = checked(end)
    assert outcome.check == FailedCheck("psc.c", 41, "unchanged", 0, 1)
    assert str(outcome).endswith(f": {FAILED_CHECK.decode().rstrip()}")
    assert not outcome.ok


@pytest.mark.parametrize(
    "end",
    [
        lambda run: io_out(run, EXIT, b"\0"),
        lambda run: io_out(run, EXIT, b"\x0b"),
        lambda run: system_event(run, lib.KVM_SYSTEM_EVENT_SEV_TERM, 0x0BF100),
        lambda run: system_event(run, lib.KVM_SYSTEM_EVENT_SEV_TERM, 0x0C1100),
        lambda run: plain_exit(run, lib.KVM_EXIT_HLT),
    ],
    ids=["well", "other-code", "other-reason", "linux", "halt"],
)
def test_check_when_the_guest_ends_otherwise_is_not_in_the_outcome(end: Any) -> None:
    assert checked(end).check is None


def test_check_when_the_code_comes_without_the_line_is_none() -> None:
    outcome = checked(lambda run: io_out(run, EXIT, b"\x0c"), text=b"hello\n")
    assert outcome.check is None
    assert str(outcome) == "vCPU 0: the guest wrote 0xc to the exit port"


def test_check_when_another_vcpu_prints_is_that_of_the_one_that_ended() -> None:
    printed = threading.Event()

    def first(run: Any) -> Script:
        yield io_out(run, CONSOLE, FAILED_CHECK)
        printed.set()
        yield from ()

    def second(run: Any) -> Script:
        printed.wait(TIMEOUT)
        yield io_out(run, CONSOLE, FAILED_CHECK.replace(b"41", b"42"))
        yield io_out(run, EXIT, b"\x0c")

    check = play(first, second).outcome.check
    assert check is not None
    assert check.line == 42
