"""Guests of the cases that run one: the payloads, and what they report."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import IoctlError
from kvmlaunch.images import LaunchPlan, MemoryRegion, PageRange, Piece, VmsaMode
from kvmlaunch.kvm import Vcpu
from kvmlaunch.kvm.exits import Exit, InterruptedExit, RetryExit, SystemEventExit
from kvmlaunch.kvm.system import cbitpos
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import run_guest
from kvmlaunch.selftest import payloads
from kvmlaunch.selftest.case import Case, Failure
from kvmlaunch.uapi import lib

__all__ = ["TIMEOUT", "VMSA_GPA", "c_bit", "launch", "payload_plan", "report", "run_alone"]

VMSA_GPA = payloads.BASE + 0x10000
"""Where the VMSA of the first vCPU is."""

TIMEOUT = 30.0
"""Seconds that a guest may take."""

_SIZE = 0x20000
_TRIES = 100


def c_bit(t: Case) -> int:
    """The host's C-bit, which page tables need. Raises Skip where its CPUID doesn't tell."""
    position = cbitpos(t.host.cpuid)
    if position is None:
        t.skip("this host's CPUID doesn't tell where the C-bit is")
    return position


def payload_plan(
    states: Sequence[Vmsa], mode: str, *, c_bit: int = 0, apic: bool = False
) -> LaunchPlan:
    """The payloads' pages, and a vCPU for each state; a VMSA page for the first (not in sync)."""
    pages = [_page(gpa, page, PageType.NORMAL) for gpa, page in payloads.build(c_bit).items()]
    bindings: Mapping[int, int] = {}
    if mode != VmsaMode.SYNC:
        pages.append(_page(VMSA_GPA, states[0].encode(), PageType.VMSA))
        bindings = {0: VMSA_GPA}
    return LaunchPlan(
        image="payload",
        image_type="flat",
        data=memoryview(b""),
        memory=(MemoryRegion(payloads.BASE, _SIZE, "ram"),),
        steps=tuple(pages),
        vcpus=tuple(states),
        apic=apic,
        vmsa_mode=VmsaMode(mode),
        bindings=bindings,
    )


def launch(
    t: Case, plan: LaunchPlan, *, before: Callable[[Guest], object] = lambda guest: None
) -> Guest:
    """Launch it, closed with the case; the host measured what was planned, if it can be asked.

    ``before`` is called when it is built, before SNP_LAUNCH_START.
    """
    guest = t.stack.enter_context(Guest(plan, t.host.platform, proposal=t.host.proposal))
    before(guest)
    guest.launch()
    witness = guest.witness()
    t.expect(witness.agrees is not False, str(witness))
    return guest


def report(t: Case, guest: Guest) -> tuple[int | None, int]:
    """Run it to its end: the vCPU that asked for it, and the word that it told."""
    outcome = run_guest(guest, console=lambda text: None, timeout=TIMEOUT)
    if outcome.kind == "no-cpu":
        t.skip(outcome.detail)
    t.expect(_is_report(outcome.exit), f"the guest's end: expected its report, got {outcome}")
    assert isinstance(outcome.exit, SystemEventExit)
    return outcome.vcpu, outcome.exit.data[0]


def run_alone(t: Case, vcpu: Vcpu) -> Exit:
    """Run one vCPU to its next exit that isn't a mere retry."""
    for _ in range(_TRIES):
        try:
            exit_ = vcpu.run()
        except IoctlError as error:
            if error.errno == errno.ENOSYS:
                t.skip(error.explanation)
            raise
        if exit_ is not None and not isinstance(exit_, (RetryExit, InterruptedExit)):
            return exit_
    raise Failure(f"KVM_RUN: expected an exit, got none in {_TRIES} calls")


def _is_report(exit_: Exit | None) -> bool:
    return isinstance(exit_, SystemEventExit) and exit_.type == lib.KVM_SYSTEM_EVENT_SEV_TERM


def _page(gpa: int, data: bytes, kind: PageType) -> PageRange:
    piece = Piece(0, memoryview(data), "kvmlaunch:selftest")
    return PageRange(gpa, PAGE_SIZE, kind, f"payload {gpa:#x}", "kvmlaunch:selftest", (piece,))
