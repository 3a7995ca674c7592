"""Whatever is launched, the host's firmware measured what was predicted.

In the emulated machine the firmware is a fake that tells each page it measured; real
firmware only says yes or no, to the digest in an ID block. Each plan is also launched on
the simulated real_snp, so three digests are compared that share no code: the prediction, the
simulated firmware's, and the one that this kernel and its firmware arrived at.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvmlaunch.abi.kvm_sync import sregs_round_trip
from kvmlaunch.abi.reset import kvm_untouched
from kvmlaunch.errors import FirmwareError, IoctlError
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image, load_vmm
from kvmlaunch.images.vmm import BUILT_IN
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.measure import measure
from kvmlaunch.launch.pagelog import open_log
from kvmlaunch.launch.session import Session
from kvmlaunch.platforms import profile_for
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import RealPlatform
from tests.cli.command import page_events
from tests.idblock import id_auth, id_block
from tests.images.builders import ovmf as synthetic_ovmf
from tests.launch.cases import IMAGES, STATES, image_plan, state_named
from tests.launch.rig import PAGE, plan, small_plan, step


def confirmed(launch_plan: LaunchPlan, real_snp: RealPlatform) -> None:
    """Launch on both hosts; prediction, records and firmware must agree."""
    predicted = measure(launch_plan).digest
    # The simulated host has its C-bit elsewhere; what it measures is the same.
    anywhere = replace(launch_plan, cbitpos=None)
    with SimPlatform(profile_for(anywhere)) as simulated, Guest(anywhere, simulated) as guest:
        guest.launch(retry_cpuid=True)
        assert simulated.launch_digest(guest.vm.fd) == predicted
    with Guest(launch_plan, real_snp) as guest:
        guest.launch(retry_cpuid=True)
        report = guest.witness()
        assert guest.digest == predicted
    if report.agrees is None:
        signed(launch_plan, predicted, real_snp)
    else:
        assert report.agrees, str(report)


def signed(launch_plan: LaunchPlan, digest: bytes, real_snp: RealPlatform) -> None:
    """Launch under an ID block with this digest: firmware itself compares."""
    block = id_block(digest)
    with Guest(replace(launch_plan, id_block=block, id_auth=id_auth(block)), real_snp) as guest:
        guest.launch(retry_cpuid=True)


@pytest.mark.parametrize("vcpus", [1, 2, 3, 4])
@pytest.mark.parametrize("image", IMAGES)
def test_digest_when_an_image_is_launched_is_the_predicted(
    real_snp: RealPlatform, cbitpos: int, image: str, vcpus: int
) -> None:
    confirmed(image_plan(image, vcpus=vcpus, cbitpos=cbitpos), real_snp)


def test_digest_when_debians_ovmf_is_launched_is_the_predicted(
    real_snp: RealPlatform, ovmf: Path
) -> None:
    confirmed(load_image(ovmf, PlanOptions(vcpus=2)), real_snp)


@pytest.mark.parametrize("name", BUILT_IN)
def test_digest_when_the_vmm_is_another_is_the_predicted(real_snp: RealPlatform, name: str) -> None:
    """So KVM measures each VMM's registers as that VMM's profile has them."""
    options = PlanOptions(vcpus=1 if name == "krun" else 2, vmm=load_vmm(name))
    confirmed(load_image(synthetic_ovmf(), options).on_kvm(), real_snp)


@pytest.mark.parametrize("vcpus", [1, 4])
def test_digest_when_hello_is_launched_is_the_predicted(
    real_snp: RealPlatform, guests: Path, vcpus: int
) -> None:
    confirmed(load_image(guests / "hello.elf", PlanOptions(vcpus=vcpus)), real_snp)


@pytest.mark.parametrize("policy", [0x30000, 0xB0000, 0x30137])
def test_digest_when_every_page_type_is_launched_is_the_predicted(
    real_snp: RealPlatform, policy: int
) -> None:
    confirmed(small_plan(vcpus=2, policy=policy), real_snp)


@pytest.mark.parametrize("pages", [256, 257])
def test_digest_when_a_range_needs_several_calls_is_the_predicted(
    real_snp: RealPlatform, pages: int
) -> None:
    content = [bytes([n & 0xFF]) * PAGE for n in range(pages)]
    confirmed(plan([step(0x1000, content)], memory=[(0, 512 * PAGE)]), real_snp)


@pytest.mark.parametrize("name", STATES)
def test_digest_when_the_state_is_not_the_default_is_the_predicted(
    real_snp: RealPlatform, cbitpos: int, name: str
) -> None:
    launch_plan = plan([step(0x1000, [b"x" * PAGE])], vcpus=2, state=state_named(name, cbitpos))
    confirmed(launch_plan, real_snp)


def test_digest_when_vcpus_are_untouched_is_the_predicted(real_snp: RealPlatform) -> None:
    confirmed(plan([], vcpus=3, state=kvm_untouched(sev_features=1)), real_snp)


def test_digest_when_debug_swap_is_asked_for_is_the_predicted(real_snp: RealPlatform) -> None:
    confirmed(small_plan(sev_features=0x21), real_snp)


def test_digest_when_registers_go_round_trip_is_the_predicted(real_snp: RealPlatform) -> None:
    """GET_SREGS and SET_SREGS alone change it, as kvm_sync says."""
    state = kvm_untouched(sev_features=1)
    launch_plan = plan([], state=state)
    predicted = measure(replace(launch_plan, vcpus=(sregs_round_trip(state),))).digest
    block = id_block(predicted)
    with Guest(replace(launch_plan, id_block=block, id_auth=id_auth(block)), real_snp) as guest:
        guest.vcpus[0].set_sregs(guest.vcpus[0].get_sregs())
        guest.launch()
    assert predicted != measure(launch_plan).digest


def test_id_block_when_it_holds_the_predicted_digest_is_accepted(real_snp: RealPlatform) -> None:
    launch_plan = small_plan()
    signed(launch_plan, measure(launch_plan).digest, real_snp)


def test_id_block_when_it_holds_another_digest_is_refused(real_snp: RealPlatform) -> None:
    with pytest.raises(FirmwareError, match=r"SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measure"):
        signed(small_plan(), bytes(range(48)), real_snp)


def test_launch_when_the_kernel_lacks_a_feature_names_it(real_snp: RealPlatform) -> None:
    with pytest.raises(IoctlError, match=r"KVM_SEV_INIT2 .*vmsa_features 0x8000000000000000 "):
        Guest(small_plan(sev_features=1 | 1 << 63), real_snp)


def test_page_log_when_launched_has_the_same_pages_as_on_the_simulated_host(
    real_snp: RealPlatform, tmp_path: Path
) -> None:
    logs = []
    with SimPlatform("6.12") as simulated:
        for platform in (real_snp, simulated):
            logs.append(tmp_path / f"{platform.name}.jsonl")
            with (
                open_log(str(logs[-1])) as log,
                Session(small_plan(vcpus=2), platform, log=log) as session,
            ):
                session.launch(retry_cpuid=True)
    real, sim = map(page_events, logs)
    assert real == sim
    assert len(real) == 8
