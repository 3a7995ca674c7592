"""The firmware as oracle: what FINISH's status proves about a predicted digest."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.idblock_sign import Signer
from kvmlaunch.errors import FirmwareError, FormatError, IoctlError
from kvmlaunch.images import LaunchPlan
from kvmlaunch.launch.measure import measure
from kvmlaunch.launch.oracle import Answer, Oracle
from kvmlaunch.launch.verify import Verdict, verify
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Call, Platform, Recorder, Result, ffi, lib
from tests.launch.planted import OneMoreVcpu, Planted, other_content
from tests.launch.rig import Accounting, Wrapped, small_plan
from tests.launch.test_vmsa_mode import KERNEL, load

KEYS = {
    "none": lambda: {},
    "id": lambda: {"id_key": Signer.generate()},
    "id+author": lambda: {"id_key": Signer.generate(), "author_key": Signer.generate()},
}
PLANS: dict[str, Callable[[], LaunchPlan]] = {
    "sync": lambda: small_plan(vcpus=2),
    "page": lambda: load(vcpus=2, vmsa_mode="page"),
    "direct": lambda: load(vcpus=2, vmsa_mode="direct"),
}


def ask(plan: LaunchPlan, platform: Platform, keys: str = "none") -> Verdict:
    return verify(plan, Oracle(platform, **KEYS[keys]()))


def statuses(verdict: Verdict) -> list[int | None]:
    return [reply.status for reply in verdict.replies]


@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize(
    ("keys", "proof"), [("none", [0x0A, 0x0B]), ("id", [0]), ("id+author", [0])]
)
def test_verify_when_the_digest_is_right_says_by_which_status(
    mode: str, keys: str, proof: list[int]
) -> None:
    plan = PLANS[mode]()
    with SimPlatform(KERNEL[mode]) as platform:
        verdict = ask(plan, platform, keys)
        assert platform.open_fds == ()
    assert verdict.answer is Answer.RIGHT
    assert statuses(verdict) == proof
    assert verdict.digest == verdict.replies[0].digest == measure(plan).digest


@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize("keys", KEYS)
def test_verify_when_the_host_measures_something_else_says_so(mode: str, keys: str) -> None:
    plan = PLANS[mode]()
    with SimPlatform(KERNEL[mode]) as platform:
        host = Planted(platform, other_content(plan.steps[0].gpa))
        verdict = ask(plan, host, keys)
    assert (verdict.answer, statuses(verdict)) == (Answer.DIFFERS, [0x0B])


@pytest.mark.parametrize("policy", [0x30000, 0xB0000])
def test_verify_when_the_policy_is_another_is_right(policy: int) -> None:
    """The ID block has the launch's policy, whatever it is."""
    with SimPlatform() as platform:
        assert ask(small_plan(policy=policy), platform).answer is Answer.RIGHT
        assert ask(small_plan(policy=policy), platform, "id").answer is Answer.RIGHT


def test_verify_when_asked_launches_one_vm_per_question() -> None:
    calls: list[Call] = []
    with SimPlatform() as platform:
        verdict = ask(small_plan(), Recorder(platform, calls.append))
    names = [call.name for call in calls]
    assert len(verdict.replies) == 2
    # One of them is for asking what the host has.
    for name in ("KVM_SEV_INIT2", "KVM_SEV_SNP_LAUNCH_START", "KVM_SEV_SNP_LAUNCH_FINISH"):
        assert names.count(name) == 2


@pytest.mark.parametrize(("keys", "enabled"), [("none", 0), ("id", 0), ("id+author", 1)])
def test_verify_when_there_is_an_author_key_has_it_checked(keys: str, enabled: int) -> None:
    found: list[tuple[int, int]] = []

    class Listens(Wrapped):
        """Notes what FINISH is given."""

        def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
            if request == lib.KVM_MEMORY_ENCRYPT_OP and arg:
                command = ffi.cast("struct kvm_sev_cmd *", arg)
                if command.id == lib.KVM_SEV_SNP_LAUNCH_FINISH:
                    finish = ffi.cast("struct kvm_sev_snp_launch_finish *", command.data)
                    found.append((finish.id_block_en, finish.auth_key_en))
            return super().ioctl(fd, request, arg)

    with SimPlatform() as platform:
        ask(small_plan(), Listens(platform), keys)
    assert set(found) == {(1, enabled)}


