"""KVM_SEV_SNP_LAUNCH_FINISH, and what a guest can and can't do before and after it."""

from __future__ import annotations

import errno
from dataclasses import replace

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.abi.reset import kvm_untouched
from kvmlaunch.errors import IoctlError
from kvmlaunch.kvm import Vcpu
from kvmlaunch.kvm.exits import FailEntryExit
from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.idblock import flipped, id_auth, id_block
from kvmlaunch.selftest.vm import UNMAPPED, LaunchVm
from kvmlaunch.uapi import ffi, lib

_NO_FD = 0x7FFF_FFFF
_DR7_FIXED = 0x400
_BREAKPOINT_0 = 1 << 0  # DR7, L0

# What GET and SET refuse once the registers are encrypted.
_REGISTERS = {
    "KVM_GET_REGS": "kvm_regs",
    "KVM_SET_REGS": "kvm_regs",
    "KVM_GET_SREGS": "kvm_sregs",
    "KVM_SET_SREGS": "kvm_sregs",
    "KVM_GET_DEBUGREGS": "kvm_debugregs",
    "KVM_SET_DEBUGREGS": "kvm_debugregs",
    "KVM_GET_XCRS": "kvm_xcrs",
    "KVM_SET_XCRS": "kvm_xcrs",
    "KVM_SET_GUEST_DEBUG": "kvm_guest_debug",
}


@case("finish.taken")
def taken(t: Case) -> None:
    """Without vCPUs only the pages are measured"""
    vm = LaunchVm.started(t)
    t.taken(vm.update())
    t.taken(vm.finish())
    vm.check_measured()


@case("finish.vcpus")
def vcpus(t: Case) -> None:
    """One VMSA per vCPU is measured, behind all pages"""
    vm = LaunchVm.started(t, vcpus=2)
    t.taken(vm.update())
    t.taken(vm.finish())
    vm.expect_vmsas()
    vm.check_measured()


@case("finish.before-init2")
def before_init2(t: Case) -> None:
    """FINISH before INIT2 is ENOTTY"""
    t.refused(LaunchVm(t).finish(), "ENOTTY")


@case("finish.plain-vm")
def plain_vm(t: Case) -> None:
    """FINISH of a VM that was not created for SEV is ENOTTY"""
    t.refused(LaunchVm(t, vm_type=lib.KVM_X86_DEFAULT_VM).finish(), "ENOTTY")


@case("finish.before-start")
def before_start(t: Case) -> None:
    """FINISH before START is EINVAL"""
    t.refused(LaunchVm.ready(t, pages=0).finish(), "EINVAL")


@case("finish.unreadable")
def unreadable(t: Case) -> None:
    """A struct that can't be read is EFAULT before anything is done to the vCPUs"""
    vm = LaunchVm.started(t, pages=0, vcpus=1)
    t.refused(vm.finish(at=UNMAPPED), "EFAULT")
    t.taken(vm.finish())


@case("finish.flags")
def flags(t: Case) -> None:
    """Each of the 16 flags is EINVAL before anything is done to the vCPUs"""
    vm = LaunchVm.started(t, pages=0, vcpus=1)
    for bit in range(16):
        t.refused(vm.finish(flags=1 << bit), "EINVAL")
    t.taken(vm.finish())


@case("finish.twice")
def twice(t: Case) -> None:
    """A second FINISH without vCPUs is refused by firmware: invalid guest state"""
    vm = LaunchVm.started(t, pages=0)
    t.taken(vm.finish())
    t.refused(vm.finish(), "EIO", fw=FwStatus.INVALID_GUEST_STATE)


@case("finish.twice-with-vcpus", may_crash=True)
def twice_with_vcpus(t: Case) -> None:
    """A second FINISH with vCPUs is EINVAL, since their VMSAs are encrypted"""
    vm = LaunchVm.started(t, pages=0, vcpus=1)
    t.taken(vm.finish())
    t.refused(vm.finish(), "EINVAL")


@case("finish.guest-debug")
def guest_debug(t: Case) -> None:
    """A vCPU that is being debugged is EINVAL"""
    vm = LaunchVm.started(t, pages=0, vcpus=1)
    vm.vcpus[0].set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
    t.refused(vm.finish(), "EINVAL")


