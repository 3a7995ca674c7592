"""Programs of several processes, and what becomes of a VM in each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.supervisor.rig import WELL, Ran

Client = Callable[..., Ran]


@pytest.mark.parametrize(
    "what",
    [
        "forked",  # EIO in the child, which can have VMs of its own
        "same-memory",  # vfork and CLONE_VM: it is the VM's own memory
        "executed",  # EIO once there is another program
        "passed",  # SCM_RIGHTS: EIO as well
    ],
)
def test_a_vm_answers_its_own_memory_when_others_have_it(client: Client, what: str) -> None:
    assert client("processes", what) == WELL


@pytest.mark.parametrize("before", [(), ("vm-before",)])
def test_a_process_goes_on_when_its_first_thread_is_gone(
    client: Client, before: tuple[str, ...]
) -> None:
    assert client("processes", "headless", *before).code == 9
