"""What the launcher makes of a firmware that refuses: the same over this kernel as simulated.

The fake firmware of tests/mainline takes the same orders as the simulated host; between it
and the launcher is the kernel's own error handling: partial progress, write-back of the
firmware word and the CPUID page, pages given back, a dead VM.
"""

from __future__ import annotations

import re

import pytest

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.images import LaunchPlan
from kvmlaunch.launch.guest import Guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Platform, RealPlatform
from tests.host import require
from tests.idblock import id_auth, id_block
from tests.launch.rig import PAGE, plan, small_plan, step
from tests.mainline.fake import FakeHost

FIRMWARE = (
    *("SNP_GCTX_CREATE:fw=0x0a", "SNP_LAUNCH_START:fw=7", "SNP_ACTIVATE:fw=0x12"),
    *("SNP_LAUNCH_UPDATE:fw=0x1a", "SNP_LAUNCH_UPDATE:fw=0x1a@2+", "SNP_LAUNCH_UPDATE:fw=0x1a@3"),
    *("SNP_LAUNCH_UPDATE:fw=0x16@5", "SNP_LAUNCH_UPDATE:fw=0x16@5+", "SNP_LAUNCH_UPDATE:fw=9@7"),
    *("SNP_LAUNCH_UPDATE:fw=9@8", "SNP_LAUNCH_FINISH:fw=11", "SNP_LAUNCH_FINISH:fw=0x16"),
)
LOST = ("SNP_PAGE_RECLAIM:fail", "SNP_PAGE_RECLAIM:fail@2", "SNP_PAGE_RECLAIM:fail@1+")
CPUID = (
    *("CPUID:correct=0x1.ecx", "CPUID:correct=0x1.ecx@2", "CPUID:correct=0x1.ecx@1+"),
    *("CPUID:correct=0x80000001.edx", "CPUID:correct=0xd/1.eax"),
)


@pytest.fixture
def fake(real_snp: RealPlatform) -> FakeHost:
    """The emulated machine: real firmware takes no orders."""
    if not isinstance(real_snp, FakeHost):
        require("snp-fake", "real firmware can't be told to fail")
    return real_snp


# The two hosts have different processors: what is sent and corrected differs, not which bits.
_REGISTER = re.compile(r"sent 0x[0-9a-f]+, corrected 0x[0-9a-f]+")


def course(launch_plan: LaunchPlan, platform: Platform, *, retry: bool) -> list[str]:
    """What the launcher says of a launch, step by step, and of the VM afterwards."""
    said: list[str] = []
    with Guest(launch_plan, platform) as guest:
        try:
            guest.start()
            said += map(str, guest.update(retry_cpuid=retry))
            said += map(str, guest.finish())
        except KvmLaunchError as error:
            said.append(f"{type(error).__name__}: {error}")
        said += [f"corrected: {line}" for e in guest.corrections for line in e.differences()]
        said.append(f"dead: {guest.vm.is_dead()}")
    return [_REGISTER.sub("sent and corrected", line) for line in said]


def same(launch_plan: LaunchPlan, fake: FakeHost, *orders: str, retry: bool = False) -> list[str]:
    """The course of a launch with these orders, which both hosts must give."""
    with SimPlatform("6.12", faults=orders) as simulated:
        expected = course(launch_plan, simulated, retry=retry)
    fake.order(orders)
    try:
        assert course(launch_plan, fake, retry=retry) == expected
    finally:
        fake.order(())
    return expected


@pytest.mark.parametrize("order", FIRMWARE)
def test_launch_when_firmware_refuses_a_command_says_the_same(fake: FakeHost, order: str) -> None:
    assert same(small_plan(vcpus=2), fake, order) != same(small_plan(vcpus=2), fake)


def test_launch_when_firmware_refuses_one_page_inside_a_call_goes_on(fake: FakeHost) -> None:
    """KVM reports the progress before it, and the launcher sends the rest again."""
    pages = plan([step(0x1000, [bytes([n]) * PAGE for n in range(6)])])
    said = same(pages, fake, "SNP_LAUNCH_UPDATE:fw=0x1a@4")
    assert said == same(pages, fake)


@pytest.mark.parametrize("order", LOST)
def test_launch_when_a_page_can_not_be_reclaimed_says_the_same(fake: FakeHost, order: str) -> None:
    said = same(small_plan(), fake, "SNP_LAUNCH_UPDATE:fw=0x1a@1+", order)
    assert said[-2].startswith(("VmDeadError", "FirmwareError"))


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("order", CPUID)
def test_launch_when_firmware_corrects_the_cpuid_page_says_the_same(
    fake: FakeHost, order: str, *, retry: bool
) -> None:
    said = same(small_plan(), fake, order, retry=retry)
    assert said[-1] == "dead: False"


def test_launch_when_the_id_block_has_another_digest_says_the_same(fake: FakeHost) -> None:
    block = id_block(bytes(range(48)))
    said = same(small_plan(id_block=block, id_auth=id_auth(block)), fake)
    assert said[-2].startswith(
        "FirmwareError: SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'"
    )


def test_launch_when_the_id_block_has_another_policy_says_the_same(fake: FakeHost) -> None:
    block = id_block(bytes(48))
    launch_plan = small_plan(id_block=block, id_auth=id_auth(block), policy=0xB0000)
    assert same(launch_plan, fake)[-2].startswith("FirmwareError: SNP_LAUNCH_FINISH ret=-5 ")
