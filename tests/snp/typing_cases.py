"""Not run: what a type checker must say about launch steps. test_states.py reads the marks.

A line with ``# wrong`` must be an error, every other line must be none.
"""

from __future__ import annotations

from kvmlaunch.kvm import SevDevice, Vm
from kvmlaunch.snp import Finished, New, Started


def right_order(vm: Vm, sev: SevDevice, address: int) -> Finished:
    new = New.init(vm, sev)
    started = new.start(0x30000)
    started.update(0x1000, 1, address, 4096)
    for done in started.update_all(0x2000, 1, address, 4096):
        print(done + 1)
    return started.finish()


def steps_of_a_new_launch(new: New) -> None:
    new.update(0x1000, 1, 0, 4096)  # wrong
    new.update_all(0x1000, 1, 0, 4096)  # wrong
    new.finish()  # wrong


def steps_of_a_started_launch(started: Started) -> None:
    started.start(0x30000)  # wrong
    again: New = started.finish()  # wrong
    print(again)


def steps_of_a_finished_launch(finished: Finished) -> None:
    finished.start(0x30000)  # wrong
    finished.update(0x1000, 1, 0, 4096)  # wrong
    finished.update_all(0x1000, 1, 0, 4096)  # wrong
    finished.finish()  # wrong


def skipped_start(vm: Vm, sev: SevDevice) -> Finished:
    return New.init(vm, sev).finish()  # wrong
