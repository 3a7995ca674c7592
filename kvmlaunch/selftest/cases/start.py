"""KVM_SEV_SNP_LAUNCH_START."""

from __future__ import annotations

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.vm import UNMAPPED, LaunchVm
from kvmlaunch.uapi import lib

# Bits of the guest policy (AMD 56860, guest policy structure).
_SMT, _MUST_BE_ONE, _MIGRATE_MA = 1 << 16, 1 << 17, 1 << 18
_DEBUG, _SINGLE_SOCKET = 1 << 19, 1 << 20
_NEWER = range(21, 26)
_RESERVED = range(26, 64)
_NO_FD = 0x7FFF_FFFF


@case("start.taken")
def taken(t: Case) -> None:
    """Policy 0x30000, without memory and vCPUs"""
    t.taken(LaunchVm.ready(t, pages=0).start())


@case("start.debug")
def debug(t: Case) -> None:
    """A policy that allows debugging is taken"""
    t.taken(LaunchVm.ready(t, pages=0).start(policy=DEFAULT_POLICY | _DEBUG))


@case("start.before-init2")
def before_init2(t: Case) -> None:
    """START before INIT2 is ENOTTY"""
    t.refused(LaunchVm(t).start(), "ENOTTY")


@case("start.plain-vm")
def plain_vm(t: Case) -> None:
    """START of a VM that was not created for SEV is ENOTTY"""
    t.refused(LaunchVm(t, vm_type=lib.KVM_X86_DEFAULT_VM).start(), "ENOTTY")


@case("start.unreadable")
def unreadable(t: Case) -> None:
    """A struct that can't be read is EFAULT, and START can be tried again"""
    vm = LaunchVm.ready(t, pages=0)
    t.refused(vm.start(at=UNMAPPED), "EFAULT")
    t.taken(vm.start())


@case("start.twice")
def twice(t: Case) -> None:
    """A second START is EINVAL"""
    t.refused(LaunchVm.started(t, pages=0).start(), "EINVAL")


@case("start.after-finish")
def after_finish(t: Case) -> None:
    """START after FINISH is EINVAL"""
    vm = LaunchVm.started(t, pages=0)
    t.taken(vm.finish())
    t.refused(vm.start(), "EINVAL")


@case("start.flags")
def flags(t: Case) -> None:
    """Each of the 16 flags is EINVAL, and START can be tried again"""
    vm = LaunchVm.ready(t, pages=0)
    for bit in range(16):
        t.refused(vm.start(flags=1 << bit), "EINVAL")
    t.taken(vm.start())


@case("start.policy-reserved")
def policy_reserved(t: Case) -> None:
    """Policy bits that no kernel knows, and the migration agent's, are EINVAL"""
    vm = LaunchVm.ready(t, pages=0)
    for bit in (_MIGRATE_MA, *(1 << number for number in _RESERVED)):
        t.refused(vm.start(policy=DEFAULT_POLICY | bit), "EINVAL")


@case("start.policy-not-offered")
def policy_not_offered(t: Case) -> None:
    """Policy bits 21 to 25 are EINVAL where the kernel doesn't offer them"""
    mask = t.host.policy_mask or 0
    missing = [1 << number for number in _NEWER if not mask >> number & 1]
    if not missing:
        t.skip("this kernel offers all of them")
    vm = LaunchVm.ready(t, pages=0)
    for bit in missing:
        t.refused(vm.start(policy=DEFAULT_POLICY | bit), "EINVAL")


@case("start.policy-offered")
def policy_offered(t: Case) -> None:
    """Policy bits 21 to 25 reach the firmware where the kernel offers them"""
    mask = t.host.policy_mask or 0
    offered = [1 << number for number in _NEWER if mask >> number & 1]
    if not offered:
        t.skip("this kernel offers none of them (6.19 and later do, as far as firmware has them)")
    for bit in offered:
        answer = LaunchVm.ready(t, pages=0).start(policy=DEFAULT_POLICY | bit)
        t.one_of(answer, "START with a policy bit that the kernel offers")


@case("start.policy-must-be-one")
def policy_must_be_one(t: Case) -> None:
    """A policy without bit 17 is EINVAL"""
    t.refused(LaunchVm.ready(t, pages=0).start(policy=_SMT), "EINVAL")


@case("start.policy-smt")
def policy_smt(t: Case) -> None:
    """A policy that forbids SMT, which kernels differ on"""
    answer = LaunchVm.ready(t, pages=0).start(policy=_MUST_BE_ONE)
    t.one_of(answer, "START without the policy's SMT bit")


@case("start.policy-single-socket")
def policy_single_socket(t: Case) -> None:
    """A policy that forbids several sockets, which kernels differ on"""
    answer = LaunchVm.ready(t, pages=0).start(policy=DEFAULT_POLICY | _SINGLE_SOCKET)
    t.one_of(answer, "START with the policy's single socket bit")


@case("start.policy-abi")
def policy_abi(t: Case) -> None:
    """A firmware ABI of the future is refused by firmware, and START can be tried again"""
    vm = LaunchVm.ready(t, pages=0)
    t.refused(vm.start(policy=DEFAULT_POLICY | 0xFFFF), "EIO", fw=FwStatus.POLICY_FAILURE)
    t.taken(vm.start())


@case("start.sev-fd")
def sev_fd(t: Case) -> None:
    """A sev_fd that isn't /dev/sev is ENOTTY, and START can be tried again"""
    vm = LaunchVm.ready(t, pages=0)
    t.refused(vm.start(sev_fd=_NO_FD), "ENOTTY")
    t.refused(vm.start(sev_fd=t.host.kvm.fd), "ENOTTY")
    t.taken(vm.start())


@case("start.padding")
def padding(t: Case) -> None:
    """What is reserved in the struct isn't looked at"""
    t.taken(LaunchVm.ready(t, pages=0).start(pad0=[1] * 6, pad1=[1] * 4))
