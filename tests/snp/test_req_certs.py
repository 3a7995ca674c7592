"""KVM_SEV_SNP_ENABLE_REQ_CERTS, which Linux has from 7.0 on (kernel-snp-abi 3.7)."""

from __future__ import annotations

import pytest

from kvmlaunch.errors import IoctlError, MissingCapability
from kvmlaunch.kvm import Kvm, SevDevice
from kvmlaunch.sim import SimPlatform
from kvmlaunch.snp import New
from kvmlaunch.snp.req_certs import enable_req_certs
from kvmlaunch.uapi import lib


def enable(profile: str, *faults: str) -> None:
    with (
        SimPlatform(profile, faults=faults) as host,
        Kvm.open(host) as kvm,
        SevDevice.open(host) as sev,
        kvm.create_vm(lib.KVM_X86_SNP_VM) as vm,
    ):
        New.init(vm, sev)
        enable_req_certs(vm)


def test_req_certs_when_the_kernel_has_them_are_enabled() -> None:
    enable("7.0")


@pytest.mark.parametrize("profile", ["6.12", "6.18"])
def test_req_certs_when_the_kernel_is_older_are_missing(profile: str) -> None:
    with pytest.raises(MissingCapability, match="KVM_SEV_SNP_ENABLE_REQ_CERTS"):
        enable(profile)


def test_req_certs_when_refused_for_another_reason_is_its_error() -> None:
    with pytest.raises(IoctlError, match="SNP_ENABLE_REQ_CERTS ret=-12"):
        enable("7.0", "KVM_SEV_SNP_ENABLE_REQ_CERTS:errno=ENOMEM")
