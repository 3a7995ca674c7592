"""What only the C side has: constants, threads, the GIL, memory."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import threading
import time
from math import isqrt
from pathlib import Path

import pytest

from kvmlaunch import hashing
from kvmlaunch.hashing.hasher import _batches

PAGE = 4096
ZERO = bytes(48)
NATIVE = [name for name in hashing.backends() if name != "hashlib"]
SOURCE = Path(__file__).parents[2] / "csrc" / "sha384.h"

pytestmark = pytest.mark.skipif(not NATIVE, reason="the hashing extension isn't built")


@pytest.fixture(params=NATIVE)
def hasher(request: pytest.FixtureRequest) -> hashing.Hasher:
    return hashing.hasher(request.param)


def constants(name: str) -> list[int]:
    found = re.search(rf"{name}\[\d+\] = {{(.*?)}};", SOURCE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return [int(number, 16) for number in found[1].replace(",", " ").split()]


def primes(count: int) -> list[int]:
    found: list[int] = []
    number = 2
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 1
    return found


def cube_root(number: int) -> int:
    low, high = 0, 1 << (number.bit_length() // 3 + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**3 <= number else (low, middle - 1)
    return low


def test_round_constants_when_derived_are_fractions_of_cube_roots() -> None:
    """FIPS 180-4, section 4.2.3."""
    derived = [cube_root(prime << 192) % (1 << 64) for prime in primes(80)]
    assert constants("sha512_k") == derived


def test_start_values_when_derived_are_fractions_of_square_roots() -> None:
    """FIPS 180-4, section 5.3.4."""
    derived = [isqrt(prime << 128) % (1 << 64) for prime in primes(16)[8:]]
    assert constants("sha384_start") == derived


def test_batches_when_cut_are_no_larger_than_c_takes() -> None:
    from kvmlaunch.hashing._ext import lib

    assert [count for _, count in _batches(10_000)] == [4096, 4096, 10_000 - 8192]
    assert lib.KL_HASH_MAX_PAGES == 4096


def test_source_when_the_machine_is_no_x86_compiles(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no cc")
    words = ["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-DKL_HASH_PORTABLE", "-c"]
    source = SOURCE.with_name("hashing.c")
    subprocess.run([*words, "-o", tmp_path / "hashing.o", source], check=True, timeout=60)


def test_gil_when_pages_are_hashed_is_free(hasher: hashing.Hasher) -> None:
    """Another thread counts on while a batch is in C, if the machine has time for it."""
    data = os.urandom(4096 * PAGE)
    counted: list[float] = []
    stop = threading.Event()

    def count() -> None:
        while not stop.wait(1e-5):
            counted.append(time.perf_counter())

    def seen() -> bool:
        begin = time.perf_counter()
        hasher.extend(ZERO, 1, 0, data, 4096, threads=1)
        end = time.perf_counter()
        # Well inside the call, where the GIL isn't free for any other reason.
        margin = (end - begin) / 4
        return any(begin + margin < at < end - margin for at in counted)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        assert any(seen() for _ in range(100))
    finally:
        stop.set()
        counter.join()


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_when_a_call_returns_have_ended(hasher: hashing.Hasher, threads: int) -> None:
    before = set(os.listdir("/proc/self/task"))  # a thread of another test may be on its way out
    hasher.extend(ZERO, 1, 0, os.urandom(512 * PAGE), 512, threads=threads)
    assert set(os.listdir("/proc/self/task")) <= before


def test_fork_when_threads_have_been_used_hashes_in_the_child(hasher: hashing.Hasher) -> None:
    data = os.urandom(256 * PAGE)
    expected = hasher.extend(ZERO, 1, 0, data, 256, threads=4)
    child = os.fork()
    if not child:
        os._exit(0 if hasher.extend(ZERO, 1, 0, data, 256, threads=4) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_extend_when_called_from_many_threads_gives_one_digest(hasher: hashing.Hasher) -> None:
    data = bytes([value for value in range(64) for _ in range(PAGE)])
    found: list[bytes] = []
    callers = [
        threading.Thread(
            target=lambda: found.append(hasher.extend(ZERO, 1, 0, data, 64, threads=2))
        )
        for _ in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [hashing.hasher("hashlib").extend(ZERO, 1, 0, data, 64)] * 8


@pytest.mark.parametrize("threads", [1, 2])
def test_extend_when_a_buffer_is_large_copies_no_page(hasher: hashing.Hasher, threads: int) -> None:
    """A copy of 16 MiB would be 4096 minor faults."""
    data = os.urandom(4096 * PAGE)
    hasher.extend(ZERO, 1, 0, data, 4096, threads=threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    hasher.extend(ZERO, 1, 0, data, 4096, threads=threads)
    # Of the records, 96 bytes per page, and the threads' stacks.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 300
