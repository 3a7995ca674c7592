"""Who a caller is: the address spaces of supervised processes."""

from __future__ import annotations

import os
import subprocess

from kvmlaunch.supervisor.clients import AddressSpace, Clients, ClientThread


def test_space_when_it_is_forgotten_is_not_alive_whoever_has_the_descriptor() -> None:
    # A thread whose number came back after its process ended was taken for that process.
    space = AddressSpace(1, os.getpid(), os.getpid())
    assert space.is_alive()
    space.close()
    with open("/proc/self/mem", "rb"):
        assert not space.is_alive()


def test_thread_when_its_number_has_come_back_is_not_taken_for_the_old_one() -> None:
    clients = Clients(os.open(os.devnull, os.O_RDONLY))
    mine = clients.thread(os.getpid())
    assert clients.thread(os.getpid()) is mine
    with subprocess.Popen(["sleep", "30"]) as other:
        clients._threads[other.pid] = ClientThread(other.pid, os.getpid(), mine.space)
        try:
            assert clients.thread(other.pid).process == other.pid
        finally:
            other.kill()
    clients.close()
