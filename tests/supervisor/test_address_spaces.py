"""Who a caller is: the address spaces of supervised processes."""

from __future__ import annotations

import os

from kvmlaunch.supervisor.clients import AddressSpace


def test_space_when_it_is_forgotten_is_not_alive_whoever_has_the_descriptor() -> None:
    # A thread whose number came back after its process ended was taken for that process.
    space = AddressSpace(1, os.getpid(), os.getpid())
    assert space.is_alive()
    space.close()
    with open("/proc/self/mem", "rb"):
        assert not space.is_alive()
