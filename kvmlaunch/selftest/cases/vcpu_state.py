"""Proposal v2: which VMSA a vCPU starts from (S), and other commands on a vCPU (D)."""

from __future__ import annotations

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.selftest.answer import issue, issue_at
from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.vm import GPA, UNMAPPED, read_only
from kvmlaunch.selftest.vmsa_vm import VmsaVm
from kvmlaunch.uapi import lib

_VMSA_VALID = lib.KVM_SEV_SNP_VCPU_STATE_VMSA_VALID
_GHCB_VALID = lib.KVM_SEV_SNP_VCPU_STATE_GHCB_VALID
_BOTH = _VMSA_VALID | _GHCB_VALID
_LARGE_PAGE = 2 << 20
_NOWHERE = (1 << 40) + PAGE_SIZE
_OTHER_COMMANDS = (
    *(0, lib.KVM_SEV_INIT2, lib.KVM_SEV_SNP_LAUNCH_START, lib.KVM_SEV_SNP_LAUNCH_UPDATE),
    *(lib.KVM_SEV_SNP_LAUNCH_FINISH, 200, 0xFFFF_FFFF),
)


@case("vmsa.s0-set")
def s0(t: Case) -> None:
    """SET takes a private and a shared page of guest_memfd, and GET tells what was set"""
    vm = VmsaVm.direct(t)
    vm.vm.set_memory_attributes(GPA + PAGE_SIZE, PAGE_SIZE, private=False)
    for page in (0, 1):
        t.taken(vm.bind(page, valid_fields=_BOTH, ghcb_gpa=1 << 40))
        vm.check_state(0, vmsa=GPA + page * PAGE_SIZE, ghcb=1 << 40)


@case("vmsa.s1-plain-vm")
def s1(t: Case) -> None:
    """SET and GET on the vCPU of a VM that isn't an SNP VM are ENOTTY"""
    t.needs("direct")
    vm = VmsaVm(t, vm_type=lib.KVM_X86_DEFAULT_VM)
    vm.add_vcpu(0)
    t.errno(vm.bind(0), "ENOTTY")
    t.errno(vm.get_state(), "ENOTTY")


@case("vmsa.s2-not-enabled")
def s2(t: Case) -> None:
    """SET without the capability is EINVAL, before START and after it"""
    t.needs("direct")
    vm = VmsaVm.ready(t, vcpus=1)
    t.errno(vm.bind(0), "EINVAL")
    t.taken(vm.start())
    t.errno(vm.bind(0), "EINVAL")


@case("vmsa.s3-before-start")
def s3(t: Case) -> None:
    """SET and GET before START are EINVAL"""
    vm = VmsaVm.direct(t, start=False)
    t.errno(vm.bind(0), "EINVAL")
    t.errno(vm.get_state(), "EINVAL")


@case("vmsa.s4-padding")
def s4(t: Case) -> None:
    """Each word of the padding must be 0: EINVAL"""
    vm = VmsaVm.direct(t)
    for index in range(5):
        t.errno(vm.bind(0, pad=[0] * index + [1]), "EINVAL")
    _unchanged(vm)


@case("vmsa.s5-valid-fields")
def s5(t: Case) -> None:
    """Bits of valid_fields that there are not: EINVAL"""
    vm = VmsaVm.direct(t)
    for bit in range(2, 64):
        t.errno(vm.bind(0, valid_fields=_VMSA_VALID | 1 << bit), "EINVAL")
    _unchanged(vm)


@case("vmsa.s6-unaligned")
def s6(t: Case) -> None:
    """A VMSA that isn't aligned to 4 KiB is EINVAL"""
    vm = VmsaVm.direct(t)
    for offset in (1, 8, 0x800, 0xFFF):
        t.errno(vm.bind(0, vmsa_gpa=GPA + offset), "EINVAL")
    _unchanged(vm)


@case("vmsa.s7-large-page")
def s7(t: Case) -> None:
    """A VMSA that is aligned to 2 MiB is EINVAL (erratum), though it lies in guest_memfd"""
    vm = VmsaVm.direct(t)
    vm.add_memory(2, _LARGE_PAGE)
    t.errno(vm.bind(0, vmsa_gpa=_LARGE_PAGE), "EINVAL")
    _unchanged(vm)
    t.taken(vm.bind(0, vmsa_gpa=_LARGE_PAGE + PAGE_SIZE))


