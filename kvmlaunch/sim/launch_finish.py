"""SNP_LAUNCH_FINISH: every vCPU's VMSA, then the end of the launch (sev.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim.sevdev import SevDevice
from kvmlaunch.sim.uaccess import UserSpace, copy_in, refuse
from kvmlaunch.sim.vmsa_sync import sync_vmsa
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.sev_es import SevEsState
    from kvmlaunch.sim.vcpu import Vcpu
    from kvmlaunch.sim.vm import Vm

__all__ = ["INITIAL_VMSA_GPA", "launch_finish"]

INITIAL_VMSA_GPA = 0xFFFFFFFFF000
"""Where the firmware is told that each VMSA lies."""

_VMSA_PAGE_TYPE = 2  # PAGE_TYPE_VMSA of the firmware; KVM's uAPI has no name for it
_DR7_FIXED = 0x400
_RMP_FAILED = errno.EFAULT


def launch_finish(vm: Vm, command: Any) -> None:
    """Check the call, encrypt the VMSAs, end the launch: there is no way back after step one."""
    sev, host = vm.sev, vm.host
    if not sev.is_snp:
        refuse(errno.ENOTTY)
    if sev.context is None:
        refuse(errno.EINVAL)
    context = sev.context
    finish = copy_in(host.user, "kvm_sev_snp_launch_finish", command.data)
    if finish.flags:
        refuse(errno.EINVAL)
    _settle_vmsas(vm, command)
    id_block, id_auth = None, None
    if finish.id_block_en:
        id_block = _blob(host.user, finish.id_block_uaddr, lib.KVM_SEV_SNP_ID_BLOCK_SIZE)
        id_auth = _blob(host.user, finish.id_auth_uaddr, lib.KVM_SEV_SNP_ID_AUTH_SIZE)
    sev.issue(
        sev.fd,
        command,
        "SNP_LAUNCH_FINISH",
        lambda: host.processor.launch_finish(
            context,
            id_block=id_block,
            id_auth=id_auth,
            auth_key_en=bool(finish.id_block_en and finish.auth_key_en),
            vcek_dis=bool(finish.vcek_disabled & 1),
            host_data=bytes(ffi.buffer(finish.host_data)),
        ),
    )
    vm.pre_fault_allowed = True


def _settle_vmsas(vm: Vm, command: Any) -> None:
    """Every vCPU's VMSA: user space's, which is in the digest already, or else KVM's own."""
    sev, rules = vm.sev, vm.host.profile.vmsa
    if sev.launch_vmsa_gpa is not None:
        for first in vm.vcpus[:1]:
            _state(first).bind(sev.launch_vmsa_gpa)
    if sev.direct_vmsa or sev.launch_vmsa_gpa is not None:
        for vcpu in vm.vcpus:
            bound = _state(vcpu).guest_vmsa_gpa is not None
            vcpu.protected = bound or rules.finish_protects_all
        return
    if rules.finish_without_page_errno:
        refuse(rules.finish_without_page_errno)
    _encrypt_vmsas(vm, command)


def _state(vcpu: Vcpu) -> SevEsState:
    assert vcpu.sev_es is not None
    return vcpu.sev_es


def _encrypt_vmsas(vm: Vm, command: Any) -> None:
    """All VMSAs in creation order. Those before a failure stay encrypted."""
    for vcpu in vm.vcpus:
        _encrypt_vmsa(vcpu, command)


def _encrypt_vmsa(vcpu: Vcpu, command: Any) -> None:
    vm, spa = vcpu.vm, vcpu.vmsa_spa
    host, sev = vm.host, vm.sev
    assert spa is not None
    if vcpu.protected and host.profile.finish_refuses_encrypted_vmsa:
        refuse(errno.EINVAL)
    if vcpu.debug.control or vcpu.state.dr7 & ~_DR7_FIXED:
        refuse(errno.EINVAL)
    host.memory.page(spa)[:] = sync_vmsa(vcpu.state, sev.features)
    if host.rmp.make_private(spa, INITIAL_VMSA_GPA, sev.asid, immutable=True):
        refuse(_RMP_FAILED)
    try:
        host.fds.get_kind(command.sev_fd, SevDevice, errno.EBADF)
        context = sev.context
        assert context is not None
        command.error = host.psp.launch_update(context, spa, _VMSA_PAGE_TYPE)
        if command.error:
            refuse(errno.EIO)
    except OSError:
        sev.reclaim(spa)
        raise
    vcpu.protected = True


def _blob(user: UserSpace, address: int, size: int) -> bytes:
    """psp_copy_user_blob()."""
    if not address:
        refuse(errno.EINVAL)
    return user.read(address, size)
