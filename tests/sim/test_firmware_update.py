"""LAUNCH_UPDATE: each status in the order of snp-firmware-abi 7.4, and effects.

For two checks that follow one another, a call that breaks both gives the earlier status.
"""

from __future__ import annotations

import struct

import pytest

from kvmlaunch.sim.firmware_profiles import FirmwareProfile
from kvmlaunch.sim.rmp import RmpEntry
from tests.abi import vectors

from .rig import NOWHERE, POLICY, Rig

# Status codes, snp-firmware-abi 10.
OK = 0x00
PLATFORM = 0x01
GUEST_STATE = 0x02
INACTIVE = 0x08
ADDRESS = 0x09
GUEST = 0x10
PARAM = 0x16
PAGE_SIZE = 0x19
PAGE_STATE = 0x1A
PAGE_OWNER = 0x1C

NORMAL, VMSA, ZERO, UNMEASURED, SECRETS, CPUID = range(1, 7)


def test_launch_update_with_an_ordered_fault_does_nothing() -> None:
    faults: dict[str, int] = {}
    rig = Rig(fault=faults.get)
    gctx, page = rig.activated(), rig.pre_guest(contents=b"x")
    faults["SNP_LAUNCH_UPDATE"] = 0
    assert rig.psp.launch_update(gctx, page, ZERO) == 0
    assert rig.psp.launch_digest(gctx) == bytes(48)
    assert (rig.state(page), rig.contents(page)[:1]) == ("Pre-Guest", b"x")


def test_launch_update_checks_1_to_3_in_order() -> None:
    rig = Rig(init=False)
    assert rig.psp.launch_update(NOWHERE, 8, NORMAL) == PARAM
    assert rig.psp.launch_update(NOWHERE, NOWHERE, NORMAL) == PLATFORM
    rig.psp.init()
    assert rig.psp.launch_update(NOWHERE, NOWHERE, NORMAL) == GUEST


@pytest.mark.parametrize(
    "bad",
    [
        {"page_type": 8},
        {"page_type": -1},
        {"page_size": 2},
        {"vmpl_perms": (0, 0, 0x100)},
        {"vmpl_perms": (-1, 0, 0)},
    ],
)
def test_launch_update_reserved_bits_are_invalid_param(bad: dict[str, int]) -> None:
    rig = Rig()
    arguments: dict[str, int] = {"page_type": NORMAL, **bad}
    status = rig.psp.launch_update(
        rig.activated(),
        NOWHERE,
        **arguments,  # type: ignore[arg-type]
    )
    assert status == PARAM


@pytest.mark.parametrize(
    "entry",
    [
        RmpEntry(),
        RmpEntry(assigned=True),
        RmpEntry(assigned=True, immutable=True),
        RmpEntry(assigned=True, asid=1, gpa=0x1000),
        RmpEntry(assigned=True, asid=1, gpa=0x1000, validated=True),
        RmpEntry(assigned=True, asid=1, gpa=0x1000, validated=True, immutable=True),
    ],
)
def test_launch_update_not_pre_guest_is_invalid_page_state(entry: RmpEntry) -> None:
    rig = Rig()
    spa = rig.memory.map_region(bytearray(2 << 20))
    rig.rmp.store(spa, entry)
    gctx = rig.activated(asid=2)
    assert rig.psp.launch_update(gctx, spa, NORMAL) == PAGE_STATE
    assert rig.psp.launch_update(gctx, spa, NORMAL, page_size=1) == PAGE_STATE  # before size


def test_launch_update_of_the_same_page_twice_is_invalid_page_state() -> None:
    rig = Rig()
    gctx, page = rig.activated(), rig.pre_guest()
    assert rig.psp.launch_update(gctx, page, NORMAL) == OK
    assert rig.psp.launch_update(gctx, page, NORMAL) == PAGE_STATE


def test_launch_update_other_page_size_is_invalid_page_size_before_address() -> None:
    rig = Rig()
    gctx = rig.activated()
    rig.memory.alloc()
    unaligned = rig.pre_guest()
    assert unaligned % (2 << 20)
    assert rig.psp.launch_update(gctx, unaligned, NORMAL, page_size=1) == PAGE_SIZE
    assert rig.psp.launch_update(gctx, rig.large_pre_guest(), NORMAL) == PAGE_SIZE


def test_launch_update_large_unaligned_is_invalid_address_before_type() -> None:
    rig = Rig()
    gctx = rig.activated()
    inside = rig.large_pre_guest() + 0x1000
    assert rig.psp.launch_update(gctx, inside, NORMAL, page_size=1) == ADDRESS
    assert rig.psp.launch_update(gctx, inside, VMSA, page_size=1) == ADDRESS
    assert rig.psp.launch_update(gctx, inside, 0, page_size=1) == ADDRESS