# Unexpected answers are no proof

ALL = sorted({*FwStatus, 0x1E, 0x7FFF} - {FwStatus.SUCCESS})


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("status", ALL)
def test_verify_when_finish_always_gives_one_status_is_never_right(status: int, keys: str) -> None:
    with SimPlatform(faults=[f"SNP_LAUNCH_FINISH:fw={status:#x}@1+"]) as platform:
        verdict = ask(small_plan(), platform, keys)
    expected = Answer.DIFFERS if status == FwStatus.BAD_MEASUREMENT else Answer.UNKNOWN
    assert verdict.answer is expected


@pytest.mark.parametrize("status", [0x0A, 0x16])
def test_verify_when_a_vmsa_is_refused_with_a_status_of_the_id_block_is_unknown(
    status: int,
) -> None:
    """FINISH has VMSAs measured first: their status comes back in the same place."""
    vmsa = small_plan().npages + 1
    orders = [f"SNP_LAUNCH_UPDATE:fw={status:#x}@{n * vmsa}" for n in (1, 2)]
    with SimPlatform(faults=orders) as platform:
        verdict = ask(small_plan(), platform)
    assert verdict.answer is Answer.UNKNOWN
    assert statuses(verdict) == [status, status]
    assert "a wrong digest is not refused as one either" in str(verdict)


def test_verify_when_unsigned_is_accepted_is_unknown() -> None:
    class Accepts(Wrapped):
        """Its kernel forgets the ID block."""

        def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
            if request == lib.KVM_MEMORY_ENCRYPT_OP and arg:
                command = ffi.cast("struct kvm_sev_cmd *", arg)
                if command.id == lib.KVM_SEV_SNP_LAUNCH_FINISH:
                    ffi.cast("struct kvm_sev_snp_launch_finish *", command.data).id_block_en = 0
            return super().ioctl(fd, request, arg)

    with SimPlatform() as platform:
        verdict = ask(small_plan(), Accepts(platform))
    assert (verdict.answer, statuses(verdict)) == (Answer.UNKNOWN, [0])
    assert "00h (SUCCESS)" in str(verdict)


@pytest.mark.parametrize("keys", KEYS)
def test_verify_when_the_kernel_refuses_finish_is_unknown(keys: str) -> None:
    with SimPlatform(faults=["SNP_LAUNCH_FINISH:errno=EINVAL@1+"]) as platform:
        verdict = ask(small_plan(), platform, keys)
    assert (verdict.answer, statuses(verdict)) == (Answer.UNKNOWN, [None])
    assert "errno 22 without a firmware status" in str(verdict)


def test_verify_when_the_host_has_a_vcpu_more_says_that_the_digest_differs() -> None:
    with SimPlatform() as platform:
        verdict = ask(small_plan(), OneMoreVcpu(platform))
    assert verdict.answer is Answer.DIFFERS


# Launches that don't get as far


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("SNP_LAUNCH_START:fw=7", FirmwareError),
        ("SNP_LAUNCH_UPDATE:fw=0x0a@1+", FirmwareError),
        ("SNP_LAUNCH_UPDATE:fw=0x0b@1+", FirmwareError),
        ("KVM_CREATE_VCPU:errno=ENOMEM", IoctlError),
        ("KVM_CHECK_EXTENSION:errno=EINVAL@1+", IoctlError),
    ],
)
def test_verify_when_the_launch_fails_before_finish_raises(
    fault: str, error: type[Exception]
) -> None:
    with SimPlatform(faults=[fault]) as platform:
        host = Accounting(platform)
        with pytest.raises(error):
            ask(small_plan(), host)
        assert host.left == (set(), [])


def test_oracle_when_given_an_author_key_alone_is_refused() -> None:
    with SimPlatform() as platform, pytest.raises(FormatError, match="ID key, which is missing"):
        Oracle(platform, author_key=Signer.generate())
