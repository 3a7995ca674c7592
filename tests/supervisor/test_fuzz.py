"""Random calls with random arguments: each is answered, and the supervisor lives on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest

from kvmlaunch.uapi import ARGUMENT
from tests.supervisor.rig import SOURCES, Ran

Client = Callable[..., Ran]

CALLS = int(os.environ.get("KVMLAUNCH_FUZZ_CALLS", "1000"))
"""Per thread and seed; a thousand take a second or two."""
SEEDS = int(os.environ.get("KVMLAUNCH_FUZZ_SEEDS", "1"))
"""Per kernel."""
THREADS = 2


@pytest.mark.timeout(0 if CALLS > 10_000 else 60)
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kernel", ["6.12", "7.0,product=Genoa", "vmsa-page", "direct-vmsa"])
def test_every_call_is_answered_when_all_are_random(client: Client, kernel: str, seed: int) -> None:
    ran = client("fuzz", "all", seed, CALLS, options=("--sim", kernel))
    assert ran == Ran(0, f"answered {THREADS * CALLS}\n")


def test_every_ioctl_is_among_the_random_ones() -> None:
    named = re.findall(r"\w+", (SOURCES / "fuzz.c").read_text())
    assert not set(ARGUMENT).difference(named)