@case("vmsa.s8-no-memory")
def s8(t: Case) -> None:
    """A VMSA where there is no memory slot is EINVAL"""
    vm = VmsaVm.direct(t)
    for gpa in (_NOWHERE, GPA - PAGE_SIZE, GPA + 4 * PAGE_SIZE):
        t.errno(vm.bind(0, vmsa_gpa=gpa), "EINVAL")
    _unchanged(vm)


@case("vmsa.s9-after-finish")
def s9(t: Case) -> None:
    """SET after FINISH is EINVAL"""
    vm = VmsaVm.direct(t)
    t.taken(vm.update_vmsa(0))
    t.taken(vm.bind(0))
    t.taken(vm.finish())
    t.errno(vm.bind(0), "EINVAL")


@case("vmsa.s10-no-guest-memfd")
def s10(t: Case) -> None:
    """A VMSA in a slot without guest_memfd is refused, with an errno that nobody has settled"""
    vm = VmsaVm.direct(t)
    vm.add_shared_memory(1, 2 * GPA + PAGE_SIZE)
    answer = vm.bind(0, vmsa_gpa=2 * GPA + PAGE_SIZE)
    t.one_of(answer, "SET_VCPU_STATE in a slot without guest_memfd")
    _unchanged(vm)


@case("vmsa.s11-cleared")
def s11(t: Case) -> None:
    """What SET doesn't mark as valid is taken away"""
    vm = VmsaVm.direct(t)
    t.taken(vm.bind(0, valid_fields=_BOTH, ghcb_gpa=GPA))
    t.taken(vm.set_state(valid_fields=_GHCB_VALID, vmsa_gpa=GPA, ghcb_gpa=GPA))
    vm.check_state(0, vmsa=None, ghcb=GPA)
    t.taken(vm.bind(0, ghcb_gpa=GPA))
    vm.check_state(0, vmsa=GPA, ghcb=None)


@case("vmsa.s12-each-vcpu")
def s12(t: Case) -> None:
    """Each vCPU has a state of its own"""
    vm = VmsaVm.direct(t, vcpus=2)
    t.taken(vm.bind(1, 1, valid_fields=_BOTH))
    t.taken(vm.bind(0, 0, valid_fields=_BOTH))
    vm.check_state(0, vmsa=GPA, ghcb=0)
    vm.check_state(1, vmsa=GPA + PAGE_SIZE, ghcb=0)


@case("vmsa.d0-mainline")
def d0(t: Case) -> None:
    """A kernel without proposal v2 has no commands for vCPUs, which kernels say differently"""
    if t.host.vmsa_mode == "direct":
        t.skip("this kernel has commands for vCPUs")
    vm = VmsaVm.ready(t, vcpus=1)
    t.taken(vm.start())
    for command in (t.host.proposal.get_vcpu_state, t.host.proposal.set_vcpu_state):
        what = f"command {command} on a vCPU"
        answer = issue(vm.vcpus[0], what, command, 0, t.host.sev.fd)
        t.one_of(answer, "a command on a vCPU")


@case("vmsa.d1-other-commands")
def d1(t: Case) -> None:
    """Commands of a VM, and those that there are not, are EINVAL on a vCPU"""
    vm = VmsaVm.direct(t)
    for command in _OTHER_COMMANDS:
        answer = issue(vm.vcpus[0], f"command {command} on a vCPU", command, 0, t.host.sev.fd)
        t.errno(answer, "EINVAL")


@case("vmsa.d2-pointers")
def d2(t: Case) -> None:
    """On a vCPU, NULL is EINVAL, and a command or a struct that can't be read EFAULT"""
    vm = VmsaVm.direct(t)
    t.errno(issue_at(vm.vcpus[0], "KVM_MEMORY_ENCRYPT_OP with NULL on a vCPU", 0), "EINVAL")
    what = "KVM_MEMORY_ENCRYPT_OP with an unreadable command on a vCPU"
    t.errno(issue_at(vm.vcpus[0], what, UNMAPPED), "EFAULT")
    t.errno(vm.set_state(at=UNMAPPED), "EFAULT")
    t.errno(vm.get_state(at=read_only(t, b"")), "EFAULT")
    _unchanged(vm)


def _unchanged(vm: VmsaVm) -> None:
    """A refused SET has no effect: the vCPU has no VMSA still."""
    vm.check_vmsa(0, None)
