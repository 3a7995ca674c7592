"""guest_memfd files (kernel-snp-abi 4.1)."""

from __future__ import annotations

import errno
import mmap

import pytest

from kvmlaunch.uapi import lib

from .driver import PAGE, RW, Guest, launched, simulated

KEEP, PUNCH = 1, 2


@pytest.fixture
def guest():
    with simulated() as platform:
        yield Guest(platform)


@pytest.mark.parametrize("bit", range(64))
def test_create_with_any_flag_on_6_12_is_einval(guest, bit):
    assert guest.create_gmem(flags=1 << bit) == (-1, errno.EINVAL)


def test_create_with_flag_and_wrong_size_is_einval_once(guest):
    assert guest.create_gmem(size=1, flags=1) == (-1, errno.EINVAL)


@pytest.mark.parametrize("size", [0, 1, PAGE + 1, 1 << 63, (1 << 64) - PAGE])
def test_create_with_wrong_size_is_einval(guest, size):
    assert guest.create_gmem(size=size) == (-1, errno.EINVAL)


def test_create_null_is_efault(guest):
    assert guest.ioctl(guest.vm, lib.KVM_CREATE_GUEST_MEMFD, 0) == (-1, errno.EFAULT)


@pytest.mark.parametrize("size", [PAGE, 1 << 40])
def test_create_with_size_makes_a_file(guest, size):
    assert guest.create_gmem(size=size).ret >= 10000


def test_create_on_default_vm_works_though_it_cannot_be_bound(guest):
    other = Guest(guest.platform, init=False, vm_type=0)
    assert other.create_gmem().ret >= 10000


@pytest.mark.parametrize(
    ("vm_type", "flags", "works"),
    [(4, 1, True), (4, 2, False), (4, 4, False), (0, 1, True), (0, 3, True), (0, 4, False)],
)
def test_create_flags_on_6_18(vm_type, flags, works):
    with simulated("6.18") as platform:
        result = Guest(platform, init=False, vm_type=vm_type).create_gmem(flags=flags)
        assert (result.ret >= 0, result.errno) == (works, 0 if works else errno.EINVAL)


def test_mmap_is_enodev_and_ioctl_enotty(guest):
    fd = guest.ok(guest.create_gmem())
    assert guest.platform.mmap(fd, PAGE, RW, mmap.MAP_SHARED) == (-1, errno.ENODEV)
    assert guest.ioctl(fd, lib.KVM_GET_API_VERSION) == (-1, errno.ENOTTY)


@pytest.mark.parametrize("mode", [0, PUNCH, 4, 0x10, KEEP | 8, KEEP | PUNCH | 0x10])
def test_fallocate_with_wrong_mode_is_eopnotsupp(guest, mode):
    fd = guest.ok(guest.create_gmem())
    assert guest.platform.fallocate(fd, mode, 1, 1) == (-1, errno.EOPNOTSUPP)


# vfs_fallocate(): modes that the VFS knows, 8 collapse, 0x10 zero, 0x40 unshare, come as far as the
# size check, which is before the file's own; 4 (hide stale) and 9 don't.
@pytest.mark.parametrize(
    ("mode", "code"),
    [
        *((mode, errno.EFBIG) for mode in (0, 8, 0x10, 0x11, 0x20, 0x40, 0x41, KEEP, KEEP | PUNCH)),
        *((mode, errno.EOPNOTSUPP) for mode in (PUNCH, 4, 9, 0x13, 0x21)),
    ],
)
def test_fallocate_too_big_is_efbig_when_vfs_knows_the_mode(guest, mode, code):
    fd = guest.ok(guest.create_gmem())
    assert guest.platform.fallocate(fd, mode, (1 << 63) - PAGE, PAGE) == (-1, code)
    assert guest.platform.fallocate(guest.vm, mode, (1 << 63) - PAGE, PAGE) == (
        (-1, errno.ENODEV) if code == errno.EFBIG else (-1, code)
    )


@pytest.mark.parametrize("mode", [KEEP, KEEP | PUNCH])
@pytest.mark.parametrize(("offset", "length"), [(1, PAGE), (0, 1), (PAGE, PAGE + 1), (0, 0)])
def test_fallocate_unaligned_or_empty_is_einval(guest, mode, offset, length):
    fd = guest.ok(guest.create_gmem())
    assert guest.platform.fallocate(fd, mode, offset, length) == (-1, errno.EINVAL)


def test_fallocate_beyond_end_is_einval_but_punch_is_0(guest):
    fd = guest.ok(guest.create_gmem(size=4 * PAGE))
    assert guest.platform.fallocate(fd, KEEP, 0, 4 * PAGE) == (0, 0)
    assert guest.platform.fallocate(fd, KEEP, PAGE, 4 * PAGE) == (-1, errno.EINVAL)
    assert guest.platform.fallocate(fd, KEEP | PUNCH, 8 * PAGE, PAGE) == (0, 0)
    assert guest.platform.fallocate(fd, KEEP | PUNCH, 0, 100 * PAGE) == (0, 0)


@pytest.mark.parametrize("name", ["/dev/kvm", "vm"])
def test_fallocate_of_other_file_is_enodev(guest, name):
    fd = guest.kvm if name == "/dev/kvm" else guest.vm
    assert guest.platform.fallocate(fd, KEEP, 0, PAGE) == (-1, errno.ENODEV)


def test_punched_page_can_be_measured_again():
    with simulated() as platform:
        guest = launched(platform)
        assert guest.update_pages(0)[0] == (0, 0)
        assert guest.update_pages(0) == ((-1, errno.EIO), 0)
        assert platform.fallocate(guest.gmem, KEEP | PUNCH, 0, PAGE) == (0, 0)
        assert guest.update_pages(0)[0] == (0, 0)
        assert [page.gpa for page in platform.measured_pages(guest.vm)] == [guest.GPA] * 2


def test_pages_when_slot_is_deleted_stay_measured():
    with simulated() as platform:
        guest = launched(platform)
        assert guest.update_pages(0)[0] == (0, 0)
        slot = {
            "flags": lib.KVM_MEM_GUEST_MEMFD,
            "guest_phys_addr": guest.GPA,
            "userspace_addr": guest.ram.address,
            "guest_memfd": guest.gmem,
        }
        guest.ok(guest.set_region(memory_size=0))
        guest.ok(guest.set_region(memory_size=4 * PAGE, **slot))
        assert guest.update_pages(0) == ((-1, errno.EIO), 0)
        assert guest.update_pages(1)[0] == (0, 0)


def test_fallocated_page_can_be_measured():
    with simulated() as platform:
        guest = launched(platform)
        assert platform.fallocate(guest.gmem, KEEP, 0, PAGE) == (0, 0)
        assert guest.update_pages(0)[0] == (0, 0)


def test_file_too_big_to_back_fails_when_touched():
    with simulated() as platform:
        guest = Guest(platform)
        fd = guest.ok(guest.create_gmem(size=1 << 62))
        assert platform.fallocate(fd, KEEP, 0, PAGE) == (-1, errno.ENOMEM)
