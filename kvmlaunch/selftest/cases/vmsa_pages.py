"""Proposals for VMSAs from user space: the capability (C) and the page type (U).

Names as in the table of negative cases of proposal v2's own test and code. The firmware word of a
refusal by KVM itself is nobody's promise there, so it isn't looked at. Of v1 it is only known that
it looks at VMPL and SEV_FEATURES, not how it answers; the cases expect of it what v2 does.
"""

from __future__ import annotations

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.vm import GPA, UNMAPPED, LaunchVm
from kvmlaunch.selftest.vmsa_vm import VmsaVm, a_vmsa
from kvmlaunch.uapi import lib

_GFN = GPA // PAGE_SIZE


@case("vmsa.c1-plain-vm")
def c1(t: Case) -> None:
    """Direct VMSAs can't be enabled for a VM that isn't an SNP VM: EINVAL"""
    t.needs("direct")
    t.errno(VmsaVm(t, vm_type=lib.KVM_X86_DEFAULT_VM).enable(), "EINVAL")


@case("vmsa.c2-first-argument")
def c2(t: Case) -> None:
    """Enabling takes no argument: args[0] = 1 is EINVAL"""
    _enable_refused(t, args=(1,))


@case("vmsa.c3-any-argument")
def c3(t: Case) -> None:
    """Enabling takes no argument: args[1], args[2] or args[3] = 1 is EINVAL"""
    for index in (1, 2, 3):
        _enable_refused(t, args=(*(0,) * index, 1))


@case("vmsa.c4-flags")
def c4(t: Case) -> None:
    """Enabling takes no flags: EINVAL"""
    for bit in (0, 1, 31):
        _enable_refused(t, flags=1 << bit)


@case("vmsa.c5-after-vcpu")
def c5(t: Case) -> None:
    """Enabling after the first vCPU is EINVAL, with or without an earlier enable"""
    t.needs("direct")
    for enabled in (False, True):
        vm = VmsaVm.ready(t, pages=0)
        if enabled:
            t.taken(vm.enable())
        vm.add_vcpu(0)
        t.errno(vm.enable(), "EINVAL")


@case("vmsa.c6-enabled")
def c6(t: Case) -> None:
    """Enabling on a fresh SNP VM works, and FINISH measures no VMSA of KVM's then"""
    t.needs("direct")
    vm = VmsaVm.ready(t)
    t.taken(vm.enable())
    for vcpu in range(2):
        vm.add_vcpu(vcpu)
    t.taken(vm.start())
    t.taken(vm.update())
    vm.confirm()


def _enable_refused(t: Case, *, args: tuple[int, ...] = (), flags: int = 0) -> None:
    t.needs("direct")
    vm = VmsaVm.ready(t, pages=0)
    t.errno(vm.enable(*args, flags=flags), "EINVAL")
    t.taken(vm.enable())


@case("vmsa.u0-taken")
def u0(t: Case) -> None:
    """A VMSA page is taken at any GPA, and measured there"""
    vm = VmsaVm.with_pages(t)
    answer = t.taken(vm.update_vmsa(1))
    t.equal(f"{answer.what}: len that is left", answer.data.len, 0)
    t.equal(f"{answer.what}: gfn_start afterwards", answer.data.gfn_start, _GFN + 2)
    vm.check_measured()


@case("vmsa.u1-two-pages")
def u1(t: Case) -> None:
    """A VMSA update of two pages is EINVAL, and leaves both usable"""
    vm = VmsaVm.with_pages(t)
    vm.fill(0, a_vmsa())
    vm.fill(1, a_vmsa())
    t.errno(vm.update(0, 2, type=vm.vmsa_type), "EINVAL")
    _usable(t, vm)


@case("vmsa.u2-vmpl")
def u2(t: Case) -> None:
    """A VMSA with a VMPL other than 0 is EINVAL, and leaves the page usable"""
    vm = VmsaVm.with_pages(t)
    for vmpl in (1, 2, 3, 0x80):
        t.errno(vm.update_vmsa(0, a_vmsa(vmpl=vmpl), note=f" of vmpl {vmpl}"), "EINVAL")
    _usable(t, vm)


