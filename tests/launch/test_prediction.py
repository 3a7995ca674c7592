"""What is predicted is what the simulated firmware measures, whatever is launched.

The two share no hashing: the prediction is made of the plan, the other witness of the
ioctls that arrived.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvmlaunch.abi.kvm_sync import sregs_round_trip
from kvmlaunch.abi.reset import kvm_untouched
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import (
    FirmwareError,
    FormatError,
    IoctlError,
)
from kvmlaunch.images import LaunchPlan
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.measure import measure
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Call, Recorder
from tests.idblock import id_auth, id_block

from .cases import IMAGES, STATES, image_plan
from .rig import PAGE, plan, reset_state, small_plan, step

PROFILES = ["6.12", "6.18", "7.0"]
UPDATE = "KVM_SEV_SNP_LAUNCH_UPDATE"


def host_pages(guest: Guest) -> list[tuple[int, int, bytes, bytes]]:
    pages = guest.platform.measured_pages(guest.vm.fd)
    assert pages is not None
    return [tuple(page) for page in pages]  # type: ignore[misc]


def predicted_pages(guest: Guest) -> list[tuple[int, int, bytes, bytes]]:
    return [(r.type, r.gpa, r.contents, r.digest) for r in guest.records]


def agree(launch_plan: LaunchPlan, profile: str = "6.12", **sim: Any) -> None:
    """Launch, and hold prediction, records and host against each other."""
    with SimPlatform(profile, **sim) as platform, Guest(launch_plan, platform) as guest:
        guest.launch(retry_cpuid=True)
        assert predicted_pages(guest) == host_pages(guest)
        assert guest.digest == platform.launch_digest(guest.vm.fd) == measure(launch_plan).digest
        assert guest.witness().agrees is True


# Prediction and simulated firmware


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("vcpus", [1, 2, 3, 4])
@pytest.mark.parametrize("image", IMAGES)
def test_prediction_when_an_image_is_launched_is_what_firmware_measured(
    image: str, vcpus: int, profile: str
) -> None:
    agree(image_plan(image, vcpus=vcpus), profile)


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
@pytest.mark.parametrize("image", ["elf", "ovmf"])
def test_prediction_when_the_product_differs_is_what_firmware_measured(
    image: str, product: str
) -> None:
    agree(image_plan(image), product=product)


def test_prediction_when_every_page_type_is_launched_is_what_firmware_measured() -> None:
    agree(small_plan(vcpus=2))


def test_prediction_when_there_are_no_pages_is_what_firmware_measured() -> None:
    agree(plan([], vcpus=2))


@pytest.mark.parametrize("pages", [255, 256, 257, 600])
def test_prediction_when_a_range_needs_several_calls_is_what_firmware_measured(
    pages: int,
) -> None:
    content = [bytes([n & 0xFF]) * PAGE for n in range(pages)]
    agree(plan([step(0x1000, content)], memory=[(0, 1024 * PAGE)]))


def test_prediction_when_the_kernel_does_one_page_per_call_is_what_firmware_measured() -> None:
    agree(image_plan("ovmf"), faults=["SNP_LAUNCH_UPDATE:partial=1@1+"])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", STATES)
def test_prediction_when_the_state_is_not_the_default_is_what_firmware_measured(
    name: str, profile: str
) -> None:
    state = reset_state().replace(**STATES[name])
    agree(plan([step(0x1000, [b"x" * PAGE])], vcpus=2, state=state), profile)


@pytest.mark.parametrize("name", ["general", "segments", "pkru", "ymm", "x87", "syscall-msrs"])
def test_digest_when_the_state_is_not_the_default_differs_from_the_default(name: str) -> None:
    """So that the test before can't pass because the state got lost on both ways."""
    changed = plan([], state=reset_state().replace(**STATES[name]))
    with SimPlatform() as platform, Guest(changed, platform) as guest:
        guest.launch()
        assert platform.launch_digest(guest.vm.fd) != measure(plan([])).digest


@pytest.mark.parametrize("profile", PROFILES)
def test_prediction_when_a_vcpu_is_untouched_is_what_firmware_measured(profile: str) -> None:
    agree(plan([], vcpus=3, state=kvm_untouched(sev_features=1)), profile)


