"""Pointers and numbers that lead nowhere: the kernel's errors, and no harm done."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlaunch.uapi import ARGUMENT
from tests.cli.command import events
from tests.supervisor.rig import SOURCES, WELL, Ran

Client = Callable[..., Ran]


@pytest.mark.parametrize(
    "what",
    [
        "structs",  # of each ioctl: unmapped, the kernel's, across the end of memory, read-only
        "lists",  # the head is there, the list isn't
        "nested",  # a pointer in a struct; a path
        "numbers",  # a descriptor in a struct
    ],
)
def test_calls_fail_as_the_kernels_when_pointers_are_wild(client: Client, what: str) -> None:
    assert client("faults", what) == WELL


def test_every_ioctl_with_a_struct_gets_a_wild_one() -> None:
    named = re.findall(r"\w+", (SOURCES / "faults.c").read_text())
    with_struct = {name for name, struct in ARGUMENT.items() if struct}
    assert with_struct.difference(named) == {"KVM_X86_SET_MCE"}  # nothing is behind it


def test_a_launch_is_in_the_log_when_its_client_could_not_be_told_that_it_began(
    client: Client, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert client("faults", "untold", options=("--log", str(log))) == WELL
    assert [event["event"] for event in events(log)] == ["header", "finish"]