@case("vmsa.u3-sev-features")
def u3(t: Case) -> None:
    """A VMSA with other SEV_FEATURES than the VM's is EINVAL, and leaves the page usable"""
    vm = VmsaVm.with_pages(t)
    for features in (0, 0x21, 0x3, 1 | 1 << 63):
        page = a_vmsa(sev_features=features)
        t.errno(vm.update_vmsa(0, page, note=f" of sev_features {features:#x}"), "EINVAL")
    _usable(t, vm)


@case("vmsa.u4-arguments")
def u4(t: Case) -> None:
    """len 0 or unaligned, flags, an unaligned source: EINVAL, and the page stays usable"""
    vm = VmsaVm.with_pages(t)
    for size in (0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1):
        t.errno(vm.update_vmsa(0, len=size), "EINVAL")
    for bit in range(16):
        t.errno(vm.update_vmsa(0, flags=1 << bit), "EINVAL")
    t.errno(vm.update_vmsa(0, uaddr=vm.source.address + 8), "EINVAL")
    _usable(t, vm)


@case("vmsa.u4-no-slot")
def u4_slot(t: Case) -> None:
    """A VMSA page without a slot, or in one without guest_memfd, is EINVAL"""
    vm = VmsaVm.with_pages(t)
    vm.add_shared_memory(1, 2 * GPA)
    vm.vm.set_memory_attributes(2 * GPA, PAGE_SIZE, private=True)
    for gfn in (_GFN - 1, 1 << 40, 2 * _GFN):
        t.errno(vm.update_vmsa(0, gfn_start=gfn), "EINVAL")
    _usable(t, vm)


@case("vmsa.u5-assigned")
def u5_assigned(t: Case) -> None:
    """A VMSA where a page has been launched is EIO without a firmware code"""
    vm = VmsaVm.with_pages(t)
    t.taken(vm.update())
    t.refused(vm.update_vmsa(0), "EIO", fw=0)
    vm.check_measured()


@case("vmsa.u5-shared")
def u5_shared(t: Case) -> None:
    """A VMSA at a GFN that isn't private is EIO, and can be launched once it is"""
    vm = VmsaVm.with_pages(t)
    vm.vm.set_memory_attributes(GPA, PAGE_SIZE, private=False)
    t.refused(vm.update_vmsa(0), "EIO", fw=0)
    vm.vm.set_memory_attributes(GPA, PAGE_SIZE, private=True)
    _usable(t, vm)


@case("vmsa.u5-source")
def u5_source(t: Case) -> None:
    """A VMSA whose source can't be read is EIO, and can be launched afterwards"""
    vm = VmsaVm.with_pages(t)
    t.refused(vm.update_vmsa(0, uaddr=UNMAPPED), "EIO", fw=0)
    _usable(t, vm)


@case("vmsa.u5-firmware")
def u5_firmware(t: Case) -> None:
    """A VMSA after FINISH is refused by firmware: invalid guest state"""
    vm = VmsaVm.with_pages(t)
    t.taken(vm.finish())
    t.refused(vm.update_vmsa(0), "EIO", fw=FwStatus.INVALID_GUEST_STATE)


@case("vmsa.mainline")
def mainline(t: Case) -> None:
    """A kernel without the proposals refuses VMSA pages: EINVAL"""
    if t.host.vmsa_mode != "sync":
        t.skip("this kernel takes VMSA pages")
    vm = LaunchVm.started(t)
    vm.fill(0, a_vmsa())
    t.refused(vm.update(type=PageType.VMSA), "EINVAL")
    t.taken(vm.update())


def _usable(t: Case, vm: VmsaVm) -> None:
    t.taken(vm.update_vmsa(0))
    vm.check_measured()
