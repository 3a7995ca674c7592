"""The selftest's payloads, launched by kvmlaunch itself, with VMSAs that KVM makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images import LaunchPlan
from kvmlaunch.kvm.exits import SystemEventExit
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.selftest import payloads
from kvmlaunch.uapi import Platform, lib
from tests.launch.rig import plan, step

TIMEOUT = 40.0
MEMORY = ((payloads.BASE, 0x10000),)


def payload_plan(
    *states: Vmsa, cbitpos: int | None, apic: bool = False, without: Collection[int] = ()
) -> LaunchPlan:
    """Every page of the payloads but ``without``, each a step, and a vCPU for each state."""
    steps = [
        step(gpa, [page], label=f"payload{gpa:x}")
        for gpa, page in payloads.build(cbitpos or 0).items()
        if gpa not in without
    ]
    made = plan(steps, memory=MEMORY, apic=apic, cbitpos=cbitpos)
    return dataclasses.replace(made, vcpus=states)


def run_payload(launch_plan: LaunchPlan, platform: Platform) -> Outcome:
    """Launch and run it."""
    with Guest(launch_plan, platform) as guest:
        guest.launch()
        return run_guest(guest, console=lambda text: None, timeout=TIMEOUT)


def report_of(outcome: Outcome) -> tuple[int | None, int]:
    """vCPU that asked for the termination, and the GHCB MSR's value."""
    exit_ = outcome.exit
    assert isinstance(exit_, SystemEventExit), outcome
    assert exit_.type == lib.KVM_SYSTEM_EVENT_SEV_TERM
    return outcome.vcpu, exit_.data[0]
