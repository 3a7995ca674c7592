"""Certificates for extended guest requests: who fills them in (mainline from 7.0)."""

from __future__ import annotations

import errno

from kvmlaunch.errors import MissingCapability
from kvmlaunch.kvm import Vm
from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.uapi import lib

__all__ = ["enable_req_certs"]


def enable_req_certs(vm: Vm) -> None:
    """Let extended guest requests exit to user space (KVM_SEV_SNP_ENABLE_REQ_CERTS).

    Comes after INIT2 and before the first vCPU. Raises MissingCapability where the kernel
    answers such requests itself, with an empty table, and IoctlError.
    """
    result = vm.sev_command_raw(lib.KVM_SEV_SNP_ENABLE_REQ_CERTS)
    if result.ret >= 0:
        return
    if result.errno == errno.EINVAL:
        raise MissingCapability(
            "KVM_SEV_SNP_ENABLE_REQ_CERTS (Linux 7.0)", "certificates for guest requests"
        )
    raise ioctl_error("KVM_SEV_SNP_ENABLE_REQ_CERTS", result.errno)