@pytest.mark.parametrize("page_type", [VMSA, SECRETS, CPUID])
def test_launch_update_small_type_large_is_invalid_page_size_before_state(page_type: int) -> None:
    rig = Rig()
    guests = (rig.created(), rig.activated())
    page = rig.large_pre_guest()
    for gctx in guests:
        assert rig.psp.launch_update(gctx, page, page_type, page_size=1) == PAGE_SIZE


@pytest.mark.parametrize("page_type", [0, 7])
def test_launch_update_type_0_or_7_is_invalid_param_before_state(page_type: int) -> None:
    rig = Rig()
    guests = (rig.created(), rig.activated())
    page = rig.pre_guest()
    for gctx in guests:
        assert rig.psp.launch_update(gctx, page, page_type) == PARAM


def test_launch_update_before_start_is_invalid_guest_state_before_inactive() -> None:
    rig = Rig()
    assert rig.psp.launch_update(rig.created(), rig.pre_guest(), NORMAL) == GUEST_STATE


def test_launch_update_after_finish_is_invalid_guest_state() -> None:
    rig = Rig()
    assert rig.psp.launch_update(rig.finished(), rig.pre_guest(), NORMAL) == GUEST_STATE


def test_launch_update_without_asid_is_inactive_before_owner() -> None:
    rig = Rig()
    assert rig.psp.launch_update(rig.started(), rig.pre_guest(asid=9), NORMAL) == INACTIVE


def test_launch_update_page_of_another_guest_is_invalid_page_owner_before_imi() -> None:
    rig = Rig()
    page = rig.pre_guest(asid=9)
    assert rig.psp.launch_update(rig.activated(1), page, NORMAL) == PAGE_OWNER
    assert rig.psp.launch_update(rig.activated(2, imi_en=True), page, NORMAL) == PAGE_OWNER


def test_launch_update_imi_without_imi_page_is_invalid_param_before_cpuid() -> None:
    rig = Rig()
    gctx = rig.activated(imi_en=True)
    refused = struct.pack("<IIQ", 1, 0, 0) + struct.pack("<IIQQIIIIQ", 1, *[0] * 5, 1 << 24, 0, 0)
    page = rig.pre_guest(contents=refused)
    assert rig.psp.launch_update(gctx, page, CPUID) == PARAM
    assert rig.contents(page)[: len(refused)] == refused  # no correction: not looked at


@pytest.mark.parametrize("page_type", [NORMAL, UNMEASURED])
def test_launch_update_keeps_contents_and_makes_the_page_guest_valid(page_type: int) -> None:
    rig = Rig()
    gctx, page = rig.activated(), rig.pre_guest(0x1000, vectors.COUNTING)
    assert rig.psp.launch_update(gctx, page, page_type) == OK
    entry = rig.rmp.lookup(page)
    assert (str(entry.state), entry.asid, entry.gpa) == ("Guest-Valid", 1, 0x1000)
    assert (entry.vmsa, entry.perms) == (False, (0xF, 0, 0, 0))
    assert rig.contents(page) == vectors.COUNTING


def test_launch_update_zero_clears_the_page() -> None:
    rig = Rig()
    gctx, page = rig.activated(), rig.pre_guest(0, vectors.COUNTING)
    assert rig.psp.launch_update(gctx, page, ZERO) == OK
    assert rig.contents(page) == bytes(4096)
    assert rig.psp.launch_digest(gctx).hex() == vectors.SINGLE_PAGE["V3"][3]


def test_launch_update_vmsa_sets_the_rmp_bit_and_measures_without_tsc() -> None:
    rig = Rig()
    gctx, page = rig.activated(), rig.pre_guest(vectors.VMSA_GPA, vectors.COUNTING[:0x300])
    assert rig.psp.launch_update(gctx, page, VMSA) == OK
    assert rig.rmp.lookup(page).vmsa
    assert rig.contents(page)[0x2F0:0x300] == vectors.COUNTING[0x2F0:0x300]


def test_launch_update_vmsa_full_of_bytes_gives_firmwares_v9() -> None:
    rig = Rig()
    page = vectors.COUNTING[:0x3B0] + bytes(8) + vectors.COUNTING[0x3B8:]
    plain, counting = rig.activated(1), rig.activated(2)
    rig.psp.launch_update(plain, rig.pre_guest(vectors.VMSA_GPA, page), VMSA)
    spa = rig.pre_guest(vectors.VMSA_GPA, vectors.COUNTING, asid=2)
    rig.psp.launch_update(counting, spa, VMSA)
    assert rig.psp.launch_digest(counting).hex() == vectors.V9_FIRMWARE
    assert rig.psp.launch_digest(plain).hex() != vectors.V9_FIRMWARE


@pytest.mark.parametrize(("wanted", "scale"), [(0, 1 << 32), (1_000_000, 1 << 31)])
def test_launch_update_vmsa_with_secure_tsc_gets_the_scale(wanted: int, scale: int) -> None:
    rig = Rig(FirmwareProfile(tsc_khz=2_000_000))
    gctx = rig.activated(desired_tsc_khz=wanted)
    vmsa = bytearray(4096)
    vmsa[0x3B0:0x3B2] = b"\x01\x02"
    page = rig.pre_guest(vectors.VMSA_GPA, bytes(vmsa))
    assert rig.psp.launch_update(gctx, page, VMSA) == OK
    assert struct.unpack_from("<QQ", rig.contents(page), 0x2F0) == (scale, 0)


