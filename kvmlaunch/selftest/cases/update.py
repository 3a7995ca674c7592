"""KVM_SEV_SNP_LAUNCH_UPDATE, for each page type."""

from __future__ import annotations

from kvmlaunch.abi.cpuid_page import CpuidEntry, encode
from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.vm import GPA, UNMAPPED, LaunchVm, read_only
from kvmlaunch.uapi import ffi, lib

_TYPES = (*(PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED, PageType.SECRETS, PageType.CPUID),)
_WITH_SOURCE = tuple(kind for kind in _TYPES if kind is not PageType.ZERO)
# A CPUID page that begins elsewhere is none.
_ANY_SOURCE = tuple(kind for kind in _WITH_SOURCE if kind is not PageType.CPUID)
_UNKNOWN = (0, 7, 8, 0x10, 0xFF)
_NO_FD = 0x7FFF_FFFF
_GFN = GPA // PAGE_SIZE
_PAST_64 = 65  # entries; a CPUID page has 64 at most (AMD 56860, CPUID page)


# Each page type.


@case("update.{}.taken", each=_TYPES)
def taken(t: Case, kind: PageType) -> None:
    """A {} page is taken; what is left to do is written back"""
    vm = LaunchVm.started(t)
    answer = t.taken(vm.update(1, type=kind))
    source = vm.source.address + PAGE_SIZE
    t.equal(f"{answer.what}: len that is left", answer.data.len, 0)
    t.equal(f"{answer.what}: gfn_start afterwards", answer.data.gfn_start, _GFN + 2)
    advanced = 0 if kind is PageType.ZERO else PAGE_SIZE
    t.equal(f"{answer.what}: uaddr afterwards", answer.data.uaddr, source + advanced)
    vm.check_measured()


@case("update.{}.several", each=_ANY_SOURCE)
def several(t: Case, kind: PageType) -> None:
    """Three {} pages in one call"""
    vm = LaunchVm.started(t)
    answer = t.taken(vm.update(1, 3, type=kind))
    t.equal(f"{answer.what}: len that is left", answer.data.len, 0)
    vm.check_measured()


@case("update.{}.len-unaligned", each=_TYPES)
def len_unaligned(t: Case, kind: PageType) -> None:
    """A len of {} pages that isn't a multiple of 4096 is EINVAL"""
    vm = LaunchVm.started(t)
    for size in (1, PAGE_SIZE - 1, PAGE_SIZE + 1, PAGE_SIZE + 8):
        t.refused(vm.update(type=kind, len=size), "EINVAL")


@case("update.{}.flags", each=_TYPES)
def flags(t: Case, kind: PageType) -> None:
    """Each of the 16 flags is EINVAL for a {} page, and the page can be launched afterwards"""
    vm = LaunchVm.started(t)
    for bit in range(16):
        t.refused(vm.update(type=kind, flags=1 << bit), "EINVAL")
    t.taken(vm.update(type=kind))


@case("update.{}.twice", each=_TYPES)
def twice(t: Case, kind: PageType) -> None:
    """A {} page where a page has been launched is EIO without a firmware code"""
    vm = LaunchVm.started(t)
    t.taken(vm.update())
    t.refused(vm.update(type=kind), "EIO", fw=0)
    vm.check_measured()


@case("update.{}.shared", each=_TYPES)
def shared(t: Case, kind: PageType) -> None:
    """A {} page at a GFN that isn't private is EIO, and can be launched once it is"""
    vm = LaunchVm.started(t)
    vm.vm.set_memory_attributes(GPA, PAGE_SIZE, private=False)
    t.refused(vm.update(type=kind), "EIO", fw=0)
    vm.vm.set_memory_attributes(GPA, PAGE_SIZE, private=True)
    t.taken(vm.update(type=kind))
    vm.check_measured()


@case("update.{}.partial", each=_TYPES)
def partial(t: Case, kind: PageType) -> None:
    """A {} page that follows and can't be done: success, with the rest written back"""
    vm = LaunchVm.started(t)
    vm.vm.set_memory_attributes(GPA + PAGE_SIZE, PAGE_SIZE, private=False)
    if kind is PageType.CPUID:
        vm.fill(0, t.host.cpuid_page)
    answer = t.taken(vm.update(0, 2, type=kind, uaddr=vm.source.address))
    t.equal(f"{answer.what}: len that is left", answer.data.len, PAGE_SIZE)
    t.equal(f"{answer.what}: gfn_start afterwards", answer.data.gfn_start, _GFN + 1)
    t.equal(f"{answer.what}: the firmware word is as it was", answer.untouched, True)
    t.refused(vm.update(1, type=kind), "EIO", fw=0)
    vm.check_measured()


