"""Plain VMs whose code the processor really executes, which not every /dev/kvm here does."""

from __future__ import annotations

import pytest

from kvmlaunch.images import LaunchPlan, PlanOptions, load_image
from kvmlaunch.kvm.exits import HypercallExit, IoExit
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import run_guest
from kvmlaunch.uapi import RealPlatform, lib
from tests.images.builders import Seg, elf64
from tests.kvm.machines import run

TIMEOUT = 20.0
END = "e6f4 f4"  # out 0xf4, al; hlt

# cr4 |= OSFXSR, then 21.0 + 21.0 == 42.
FLOATING_POINT = f"""
    0f20e0 660d0002 0f22e0
    b815000000 f20f2ac0 f20f58c0 f20f2cc0
    3c2a 0f95c0 {END}
"""
# Each of four vCPUs counts to 10,000 in the same word; the last one looks at the sum.
COUNTING = f"""
    bb00201000 b910270000
    f0ff03 ffc9 75f9
    b801000000 f00fc14304 83f803 750b
    813b409c0000 0f95c0 {END}
"""
# CPUID leaf 0x8000001f must be all zero in EAX.
SEV_LEAF = f"b81f000080 0fa2 85c0 0f95c0 {END}"
# eax = 12, ebx = GPA, ecx = pages, edx = attributes; vmmcall; the answer goes to the port.
HYPERCALL = f"b80c000000 bb00101000 b902000000 ba10000000 0f01d9 {END}"


def plain(code: str, vcpus: int = 1) -> LaunchPlan:
    image = elf64([Seg(0x100000, bytes.fromhex(code), memsz=0x4000)])
    return load_image(image, PlanOptions(vcpus=vcpus, memory=4 << 20, confidential=False))


def runs_well(real_snp: RealPlatform, code: str, vcpus: int = 1) -> bool:
    with Guest(plain(code, vcpus), real_snp) as guest:
        outcome = run_guest(guest, console=lambda text: None, timeout=TIMEOUT)
    assert outcome.kind == "exit-port", str(outcome)
    return outcome.ok


def test_guest_when_it_does_floating_point_gets_the_result(real_snp: RealPlatform) -> None:
    assert runs_well(real_snp, FLOATING_POINT)


def test_guest_when_four_vcpus_count_under_lock_loses_nothing(real_snp: RealPlatform) -> None:
    assert runs_well(real_snp, COUNTING, vcpus=4)


def test_guest_when_four_vcpus_count_too_little_is_found_out(real_snp: RealPlatform) -> None:
    """So that the test before can fail."""
    assert not runs_well(real_snp, COUNTING.replace("b910270000", "b90f270000"), vcpus=4)


def test_guest_when_it_is_plain_sees_no_sev_in_its_cpuid(real_snp: RealPlatform) -> None:
    assert runs_well(real_snp, SEV_LEAF)


@pytest.mark.parametrize("answer", [0, 22])
def test_hypercall_when_user_space_asked_for_it_exits_and_is_answered(
    real_snp: RealPlatform, answer: int
) -> None:
    with Guest(plain(HYPERCALL), real_snp) as guest:
        guest.vm.enable_cap(lib.KVM_CAP_EXIT_HYPERCALL, 1 << lib.KVM_HC_MAP_GPA_RANGE)
        (vcpu,) = guest.vcpus
        exit_ = run(vcpu)
        assert isinstance(exit_, HypercallExit)
        assert (exit_.nr, exit_.args[:3]) == (lib.KVM_HC_MAP_GPA_RANGE, (0x101000, 2, 0x10))
        vcpu.complete_hypercall(answer)
        exit_ = run(vcpu)
        assert isinstance(exit_, IoExit)
        assert (exit_.port, exit_.data[0]) == (0xF4, answer)


def test_hypercall_when_user_space_did_not_ask_is_refused_by_kvm(real_snp: RealPlatform) -> None:
    with Guest(plain(HYPERCALL), real_snp) as guest:
        exit_ = run(guest.vcpus[0])
        assert isinstance(exit_, IoExit)
        assert exit_.data == bytes([-1000 & 0xFF])  # -KVM_ENOSYS, include/uapi/linux/kvm_para.h
