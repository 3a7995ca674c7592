"""Signals end KVM_RUN and nothing else; a process may go while its guest runs."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.supervisor.rig import WELL, Ran

Client = Callable[..., Ran]

KILLED = 128 + signal.SIGKILL
FAULTED = 128 + signal.SIGSEGV


@pytest.mark.parametrize(
    "what",
    [
        "interrupted",  # EINTR, with SA_RESTART, too
        "timer",  # sent to the process
        "ignored",  # by default, or blocked
        "immediate",  # immediate_exit
        "masked",  # KVM_SET_SIGNAL_MASK
        "once",  # other calls are done, and once
        "stopped",  # SIGSTOP that another thread takes, SIGCONT
        "stopped-alone",
        "all-stopped",  # by a third thread, when two are in KVM_RUN
    ],
)
def test_kvm_run_ends_as_the_kernels_when_signals_come(client: Client, what: str) -> None:
    assert client("signals", what) == WELL


def test_memory_is_the_next_programs_when_one_is_executed_while_the_guest_runs(
    client: Client,
) -> None:
    assert client("signals", "leaves-memory") == WELL


@pytest.mark.parametrize("who", ["leaves", "leaves-first"])
@pytest.mark.parametrize(
    ("how", "code"), [("exit", 6), ("exec", 6), ("kill", KILLED), ("fault", FAULTED)]
)
def test_a_program_ends_as_it_wants_when_a_thread_is_in_kvm_run(
    client: Client, who: str, how: str, code: int
) -> None:
    assert client("signals", who, how) == Ran(code)