@case("update.{}.sev-fd", each=_TYPES)
def sev_fd(t: Case, kind: PageType) -> None:
    """A {} page with a sev_fd that isn't /dev/sev is EIO, and can be launched afterwards"""
    vm = LaunchVm.started(t)
    for fd in (_NO_FD, t.host.kvm.fd):
        t.refused(vm.update(type=kind, sev_fd=fd), "EIO", fw=0)
    t.taken(vm.update(type=kind))
    vm.check_measured()


@case("update.{}.source-unreadable", each=_WITH_SOURCE)
def source_unreadable(t: Case, kind: PageType) -> None:
    """A {} page whose source can't be read is EIO, and can be launched afterwards"""
    vm = LaunchVm.started(t)
    t.refused(vm.update(type=kind, uaddr=UNMAPPED), "EIO", fw=0)
    t.taken(vm.update(type=kind))
    vm.check_measured()


@case("update.{}.source-unaligned", each=_ANY_SOURCE)
def source_unaligned(t: Case, kind: PageType) -> None:
    """A {} page from an unaligned source, which kernels differ on"""
    vm = LaunchVm.started(t)
    t.one_of(vm.update(type=kind, uaddr=vm.source.address + 8), "UPDATE with an unaligned source")
    vm.check_measured()


@case("update.{}.after-finish", each=_TYPES)
def after_finish(t: Case, kind: PageType) -> None:
    """A {} page after FINISH is refused by firmware: invalid guest state"""
    vm = LaunchVm.started(t)
    t.taken(vm.finish())
    t.refused(vm.update(type=kind), "EIO", fw=FwStatus.INVALID_GUEST_STATE)


@case("update.zero.source-ignored")
def source_ignored(t: Case) -> None:
    """A ZERO page has no source: any uaddr is taken, and left alone"""
    vm = LaunchVm.started(t)
    for page, address in enumerate((0, UNMAPPED + 1, (1 << 64) - 1)):
        answer = t.taken(vm.update(page, type=PageType.ZERO, uaddr=address))
        t.equal(f"{answer.what}: uaddr afterwards", answer.data.uaddr, address)
    vm.check_measured()


@case("update.cpuid.refused")
def cpuid_refused(t: Case) -> None:
    """A CPUID page with a count of 65 is refused by firmware, and can be launched corrected"""
    vm = LaunchVm.started(t)
    page = bytearray(t.host.cpuid_page)
    page[:4] = _PAST_64.to_bytes(4, "little")
    vm.fill(0, bytes(page))
    answer = vm.update(type=PageType.CPUID, uaddr=vm.source.address)
    t.refused(answer, "EIO", fw=FwStatus.INVALID_PARAM)
    t.taken(vm.update(type=PageType.CPUID))
    vm.check_measured()


@case("update.cpuid.corrected")
def cpuid_corrected(t: Case) -> None:
    """Firmware's correction of a CPUID page comes back in its source, and is taken then"""
    vm = LaunchVm.started(t)
    sent = encode([CpuidEntry(0x8000_0001, ecx=0xFFFF_FFFF, edx=0xFFFF_FFFF)])
    vm.fill(0, sent)
    answer = vm.update(type=PageType.CPUID, uaddr=vm.source.address)
    if answer.ok:
        t.skip("this firmware takes any feature bits")
    t.refused(answer, "EIO", fw=FwStatus.INVALID_PARAM)
    t.expect(bytes(vm.source.view[:PAGE_SIZE]) != sent, "the CPUID page came back as it was sent")
    t.taken(vm.update(type=PageType.CPUID, uaddr=vm.source.address))
    vm.check_measured()


# The call.


@case("update.before-init2")
def before_init2(t: Case) -> None:
    """UPDATE before INIT2 is EINVAL"""
    vm = LaunchVm(t)
    vm.add_memory(1)
    t.refused(vm.update(), "EINVAL")


@case("update.before-start")
def before_start(t: Case) -> None:
    """UPDATE before START is EINVAL"""
    t.refused(LaunchVm.ready(t).update(), "EINVAL")


@case("update.plain-vm")
def plain_vm(t: Case) -> None:
    """UPDATE of a VM that was not created for SEV is EINVAL"""
    vm = LaunchVm(t, vm_type=lib.KVM_X86_DEFAULT_VM)
    t.refused(vm.update(uaddr=UNMAPPED), "EINVAL")


