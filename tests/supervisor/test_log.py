"""What `kvmlaunch sim` says of its program's calls: the page log of its launches, and -v."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

from tests.cli.command import command, events
from tests.supervisor.rig import WELL, Ran, run

Client = Callable[..., Ran]

PAGE = 4096


def test_log_tells_guests_apart_when_two_are_launched_in_turns(
    client: Client, clients: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    ran = client("launches", "two", options=("--log", str(log)))
    assert (ran.code, ran.err) == (0, "")
    first, second = (int(address, 16) for address in ran.out.split())
    shown = [
        (event["event"], event.get("vm"), event.get("seq"), event.get("origin"))
        for event in events(log)
    ]
    assert shown == [
        ("header", None, None, None),
        ("header", 1, None, None),
        ("page", 1, 0, f"client+{second + 1 * PAGE:#x}"),
        ("page", 1, 1, f"client+{second + 2 * PAGE:#x}"),
        ("page", None, 0, f"client+{first + 1 * PAGE:#x}"),
        ("page", None, 1, f"client+{first + 2 * PAGE:#x}"),
        ("page", 1, 2, "client"),  # a ZERO page has no source
        ("finish", None, None, None),
        ("vmsa", 1, 3, "kvm-sync"),
        ("finish", 1, None, None),
    ]
    for vm, pages in ((None, 2), (1, 4)):
        mine = [event for event in events(log) if event.get("vm") == vm]
        assert (mine[0]["image"], mine[0]["vmsa_mode"]) == (str(clients / "launches"), "client")
        assert (mine[-1]["pages"], mine[-1]["predicted"]) == (pages, False)
        assert mine[-1]["digest"] == mine[-2]["digest"]


def test_failed_calls_are_told_when_it_is_verbose(clients: Path) -> None:
    program = clients / "faults"
    ran = run(command("-v", "sim", "--", program, "untold"))
    assert (ran.code, ran.out) == (0, "")
    assert re.sub(r"thread \d+", "thread N", ran.err).splitlines() == [
        f"platform sim (6.12): a simulated host, for {program} alone",
        "thread N: KVM_SEV_SNP_LAUNCH_START ret=-14 (Bad address) fw_error=0",
        "thread N: KVM_SEV_SNP_LAUNCH_FINISH ret=-22 (Invalid argument) fw_error=0",
    ]


def test_every_call_is_in_the_log_when_asked_for(client: Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert client("faults", "untold", options=("--log", str(log), "--ioctls")) == WELL
    assert [(event["name"], event["errno"]) for event in events(log) if "errno" in event] == [
        ("open", 0),
        ("KVM_CREATE_VM", 0),
        ("KVM_SEV_INIT2", 0),
        ("open", 0),
        ("KVM_SEV_SNP_LAUNCH_START", errno.EFAULT),
        ("KVM_SEV_SNP_LAUNCH_FINISH", errno.EINVAL),
        ("KVM_SEV_SNP_LAUNCH_FINISH", 0),
    ]
