"""The local APIC's timer, on the clock of the software CPUs (lapic.c).

Times are ticks of the VM's clock, which is the guest's TSC; a bus cycle of KVM's APIC is given in
nanoseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["ONE_SHOT", "PERIODIC", "TSC_DEADLINE", "Timer"]

ONE_SHOT, PERIODIC, TSC_DEADLINE = 0, 1 << 17, 2 << 17
"""Bits 18:17 of the LVT entry; both together are no mode."""

_MIN_PERIOD_NS = 200_000  # min_timer_period_us: keeps a guest from drowning the host
_NS_PER_MS = 1_000_000


class Timer:
    """``deadline`` is when it expires next, None while it is stopped.

    ``pending``: it has expired, and its interrupt is still to be delivered.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.mode = ONE_SHOT
        self.divide = 2
        self.deadline: int | None = None
        self.pending = False
        self._period_ns = 0

    def stop(self) -> None:
        """Forget the deadline, and what was to be delivered."""
        self.deadline, self.pending = None, False

    def set_mode(self, mode: int) -> bool:
        """Take the mode of the LVT entry; True where that clears the initial count."""
        if mode == self.mode:
            return False
        clears = (self.mode == TSC_DEADLINE) != (mode == TSC_DEADLINE)
        self.mode = mode
        if clears:
            self.stop()
            self._period_ns = 0
        self._limit_period()
        return clears

    def set_divide(self, register: int, initial: int) -> None:
        """Take the divide configuration; a count that runs goes on at the other pace."""
        old = self.divide
        self.divide = 1 << ((register & 3 | register >> 1 & 4) + 1 & 7)
        if self.divide == old or not self._period_ns:
            return
        left = self._left_ns() * self.divide // old
        self._period_ns = self._to_ns(initial)
        self._limit_period()
        # One that has expired does so once more, as KVM has it; without a count it is stopped.
        self.deadline = self._now() + self._to_ticks(left) if self._period_ns else None

    def start(self, initial: int, current: int | None = None) -> None:
        """Count down from ``initial``; a restored timer has ``current`` left.

        A deadline of the TSC stays as it is.
        """
        self.pending = False
        if self.mode == TSC_DEADLINE:
            return
        self.deadline = None
        if self.mode not in (ONE_SHOT, PERIODIC):
            return
        self._period_ns = self._to_ns(initial)
        if not self._period_ns:
            return
        self._limit_period()
        left = self._period_ns
        if current is not None:
            left = min(self._to_ns(current), self._period_ns)
            if not left and self.mode == PERIODIC:
                left = self._period_ns
        self.deadline = self._now() + self._to_ticks(left)

    def count(self) -> int:
        """The current count."""
        if not self._period_ns:
            return 0
        # More is left where the TSC, which counts the time here, was made slower meanwhile.
        return min(self._left_ns(), self._period_ns) // (self._cycle_ns * self.divide)

    def expire(self) -> None:
        """Notice that it has expired; expiries of the meantime are one."""
        if self.deadline is None or self._now() < self.deadline:
            return
        if self.mode == PERIODIC:
            period = self._to_ticks(self._period_ns)
            self.deadline += ((self._now() - self.deadline) // period + 1) * period
        else:
            self.deadline = None
        self.pending = True

    @property
    def due(self) -> bool:
        """Whether an interrupt is to be delivered, noticed or not."""
        return self.pending or (self.deadline is not None and self._now() >= self.deadline)

    @property
    def _cycle_ns(self) -> int:
        return self._vcpu.vm.irq.bus_cycle_ns

    def _now(self) -> int:
        return self._vcpu.vm.guest_ticks

    def _to_ns(self, count: int) -> int:
        return count * self._cycle_ns * self.divide

    def _to_ticks(self, ns: int) -> int:
        """At least one tick, so that a timer never expires before it was started."""
        return max(ns * self._vcpu.tsc_khz // _NS_PER_MS, 1)

    def _left_ns(self) -> int:
        if self.deadline is None:
            return 0
        return max(self.deadline - self._now(), 0) * _NS_PER_MS // self._vcpu.tsc_khz

    def _limit_period(self) -> None:
        if self.mode == PERIODIC and self._period_ns:
            self._period_ns = max(self._period_ns, _MIN_PERIOD_NS)