@case("update.unreadable")
def unreadable(t: Case) -> None:
    """A struct that can't be read is EFAULT"""
    t.refused(LaunchVm.started(t).update(at=UNMAPPED), "EFAULT")


@case("update.unwritable")
def unwritable(t: Case) -> None:
    """A struct that can't be written back is EFAULT, after the page has been launched"""
    vm = LaunchVm.started(t)
    struct = ffi.new(
        "struct kvm_sev_snp_launch_update *",
        {"gfn_start": _GFN, "len": PAGE_SIZE, "type": PageType.ZERO},
    )
    t.refused(vm.update(at=read_only(t, bytes(ffi.buffer(struct)))), "EFAULT")
    t.refused(vm.update(), "EIO", fw=0)


@case("update.type-unknown")
def type_unknown(t: Case) -> None:
    """Page types that there are not are EINVAL"""
    vm = LaunchVm.started(t)
    for kind in _UNKNOWN:
        t.refused(vm.update(type=kind), "EINVAL")


@case("update.len-zero")
def len_zero(t: Case) -> None:
    """A len of 0, which kernels differ on; no page is launched"""
    vm = LaunchVm.started(t)
    t.one_of(vm.update(len=0), "UPDATE with len 0")
    t.taken(vm.update())
    vm.check_measured()


@case("update.padding")
def padding(t: Case) -> None:
    """What is reserved in the struct isn't looked at"""
    t.taken(LaunchVm.started(t).update(pad0=1, pad1=1, pad2=[1] * 4))


@case("update.no-slot")
def no_slot(t: Case) -> None:
    """A GFN without a memory slot is EINVAL"""
    vm = LaunchVm.started(t)
    for gfn in (_GFN - 1, _GFN + 4, 1 << 40, (1 << 52) + _GFN):
        t.refused(vm.update(gfn_start=gfn), "EINVAL")


@case("update.slot-without-memfd")
def slot_without_memfd(t: Case) -> None:
    """A slot without guest_memfd is EINVAL"""
    vm = LaunchVm.started(t)
    vm.add_shared_memory(1, 2 * GPA)
    vm.vm.set_memory_attributes(2 * GPA, PAGE_SIZE, private=True)
    t.refused(vm.update(gfn_start=2 * _GFN), "EINVAL")


@case("update.assigned-after-finish")
def assigned_after_finish(t: Case) -> None:
    """After FINISH, a page where one has been launched is EIO without a firmware code"""
    vm = LaunchVm.started(t)
    t.taken(vm.update())
    t.taken(vm.finish())
    t.refused(vm.update(), "EIO", fw=0)


@case("update.memfd-closed")
def memfd_closed(t: Case) -> None:
    """A slot whose guest_memfd has been closed is EIO without a firmware code"""
    vm = LaunchVm.started(t)
    assert vm.memfd is not None
    vm.memfd.close()
    t.refused(vm.update(), "EIO", fw=0)


@case("update.beyond-slot")
def beyond_slot(t: Case) -> None:
    """A range that ends beyond its slot: success, with the rest written back"""
    vm = LaunchVm.started(t)
    answer = t.taken(vm.update(2, 5))
    t.equal(f"{answer.what}: len that is left", answer.data.len, 3 * PAGE_SIZE)
    t.equal(f"{answer.what}: gfn_start afterwards", answer.data.gfn_start, _GFN + 4)
    t.refused(vm.update(gfn_start=_GFN + 4), "EINVAL")
    vm.check_measured()


@case("update.slots-in-a-row")
def slots_in_a_row(t: Case) -> None:
    """What a range leaves behind its slot can be launched from the next one"""
    vm = LaunchVm.started(t, pages=2)
    vm.add_memory(2, GPA + 2 * PAGE_SIZE)
    answer = t.taken(vm.update(0, 2, len=3 * PAGE_SIZE))
    t.equal(f"{answer.what}: len that is left", answer.data.len, PAGE_SIZE)
    t.taken(vm.update(gfn_start=answer.data.gfn_start))
    vm.check_measured()


@case("update.punched")
def punched(t: Case) -> None:
    """A page that was freed by PUNCH_HOLE can be launched again, and is measured twice"""
    vm = LaunchVm.started(t)
    t.taken(vm.update())
    assert vm.memfd is not None
    vm.memfd.punch_hole(0, PAGE_SIZE)
    t.taken(vm.update())
    vm.check_measured()
