"""KVM_MEMORY_ENCRYPT_OP: its entry, INIT2 and SNP_LAUNCH_START (arch/x86/kvm/svm/sev.c).

SEV and SEV-ES guests can be initialised; nothing is behind their launch and migration (ENOSYS).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim import launch_finish, launch_update
from kvmlaunch.sim.guest_request import GuestRequests
from kvmlaunch.sim.sev_es import GHCB_VERSION_MIN
from kvmlaunch.sim.sevdev import SevDevice
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.uapi import command_name, ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.host import Host
    from kvmlaunch.sim.vm import Vm

__all__ = ["SevVm", "encrypt_op", "register_region", "unregister_region"]

_SNP_ACTIVE, _SECURE_TSC = 1 << 0, 1 << 9
_GHCB_VERSION_MAX = 2
_POLICY_SMT, _POLICY_MBO, _POLICY_SINGLE_SOCKET = 1 << 16, 1 << 17, 1 << 20

# Ids that no kernel has a handler for (sev_mem_enc_ioctl()).
_LEGACY_UNKNOWN = frozenset(
    {lib.KVM_SEV_SEND_UPDATE_VMSA, lib.KVM_SEV_RECEIVE_UPDATE_VMSA, lib.KVM_SEV_CERT_EXPORT}
)

_CommandHandler = Callable[["Vm", Any], None]


class SevVm:
    """What KVM keeps for memory encryption (struct kvm_sev_info)."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.need_init = vm.type != lib.KVM_X86_DEFAULT_VM
        self.active = self.es_active = False
        self.features = 0
        self.ghcb_version = 0
        self.asid = 0
        self.context: int | None = None
        self.fd = -1
        self.req_certs = False
        self.direct_vmsa = False
        """KVM_CAP_SNP_DIRECT_VMSA is enabled."""
        self.launch_vmsa_gpa: int | None = None
        """Of proposal v1: the VMSA page for the first vCPU."""
        self.ap_jump_table = 0
        self.requests: GuestRequests | None = None
        self.regions: list[tuple[int, int]] = []

    @property
    def host(self) -> Host:
        """The machine that the VM is on."""
        return self._vm.host

    @property
    def is_snp(self) -> bool:
        """An initialised SNP guest."""
        return self.active and bool(self.features & _SNP_ACTIVE)

    def command_name(self, arg: int) -> str:
        """Name of the command in the user's ``struct kvm_sev_cmd``, for ordered faults."""
        try:
            command = copy_in(self._vm.host.user, "kvm_sev_cmd", arg)
        except OSError:
            return ""
        return command_name(command.id).removeprefix("KVM_SEV_")

    def issue(self, sev_fd: int, command: Any, name: str, call: Callable[[], int]) -> None:
        """__sev_issue_cmd(): EBADF unless ``sev_fd`` is /dev/sev; EIO and a status word."""
        host = self._vm.host
        host.fds.get_kind(sev_fd, SevDevice, errno.EBADF)
        command.error = host.psp.status(name, call)
        if command.error:
            refuse(errno.EIO)

    def reclaim(self, spa: int) -> bool:
        """snp_page_reclaim(): back to the hypervisor; failing at that kills the VM."""
        host = self._vm.host
        if host.faults.reclaim_fails() or host.psp.page_reclaim(spa):
            self._vm.dead = True
            return False
        return not host.rmp.make_shared(spa)

    def decommission(self) -> None:
        """snp_decommission_context(); a context that firmware keeps stays where it is."""
        host, context = self._vm.host, self.context
        if context is None:
            return
        if host.psp.status("SNP_DECOMMISSION", lambda: host.processor.decommission(context)):
            return
        host.free_firmware_page(context)
        self.context = None

    def create_context(self, command: Any) -> int | None:
        """snp_context_create(): None whatever went wrong."""
        host = self._vm.host
        spa = host.alloc_firmware_page()
        if spa is None:
            return None
        try:
            self.issue(
                command.sev_fd,
                command,
                "SNP_GCTX_CREATE",
                lambda: host.processor.gctx_create(spa),
            )
        except OSError:
            host.free_firmware_page(spa)
            return None
        return spa

    def destroy(self) -> None:
        """The VM is gone."""
        if not self.active:
            return
        if self.requests is not None:
            self.requests.free()
        self.decommission()
        if self.context is None:
            self._vm.host.asids.give_back(self.asid)


def encrypt_op(vm: Vm, arg: int) -> int:
    """The ioctl's entry, check by check; ``kvm_sev_cmd`` goes back once a handler ran."""
    if not arg:
        return 0
    user = vm.host.user
    command = copy_in(user, "kvm_sev_cmd", arg)
    if vm.sev.is_snp and command.id < lib.KVM_SEV_SNP_LAUNCH_START:
        refuse(errno.EPERM)
    handler = _handler(vm, command.id)
    if handler is None:
        refuse(errno.EINVAL)
    try:
        handler(vm, command)
    finally:
        # The handler's errno is lost if this can't be written.
        copy_out(user, arg, command)
    return 0


def _handler(vm: Vm, command: int) -> _CommandHandler | None:
    if command == lib.KVM_SEV_SNP_ENABLE_REQ_CERTS and vm.host.profile.req_certs:
        return _enable_req_certs
    if command in (lib.KVM_SEV_INIT, lib.KVM_SEV_ES_INIT):
        return _legacy_init
    if command == lib.KVM_SEV_LAUNCH_UPDATE_VMSA:
        return _legacy_update_vmsa
    if command == lib.KVM_SEV_RECEIVE_UPDATE_DATA:
        return _legacy_receive_update_data
    if command <= lib.KVM_SEV_SEND_CANCEL and command not in _LEGACY_UNKNOWN:
        return _legacy
    return {
        lib.KVM_SEV_INIT2: _init2,
        lib.KVM_SEV_SNP_LAUNCH_START: _launch_start,
        lib.KVM_SEV_SNP_LAUNCH_UPDATE: launch_update.launch_update,
        lib.KVM_SEV_SNP_LAUNCH_FINISH: launch_finish.launch_finish,
    }.get(command)


