"""vCPUs on threads: how a run is stopped, and that nothing of it stays."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import RunResult
from tests.host import require_kvm

from .rig import (
    SPIN,
    Playback,
    Script,
    failed,
    io_out,
    out_and_exit,
    playing,
    prints,
    small_plan,
    spin,
)

TIMEOUT = 20.0


@contextmanager
def no_thread_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@contextmanager
def interrupts(platform: Playback, vcpus: int = 1, *, times: int = 1) -> Iterator[None]:
    """SIGINT to this process (as Ctrl-C sends it) once all vCPUs run, each when the last was seen.

    ``platform.told`` is set when the last one was.
    """
    seen = threading.Semaphore(0)

    def handle(number: int, frame: Any) -> None:
        seen.release()
        raise KeyboardInterrupt

    def send() -> None:
        for _ in range(vcpus):
            assert platform.running.acquire(timeout=TIMEOUT)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            assert seen.acquire(timeout=TIMEOUT)
        platform.told.set()

    before = signal.signal(signal.SIGINT, handle)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)


def run(guest: Guest, timeout: float = TIMEOUT) -> Outcome:
    return run_guest(guest, console=lambda text: None, timeout=timeout)


# Timeout


@pytest.mark.parametrize("vcpus", [1, 4])
def test_run_when_the_guest_never_ends_times_out(vcpus: int) -> None:
    with no_thread_left(), playing(*[spin] * vcpus) as (guest, _):
        outcome = run(guest, 0.05)
    assert (outcome.kind, outcome.ok, outcome.vcpu) == ("timeout", False, None)


def test_timeout_when_shown_names_the_seconds() -> None:
    with playing(spin) as (guest, _):
        assert str(run(guest, 0.05)) == "the guest still ran after 0.05 s"


def test_run_when_it_times_out_keeps_what_was_printed() -> None:
    text = bytearray()

    def script(vcpu_run: Any) -> Script:
        yield io_out(vcpu_run, 0x3F8, b"half a line")

    with playing(script) as (guest, _):
        run_guest(guest, console=text.extend, timeout=0.05)
    assert text == b"half a line"


def test_run_when_the_guest_ends_in_time_is_not_held_up_by_the_timeout() -> None:
    start = time.monotonic()
    with playing(out_and_exit(b"")) as (guest, _):
        assert run(guest, 60).kind == "exit-port"
    assert time.monotonic() - start < 10


def test_run_when_there_is_no_timeout_waits_for_the_guest() -> None:
    def script(vcpu_run: Any) -> Script:
        time.sleep(0.3)
        yield io_out(vcpu_run, 0xF4, b"\0")

    with playing(script) as (guest, _):
        assert run_guest(guest, console=print).kind == "exit-port"


# Several vCPUs


def test_run_when_one_of_four_vcpus_ends_it_stops_the_others() -> None:
    with no_thread_left(), playing(spin, spin, out_and_exit(b"", 5), spin) as (guest, _):
        outcome = run(guest)
    assert (outcome.kind, outcome.vcpu) == ("exit-port", 2)


def test_run_when_two_vcpus_end_it_reports_one_outcome() -> None:
    with no_thread_left(), playing(out_and_exit(b"", 1), out_and_exit(b"", 2)) as (guest, _):
        outcome = run(guest)
    assert (outcome.vcpu, outcome.detail.split()[3]) in [(0, "0x1"), (1, "0x2")]


def test_run_when_there_are_four_vcpus_runs_them_at_the_same_time() -> None:
    together = threading.Barrier(4, timeout=TIMEOUT)
    names: list[str] = []

    def script(vcpu_run: Any) -> Script:
        together.wait()
        names.append(threading.current_thread().name)
        yield io_out(vcpu_run, 0xF4, b"\0")

    with playing(*[script] * 4) as (guest, _):
        assert run(guest).ok
    assert sorted(names)[0] == "vcpu-0"


def test_console_when_four_vcpus_print_gets_one_text_at_a_time() -> None:
    inside: list[int] = []
    most: list[int] = []

    def console(text: bytes) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()

    def script(vcpu_run: Any) -> Script:
        for _ in range(5):
            yield io_out(vcpu_run, 0x3F8, b"line\n")
        yield failed(errno.EINTR)

    with playing(*[script] * 4) as (guest, _):
        run_guest(guest, console=console, timeout=0.3)
    assert (len(most), max(most)) == (20, 1)


class Sluggish(Playback):
    """Comes back from KVM_RUN only when ``told``, and some time after."""

    def block(self, run: Any) -> RunResult:
        result = super().block(run)
        assert self.told.wait(TIMEOUT)
        time.sleep(0.1)
        return result


def test_run_when_a_vcpu_can_not_be_woken_at_once_still_ends() -> None:
    """The kick repeats until the thread has noticed."""
    with SimPlatform() as host, no_thread_left():
        platform = Sluggish(host, {})
        platform.told.set()
        with Guest(small_plan(), platform) as guest:
            assert run(guest, 0.05).kind == "timeout"


# Ctrl-C


@pytest.mark.parametrize("vcpus", [1, 4])
def test_run_when_interrupted_ends_cleanly(vcpus: int) -> None:
    with (
        no_thread_left(),
        playing(*[spin] * vcpus) as (guest, platform),
        interrupts(platform, vcpus),
    ):
        outcome = run(guest)
    assert (outcome.kind, outcome.ok) == ("interrupted", False)
    assert str(outcome) == "interrupted by the user"


def test_run_when_interrupted_without_a_timeout_ends_cleanly() -> None:
    with no_thread_left(), playing(spin) as (guest, platform), interrupts(platform):
        assert run_guest(guest, console=print).kind == "interrupted"


def test_run_when_interrupted_again_while_stopping_leaves_no_thread() -> None:
    with SimPlatform() as host, no_thread_left():
        platform = Sluggish(host, {})
        with Guest(small_plan(vcpus=2), platform) as guest:
            with interrupts(platform, 2, times=4):
                outcome = run(guest)
                left = [t.name for t in threading.enumerate() if t.name.startswith("vcpu-")]
            assert (outcome.kind, left) == ("interrupted", [])


def test_run_when_interrupted_can_go_on() -> None:
    """Nobody is told to stop any more."""

    def script(vcpu_run: Any) -> Script:
        yield platform.block(vcpu_run)
        yield io_out(vcpu_run, 0xF4, b"\x09")

    with playing(script) as (guest, platform):
        with interrupts(platform):
            assert run(guest).kind == "interrupted"
        assert run(guest).detail.split()[3] == "0x9"


# The real kernel


@contextmanager
def real_guest(code: bytes, vcpus: int = 1) -> Iterator[Guest]:
    platform = require_kvm()
    options = PlanOptions(vcpus=vcpus, memory=1 << 20, confidential=False)
    with Guest(load_image(code, options), platform) as guest:
        yield guest


@pytest.mark.parametrize("vcpus", [1, 4])
def test_real_run_when_the_guest_spins_times_out(vcpus: int) -> None:
    with no_thread_left(), real_guest(SPIN, vcpus) as guest:
        assert run(guest, 0.2).kind == "timeout"


@pytest.mark.parametrize("vcpus", [1, 4])
def test_real_run_when_interrupted_ends_cleanly(vcpus: int) -> None:
    with no_thread_left(), real_guest(SPIN, vcpus) as guest:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            outcome = run(guest)
        finally:
            timer.join()
    assert outcome.kind == "interrupted"


def test_real_run_when_stopped_can_go_on() -> None:
    with real_guest(SPIN) as guest:
        assert [run(guest, 0.05).kind for _ in range(3)] == ["timeout"] * 3


def test_real_run_when_repeated_many_times_always_ends() -> None:
    """Ends and kicks race; each round has both."""
    with no_thread_left():
        for _ in range(50):
            with real_guest(prints(b"", 0), 2) as guest:
                assert run(guest).ok
