"""SNP_LAUNCH_UPDATE, row by row (kernel-snp-abi 3.4)."""

from __future__ import annotations

import errno
import hashlib
import struct as packed

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, RAM_PAGES, FrozenPage, Guest, launched, simulated

MARK = 0xABCD1234
EINVAL = (-1, errno.EINVAL)
EIO = (-1, errno.EIO)
OK = (0, 0)
NORMAL, ZERO, UNMEASURED, SECRETS, CPUID = 1, 3, 4, 5, 6


@pytest.fixture
def guest():
    with simulated() as platform:
        yield launched(platform)


def fields(args):
    return args.gfn_start, args.uaddr, args.len


def cpuid_page(*functions):
    """A CPUID page with (leaf, index, eax, ebx, ecx, edx) entries."""
    head = packed.pack("<IIQ", len(functions), 0, 0)
    body = b"".join(
        packed.pack("<IIQQIIIIQ", leaf, index, 0, 0, *registers, 0)
        for leaf, index, *registers in functions
    )
    return (head + body).ljust(PAGE, b"\0")


# The processor's name: firmware takes any.
TEXT_LEAF = cpuid_page((0x80000002, 0, 0x20444D41, 0, 0, 0))


# rows 1-4


@pytest.mark.parametrize("vm_type", [0, 4])
def test_update_before_start_is_einval_before_its_struct_is_read(vm_type):
    with simulated() as platform:
        guest = Guest(platform, init=vm_type == 4, vm_type=vm_type)
        command = lib.KVM_SEV_SNP_LAUNCH_UPDATE
        assert guest.sev(guest.vm, command, 8, guest.sev_fd, MARK) == (EINVAL, MARK)


def test_update_with_unreadable_struct_is_efault(guest):
    command = lib.KVM_SEV_SNP_LAUNCH_UPDATE
    result = guest.sev(guest.vm, command, 0, guest.sev_fd, MARK)
    assert result == ((-1, errno.EFAULT), MARK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"len": 1},
        {"len": PAGE + 1},
        *({"flags": 1 << bit} for bit in range(16)),
        *({"type": value} for value in (0, 2, 7, 8, 255)),
        {"gfn_start": 0},
        {"gfn_start": 0x110},
        {"gfn_start": (1 << 64) - 1},
    ],
)
def test_update_with_wrong_argument_is_einval_and_leaves_the_struct(guest, wrong):
    args = guest.update_args(**wrong)
    before = fields(args)
    assert guest.update(args, error=MARK) == (EINVAL, MARK)
    assert fields(args) == before


def test_update_of_shared_slot_is_einval(guest):
    slot = {"slot": 5, "guest_phys_addr": 0x800000, "memory_size": PAGE}
    guest.ok(guest.set_region(userspace_addr=guest.ram.address, **slot))
    assert guest.update_pages(gfn_start=0x800) == (EINVAL, 0)


@pytest.mark.parametrize(("profile", "result"), [("6.12", OK), ("6.18", EINVAL), ("7.0", EINVAL)])
def test_update_of_nothing_by_profile(profile, result):
    with simulated(profile) as platform:
        guest = launched(platform)
        args = guest.update_args(npages=0)
        before = fields(args)
        assert guest.update(args, error=MARK) == (result, MARK)
        assert fields(args) == before


def test_update_of_nothing_where_no_slot_is_is_einval(guest):
    assert guest.update_pages(npages=0, gfn_start=0) == (EINVAL, 0)


@pytest.mark.parametrize(("profile", "result"), [("6.12", OK), ("6.18", OK), ("7.0", EINVAL)])
def test_update_from_unaligned_source_by_profile(profile, result):
    with simulated(profile) as platform:
        guest = launched(platform)
        assert guest.update_pages(uaddr=guest.source.address + 8) == (result, 0)


def test_update_zero_with_unaligned_source_on_7_0_works():
    with simulated("7.0") as platform:
        assert launched(platform).update_pages(uaddr=1, type=ZERO) == (OK, 0)


# row 5: the first page fails


def refused(guest, error=0, **wrong):
    """The call is EIO with that word, and the struct isn't written."""
    args = guest.update_args(**wrong)
    before = fields(args)
    result = guest.update(args, error=MARK)
    return result == (EIO, error) and fields(args) == before


def test_update_when_memfd_is_closed_is_eio(guest):
    guest.platform.close(guest.gmem)
    assert refused(guest)


def test_update_with_signal_pending_is_eio():
    with simulated(faults=["SNP_LAUNCH_UPDATE:signal=0"]) as platform:
        guest = launched(platform)
        assert refused(guest)
        assert guest.update_pages() == (OK, 0)


