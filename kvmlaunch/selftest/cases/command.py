"""KVM_MEMORY_ENCRYPT_OP itself: which commands there are, and what goes back to the caller."""

from __future__ import annotations

from kvmlaunch.selftest.answer import Answer, issue, issue_at
from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.vm import UNMAPPED, LaunchVm, read_only
from kvmlaunch.uapi import address_of, ffi, lib

_FIRST_SNP = lib.KVM_SEV_SNP_LAUNCH_START
_INIT = (lib.KVM_SEV_INIT, lib.KVM_SEV_ES_INIT)
_LEGACY = (
    *(lib.KVM_SEV_LAUNCH_START, lib.KVM_SEV_LAUNCH_UPDATE_DATA, lib.KVM_SEV_LAUNCH_UPDATE_VMSA),
    *(lib.KVM_SEV_LAUNCH_SECRET, lib.KVM_SEV_LAUNCH_MEASURE, lib.KVM_SEV_LAUNCH_FINISH),
    *(lib.KVM_SEV_GUEST_STATUS, lib.KVM_SEV_DBG_DECRYPT, lib.KVM_SEV_DBG_ENCRYPT),
)
_UNKNOWN = (23, 99, 200, 0xFFFF_FFFF)


@case("command.null")
def null(t: Case) -> None:
    """NULL instead of a command is a probe, and succeeds"""
    t.taken(issue_at(LaunchVm(t).vm, "KVM_MEMORY_ENCRYPT_OP with NULL", 0))


@case("command.unreadable")
def unreadable(t: Case) -> None:
    """A command that can't be read is EFAULT"""
    what = "KVM_MEMORY_ENCRYPT_OP with an unreadable command"
    t.refused(issue_at(LaunchVm(t).vm, what, UNMAPPED), "EFAULT")


@case("command.unwritable")
def unwritable(t: Case) -> None:
    """A command that can't be written back is EFAULT, whatever its handler said"""
    init = ffi.new("struct kvm_sev_init *", {"flags": 1})
    command = ffi.new("struct kvm_sev_cmd *", {"id": lib.KVM_SEV_INIT2, "data": address_of(init)})
    address = read_only(t, bytes(ffi.buffer(command)))
    what = "KVM_MEMORY_ENCRYPT_OP with a read-only command that is EINVAL"
    t.refused(issue_at(LaunchVm(t).vm, what, address), "EFAULT")


@case("command.legacy-before-init2")
def legacy_before_init2(t: Case) -> None:
    """On an SNP VM, SEV_INIT and SEV_ES_INIT are EINVAL, other commands of SEV guests ENOTTY"""
    vm = LaunchVm(t)
    for command in _INIT:
        t.refused(_bare(vm, command), "EINVAL")
    for command in _LEGACY:
        t.refused(_bare(vm, command), "ENOTTY")


@case("command.legacy-after-init2")
def legacy_after_init2(t: Case) -> None:
    """On an initialised SNP guest, every command below SNP_LAUNCH_START is EPERM"""
    vm = LaunchVm.ready(t, pages=0)
    for command in range(_FIRST_SNP):
        t.refused(_bare(vm, command), "EPERM")


@case("command.unknown")
def unknown(t: Case) -> None:
    """A command that no kernel has is EINVAL"""
    vm = LaunchVm(t)
    for command in _UNKNOWN:
        t.refused(_bare(vm, command), "EINVAL")


def _bare(vm: LaunchVm, command: int) -> Answer:
    return issue(vm.vm, f"SEV command {command}", command, 0, vm.host.sev.fd)
