"""KVM_MEMORY_ENCRYPT_OP on a vCPU: its VMSA page and its GHCB, before the launch ends.

Source: sev.c of coconut-svsm/linux @64f383649857 and the test of proposal v2 (see vmsa_rules).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim.rmp import LARGE_PAGE_SIZE
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.sev_es import SevEsState
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["command_name", "encrypt_op"]

_NO_GHCB = (1 << 64) - 1
"""INVALID_PAGE, in the GHCB MSR as well."""
_KNOWN_FIELDS = lib.KVM_SEV_SNP_VCPU_STATE_VMSA_VALID | lib.KVM_SEV_SNP_VCPU_STATE_GHCB_VALID


def command_name(vcpu: Vcpu, arg: int) -> str:
    """Name of the command in the user's ``struct kvm_sev_cmd``; "" for none that is known."""
    try:
        command = copy_in(vcpu.vm.host.user, "kvm_sev_cmd", arg)
    except OSError:
        return ""
    return vcpu.vm.host.profile.vmsa.vcpu_commands.get(command.id, "")


def encrypt_op(vcpu: Vcpu, arg: int) -> int:
    """The ioctl; ``kvm_sev_cmd`` goes back once a handler ran."""
    user, rules = vcpu.vm.host.user, vcpu.vm.host.profile.vmsa
    if not rules.vcpu_commands:
        refuse(rules.vcpu_op_errno)
    if not arg:
        refuse(errno.EINVAL)
    command = copy_in(user, "kvm_sev_cmd", arg)
    if command.id not in rules.vcpu_commands:
        refuse(errno.EINVAL)
    try:
        if command.id == rules.proposal.get_vcpu_state:
            _get_state(vcpu, command)
        else:
            _set_state(vcpu, command)
    finally:
        # The handler's errno is lost if this can't be written.
        copy_out(user, arg, command)
    return 0


def _get_state(vcpu: Vcpu, command: Any) -> None:
    vm, state = vcpu.vm, _snp_state(vcpu)
    if vm.host.profile.vmsa.get_needs_capability and not vm.sev.direct_vmsa:
        refuse(errno.EINVAL)
    if vm.sev.context is None:
        refuse(errno.EINVAL)
    out = ffi.new("struct kvm_sev_snp_vcpu_state *")
    if state.guest_vmsa_gpa is not None:
        out.vmsa_gpa = state.guest_vmsa_gpa
        out.valid_fields |= lib.KVM_SEV_SNP_VCPU_STATE_VMSA_VALID
    # The MSR's value as it is, also where it is no address: before any SET, SEV_INFO's answer.
    if state.msr != _NO_GHCB:
        out.ghcb_gpa = state.msr
        out.valid_fields |= lib.KVM_SEV_SNP_VCPU_STATE_GHCB_VALID
    copy_out(vm.host.user, command.data, out)


def _set_state(vcpu: Vcpu, command: Any) -> None:
    vm, state = vcpu.vm, _snp_state(vcpu)
    if not vm.sev.direct_vmsa:
        refuse(errno.EINVAL)
    if vm.sev.context is None or vm.pre_fault_allowed:
        refuse(errno.EINVAL)
    new = copy_in(vm.host.user, "kvm_sev_snp_vcpu_state", command.data)
    if any(new.pad) or new.valid_fields & ~_KNOWN_FIELDS:
        refuse(errno.EINVAL)
    vmsa_gpa = None
    if new.valid_fields & lib.KVM_SEV_SNP_VCPU_STATE_VMSA_VALID:
        vmsa_gpa = new.vmsa_gpa
        _check_vmsa_gpa(vcpu, vmsa_gpa)
    # What isn't marked as valid is taken away.
    state.bind(vmsa_gpa)
    has_ghcb = new.valid_fields & lib.KVM_SEV_SNP_VCPU_STATE_GHCB_VALID
    state.set_msr(new.ghcb_gpa if has_ghcb else _NO_GHCB)


def _snp_state(vcpu: Vcpu) -> SevEsState:
    if not vcpu.vm.sev.is_snp or vcpu.sev_es is None:
        refuse(errno.ENOTTY)
    return vcpu.sev_es


def _check_vmsa_gpa(vcpu: Vcpu, gpa: int) -> None:
    """Neither whether the page is private nor whether it is a VMSA matters here."""
    if not vcpu.state.is_page_address(gpa):
        refuse(errno.EINVAL)
    # An erratum: a 2 MiB page that meets a VMSA aligned like itself faults.
    if not gpa % LARGE_PAGE_SIZE:
        refuse(errno.EINVAL)
    slot = vcpu.vm.slots.find(gpa // PAGE_SIZE)
    if slot is None:
        refuse(errno.EINVAL)
    if slot.gmem is None:
        refuse(vcpu.vm.host.profile.vmsa.no_guest_memfd_errno)