@pytest.mark.parametrize("profile", ["6.12", "7.0"])
def test_update_of_measured_page_is_eio(profile):
    with simulated(profile) as platform:
        guest = launched(platform)
        assert guest.update_pages() == (OK, 0)
        assert refused(guest)


def test_update_of_shared_page_is_eio(guest):
    guest.ok(guest.set_attributes(guest.GPA, PAGE, 0))
    assert refused(guest)


@pytest.mark.parametrize("uaddr", [0, 8, 1 << 63])
def test_update_from_unreadable_source_is_eio_and_page_can_be_done_later(guest, uaddr):
    assert refused(guest, uaddr=uaddr)
    assert guest.update_pages() == (OK, 0)


@pytest.mark.parametrize("sev_fd", [0, 99999])
def test_update_without_sev_fd_is_eio_and_page_can_be_done_later(guest, sev_fd):
    args = guest.update_args()
    assert guest.update(args, error=MARK, sev_fd=sev_fd) == (EIO, 0)
    assert guest.update_pages() == (OK, 0)


def test_update_with_other_sev_fd_than_at_start_works(guest):
    assert guest.update(guest.update_args(), sev_fd=guest.open_sev()) == (OK, 0)


def test_update_when_firmware_refuses_is_eio_with_its_word():
    with simulated(faults=["SNP_LAUNCH_UPDATE:fw=0x1a"]) as platform:
        guest = launched(platform)
        assert refused(guest, error=0x1A)
        assert guest.update_pages() == (OK, 0)


def test_update_after_finish_is_invalid_guest_state_or_plain_eio(guest):
    assert guest.update_pages() == (OK, 0)
    assert guest.finish()[0] == OK
    assert refused(guest)
    assert refused(guest, error=2, page=1)


def test_update_when_reclaim_fails_kills_the_vm():
    faults = ["SNP_LAUNCH_UPDATE:fw=0x1a", "SNP_PAGE_RECLAIM:fail"]
    with simulated(faults=faults) as platform:
        guest = launched(platform)
        assert guest.update_pages() == (EIO, 0x1A)
        dead = (-1, errno.EIO)
        assert guest.ioctl(guest.vm, lib.KVM_CHECK_EXTENSION, 3) == dead
        assert guest.ioctl(guest.vm, 0x1234) == dead
        assert guest.ioctl(guest.vcpus[0], lib.KVM_GET_REGS, 0) == dead
        assert guest.ioctl(guest.vcpus[0], lib.KVM_RUN) == dead
        assert guest.sev(guest.vm, lib.KVM_SEV_SNP_LAUNCH_UPDATE, 0, error=MARK) == (dead, MARK)


# row 6: success and partial progress


@pytest.mark.parametrize("kind", [NORMAL, UNMEASURED, SECRETS])
def test_update_of_pages_writes_the_rest_back(guest, kind):
    args = guest.update_args(npages=3, type=kind)
    gfn, uaddr, _ = fields(args)
    assert guest.update(args, error=MARK) == (OK, MARK)
    assert fields(args) == (gfn + 3, uaddr + 3 * PAGE, 0)


def test_update_zero_does_not_touch_uaddr(guest):
    args = guest.update_args(npages=2, type=ZERO, uaddr=77)
    assert guest.update(args) == (OK, 0)
    assert (args.uaddr, args.len) == (77, 0)


@pytest.mark.parametrize("failing", [1, 3])
def test_update_when_later_page_fails_is_success_and_next_call_says_why(guest, failing):
    guest.ok(guest.set_attributes(guest.GPA + failing * PAGE, PAGE, 0))
    args = guest.update_args(npages=6)
    gfn, uaddr, length = fields(args)
    assert guest.update(args, error=MARK) == (OK, MARK)
    done = failing * PAGE
    assert fields(args) == (gfn + failing, uaddr + done, length - done)
    assert guest.update(args, error=MARK) == (EIO, 0)


def test_update_when_later_page_is_refused_hides_the_word_until_the_next_call():
    with simulated(faults=["SNP_LAUNCH_UPDATE:fw=0x17@3+"]) as platform:
        guest = launched(platform)
        args = guest.update_args(npages=4)
        assert guest.update(args, error=MARK) == (OK, MARK)
        assert args.len == 2 * PAGE
        assert guest.update(args, error=MARK) == (EIO, 0x17)


def test_update_beyond_slot_stops_there_and_goes_on_in_the_next(guest):
    tail = RAM_PAGES - 2
    args = guest.update_args(page=tail, npages=4, uaddr=guest.source.address)
    assert guest.update(args) == (OK, 0)
    assert args.len == 2 * PAGE
    assert guest.update(args) == (EINVAL, 0)
    guest.add_ram(slot=1, gpa=guest.GPA + RAM_PAGES * PAGE)
    assert guest.update(args) == (OK, 0)
    assert args.len == 0


