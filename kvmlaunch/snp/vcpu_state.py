"""Proposal v2 ("direct VMSA"): which VMSA page and which GHCB a vCPU starts with.

The capability comes before the first vCPU, the state between SNP_LAUNCH_START and
SNP_LAUNCH_FINISH. Unmerged: numbers are those of a `Proposal`.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from kvmlaunch.kvm import SevResult, Vcpu, Vm
from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.uapi import Proposal, ffi, lib

__all__ = [
    "VcpuState",
    "enable_direct_vmsa",
    "get_vcpu_state",
    "set_vcpu_state",
    "set_vcpu_state_raw",
]


class VcpuState(NamedTuple):
    """GPAs of a vCPU's VMSA page and GHCB; None where it has none."""

    vmsa_gpa: int | None = None
    ghcb_gpa: int | None = None


def enable_direct_vmsa(vm: Vm, proposal: Proposal) -> None:
    """Let user space bring the VMSAs of this VM (KVM_CAP_SNP_DIRECT_VMSA). Raises IoctlError."""
    vm.enable_cap(proposal.direct_vmsa)


def set_vcpu_state_raw(
    vcpu: Vcpu,
    proposal: Proposal,
    *,
    valid_fields: int,
    vmsa_gpa: int = 0,
    ghcb_gpa: int = 0,
    pad: tuple[int, ...] = (0, 0, 0, 0, 0),
) -> SevResult:
    """One KVM_SEV_SNP_SET_VCPU_STATE, unchecked."""
    data = ffi.new(
        "struct kvm_sev_snp_vcpu_state *",
        {
            "valid_fields": valid_fields,
            "vmsa_gpa": vmsa_gpa,
            "ghcb_gpa": ghcb_gpa,
            "pad": list(pad),
        },
    )
    return vcpu.sev_command_raw(proposal.set_vcpu_state, data)


def set_vcpu_state(vcpu: Vcpu, state: VcpuState, proposal: Proposal) -> None:
    """Bind a VMSA page and a GHCB (KVM_SEV_SNP_SET_VCPU_STATE); None takes it away.

    The last call counts. Raises IoctlError with the rules that can be broken.
    """
    valid = 0
    if state.vmsa_gpa is not None:
        valid |= lib.KVM_SEV_SNP_VCPU_STATE_VMSA_VALID
    if state.ghcb_gpa is not None:
        valid |= lib.KVM_SEV_SNP_VCPU_STATE_GHCB_VALID
    vmsa_gpa, ghcb_gpa = state.vmsa_gpa or 0, state.ghcb_gpa or 0
    result = set_vcpu_state_raw(
        vcpu, proposal, valid_fields=valid, vmsa_gpa=vmsa_gpa, ghcb_gpa=ghcb_gpa
    )
    if result.ret < 0:
        raise ioctl_error(
            "KVM_SEV_SNP_SET_VCPU_STATE",
            result.errno,
            fields={
                "vcpu": vcpu.vcpu_id,
                "valid_fields": valid,
                "vmsa_gpa": vmsa_gpa,
                "ghcb_gpa": ghcb_gpa,
            },
            explanation=_EXPLAINED.get(result.errno, ""),
        )


def get_vcpu_state(vcpu: Vcpu, proposal: Proposal) -> VcpuState:
    """What is bound (KVM_SEV_SNP_GET_VCPU_STATE). Raises IoctlError."""
    data = ffi.new("struct kvm_sev_snp_vcpu_state *")
    result = vcpu.sev_command_raw(proposal.get_vcpu_state, data)
    if result.ret < 0:
        raise ioctl_error(
            "KVM_SEV_SNP_GET_VCPU_STATE",
            result.errno,
            fields={"vcpu": vcpu.vcpu_id},
            explanation=_EXPLAINED.get(result.errno, ""),
        )
    valid = int(data.valid_fields)
    return VcpuState(
        int(data.vmsa_gpa) if valid & lib.KVM_SEV_SNP_VCPU_STATE_VMSA_VALID else None,
        int(data.ghcb_gpa) if valid & lib.KVM_SEV_SNP_VCPU_STATE_GHCB_VALID else None,
    )


_EXPLAINED = {
    errno.EINVAL: "The kernel doesn't know the command (or has another number for it: "
    "--proposal-cap), KVM_CAP_SNP_DIRECT_VMSA isn't enabled, the launch isn't between "
    "SNP_LAUNCH_START and SNP_LAUNCH_FINISH, or the VMSA's GPA isn't aligned to 4 KiB, is aligned "
    "to 2 MiB, has no memory slot, or more bits than the CPUID of the vCPU allows.",
    errno.ENOTTY: "This vCPU belongs to no SNP guest, or the kernel has no commands for vCPUs.",
    errno.EFAULT: "The memory slot at the VMSA's GPA has no guest_memfd.",
}
