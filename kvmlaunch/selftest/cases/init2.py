"""KVM_SEV_INIT2 of an SNP VM."""

from __future__ import annotations

from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.vm import UNMAPPED, LaunchVm
from kvmlaunch.uapi import lib

_SNP_ACTIVE = 1 << 0


@case("init2.taken")
def taken(t: Case) -> None:
    """All zeros: no features, the default GHCB version"""
    t.taken(LaunchVm(t).init2())


@case("init2.twice")
def twice(t: Case) -> None:
    """A second INIT2 is EPERM"""
    vm = LaunchVm.ready(t, pages=0)
    t.refused(vm.init2(), "EPERM")


@case("init2.plain-vm")
def plain_vm(t: Case) -> None:
    """INIT2 of a VM that was not created for SEV is EINVAL"""
    t.refused(LaunchVm(t, vm_type=lib.KVM_X86_DEFAULT_VM).init2(), "EINVAL")


@case("init2.unreadable")
def unreadable(t: Case) -> None:
    """A struct that can't be read is EFAULT, and INIT2 can be tried again"""
    vm = LaunchVm(t)
    t.refused(vm.init2(at=UNMAPPED), "EFAULT")
    t.taken(vm.init2())


@case("init2.after-vcpu")
def after_vcpu(t: Case) -> None:
    """INIT2 after the first vCPU is EINVAL"""
    vm = LaunchVm(t)
    vm.add_vcpu(0)
    t.refused(vm.init2(), "EINVAL")


@case("init2.flags")
def flags(t: Case) -> None:
    """Each of the 32 flags is EINVAL, and INIT2 can be tried again"""
    vm = LaunchVm(t)
    for bit in range(32):
        t.refused(vm.init2(flags=1 << bit), "EINVAL")
    t.taken(vm.init2())


@case("init2.features-refused")
def features_refused(t: Case) -> None:
    """Each SEV feature that the kernel doesn't offer is EINVAL, SNP_ACTIVE always"""
    vm = LaunchVm(t)
    for bit in range(64):
        if 1 << bit == _SNP_ACTIVE or not t.host.vmsa_features >> bit & 1:
            t.refused(vm.init2(vmsa_features=1 << bit), "EINVAL")


@case("init2.features-taken")
def features_taken(t: Case) -> None:
    """Each SEV feature that the kernel offers is taken"""
    offered = t.host.vmsa_features
    if not offered:
        t.skip("this host offers no SEV features")
    for bit in range(offered.bit_length()):
        if offered >> bit & 1:
            t.taken(LaunchVm(t).init2(vmsa_features=1 << bit))


@case("init2.ghcb-version")
def ghcb_version(t: Case) -> None:
    """GHCB version 2 is taken, versions above are EINVAL"""
    vm = LaunchVm(t)
    for version in (3, 0x100, 0xFFFF):
        t.refused(vm.init2(ghcb_version=version), "EINVAL")
    t.taken(vm.init2(ghcb_version=2))


@case("init2.ghcb-version-1")
def ghcb_version_1(t: Case) -> None:
    """GHCB version 1, which kernels differ on"""
    t.one_of(LaunchVm(t).init2(ghcb_version=1), "INIT2 with ghcb_version 1")


@case("init2.padding")
def padding(t: Case) -> None:
    """What is reserved in the struct isn't looked at"""
    t.taken(LaunchVm(t).init2(pad1=1, pad2=[1] * 8))
