"""Memory slots and attributes, row by row (kernel-snp-abi 4.2, 4.3)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import lib

from .driver import PAGE, RAM_PAGES, Driver, Guest, simulated, struct

GMEM = lib.KVM_MEM_GUEST_MEMFD
LOG = lib.KVM_MEM_LOG_DIRTY_PAGES
RO = lib.KVM_MEM_READONLY
EINVAL = (-1, errno.EINVAL)
TOP = 1 << 64


@pytest.fixture
def guest():
    with simulated() as platform:
        yield Guest(platform)


@pytest.fixture
def plain():
    with simulated() as platform:
        yield Guest(platform, init=False, vm_type=0)


def region(guest, **fields):
    """A correct shared slot of four pages, with changes."""
    base = {
        "guest_phys_addr": 0x100000,
        "memory_size": 4 * PAGE,
        "userspace_addr": guest.ram.address,
    }
    return guest.set_region(**{**base, **fields})


def private(guest, fd=None, **fields):
    fd = guest.ok(guest.create_gmem()) if fd is None else fd
    return region(guest, **{"flags": GMEM, "guest_memfd": fd, **fields})


# 1: flags


@pytest.mark.parametrize("flags", [8, 1 << 31, GMEM | LOG, GMEM | RO, RO, RO | LOG])
def test_slot_flags_that_snp_refuses_are_einval(guest, flags):
    assert region(guest, flags=flags, guest_memfd=12345) == EINVAL


@pytest.mark.parametrize("flags", [0, LOG])
def test_slot_flags_that_snp_takes(guest, flags):
    assert region(guest, flags=flags) == (0, 0)


@pytest.mark.parametrize("flags", [0, LOG, RO, LOG | RO])
def test_slot_flags_that_default_vm_takes(plain, flags):
    assert region(plain, flags=flags) == (0, 0)


@pytest.mark.parametrize(("profile", "expected"), [("6.12", EINVAL), ("6.18", (0, 0))])
def test_guest_memfd_slot_on_default_vm_by_profile(profile, expected):
    with simulated(profile) as platform:
        assert private(Guest(platform, init=False, vm_type=0)) == expected


@pytest.mark.parametrize("flags", [GMEM, 8])
def test_v1_region_with_newer_flag_is_einval(guest, flags):
    args = struct("kvm_userspace_memory_region", flags=flags, memory_size=PAGE)
    assert guest.ioctl(guest.vm, lib.KVM_SET_USER_MEMORY_REGION, args) == EINVAL


def test_v1_region_makes_a_shared_slot(guest):
    args = struct(
        "kvm_userspace_memory_region",
        memory_size=PAGE,
        userspace_addr=guest.ram.address,
    )
    assert guest.ioctl(guest.vm, lib.KVM_SET_USER_MEMORY_REGION, args) == (0, 0)


@pytest.mark.parametrize("name", ["KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2"])
def test_region_null_is_efault(guest, name):
    assert guest.ioctl(guest.vm, getattr(lib, name), 0) == (-1, errno.EFAULT)


# 2-6: numbers


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_size": 1},
        {"memory_size": PAGE + 1},
        {"guest_phys_addr": 0x100001},
        {"userspace_addr": 0x1001},
        {"userspace_addr": 1 << 63},
        {"userspace_addr": (1 << 47) - PAGE},
        {"slot": 32764},
        {"slot": 0xFFFF},
        {"slot": 1 << 16},
        {"guest_phys_addr": TOP - PAGE},
        {"memory_size": (1 << 31) * PAGE, "userspace_addr": 0},
        {"guest_phys_addr": 1 << 52},
    ],
)
def test_slot_with_wrong_number_is_einval(guest, wrong):
    assert region(guest, **wrong) == EINVAL


@pytest.mark.parametrize("offset", [1, PAGE - 1, TOP - PAGE])
def test_private_slot_with_wrong_offset_is_einval_before_the_fd_is_looked_at(guest, offset):
    assert private(guest, fd=7, guest_memfd_offset=offset) == EINVAL


def test_slot_without_hva_is_accepted(guest):
    assert region(guest, userspace_addr=0) == (0, 0)


def test_highest_slot_is_accepted(guest):
    assert region(guest, slot=32763) == (0, 0)


def test_default_vm_has_a_second_address_space(plain):
    assert region(plain, slot=1 << 16) == (0, 0)
    assert region(plain, slot=2 << 16) == EINVAL


def test_slots_of_two_address_spaces_may_overlap(plain):
    assert region(plain) == (0, 0)
    assert region(plain, slot=1 << 16) == (0, 0)


# 7-9: existing slots


def test_delete_of_missing_slot_is_einval(guest):
    assert region(guest, memory_size=0) == EINVAL


def test_delete_then_create_again_works(guest):
    assert region(guest) == (0, 0)
    assert region(guest, memory_size=0) == (0, 0)
    assert region(guest, memory_size=8 * PAGE) == (0, 0)


def test_private_slot_set_again_is_einval(guest):
    fd = guest.ok(guest.create_gmem())
    assert private(guest, fd) == (0, 0)
    assert private(guest, fd) == EINVAL
    assert region(guest) == EINVAL


@pytest.mark.parametrize(
    "change",
    [
        {"memory_size": 8 * PAGE},
        {"userspace_addr": 0},
        {"flags": RO},
        {"flags": GMEM, "guest_memfd": 0},
    ],
)
def test_existing_slot_with_other_shape_is_einval(plain, change):
    assert region(plain) == (0, 0)
    assert region(plain, **change) == EINVAL


@pytest.mark.parametrize("change", [{}, {"flags": LOG}, {"guest_phys_addr": 0x200000}])
def test_existing_slot_can_be_logged_moved_or_repeated(plain, change):
    assert region(plain) == (0, 0)
    assert region(plain, **change) == (0, 0)


# 10-12


@pytest.mark.parametrize("gpa", [0x100000, 0x103000, 0xFD000])
def test_overlapping_slot_is_eexist(guest, gpa):
    assert region(guest) == (0, 0)
    assert region(guest, slot=1, guest_phys_addr=gpa) == (-1, errno.EEXIST)


@pytest.mark.parametrize("gpa", [0x104000, 0xFC000])
def test_adjacent_slot_is_accepted(guest, gpa):
    assert region(guest) == (0, 0)
    assert region(guest, slot=1, guest_phys_addr=gpa) == (0, 0)


def test_move_onto_another_slot_is_eexist(guest):
    assert region(guest) == (0, 0)
    assert region(guest, slot=1, guest_phys_addr=0x200000) == (0, 0)
    assert region(guest, slot=1) == (-1, errno.EEXIST)


def test_slot_in_the_middle_of_others_is_eexist_only_where_they_are(plain):
    # Frames 0x100-0x103 and 0x108-0x10b are taken, in either address space on its own.
    for slot in (0, 1 << 16):
        assert region(plain, slot=slot + 5) == (0, 0)
        assert region(plain, slot=slot + 3, guest_phys_addr=0x108000) == (0, 0)
    for gpa, code in (
        (0x101000, 17),
        (0x105000, 17),
        (0x107000, 17),
        (0x10B000, 17),
        (0xFF000, 17),
    ):
        assert region(plain, slot=1, guest_phys_addr=gpa) == (-1, code)
    assert region(plain, slot=1, guest_phys_addr=0x104000) == (0, 0)
    # The one in the middle moves away over the end of its neighbour's old place.
    assert region(plain, slot=3, guest_phys_addr=0x10A000) == (0, 0)
    assert region(plain, slot=5, memory_size=0) == (0, 0)
    assert region(plain, slot=7, guest_phys_addr=0x100000) == (0, 0)


def test_slots_up_to_the_limit_take_little_time(plain):
    for slot in range(32764):
        plain.ok(region(plain, slot=slot, guest_phys_addr=slot * 4 * PAGE))
    assert region(plain, slot=32764, guest_phys_addr=1 << 40) == EINVAL


def test_overlap_is_looked_at_before_the_fd(guest):
    assert region(guest) == (0, 0)
    assert private(guest, fd=99999, slot=1) == (-1, errno.EEXIST)


@pytest.mark.parametrize("fd", [0, 99999, 0xFFFFFFFF])
def test_private_slot_with_no_fd_is_ebadf(guest, fd):
    assert private(guest, fd) == (-1, errno.EBADF)


def test_private_slot_with_other_file_is_einval(guest):
    assert private(guest, guest.kvm) == EINVAL
    assert private(guest, guest.vm) == EINVAL


def test_private_slot_with_file_of_other_vm_is_einval(guest):
    other = Guest(guest.platform)
    assert private(guest, other.ok(other.create_gmem())) == EINVAL


def test_private_slot_beyond_file_is_einval(guest):
    offset = (RAM_PAGES - 3) * PAGE
    assert private(guest, guest_memfd_offset=offset) == EINVAL
    assert private(guest, guest_memfd_offset=offset - PAGE) == (0, 0)


def test_file_range_bound_twice_is_einval_and_beside_is_fine(guest):
    fd = guest.ok(guest.create_gmem())
    assert private(guest, fd) == (0, 0)
    other = {"slot": 1, "guest_phys_addr": 0x200000}
    assert private(guest, fd, guest_memfd_offset=3 * PAGE, **other) == EINVAL
    assert private(guest, fd, guest_memfd_offset=4 * PAGE, **other) == (0, 0)


def test_rebinding_after_delete_works(guest):
    fd = guest.ok(guest.create_gmem())
    assert private(guest, fd) == (0, 0)
    assert region(guest, memory_size=0) == (0, 0)
    assert private(guest, fd) == (0, 0)


def test_slot_whose_memfd_was_closed_can_be_deleted(guest):
    fd = guest.ok(guest.create_gmem())
    assert private(guest, fd) == (0, 0)
    guest.platform.close(fd)
    assert region(guest, memory_size=0) == (0, 0)


# attributes


def test_attributes_null_is_efault(guest):
    assert guest.ioctl(guest.vm, lib.KVM_SET_MEMORY_ATTRIBUTES, 0) == (-1, errno.EFAULT)


@pytest.mark.parametrize(
    "args",
    [
        (0x1000, PAGE, 8, 1),
        (0x1000, PAGE, 1, 0),
        (0x1000, PAGE, 9, 0),
        (0x1000, 0, 8, 0),
        (TOP - PAGE, 2 * PAGE, 8, 0),
        (TOP - PAGE, PAGE, 8, 0),
        (0x1001, PAGE, 8, 0),
        (0x1000, PAGE + 1, 8, 0),
    ],
)
def test_wrong_attributes_are_einval(guest, args):
    assert guest.set_attributes(*args) == EINVAL


def test_attributes_without_slot_are_accepted_and_struct_stays(guest):
    args = struct("kvm_memory_attributes", address=0x1000, size=PAGE, attributes=8)
    assert guest.ioctl(guest.vm, lib.KVM_SET_MEMORY_ATTRIBUTES, args) == (0, 0)
    assert (args.address, args.size, args.attributes) == (0x1000, PAGE, 8)


def test_attributes_on_default_vm_only_shared(plain):
    assert plain.set_attributes(0, PAGE, 8) == EINVAL
    assert plain.set_attributes(0, PAGE, 0) == (0, 0)


def test_attribute_ranges_when_cut_and_joined_are_what_update_sees(guest):
    guest.add_ram(private=False)
    guest.ok(guest.start()[0])
    gpa = guest.GPA
    assert guest.set_attributes(gpa, 8 * PAGE) == (0, 0)
    assert guest.set_attributes(gpa + 2 * PAGE, 2 * PAGE, 0) == (0, 0)
    assert guest.set_attributes(gpa + 3 * PAGE, PAGE) == (0, 0)
    private_pages = [n for n in range(10) if guest.update_pages(n)[0] == (0, 0)]
    assert private_pages == [0, 1, 3, 4, 5, 6, 7]


def test_driver_survives_vm_without_slots():
    with simulated() as platform:
        driver = Driver(platform)
        driver.platform.close(driver.create_vm(4))