@case("finish.dr7")
def dr7(t: Case) -> None:
    """A vCPU with a breakpoint in DR7 is EINVAL"""
    vm = LaunchVm.started(t, pages=0, vcpus=1)
    vm.vcpus[0].set_debugregs({"dr6": 0xFFFF0FF0, "dr7": _DR7_FIXED | _BREAKPOINT_0})
    t.refused(vm.finish(), "EINVAL")


@case("finish.sev-fd")
def sev_fd(t: Case) -> None:
    """The VMSAs need a sev_fd that is /dev/sev: EBADF"""
    vm = LaunchVm.started(t, pages=0, vcpus=1)
    t.refused(vm.finish(sev_fd=_NO_FD), "EBADF")
    t.refused(vm.finish(sev_fd=t.host.kvm.fd), "EBADF")
    t.taken(vm.finish())
    vm.expect_vmsas()
    vm.check_measured()


@case("finish.sev-fd-of-start")
def sev_fd_of_start(t: Case) -> None:
    """The end of the launch needs the sev_fd of START, not its own"""
    vm = LaunchVm.started(t, pages=0)
    t.taken(vm.finish(sev_fd=_NO_FD))


@case("finish.host-data")
def host_data(t: Case) -> None:
    """Any host data is taken, and VCEK_DISABLED"""
    t.taken(LaunchVm.started(t, pages=0).finish(host_data=bytes(range(32)), vcek_disabled=1))


@case("finish.padding")
def padding(t: Case) -> None:
    """What is reserved in the struct isn't looked at"""
    t.taken(LaunchVm.started(t, pages=0).finish(pad0=[1] * 3, pad1=[1] * 4))


@case("finish.creation-order")
def creation_order(t: Case) -> None:
    """VMSAs are measured in the order in which vCPUs were created, not by their ids"""
    vm = LaunchVm.started(t, pages=0)
    for vcpu_id in (1, 0):
        regs = vm.add_vcpu(vcpu_id).get_regs()
        vm.vcpus[-1].set_regs({**regs, "rax": 0xA0 + vcpu_id})
    untouched = kvm_untouched(sev_features=1)
    vm.expect_vmsas([untouched.replace(rax=0xA1), untouched.replace(rax=0xA0)])
    vm.confirm()


# ID blocks. Without vCPUs, a FINISH that is refused can be repeated.


def _with_page(t: Case) -> LaunchVm:
    vm = LaunchVm.started(t)
    t.taken(vm.update())
    return vm


@case("id-block.taken")
def id_block_taken(t: Case) -> None:
    """An ID block with the predicted digest is taken"""
    vm = LaunchVm.started(t)
    t.taken(vm.update(0, 2))
    t.taken(vm.update(2, type=PageType.ZERO))
    vm.confirm()


@case("id-block.vcpus")
def id_block_vcpus(t: Case) -> None:
    """The digest in an ID block covers the VMSAs of all vCPUs"""
    vm = LaunchVm.started(t, vcpus=2)
    t.taken(vm.update())
    vm.expect_vmsas()
    vm.confirm()


@case("id-block.digest")
def id_block_digest(t: Case) -> None:
    """An ID block whose digest has one bit flipped is refused by firmware: bad measurement"""
    vm = _with_page(t)
    for bit in (0, 200, 383):
        block = id_block(flipped(vm.digest, bit))
        answer = vm.finish_with(block, id_auth(block))
        t.refused(answer, "EIO", fw=FwStatus.BAD_MEASUREMENT)
    vm.confirm()


@case("id-block.policy")
def id_block_policy(t: Case) -> None:
    """An ID block for another policy is refused by firmware: policy failure"""
    vm = _with_page(t)
    block = id_block(vm.digest, policy=DEFAULT_POLICY | 1 << 19)
    t.refused(vm.finish_with(block, id_auth(block)), "EIO", fw=FwStatus.POLICY_FAILURE)
    vm.confirm()