@pytest.mark.parametrize(
    ("profile", "features"),
    [("6.12", 0x21), ("6.18", 0x21), ("7.0", 0x21), ("6.18", 0x221), ("7.0", 0x201)],
)
def test_prediction_when_features_are_asked_for_is_what_firmware_measured(
    profile: str, features: int
) -> None:
    agree(small_plan(sev_features=features), profile)


def test_launch_when_the_kernel_lacks_a_feature_names_it() -> None:
    with (
        SimPlatform("6.12") as platform,
        pytest.raises(IoctlError, match="vmsa_features 0x200 "),
    ):
        Guest(small_plan(sev_features=0x201), platform)


@pytest.mark.parametrize(
    ("profile", "policy"),
    [(profile, policy) for profile in PROFILES for policy in (0x30000, 0xB0000, 0x30001)]
    + [("6.18", 0x130000)],
)
def test_prediction_when_the_policy_differs_is_the_same(profile: str, policy: int) -> None:
    assert measure(small_plan(policy=policy)) == measure(small_plan())
    agree(small_plan(policy=policy), profile)


def test_id_block_when_it_holds_the_predicted_digest_is_accepted() -> None:
    """Firmware itself confirms the prediction, as it would on a real host."""
    block = id_block(measure(small_plan()).digest)
    launch_plan = small_plan(id_block=block, id_auth=id_auth(block))
    with SimPlatform() as platform, Guest(launch_plan, platform) as guest:
        guest.launch()
        assert guest.state is not None
        assert guest.state.state == "Finished"


def test_id_block_when_it_holds_another_digest_shows_both() -> None:
    block = id_block(bytes(range(48)))
    launch_plan = small_plan(id_block=block, id_auth=id_auth(block))
    with (
        SimPlatform() as platform,
        Guest(launch_plan, platform) as guest,
        pytest.raises(FirmwareError) as caught,
    ):
        guest.launch()
    assert bytes(range(48)).hex() in str(caught.value)
    assert measure(launch_plan).digest.hex() in str(caught.value)


# Traps


def round_trip(state: Vmsa) -> tuple[Any, bytes, bytes]:
    """Launch with a GET/SET_SREGS round trip; the report, the host's and the predicted digest."""
    launch_plan = plan([step(0x1000, [b"x" * PAGE])], vcpus=2, state=state)
    with SimPlatform() as platform, Guest(launch_plan, platform) as guest:
        vcpu = guest.vcpus[1]
        vcpu.set_sregs(vcpu.get_sregs())
        guest.launch()
        host = platform.launch_digest(guest.vm.fd)
        assert host is not None
        return guest.witness(), host, guest.digest


def test_sregs_round_trip_when_the_vcpu_is_as_kvm_made_it_changes_the_hosts_digest() -> None:
    _, host, predicted = round_trip(kvm_untouched(sev_features=1))
    assert host != predicted


def test_sregs_round_trip_when_it_changed_the_digest_is_found_in_that_vcpus_record() -> None:
    report, _, _ = round_trip(kvm_untouched(sev_features=1))
    assert report.agrees is False
    assert report.first_difference.predicted.vcpu == 1


def test_sregs_round_trip_when_predicted_gives_the_hosts_digest() -> None:
    state = kvm_untouched(sev_features=1)
    _, host, _ = round_trip(state)
    launch_plan = plan([step(0x1000, [b"x" * PAGE])], vcpus=2, state=state)
    expected = replace(launch_plan, vcpus=(state, sregs_round_trip(state)))
    assert measure(expected).digest == host


def test_sregs_round_trip_when_the_state_is_qemus_changes_nothing() -> None:
    report, host, predicted = round_trip(reset_state())
    assert (report.agrees, host) == (True, predicted)


def test_launch_when_states_are_applied_reads_no_registers() -> None:
    calls: list[Call] = []
    with SimPlatform() as host, Guest(small_plan(), Recorder(host, calls.append)) as guest:
        guest.launch()
    got = {call.name for call in calls if call.name.startswith("KVM_GET_")}
    assert got == {"KVM_GET_SUPPORTED_CPUID", "KVM_GET_VCPU_MMAP_SIZE"}


def test_measured_vmsa_when_debug_registers_would_be_refused_is_refused_before_the_vm() -> None:
    with SimPlatform() as platform:
        guest = Guest(plan([], state=reset_state().replace(dr7=0x401)), platform)
        with guest, pytest.raises(FormatError, match="dr7"):
            guest.launch()
