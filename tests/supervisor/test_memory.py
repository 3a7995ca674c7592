"""Guest RAM of a client, which guests of the simulated host use as copies."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.supervisor.clients import Clients
from kvmlaunch.supervisor.memory import ClientMemory
from kvmlaunch.uapi import address_of, ffi, lib, peek
from tests.supervisor.rig import WELL, Ran

Client = Callable[..., Ran]

PAGE = 4096
BATCH = 32
"""How many pages kl_merge() reads at once."""

edits = st.dictionaries(st.integers(0, 2 * PAGE - 1), st.integers(0, 255), max_size=40)


@pytest.mark.parametrize(
    "what",
    [
        "in-turns",  # what either side wrote between two KVM_RUNs, code as well
        "structs",  # arguments of ioctls in pages that the guest uses
        "meanwhile",  # written while the guest waits for it
        "watched",  # written by the guest before it exits
        "unmapped",  # taken away while the guest is at it
        "events",  # whose stack is not there
        "read-only",  # the guest can't write where its client can't
        "two",  # two vCPUs, two threads, one page
        "busy",  # a vCPU does one thing at a time, the VM goes on
        "closed",  # the descriptors go while the guest runs
        "closed-waiting",  # and another call waits for the vCPU
        "scribbled",  # struct kvm_run is written over all the time
    ],
)
def test_guest_and_client_share_memory_when_the_guest_runs(client: Client, what: str) -> None:
    assert client("running", what) == WELL


class Sides:
    """Pages as a client has them, the copies, and what both were before."""

    def __init__(self, count: int) -> None:
        self.there, self.here, self.base = (mmap.mmap(-1, count * PAGE) for _ in range(3))
        self.table = ffi.new("struct kl_copy[]", count)
        for page, copy in enumerate(self.table):
            copy.there, copy.here, copy.base = (
                address_of(ffi.from_buffer(side)) + page * PAGE
                for side in (self.there, self.here, self.base)
            )

    def merge(self) -> Any:
        return lib.kl_merge(os.getpid(), self.table, len(self.table))


def changed(before: bytes, edits: dict[int, int]) -> bytes:
    after = bytearray(before)
    for at, value in edits.items():
        after[at] = value
    return bytes(after)


@given(st.binary(min_size=64, max_size=64), edits, edits)
def test_both_sides_get_each_others_bytes_when_they_are_merged(
    pattern: bytes, theirs: dict[int, int], ours: dict[int, int]
) -> None:
    before = pattern * (2 * PAGE // len(pattern))
    there, here = changed(before, theirs), changed(before, ours)
    sides = Sides(2)
    sides.there[:], sides.here[:], sides.base[:] = there, here, before
    merged = sides.merge()
    # A byte that the guest changed is the guest's, all others are the client's.
    expected = bytes(g if g != b else c for c, g, b in zip(there, here, before, strict=True))
    assert sides.there[:] == sides.here[:] == sides.base[:] == expected
    pages = {at // PAGE for at, value in theirs.items() if before[at] != value}
    assert (merged.changed, merged.lost) == (len(pages), 0)


def test_pages_are_lost_alone_when_they_are_gone() -> None:
    count, gone = 2 * BATCH + 3, {0, 5, BATCH - 1, BATCH, 2 * BATCH + 2}
    sides = Sides(count)
    for page in range(count):
        sides.there[page * PAGE] = sides.here[page * PAGE + 1] = 1 + page % 255
        if page in gone:
            sides.table[page].there = 0xFFFF888000000000  # the kernel's
    merged = sides.merge()
    assert {page for page in range(count) if sides.table[page].lost} == gone
    assert (merged.changed, merged.lost) == (count - len(gone), len(gone))
    for page in range(count):
        first = 0 if page in gone else 1 + page % 255
        assert sides.here[page * PAGE : page * PAGE + 2] == bytes((first, 1 + page % 255))


def test_pages_are_lost_when_they_cannot_be_written() -> None:
    sides = Sides(1)
    sides.here[8] = 1
    read_only = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ)
    sides.table[0].there = address_of(ffi.from_buffer(read_only))
    merged = sides.merge()
    assert (merged.lost, sides.table[0].lost) == (1, 1)


class OneClient:
    """This process as its own client, until it has ended."""

    def __init__(self) -> None:
        thread = SimpleNamespace(tid=os.getpid(), space=SimpleNamespace(number=1))
        self.call = SimpleNamespace(thread=thread, read=peek)
        self.alive = [thread.space]
        self.calls = 0

    def spaces(self) -> list[SimpleNamespace]:
        return self.alive

    def still_waits(self) -> bool:
        return True


def test_copies_are_dropped_when_their_process_has_ended() -> None:
    clients = OneClient()
    memory = ClientMemory(cast(Clients, clients))
    page = mmap.mmap(-1, PAGE)
    address = address_of(ffi.from_buffer(page))
    copy = memory.pin(address)
    memory.forget_dead()
    assert memory.pin(address) == copy
    clients.alive = []
    memory.forget_dead()
    page[0] = 0x5A
    assert peek(memory.pin(address), 1) == b"\x5a"


def test_a_copy_is_a_good_one_when_it_has_the_place_of_a_lost_one() -> None:
    memory = ClientMemory(cast(Clients, OneClient()))
    gone, page = mmap.mmap(-1, PAGE), mmap.mmap(-1, PAGE)
    memory.pin(address_of(ffi.from_buffer(gone)))
    gone.close()
    assert memory.sync()  # it is lost
    address = address_of(ffi.from_buffer(page))
    memory.pin(address)
    page[0] = 0x5A
    assert memory.read(address, 1) == b"\x5a"


def test_what_was_written_before_is_there_when_a_later_write_is_seen() -> None:
    """As data and then an index, by a thread that goes on while the copies are merged."""
    memory = ClientMemory(cast(Clients, OneClient()))
    pages = mmap.mmap(-1, 128 * PAGE)
    first = address_of(ffi.from_buffer(pages))
    copies = [memory.pin(address) for address in range(first, first + len(pages), PAGE)]
    data, index = (ffi.cast("uint64_t *", copies[at]) for at in (0, -1))
    written, end = memoryview(pages).cast("Q"), threading.Event()

    def write() -> None:
        for number in itertools.count(1):
            written[0] = number
            written[-PAGE // 8] = number
            if end.wait(0.01):
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(1000):
            memory.sync()
            assert data[0] >= index[0]
    finally:
        end.set()
        writer.join()
    assert index[0]
