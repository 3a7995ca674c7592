"""Which vCPU of a VM runs when: one at a time, in turns, the same way every time.

Each vCPU sits in the KVM_RUN of its own thread, but the order in which they run, and for how
long, depends on the seed and on what the guest does, never on the host's threads. So a vCPU
that is out in user space is waited for when its turn comes, though not for ever.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["GRACE_SECONDS", "SLICE_TICKS", "Scheduler", "Seat"]

GRACE_SECONDS = 0.1
"""How long a vCPU that is out in user space keeps the others waiting."""
SLICE_TICKS = 100_000
"""Ticks of a turn, on average."""

_POLL_SECONDS = 0.01


class Occupant(Protocol):
    """What the scheduler asks of a vCPU. No answer may take a lock."""

    def can_run(self) -> bool:
        """Whether it would do something if it had its turn."""
        ...

    def interrupted(self) -> bool:
        """Whether its thread has to leave KVM_RUN."""
        ...


class Driver(Protocol):
    """The thread that runs a vCPU; the same object for the same thread."""

    def is_alive(self) -> bool:
        """False once it has ended."""
        ...


class Seat:
    """A vCPU's place in the round."""

    def __init__(self, occupant: Occupant) -> None:
        self.occupant = occupant
        self.inside = False
        self.given_up = False
        self.driver: Driver | None = None
        self.out_since: float | None = None


class Scheduler:
    """The turns of one VM. ``idle`` is called when nobody can run: True where that changed it."""

    def __init__(self, seed: int = 0, idle: Callable[[], bool] = lambda: False) -> None:
        self._idle = idle
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._seats: list[Seat] = []
        self._at = 0
        self._left = 0

    def add(self, occupant: Occupant) -> Seat:
        """Give a new vCPU the last place in the round."""
        with self._changed:
            seat = Seat(occupant)
            self._seats.append(seat)
            return seat

    def remove(self, seat: Seat) -> None:
        """Take back the last place, whose vCPU never ran."""
        with self._changed:
            self._seats.remove(seat)
            self._at %= max(len(self._seats), 1)

    def enter(self, seat: Seat, driver: Driver) -> None:
        """The vCPU's thread ``driver`` is in KVM_RUN."""
        with self._changed:
            now = time.monotonic()
            for other in self._seats:
                if other.out_since is None:
                    other.out_since = now  # those that never came are waited for from now on
            seat.inside, seat.given_up = True, False
            seat.driver = driver
            self._changed.notify_all()

    def leave(self, seat: Seat) -> None:
        """The vCPU's thread goes out to user space; the turn stays with it."""
        with self._changed:
            seat.inside, seat.out_since = False, time.monotonic()
            self._changed.notify_all()

    def turn(self, seat: Seat) -> int | None:
        """Wait for a turn and return its ticks; None if the thread has to leave KVM_RUN."""
        with self._changed:
            while not seat.occupant.interrupted():
                current = self._current(seat.driver)
                if current is seat:
                    if self._left <= 0:
                        self._left = round(SLICE_TICKS * self._random.uniform(0.5, 1.5))
                    return self._left
                if current is None and self._idle():
                    continue
                self._changed.wait(_POLL_SECONDS)
            return None

    def spend(self, seat: Seat, ticks: int, *, keep: bool) -> None:
        """Take ticks off the vCPU's turn, which ends when there are none left.

        ``keep``: not before it comes back from user space, so that what happens there is in
        order as well.
        """
        with self._changed:
            if self._seats[self._at] is seat:
                self._left = max(self._left - ticks, int(keep))
                if not self._left:
                    self._pass_on()

    def give_up_turn(self, seat: Seat) -> None:
        """End the vCPU's turn."""
        with self._changed:
            if self._seats[self._at] is seat:
                self._pass_on()

    def wake(self) -> None:
        """Something happened that a waiting vCPU may be waiting for."""
        with self._changed:
            self._changed.notify_all()

    def _current(self, asking: Driver | None) -> Seat | None:
        """Whose turn it is; None where nobody can run. Passes over those that don't."""
        for _ in self._seats:
            seat = self._seats[self._at]
            if seat.occupant.can_run() and (seat.inside or self._expected(seat, asking)):
                return seat
            self._pass_on()
        return None

    def _expected(self, seat: Seat, asking: Driver | None) -> bool:
        """Whether a vCPU in user space will be back soon."""
        if seat.given_up:
            return False
        driver = seat.driver
        gone = driver is not None and (driver is asking or not driver.is_alive())
        late = seat.out_since is not None and time.monotonic() > seat.out_since + GRACE_SECONDS
        seat.given_up = gone or late
        return not seat.given_up

    def _pass_on(self) -> None:
        self._at = (self._at + 1) % len(self._seats)
        self._left = 0
        self._changed.notify_all()
