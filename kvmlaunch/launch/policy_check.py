"""Whether a host starts guests with a policy: tried, in a VM that is thrown away."""

from __future__ import annotations

from kvmlaunch.kvm import Kvm, SevDevice
from kvmlaunch.snp import New
from kvmlaunch.uapi import Platform, lib

__all__ = ["try_policy"]


def try_policy(platform: Platform, policy: int) -> None:
    """SNP_LAUNCH_START with ``policy``. Raises IoctlError if it is refused, MissingCapability."""
    with Kvm.open(platform) as kvm, SevDevice.open(platform) as sev:
        kvm.require_snp()
        with kvm.create_vm(lib.KVM_X86_SNP_VM) as vm:
            New.init(vm, sev).start(policy)