def _legacy_init(vm: Vm, command: Any) -> None:
    """sev_guest_init(): a plain VM becomes an SEV or SEV-ES guest."""
    if vm.type != lib.KVM_X86_DEFAULT_VM:
        refuse(errno.EINVAL)
    init = ffi.new("struct kvm_sev_init *")
    if command.id == lib.KVM_SEV_INIT:
        _initialize(vm, init, lib.KVM_X86_SEV_VM)
    else:
        init.ghcb_version = GHCB_VERSION_MIN
        _initialize(vm, init, lib.KVM_X86_SEV_ES_VM)


def _legacy(vm: Vm, command: Any) -> None:
    """Commands of SEV guests, whose launch and migration isn't simulated."""
    refuse(errno.ENOSYS if vm.sev.active else errno.ENOTTY)


def _legacy_update_vmsa(vm: Vm, command: Any) -> None:
    """The same, for SEV-ES alone."""
    refuse(errno.ENOSYS if vm.sev.es_active else errno.ENOTTY)


def _legacy_receive_update_data(vm: Vm, command: Any) -> None:
    """The same, with an errno of its own."""
    refuse(errno.ENOSYS if vm.sev.active else errno.EINVAL)


def _init2(vm: Vm, command: Any) -> None:
    if not vm.sev.need_init:
        refuse(errno.EINVAL)
    init = copy_in(vm.host.user, "kvm_sev_init", command.data)
    _initialize(vm, init, vm.type)


def _initialize(vm: Vm, init: Any, vm_type: int) -> None:
    """__sev_guest_init()."""
    sev, profile = vm.sev, vm.host.profile
    es, snp = vm_type != lib.KVM_X86_SEV_VM, vm_type == lib.KVM_X86_SNP_VM
    features = profile.vmsa_features if es else 0
    if not snp:
        features &= ~_SECURE_TSC
    if vm.vcpus or init.flags or init.vmsa_features & ~features:
        refuse(errno.EINVAL)
    if init.ghcb_version > _GHCB_VERSION_MAX or (init.ghcb_version and not es):
        refuse(errno.EINVAL)
    if snp and init.ghcb_version == GHCB_VERSION_MIN and not profile.init2_ghcb_v1:
        refuse(errno.EINVAL)
    if sev.active:
        refuse(errno.EINVAL)
    sev.asid = vm.host.asids.take(es=es)
    sev.features = init.vmsa_features
    sev.ghcb_version = init.ghcb_version or (_GHCB_VERSION_MAX if es else 0)
    if snp:
        sev.features |= profile.forced_vmsa_features | _SNP_ACTIVE
        sev.requests = GuestRequests(sev)
    sev.active, sev.es_active, sev.need_init = True, es, False


def _launch_start(vm: Vm, command: Any) -> None:
    sev, host = vm.sev, vm.host
    if not sev.is_snp:
        refuse(errno.ENOTTY)
    start = copy_in(host.user, "kvm_sev_snp_launch_start", command.data)
    if sev.context is not None:
        refuse(errno.EINVAL)
    if start.flags or not _policy_taken(vm, start.policy):
        refuse(errno.EINVAL)
    context = sev.create_context(command)
    if context is None:
        refuse(errno.ENOTTY)
    sev.context = context
    gosvw = bytes(ffi.buffer(start.gosvw))
    try:
        sev.issue(
            command.sev_fd,
            command,
            "SNP_LAUNCH_START",
            lambda: host.processor.launch_start(context, start.policy, gosvw),
        )
        sev.fd = command.sev_fd
        sev.issue(
            sev.fd,
            command,
            "SNP_ACTIVATE",
            lambda: host.processor.activate(context, sev.asid),
        )
    except OSError:
        sev.decommission()
        raise


def _policy_taken(vm: Vm, policy: int) -> bool:
    profile = vm.host.profile
    mask = profile.policy_mask
    if profile.policy_bits_attr:
        mask &= vm.host.policy_bits
    if policy & ~mask or not policy & _POLICY_MBO:
        return False
    if not policy & _POLICY_SMT and not profile.policy_smt_optional:
        return False
    return not policy & _POLICY_SINGLE_SOCKET or profile.policy_single_socket_allowed


def _enable_req_certs(vm: Vm, command: Any) -> None:
    if not vm.sev.is_snp or vm.vcpus:
        refuse(errno.EINVAL)
    vm.sev.req_certs = True


def register_region(vm: Vm, region: Any) -> int:
    """KVM_MEMORY_ENCRYPT_REG_REGION: pins memory, which SNP doesn't need."""
    if not vm.sev.active:
        refuse(errno.ENOTTY)
    if not region.size or region.addr + region.size >> 64:
        refuse(errno.EINVAL)
    vm.sev.regions.append((region.addr, region.size))
    return 0


def unregister_region(vm: Vm, region: Any) -> int:
    """KVM_MEMORY_ENCRYPT_UNREG_REGION."""
    if not vm.sev.active:
        refuse(errno.ENOTTY)
    if (region.addr, region.size) not in vm.sev.regions:
        refuse(errno.EINVAL)
    vm.sev.regions.remove((region.addr, region.size))
    return 0
