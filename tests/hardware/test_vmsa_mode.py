"""VMSAs of user space on a real kernel: what it offers, found by trying, and launched as predicted.

Mainline, also that of the emulated machine, offers nothing: then KVM makes the VMSAs.
"""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.errors import IoctlError, MissingCapability
from kvmlaunch.images import PlanOptions, VmsaChoice, VmsaMode, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.vmsa_mode import probe_vmsa_mode, settle_vmsa_mode
from kvmlaunch.uapi import RealPlatform
from tests.hardware.test_launch import confirmed

HALT = b"\xf4"
EDITED = VmsaChoice(gpa=0x9000, edits=(("rbx", 7), ("cr2", 5)))


def options(**more: object) -> PlanOptions:
    return PlanOptions(memory=1 << 20, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("vcpus", [1, 2])
def test_vmsa_when_the_kernel_is_asked_is_launched_in_the_best_mode_as_predicted(
    real_snp: RealPlatform, vcpus: int
) -> None:
    plan = load_image(HALT, options(vcpus=vcpus, vmsas=(EDITED,)))
    settled = settle_vmsa_mode(plan, real_snp, allow_digest_change=True)
    assert settled.plan.vmsa_mode is probe_vmsa_mode(real_snp).mode
    confirmed(settled.plan, real_snp)
    if settled.plan.vmsa_mode is VmsaMode.SYNC:
        assert settled.changes[0] == (
            "vCPU 0: KVM can't carry cr2 (offset 0x240): 0x5 in the VMSA, 0x0 measured"
        )


@pytest.fixture
def mainline(real_snp: RealPlatform) -> RealPlatform:
    """A kernel without the proposals."""
    if probe_vmsa_mode(real_snp).mode is not VmsaMode.SYNC:
        pytest.skip("this kernel takes VMSAs from user space")
    return real_snp


def test_vmsa_when_mainline_would_change_the_digest_is_refused(mainline: RealPlatform) -> None:
    with pytest.raises(MissingCapability, match=r"VMSAs of user space .* gives EINVAL\), needed"):
        settle_vmsa_mode(load_image(HALT, options(vmsas=(EDITED,))), mainline)


def test_mode_page_when_mainline_refuses_the_page_names_it(mainline: RealPlatform) -> None:
    plan = load_image(HALT, options(vmsa_mode="page"))
    with Guest(plan, mainline) as guest:
        guest.start()
        with pytest.raises(IoctlError, match=r"gpa=0x2000 type=0x2") as caught:
            list(guest.update())
        assert caught.value.errno == errno.EINVAL
        # What firmware measured before is still the whole launch.
        assert [record.gpa for record in guest.records] == [0x1000]


def test_mode_direct_when_mainline_lacks_it_says_so(mainline: RealPlatform) -> None:
    with pytest.raises(MissingCapability, match="KVM_CAP_SNP_DIRECT_VMSA"):
        Guest(load_image(HALT, options(vmsa_mode="direct")), mainline)
