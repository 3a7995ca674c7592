"""Page state changes by list (svm/sev.c: snp_begin_psc of 6.12)."""

from __future__ import annotations

import struct

import pytest

from kvmlaunch.uapi import lib

from .driver import Guest
from .scripted import BUFFER, GHCB_GPA, asks

OK = (0, 0)
PRIVATE, SHARED, PSMASH = 1, 2, 3
BAD_HEADER, BAD_ENTRY, GENERIC = 1 << 32 | 1, 1 << 32 | 2, 0x100 << 32
GFN = 0x400


def entry(gfn, operation=PRIVATE, *, large=0, done=0):
    return done | gfn << 12 | operation << 52 | large << 56


def psc(*entries, current=0, last=None, at=BUFFER, **options):
    """A guest that asks for this list; ``at`` is its place in the GHCB."""
    rig = asks({"code": 0x80000010, "scratch": GHCB_GPA + at}, **options)
    request = rig.request
    last = len(entries) - 1 if last is None else last

    def with_list(**fields):
        request(**fields)
        rig.put(at, struct.pack(f"<HHI{len(entries)}Q", current, last, 0, *entries))

    rig.request = with_list
    return rig


def ranges(rig):
    """Every exit as (GFN, pages, attributes), each answered with success; then the answer."""
    seen = []
    while rig.enter() == OK and rig.run.exit_reason == lib.KVM_EXIT_HYPERCALL:
        gpa, npages, attributes = list(rig.run.hypercall.args)[:3]
        seen.append((gpa // 4096, npages, attributes))
        rig.run.hypercall.ret = 0
    assert rig.run.exit_reason == lib.KVM_EXIT_HLT
    return seen, rig.error[1]


def header(rig):
    return struct.unpack("<HH", rig.shared(BUFFER, 4))


def done(rig, index):
    """cur_page of an entry."""
    return int.from_bytes(rig.shared(BUFFER + 8 + 8 * index), "little") & 0xFFF


def test_list_when_adjacent_is_one_range():
    rig = psc(entry(GFN), entry(GFN + 1), entry(GFN + 2))
    assert ranges(rig) == ([(GFN, 3, 0x10)], 0)
    assert header(rig) == (3, 2)
    assert [done(rig, index) for index in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        (entry(GFN + 2), [(GFN, 1, 0x10), (GFN + 2, 1, 0x10)]),
        (entry(GFN + 1, SHARED), [(GFN, 1, 0x10), (GFN + 1, 1, 0)]),
        (entry(GFN - 1), [(GFN, 1, 0x10), (GFN - 1, 1, 0x10)]),
        (entry(0x600, large=1), [(GFN, 1, 0x10), (0x600, 512, 0x11)]),
    ],
)
def test_list_when_something_differs_is_two_ranges(second, wanted):
    assert ranges(psc(entry(GFN), second)) == (wanted, 0)


def test_list_of_large_pages_is_one_range_with_the_size():
    rig = psc(entry(0x400, SHARED, large=1), entry(0x600, SHARED, large=1))
    assert ranges(rig) == ([(0x400, 1024, 0x01)], 0)
    assert (done(rig, 0), done(rig, 1)) == (512, 512)


def test_large_page_that_is_partly_done_goes_on_in_small_ones():
    rig = psc(entry(0x400, large=1, done=500))
    # The size that KVM names is still that of the entry.
    assert ranges(rig) == ([(0x400 + 500, 12, 0x11)], 0)
    assert done(rig, 0) == 512


def test_entries_that_are_done_are_passed_over():
    rig = psc(entry(GFN, done=1), entry(GFN + 5), entry(0x600, large=1, done=512))
    assert ranges(rig) == ([(GFN + 5, 1, 0x10)], 0)
    assert header(rig) == (3, 2)


def test_list_when_it_starts_later_leaves_the_first_entries():
    rig = psc(entry(GFN), entry(GFN + 1), current=1)
    assert ranges(rig) == ([(GFN + 1, 1, 0x10)], 0)
    assert done(rig, 0) == 0


def test_list_when_it_is_done_already_is_a_success():
    assert ranges(psc(entry(GFN), current=1)) == ([], 0)


@pytest.mark.parametrize("operation", [0, PSMASH, 4, 15])
def test_operation_that_kvm_does_not_know_counts_as_done(operation):
    rig = psc(entry(GFN, operation), entry(GFN + 9, SHARED))
    assert ranges(rig) == ([(GFN + 9, 1, 0)], 0)
    assert done(rig, 0) == 1


@pytest.mark.parametrize(
    "bad", [entry(GFN, done=2), entry(0x401, large=1), entry(0x400, large=1, done=513)]
)
def test_entry_that_can_not_be_ends_the_list(bad):
    rig = psc(entry(GFN + 8), bad)
    assert ranges(rig) == ([(GFN + 8, 1, 0x10)], BAD_ENTRY)
    assert header(rig) == (1, 1)


def test_list_of_253_entries_is_taken_and_one_of_254_is_not():
    assert ranges(psc(*[entry(GFN + n) for n in range(253)])) == ([(GFN, 253, 0x10)], 0)
    assert ranges(psc(entry(GFN), last=253)) == ([], BAD_HEADER)


def test_list_in_the_middle_of_the_buffer_has_less_room():
    # 0xFE0 to 0xFF0: a header and one entry.
    assert ranges(psc(entry(GFN), at=0xFE0)) == ([(GFN, 1, 0x10)], 0)
    assert ranges(psc(entry(GFN), last=1, at=0xFE0)) == ([], BAD_HEADER)


def test_list_without_the_exit_is_an_error():
    assert ranges(psc(entry(GFN), hypercalls=False)) == ([], GENERIC)


def test_list_when_user_space_refuses_stops_there():
    rig = psc(entry(GFN), entry(GFN + 2))
    rig.enter()
    rig.run.hypercall.ret = 22
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert rig.error == (0, GENERIC)
    assert (header(rig), done(rig, 0)) == ((0, 1), 0)


def test_list_that_the_guest_changes_meanwhile_is_read_anew():
    rig = psc(entry(GFN), entry(GFN + 2))
    rig.enter()
    rig.run.hypercall.ret = 0
    rig.put(BUFFER + 2, (300).to_bytes(2, "little"))
    rig.enter()
    assert rig.error == (0, BAD_HEADER)


@pytest.mark.timeout(20)
def test_list_whose_slot_user_space_deletes_ends():
    """What is left of the list reads as zeros, and what is written to it is lost."""
    rig = psc(entry(GFN), entry(GFN + 2))
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HYPERCALL)
    rig.guest.ok(rig.guest.set_region(memory_size=0))
    rig.run.hypercall.ret = 0
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)


def test_list_of_version_1_has_no_room_outside_the_ghcb():
    rig = asks({"code": 0x80000010, "scratch": Guest.GPA}, ghcb_version=1)
    assert ranges(rig) == ([], BAD_HEADER)
