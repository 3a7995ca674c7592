"""Guests that use their local APICs, in plain VMs on a real KVM and on the simulated host.

Their sources say what is checked; a check that fails ends the guest and is in the outcome.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Platform
from tests.host import require_simulated_cpu

TIMEOUT = 60.0
HARDWARE = ("/sys/module/kvm_amd", "/sys/module/kvm_intel")

TIMER = "once\nagain and again\nnot too often\nnot while masked\nwithout HLT\n"
PRIORITY = "priorities\ntask priority\noff\nNMI\n"


def run(
    image: Path,
    platform: Platform,
    *,
    confidential: bool = False,
    vcpus: int = 1,
    timeout: float = TIMEOUT,
) -> tuple[Outcome, str]:
    """A guest with in-kernel APICs, to its end: outcome and console."""
    options = PlanOptions(memory=16 << 20, confidential=confidential, vcpus=vcpus)
    plan = dataclasses.replace(load_image(image, options), apic=True)
    console = bytearray()
    with Guest(plan, platform) as guest:
        if confidential:
            guest.launch()
        outcome = run_guest(guest, console=console.extend, timeout=timeout)
    return outcome, console.decode()


def test_timer_when_set_interrupts_as_its_mode_says(
    test_guests: Path, kind: tuple[Platform, bool]
) -> None:
    platform, confidential = kind
    outcome, console = run(test_guests / "apic_timer.elf", platform, confidential=confidential)
    assert (console, outcome.kind, outcome.ok) == (TIMER, "exit-port", True), outcome


def test_interrupts_when_several_wait_come_by_priority(
    test_guests: Path, kind: tuple[Platform, bool]
) -> None:
    platform, confidential = kind
    if platform.name == "kvm" and not any(map(os.path.isdir, HARDWARE)):
        pytest.skip("this KVM runs guests without SVM or VMX, and lets their interrupts wait")
    outcome, console = run(test_guests / "apic_priority.elf", platform, confidential=confidential)
    assert (console, outcome.kind, outcome.ok) == (PRIORITY, "exit-port", True), outcome


def test_vcpus_when_sent_init_and_sipi_start(test_guests: Path, plain_host: Platform) -> None:
    outcome, console = run(test_guests / "apic_start.elf", plain_host, vcpus=4)
    here = "1 is here\n2 is here\n3 is here\n"
    assert console == here + "all were called\nand again\n", outcome
    assert (outcome.kind, outcome.ok) == ("exit-port", True)


def test_guest_when_it_waits_with_interrupts_off_runs_into_the_timeout(
    test_guests: Path, kind: tuple[Platform, bool]
) -> None:
    platform, confidential = kind
    outcome, console = run(
        test_guests / "apic_deaf.elf", platform, confidential=confidential, timeout=1
    )
    assert (console, outcome.kind) == ("good night\n", "timeout")


@pytest.mark.simulated
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_vcpus_when_seed_is_the_same_run_the_same(test_guests: Path, seed: int) -> None:
    require_simulated_cpu()
    ends = []
    for _ in range(2):
        platform = SimPlatform(seed=seed)
        outcome, console = run(test_guests / "apic_start.elf", platform, vcpus=4)
        assert outcome.ok, console
        ends.append(console)
    assert ends[0] == ends[1]