def test_launch_update_secrets_page_holds_keys_and_platform() -> None:
    rig = Rig()
    gctx = rig.created()
    rig.psp.launch_start(gctx, POLICY, b"G" * 16)
    rig.psp.activate(gctx, 1)
    page = rig.pre_guest(0x3000, vectors.ONES)
    assert rig.psp.launch_update(gctx, page, SECRETS) == OK
    expected = bytearray(4096)
    struct.pack_into("<III", expected, 0, 3, 0, 0xA00F11)
    expected[0x10:0x20] = b"G" * 16
    for number in range(4):
        expected[0x20 + 0x20 * number : 0x40 + 0x20 * number] = bytes([number + 1]) * 32
    struct.pack_into("<I", expected, 0x160, 200)
    assert rig.contents(page) == bytes(expected)
    assert rig.psp.launch_digest(gctx).hex() == vectors.SINGLE_PAGE["V6"][3]


def test_launch_update_secrets_version_2_has_no_tsc_factor() -> None:
    rig = Rig(FirmwareProfile(secrets_version=2))
    gctx, page = rig.activated(imi_en=True), rig.pre_guest()
    assert rig.psp.launch_update(gctx, page, SECRETS, imi_page=True) == OK
    assert struct.unpack_from("<II", rig.contents(page)) == (2, 1)
    assert rig.contents(page)[0x160:0x164] == bytes(4)


def test_launch_update_large_page_gives_v17() -> None:
    rig = Rig()
    gctx, page = rig.activated(), rig.large_pre_guest(0x200000)
    assert rig.psp.launch_update(gctx, page, NORMAL, page_size=1) == OK
    assert rig.psp.launch_digest(gctx).hex() == vectors.RANGES["V17"][3]
    assert rig.state(page + 0x1FF000) == "Guest-Valid"


@pytest.mark.parametrize("name", vectors.IMI_AND_VMPL)
def test_launch_update_with_imi_or_permissions_gives_the_vector(name: str) -> None:
    imi_page, vmpl_perms, digest = vectors.IMI_AND_VMPL[name]
    rig = Rig()
    gctx, page = rig.activated(), rig.pre_guest(0)
    status = rig.psp.launch_update(gctx, page, NORMAL, imi_page=imi_page, vmpl_perms=vmpl_perms)
    assert status == OK
    assert rig.psp.launch_digest(gctx).hex() == digest
    assert rig.rmp.lookup(page).perms == (0xF, *vmpl_perms)
    imd = rig.psp.context(gctx).imi_measurement.value.hex()
    assert imd == (digest if imi_page else "00" * 48)


def test_launch_update_v12_gives_the_vectors_and_the_page_list() -> None:
    rig = Rig()
    gctx = rig.activated()
    wanted = []
    for page_type, pages, digest in vectors.V12_STEPS.values():
        for gpa, contents in pages:
            # An empty table is the CPUID page that firmware always takes.
            assert rig.psp.launch_update(gctx, rig.pre_guest(gpa, contents or b""), page_type) == OK
            wanted.append((page_type, gpa))
        assert rig.psp.launch_digest(gctx).hex() == digest
    measured = rig.psp.measured_pages(gctx)
    assert [(p.page_type, p.gpa) for p in measured] == wanted
    assert measured[0].contents.hex() == vectors.PAGE_HASHES[vectors.COUNTING]
    assert measured[2].contents == bytes(48)
    assert measured[-1].digest.hex() == vectors.V12_STEPS["f"][2]


def test_launch_update_refused_leaves_digest_page_and_list_alone() -> None:
    rig = Rig()
    gctx = rig.activated()
    page = rig.pre_guest(contents=b"x", asid=9)
    before = rig.rmp.lookup(page)
    assert rig.psp.launch_update(gctx, page, ZERO) == PAGE_OWNER
    assert rig.psp.launch_digest(gctx) == bytes(48)
    assert rig.psp.measured_pages(gctx) == []
    assert (rig.rmp.lookup(page), rig.contents(page)[:1]) == (before, b"x")


def test_launch_update_of_two_guests_measures_each_apart() -> None:
    rig = Rig()
    first, second = rig.activated(1), rig.activated(2)
    rig.psp.launch_update(first, rig.pre_guest(0, asid=1), NORMAL)
    rig.psp.launch_update(second, rig.pre_guest(0x1000, vectors.COUNTING, asid=2), NORMAL)
    assert rig.psp.launch_digest(first).hex() == vectors.SINGLE_PAGE["V1"][3]
    assert rig.psp.launch_digest(second).hex() == vectors.SINGLE_PAGE["V2"][3]
