"""The firmware as oracle on the real path: what `verify` and `bisect` rely on.

On an SNP host this is where it shows whether FINISH's checks come in the order that was observed
(snp-firmware-abi 6.4): 0Bh for a wrong digest, and another status only for a right one. In the
emulated machine the firmware is a fake with that order, and the kernel is the real one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.idblock_sign import Signer
from kvmlaunch.abi.page import PageType
from kvmlaunch.images import LaunchPlan
from kvmlaunch.launch.bisect import Bisection, bisect, bisect_vmsas
from kvmlaunch.launch.oracle import Answer, Oracle
from kvmlaunch.launch.prefix import prefix
from kvmlaunch.launch.verify import verify
from kvmlaunch.uapi import Platform, RealPlatform, Result, ffi, lib
from tests.launch.planted import (
    OneMoreVcpu,
    OtherRegisters,
    Planted,
    clear_fpu,
    doubled,
    late,
    missing,
    other_content,
    other_gpa,
    other_type,
    set_register,
)
from tests.launch.rig import Wrapped, small_plan

FREE = 0x20000


def oracle(platform: Platform, **keys: Signer) -> Oracle:
    return Oracle(platform, retry_cpuid=True, **keys)


def test_verify_when_unsigned_is_right_and_a_wrong_digest_is_not(real_snp: RealPlatform) -> None:
    verdict = verify(small_plan(vcpus=2), oracle(real_snp))
    statuses = [reply.status for reply in verdict.replies]
    assert verdict.answer is Answer.RIGHT, verdict
    assert statuses[0] in (FwStatus.BAD_SIGNATURE, FwStatus.INVALID_PARAM)
    assert statuses[1] == FwStatus.BAD_MEASUREMENT


@pytest.mark.parametrize("names", [["id_key"], ["id_key", "author_key"]])
def test_verify_when_signed_is_proven_by_success(real_snp: RealPlatform, names: list[str]) -> None:
    keys = {name: Signer.generate() for name in names}
    verdict = verify(small_plan(vcpus=2), oracle(real_snp, **keys))
    assert verdict.answer is Answer.RIGHT, verdict
    assert [reply.status for reply in verdict.replies] == [FwStatus.SUCCESS]


def test_prefix_when_launched_without_vcpus_is_measured_as_predicted(
    real_snp: RealPlatform,
) -> None:
    """FINISH takes a VM that has no vCPU, and one that has no page."""
    from kvmlaunch.launch.measure import measure

    for pages in (0, 1, 6):
        part = prefix(small_plan(), pages)
        reply = oracle(real_snp).ask(part, measure(part).digest)
        assert reply.answer is Answer.RIGHT, str(reply)


PLANTED = {
    "content": other_content(0x2000),
    "type": other_type(0x7000, 3),
    "gpa": other_gpa(0x2000, FREE),
    "missing": missing(0x4000),
    "doubled": doubled(0x2000, FREE),
    "order": late(0x1000),
}
CULPRITS = {
    "content": 0x2000,
    "type": 0x7000,
    "gpa": 0x2000,
    "missing": 0x4000,
    "doubled": 0x2000,
    "order": 0x1000,
}


@pytest.mark.parametrize("kind", PLANTED)
def test_bisect_when_a_page_is_planted_finds_it(real_snp: RealPlatform, kind: str) -> None:
    result = bisect(small_plan(), oracle(Planted(real_snp, PLANTED[kind])))
    assert result.answer is Answer.DIFFERS
    assert result.culprit is not None, str(result)
    assert result.culprit.gpa == CULPRITS[kind]


class DebugSwap(Wrapped):
    """KVM_SEV_INIT2 gets the feature, whoever asked."""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        if request == lib.KVM_MEMORY_ENCRYPT_OP and arg:
            command = ffi.cast("struct kvm_sev_cmd *", arg)
            if command.id == lib.KVM_SEV_INIT2:
                ffi.cast("struct kvm_sev_init *", command.data).vmsa_features |= 1 << 5
        return super().ioctl(fd, request, arg)


HOSTS: dict[str, tuple[Callable[[Platform], Platform], int, str]] = {
    "debug-swap": (DebugSwap, 0, "SEV feature debug_swap is set"),
    "no-fpu": (
        lambda host: OtherRegisters(host, 1, lib.KVM_SET_XSAVE, clear_fpu),
        1,
        "without FPU state, as kernels before 6.10 do",
    ),
    "signature": (
        lambda host: OtherRegisters(host, 1, lib.KVM_SET_REGS, set_register("rdx", 0x600)),
        1,
        "another vCPU signature: KVM's own",
    ),
    "one-more": (lambda host: OneMoreVcpu(host, 1), 1, "the host measures one VMSA more behind it"),
}


def vmsa_found(result: Bisection) -> tuple[int | None, str]:
    assert result.answer is Answer.DIFFERS
    assert result.culprit is not None
    assert result.culprit.type is PageType.VMSA
    return result.culprit.vcpu, "" if result.fits is None else result.fits.why


@pytest.mark.parametrize("kind", HOSTS)
def test_bisect_when_a_vmsa_differs_names_vcpu_and_cause(real_snp: RealPlatform, kind: str) -> None:
    make, vcpu, why = HOSTS[kind]
    plan: LaunchPlan = small_plan(vcpus=2)
    assert vmsa_found(bisect(plan, oracle(make(real_snp)))) == (vcpu, why)
    asked = oracle(make(real_snp))
    assert verify(plan, asked).answer is Answer.DIFFERS
    assert vmsa_found(bisect_vmsas(plan, asked)) == (vcpu, why)
