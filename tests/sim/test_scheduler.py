"""Turns of vCPUs: one at a time, in the same order whatever the host's threads do."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from kvmlaunch.sim.scheduler import GRACE_SECONDS, SLICE_TICKS, Scheduler

COST = 30_000


class Fake:
    """A vCPU."""

    def __init__(self) -> None:
        self.runnable = True
        self.told = False

    def can_run(self) -> bool:
        return self.runnable

    def interrupted(self) -> bool:
        return self.told


def played(seed: int, vcpus: int = 3, steps: int = 40, delay: Callable[[], float] = lambda: 0.0):
    """Who did each step, where every other step is an exit to user space."""
    scheduler = Scheduler(seed)
    seats = [scheduler.add(Fake()) for _ in range(vcpus)]
    log: list[int] = []
    inside = threading.Lock()

    def drive(index: int) -> None:
        seat = seats[index]
        for _ in range(steps):
            time.sleep(delay())
            scheduler.enter(seat, threading.current_thread())
            for _ in range(2):
                assert scheduler.turn(seat) is not None
                assert inside.acquire(blocking=False), "two vCPUs run at once"
                log.append(index)
                inside.release()
                scheduler.spend(seat, COST, keep=False)
            assert scheduler.turn(seat) is not None
            scheduler.spend(seat, COST, keep=True)
            scheduler.leave(seat)

    threads = [threading.Thread(target=drive, args=(index,)) for index in range(vcpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return log


def test_order_when_the_seed_is_the_same_is_the_same() -> None:
    jitter = random.Random(5)
    first = played(1)
    assert played(1, delay=lambda: jitter.uniform(0, 0.002)) == first
    assert played(1) == first


def test_order_when_the_seed_is_another_is_another() -> None:
    assert len({tuple(played(seed)) for seed in range(4)}) == 4


def test_turns_are_about_as_long_as_they_should_be() -> None:
    scheduler = Scheduler()
    seat = scheduler.add(Fake())
    scheduler.enter(seat, threading.current_thread())
    turns = []
    for _ in range(50):
        ticks = scheduler.turn(seat)
        assert ticks is not None
        turns.append(ticks)
        scheduler.spend(seat, ticks, keep=False)
    assert SLICE_TICKS / 2 <= min(turns) < max(turns) <= SLICE_TICKS * 3 / 2


def test_turn_when_the_others_stay_away_comes_after_the_grace() -> None:
    scheduler = Scheduler()
    scheduler.add(Fake())
    scheduler.add(Fake())
    last = scheduler.add(Fake())
    scheduler.enter(last, threading.current_thread())
    before = time.monotonic()
    assert scheduler.turn(last)
    assert GRACE_SECONDS <= time.monotonic() - before < 3 * GRACE_SECONDS


def test_turn_when_this_thread_drove_the_other_comes_at_once() -> None:
    scheduler = Scheduler()
    first, second = scheduler.add(Fake()), scheduler.add(Fake())
    scheduler.enter(first, threading.current_thread())
    scheduler.turn(first)
    scheduler.spend(first, 1, keep=True)
    scheduler.leave(first)
    scheduler.enter(second, threading.current_thread())
    before = time.monotonic()
    assert scheduler.turn(second)
    assert time.monotonic() - before < GRACE_SECONDS / 2


def test_turn_when_the_others_thread_has_ended_comes_at_once() -> None:
    scheduler = Scheduler()
    first, second = scheduler.add(Fake()), scheduler.add(Fake())

    def once() -> None:
        scheduler.enter(first, threading.current_thread())
        scheduler.turn(first)
        scheduler.leave(first)

    thread = threading.Thread(target=once)
    thread.start()
    thread.join()
    scheduler.enter(second, threading.current_thread())
    before = time.monotonic()
    assert scheduler.turn(second)
    assert time.monotonic() - before < GRACE_SECONDS / 2


def test_turn_when_the_other_can_not_run_comes_at_once() -> None:
    scheduler = Scheduler()
    blocked = Fake()
    blocked.runnable = False
    scheduler.enter(scheduler.add(blocked), threading.current_thread())
    second = scheduler.add(Fake())
    scheduler.enter(second, threading.current_thread())
    assert scheduler.turn(second)


def test_turn_when_told_to_leave_is_none() -> None:
    scheduler = Scheduler()
    vcpu = Fake()
    vcpu.runnable = False
    seat = scheduler.add(vcpu)
    scheduler.enter(seat, threading.current_thread())
    timer = threading.Timer(0.05, lambda: setattr(vcpu, "told", True))
    timer.start()
    assert scheduler.turn(seat) is None
    timer.join()


@pytest.mark.parametrize("keep", [False, True])
def test_turn_when_used_up_goes_on_unless_the_vcpu_is_to_come_back(keep: bool) -> None:
    scheduler = Scheduler()
    first, second = scheduler.add(Fake()), scheduler.add(Fake())
    scheduler.enter(first, threading.current_thread())
    scheduler.enter(second, threading.current_thread())
    assert scheduler.turn(first)
    scheduler.spend(first, 10 * SLICE_TICKS, keep=keep)
    assert scheduler.turn(first if keep else second)
