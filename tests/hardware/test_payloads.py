"""The selftest's payloads on the real path, with VMSAs that KVM makes of vCPU registers."""

from __future__ import annotations

import pytest

from kvmlaunch.selftest import payloads
from kvmlaunch.uapi import RealPlatform
from tests.payloads import payload_plan, report_of, run_payload


@pytest.mark.parametrize("bl", [0, 0xA5])
def test_report_bl_when_run_reports_the_register(real_snp: RealPlatform, bl: int) -> None:
    outcome = run_payload(payload_plan(payloads.report_bl(bl), cbitpos=None), real_snp)
    assert report_of(outcome) == (0, 0xE100 | bl << 16)


def test_state_when_reported_is_the_one_that_was_set(real_snp: RealPlatform, cbitpos: int) -> None:
    state = payloads.report_vmsa_state(cbitpos)
    checksum = payloads.state_checksum(state)
    outcome = run_payload(payload_plan(state, cbitpos=cbitpos), real_snp)
    assert report_of(outcome) == (0, checksum << 32 | (checksum & 0xFF) << 16 | 0xE100)


def test_ap_when_started_by_the_guest_reports_itself(real_snp: RealPlatform, cbitpos: int) -> None:
    states = payloads.start_ap(cbitpos), payloads.report_bl(0x11)
    outcome = run_payload(payload_plan(*states, cbitpos=cbitpos, apic=True), real_snp)
    assert report_of(outcome) == (1, 0xA9E100)


def test_apic_ids_when_asked_for_are_counted_or_not_offered(
    real_snp: RealPlatform, cbitpos: int
) -> None:
    states = [payloads.apic_ids(cbitpos)] * 2
    outcome = run_payload(payload_plan(*states, cbitpos=cbitpos, apic=True), real_snp)
    vcpu, report = report_of(outcome)
    assert (vcpu, report & 0xFFFFFFFF) in ((0, 0x2E100), (0, 0xE6E100))
