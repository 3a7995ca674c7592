"""Launches with another VMM's page order, page types and register values, on this KVM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.abi.kvm_sync import synced
from kvmlaunch.errors import FormatError
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image, load_vmm
from kvmlaunch.images.vmm import BUILT_IN
from kvmlaunch.images.vmm_file import parse_vmm
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.measure import measure, page_records
from kvmlaunch.sim import SimPlatform
from tests.images.builders import ovmf, svsm_image
from tests.launch.rig import small_plan

ODD = {
    "format": "kvmlaunch.vmm/1",
    "name": "odd",
    "base": "QEMU",
    "measured": "as-given",
    "vmsa_gpa": "0xffffffffff000",
    "registers": {"tsc_aux": 7, "dr7": "0x455", "s_cet": 1},
}


def odd() -> Any:
    return parse_vmm(json.dumps(ODD).encode())


def ovmf_plan(vmm: Any, vcpus: int = 1, **options: Any) -> LaunchPlan:
    return load_image(ovmf(), PlanOptions(vmm=vmm, vcpus=vcpus, **options))


@pytest.mark.parametrize("name", BUILT_IN)
def test_launch_when_the_vmm_is_another_is_what_firmware_measures(name: str) -> None:
    plan = ovmf_plan(load_vmm(name), vcpus=1 if name == "krun" else 3)
    with SimPlatform() as platform, Guest(plan, platform) as guest:
        guest.launch(retry_cpuid=True)
        assert guest.witness().agrees is True
        assert guest.digest == platform.launch_digest(guest.vm.fd) == measure(guest.plan).digest


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "gce-genoa"])
def test_prediction_when_launched_here_is_the_vmms_own(name: str) -> None:
    """KVM carries all registers of each VMM, so only the GPA of VMSAs can differ."""
    plan = ovmf_plan(load_vmm(name), vcpus=1 if name == "krun" else 3)
    assert measure(plan.on_kvm()).digest == measure(plan).digest


def test_prediction_when_vmsas_are_elsewhere_is_not_what_kvm_measures() -> None:
    plan = ovmf_plan(load_vmm("gce-genoa"))
    assert measure(plan.on_kvm()).digest == measure(ovmf_plan(load_vmm("gce"))).digest
    assert measure(plan).digest != measure(plan.on_kvm()).digest


def test_records_when_given_hold_the_vmsa_as_it_is() -> None:
    plan = ovmf_plan(odd(), vcpus=2)
    assert plan.vcpus[1].tsc_aux == 7
    for record in list(page_records(plan))[-2:]:
        assert (record.gpa, record.origin) == (0xFFFFFFFFFF000, "vmm:odd")


def test_states_when_kvm_would_refuse_them_are_measured_where_they_are_given() -> None:
    plan = ovmf_plan(odd())
    measure(plan)
    with pytest.raises(FormatError, match="dr7 0x455 has bits besides 0x400"):
        measure(plan.on_kvm())
    with pytest.raises(FormatError, match="dr7 0x455 has bits besides 0x400"):
        synced(plan.vcpus[0], sev_features=1)


def test_guest_when_the_plan_only_predicts_is_refused() -> None:
    known = ovmf_plan(None, firmware_digest=bytes(range(48)))
    with SimPlatform() as platform, pytest.raises(FormatError, match="it can't be launched"):
        Guest(known, platform)


def test_guest_when_features_lack_snp_active_is_refused() -> None:
    with SimPlatform() as platform, pytest.raises(FormatError, match="0x20 lack bit 0"):
        Guest(replace(small_plan(), sev_features=0x20), platform)


@pytest.mark.parametrize("features", [0, 0x20, 0xFFFF_FFFF_FFFF_FFFE])
def test_features_when_they_lack_snp_active_are_measured_as_given(features: int) -> None:
    """The only difference to the same with bit 0 is that field."""
    from kvmlaunch.images.sync_vmsas import finish_vmsas

    ((_, vmsa),) = finish_vmsas(ovmf_plan(None, sev_features=features))
    ((_, usual),) = finish_vmsas(ovmf_plan(None, sev_features=1))
    assert vmsa == usual.replace(sev_features=features)


@pytest.mark.parametrize("vmm", ["QEMU", "QEMU-before-6.10"])
def test_launch_when_there_is_an_svsm_is_what_firmware_measures(vmm: str) -> None:
    plan = ovmf_plan(load_vmm(vmm), vcpus=2, svsm=svsm_image(), vars_size=0x2000)
    with SimPlatform() as platform, Guest(plan, platform) as guest:
        guest.launch(retry_cpuid=True)
        assert guest.witness().agrees is True
        assert guest.digest == measure(plan).digest


def test_profile_when_it_is_in_a_file_can_be_launched(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**ODD, "registers": {"rsi": 1}, "pages": ["metadata", "firmware"]}))
    plan = ovmf_plan(load_vmm(str(path)))
    with SimPlatform() as platform, Guest(plan, platform) as guest:
        guest.launch(retry_cpuid=True)
        assert guest.witness().agrees is True
        assert guest.records[-2].label == "firmware"