def test_update_whose_struct_cannot_be_written_is_efault_but_done(guest):
    frozen = FrozenPage(bytes(ffi.buffer(guest.update_args())))
    command = lib.KVM_SEV_SNP_LAUNCH_UPDATE
    result = guest.sev(guest.vm, command, frozen.address, guest.sev_fd)
    assert result == ((-1, errno.EFAULT), 0)
    assert len(guest.platform.measured_pages(guest.vm)) == 1


def test_update_measures_pages_in_call_order_with_their_contents(guest):
    guest.source.write(b"first", 0)
    guest.source.write(b"second", PAGE)
    assert guest.update_pages(1) == (OK, 0)
    assert guest.update_pages(0) == (OK, 0)
    pages = guest.platform.measured_pages(guest.vm)
    assert [page.gpa for page in pages] == [guest.GPA + PAGE, guest.GPA]
    texts = [b"second", b"first"]
    assert [page.contents for page in pages] == [
        hashlib.sha384(text.ljust(PAGE, b"\0")).digest() for text in texts
    ]


def test_update_of_every_type_is_measured_as_that_type(guest):
    guest.source.write(TEXT_LEAF, 4 * PAGE)
    kinds = [NORMAL, ZERO, UNMEASURED, SECRETS, CPUID]
    for page, kind in enumerate(kinds):
        assert guest.update_pages(page, type=kind) == (OK, 0)
    measured = guest.platform.measured_pages(guest.vm)
    assert [page.type for page in measured] == kinds
    assert [any(page.contents) for page in measured] == [True, False, False, False, False]


def test_source_may_be_reused_at_once(guest):
    guest.source.write(b"A" * PAGE)
    assert guest.update_pages(0) == (OK, 0)
    guest.source.write(b"B" * PAGE)
    assert guest.update_pages(1, uaddr=guest.source.address) == (OK, 0)
    first, second = guest.platform.measured_pages(guest.vm)
    assert first.contents != second.contents


# CPUID


def test_corrected_cpuid_page_is_copied_back_and_retry_works():
    with simulated(faults=["CPUID:correct=0x80000002.ebx=0x1234"]) as platform:
        guest = launched(platform)
        guest.source.write(TEXT_LEAF)
        assert refused(guest, error=0x16, type=CPUID)
        expected = bytearray(TEXT_LEAF)
        packed.pack_into("<I", expected, 16 + 28, 0x1234)
        assert guest.source.read() == expected
        assert guest.platform.launch_digest(guest.vm) == bytes(48)
        assert guest.update_pages(type=CPUID) == (OK, 0)


def test_correction_of_later_page_is_copied_back_though_the_call_succeeds():
    with simulated(faults=["CPUID:correct=1.eax@2"]) as platform:
        guest = launched(platform)
        guest.source.write(TEXT_LEAF)
        second = cpuid_page((1, 0, 0, 0, 0, 0))
        guest.source.write(second, PAGE)
        args = guest.update_args(npages=2, type=CPUID)
        assert guest.update(args, error=MARK) == (OK, MARK)
        assert args.len == PAGE
        assert guest.source.read(offset=PAGE) != second


def test_normal_page_refused_with_0x16_is_not_copied_back():
    with simulated(faults=["SNP_LAUNCH_UPDATE:fw=0x16"]) as platform:
        guest = launched(platform)
        guest.source.write(b"mine")
        assert refused(guest, error=0x16)
        assert guest.source.read(4) == b"mine"


def test_no_copy_back_when_reclaim_fails():
    faults = ["CPUID:correct=1.eax", "SNP_PAGE_RECLAIM:fail"]
    with simulated(faults=faults) as platform:
        guest = launched(platform)
        page = cpuid_page((1, 0, 0, 0, 0, 0))
        guest.source.write(page)
        assert guest.update_pages(type=CPUID) == (EIO, 0x16)
        assert guest.source.read() == page


# order


@pytest.mark.parametrize(
    "wrong",
    [
        {"len": 1, "gfn_start": 0},
        {"type": 2, "uaddr": 0},
        {"flags": 1, "gfn_start": 0},
        {"gfn_start": 0, "uaddr": 0},
    ],
)
def test_update_with_two_faults_gives_the_earlier_one(guest, wrong):
    assert guest.update(guest.update_args(**wrong), error=MARK) == (EINVAL, MARK)


def test_update_with_bad_fd_and_bad_slot_is_einval(guest):
    assert guest.update(guest.update_args(gfn_start=0), sev_fd=0) == (EINVAL, 0)


def test_update_reserved_bytes_are_ignored(guest):
    args = guest.update_args()
    args.pad0, args.pad1, args.pad2[0] = 1, 1, 1
    assert guest.update(args) == (OK, 0)
