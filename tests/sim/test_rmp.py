"""RMP: page states and RMPUPDATE."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmlaunch.sim.rmp import Rmp, RmpEntry

SPA = 0x1_0000_0000
FAIL_INPUT, FAIL_PERMISSION, FAIL_OVERLAP = 1, 2, 4


@pytest.mark.parametrize(
    ("entry", "state"),
    [
        (RmpEntry(), "Hypervisor"),
        (RmpEntry(assigned=True), "Reclaim"),
        (RmpEntry(assigned=True, vmsa=True), "Reclaim"),
        (RmpEntry(assigned=True, immutable=True), "Firmware"),
        (RmpEntry(assigned=True, immutable=True, vmsa=True), "Context"),
        (RmpEntry(assigned=True, immutable=True, gpa=0x1000), "Metadata"),
        (RmpEntry(assigned=True, asid=1, gpa=0x1000, immutable=True), "Pre-Guest"),
        (RmpEntry(assigned=True, asid=1, immutable=True, validated=True), "Pre-Swap"),
        (RmpEntry(assigned=True, asid=1), "Guest-Invalid"),
        (RmpEntry(assigned=True, asid=1, validated=True), "Guest-Valid"),
        (RmpEntry(assigned=True, asid=1, validated=True, vmsa=True), "Guest-Valid"),
    ],
)
def test_state_of_an_entry_follows_its_bits(entry: RmpEntry, state: str) -> None:
    assert str(entry.state) == state


def test_lookup_without_an_entry_is_hypervisor() -> None:
    assert str(Rmp().lookup(SPA).state) == "Hypervisor"


def test_lookup_inside_a_page_finds_its_entry() -> None:
    rmp = Rmp()
    rmp.make_private(SPA, 0x5000, 1, immutable=True)
    assert rmp.lookup(SPA + 0xFFF).gpa == 0x5000
    assert rmp.lookup(SPA + 0x1000) == RmpEntry()


def test_make_private_immutable_is_pre_guest_for_vmpl0() -> None:
    rmp = Rmp()
    assert rmp.make_private(SPA, 0xFFFFF000, 5, immutable=True) == 0
    entry = rmp.lookup(SPA)
    assert (str(entry.state), entry.asid, entry.gpa) == ("Pre-Guest", 5, 0xFFFFF000)
    assert entry.perms == (0xF, 0, 0, 0)


def test_make_private_not_immutable_is_guest_invalid() -> None:
    rmp = Rmp()
    assert rmp.make_private(SPA, 0x1000, 5, immutable=False) == 0
    assert str(rmp.lookup(SPA).state) == "Guest-Invalid"


def test_make_private_asid_0_immutable_is_firmware() -> None:
    rmp = Rmp()
    assert rmp.make_private(SPA, 0, 0, immutable=True) == 0
    assert str(rmp.lookup(SPA).state) == "Firmware"


def test_make_shared_of_guest_valid_is_hypervisor() -> None:
    rmp = Rmp()
    rmp.store(SPA, RmpEntry(assigned=True, asid=1, gpa=0x1000, validated=True, vmsa=True))
    assert rmp.make_shared(SPA) == 0
    assert rmp.lookup(SPA) == RmpEntry()


def test_make_shared_of_a_large_page_frees_all_of_it() -> None:
    rmp = Rmp()
    rmp.rmpupdate(SPA, assigned=True, asid=1, page_size=1)
    assert rmp.make_shared(SPA) == 0
    assert rmp.lookup(SPA + 0x3000) == RmpEntry()


@pytest.mark.parametrize("asid", [0, 1])
def test_rmpupdate_of_immutable_page_is_fail_permission_and_changes_nothing(asid: int) -> None:
    rmp = Rmp()
    rmp.make_private(SPA, 0, asid, immutable=True)
    before = rmp.lookup(SPA)
    assert rmp.make_shared(SPA) == FAIL_PERMISSION
    assert rmp.make_private(SPA, 0x1000, 2, immutable=False) == FAIL_PERMISSION
    assert rmp.lookup(SPA) == before


def test_rmpupdate_of_validated_page_clears_validated() -> None:
    rmp = Rmp()
    rmp.store(SPA, RmpEntry(assigned=True, asid=1, gpa=0x1000, validated=True))
    assert rmp.make_private(SPA, 0x1000, 1, immutable=False) == 0
    assert not rmp.lookup(SPA).validated


@pytest.mark.parametrize(
    ("spa", "asid", "gpa", "page_size"),
    [
        (SPA + 8, 1, 0, 0),
        (SPA, 1, 8, 0),
        (SPA + 0x1000, 1, 0, 1),
        (SPA, 1, 0x1000, 1),
        (SPA, 1, 0, 2),
        (SPA, 0, 0x1000, 0),
    ],
)
def test_rmpupdate_with_impossible_input_is_fail_input(
    spa: int, asid: int, gpa: int, page_size: int
) -> None:
    rmp = Rmp()
    code = rmp.rmpupdate(spa, assigned=True, asid=asid, gpa=gpa, page_size=page_size)
    assert code == FAIL_INPUT


@pytest.mark.parametrize("owner", [{"asid": 1}, {"immutable": True}, {"vmsa": True}])
def test_rmpupdate_unassigned_with_an_owner_is_fail_input(owner: dict[str, int]) -> None:
    assert Rmp().rmpupdate(SPA, assigned=False, **owner) == FAIL_INPUT  # type: ignore[arg-type]


def test_rmpupdate_bad_input_of_immutable_page_is_fail_input() -> None:
    rmp = Rmp()
    rmp.make_private(SPA, 0, 0, immutable=True)
    assert rmp.make_private(SPA, 8, 1, immutable=False) == FAIL_INPUT


def test_rmpupdate_large_over_small_is_fail_overlap() -> None:
    rmp = Rmp()
    rmp.make_private(SPA + 0x5000, 0x5000, 1, immutable=False)
    assert rmp.rmpupdate(SPA, assigned=True, asid=1, page_size=1) == FAIL_OVERLAP


def test_rmpupdate_small_inside_large_is_fail_overlap() -> None:
    rmp = Rmp()
    rmp.rmpupdate(SPA, assigned=True, asid=1, page_size=1)
    assert rmp.make_private(SPA + 0x5000, 0x5000, 1, immutable=False) == FAIL_OVERLAP


def test_rmpupdate_large_over_immutable_small_is_fail_permission() -> None:
    rmp = Rmp()
    rmp.make_private(SPA + 0x5000, 0x5000, 1, immutable=True)
    assert rmp.rmpupdate(SPA, assigned=True, asid=1, page_size=1) == FAIL_PERMISSION


def test_lookup_inside_a_large_page_finds_the_large_entry() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(SPA, assigned=True, asid=3, gpa=0x200000, page_size=1) == 0
    assert rmp.lookup(SPA + 0x1FF000).gpa == 0x200000
    assert rmp.lookup(SPA + 0x200000) == RmpEntry()


def test_asid_in_use_follows_assignments() -> None:
    rmp = Rmp()
    assert not rmp.asid_in_use(7)
    rmp.make_private(SPA, 0, 7, immutable=False)
    rmp.make_private(SPA, 0x1000, 7, immutable=False)
    assert rmp.asid_in_use(7)
    rmp.make_shared(SPA)
    assert not rmp.asid_in_use(7)


def test_asid_in_use_of_asid_0_is_false_with_firmware_pages() -> None:
    rmp = Rmp()
    rmp.make_private(SPA, 0, 0, immutable=True)
    assert not rmp.asid_in_use(0)


def test_repr_names_state_owner_and_size() -> None:
    entry = RmpEntry(assigned=True, asid=2, gpa=0x3000, immutable=True)
    assert repr(entry) == "<RmpEntry Pre-Guest asid=2 gpa=0x3000 4K>"
    assert repr(replace(entry, vmsa=True)) == "<RmpEntry Pre-Guest asid=2 gpa=0x3000 VMSA 4K>"
    rmp = Rmp()
    rmp.make_private(SPA, 0, 2, immutable=True)
    assert repr(rmp) == "<Rmp 1 pages assigned>"