@case("id-block.signature")
def id_block_signature(t: Case) -> None:
    """An ID block that was changed after signing is refused by firmware: bad signature"""
    vm = _with_page(t)
    block = id_block(vm.digest)
    changed = replace(block, guest_svn=block.guest_svn + 1)
    t.refused(vm.finish_with(changed, id_auth(block)), "EIO", fw=FwStatus.BAD_SIGNATURE)
    vm.confirm()


@case("id-block.algorithm")
def id_block_algorithm(t: Case) -> None:
    """A key algorithm that firmware doesn't know is refused: invalid parameter"""
    vm = _with_page(t)
    block = id_block(vm.digest)
    auth = replace(id_auth(block), id_key_algo=0)
    t.refused(vm.finish_with(block, auth), "EIO", fw=FwStatus.INVALID_PARAM)
    vm.confirm()


@case("id-block.author-key")
def id_block_author_key(t: Case) -> None:
    """An author key must have signed the ID key; else bad signature"""
    vm = _with_page(t)
    block = id_block(vm.digest)
    auth = id_auth(block, author=True)
    wrong = replace(auth, id_key_sig=auth.id_block_sig)
    answer = vm.finish_with(block, wrong, auth_key_en=1)
    t.refused(answer, "EIO", fw=FwStatus.BAD_SIGNATURE)
    t.taken(vm.finish_with(block, auth, auth_key_en=1))


@case("id-block.author-key-off")
def id_block_author_key_off(t: Case) -> None:
    """An author key that isn't enabled isn't looked at"""
    vm = _with_page(t)
    block = id_block(vm.digest)
    auth = id_auth(block, author=True)
    t.taken(vm.finish_with(block, replace(auth, id_key_sig=auth.id_block_sig)))


@case("id-block.off")
def id_block_off(t: Case) -> None:
    """Without id_block_en neither ID block nor author key is looked at"""
    vm = _with_page(t)
    t.taken(vm.finish(id_block_uaddr=UNMAPPED, id_auth_uaddr=UNMAPPED, auth_key_en=1))


@case("id-block.pointers")
def id_block_pointers(t: Case) -> None:
    """A missing ID block or authentication is EINVAL, an unreadable one EFAULT"""
    vm = _with_page(t)
    block = id_block(vm.digest)
    auth = id_auth(block)
    for address, name in ((0, "EINVAL"), (UNMAPPED, "EFAULT")):
        t.refused(vm.finish_with(block, auth, id_block_uaddr=address), name)
        t.refused(vm.finish_with(block, auth, id_auth_uaddr=address), name)
    t.taken(vm.finish_with(block, auth))


# The vCPUs.


@case("vcpu.registers-after-finish")
def registers_after_finish(t: Case) -> None:
    """Registers can be read and written before FINISH, and neither afterwards: EINVAL"""
    vm = LaunchVm.started(t, pages=0, vcpus=1)
    for name, struct in _REGISTERS.items():
        if "_GET_" in name:
            t.equal(f"{name} before FINISH: errno", _errno(vm.vcpus[0], name, struct), 0)
    t.taken(vm.finish())
    for name, struct in _REGISTERS.items():
        got = _errno(vm.vcpus[0], name, struct)
        t.equal(f"{name} after FINISH: errno", got, errno.EINVAL)


@case("vcpu.run-before-init2")
def run_before_init2(t: Case) -> None:
    """KVM_RUN before INIT2 is EINVAL"""
    vcpu = LaunchVm(t).add_vcpu(0)
    try:
        got = str(vcpu.run())
    except IoctlError as error:
        got = f"errno {errno.errorcode.get(error.errno or 0)}"
    t.equal("KVM_RUN before INIT2", got, "errno EINVAL")


@case("vcpu.run-before-finish")
def run_before_finish(t: Case) -> None:
    """KVM_RUN before FINISH is KVM_EXIT_FAIL_ENTRY"""
    vm = LaunchVm.started(t, pages=0, vcpus=1)
    exit_ = vm.vcpus[0].run()
    t.expect(
        isinstance(exit_, FailEntryExit),
        f"KVM_RUN before FINISH: expected KVM_EXIT_FAIL_ENTRY, got {exit_}",
    )


def _errno(vcpu: Vcpu, name: str, struct: str) -> int:
    return vcpu.ioctl_raw(name, ffi.new(f"struct {struct} *")).errno
