"""The CPUID that a guest gets, per vCPU and as the SNP CPUID page."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmlaunch.kvm import Kvm
from kvmlaunch.launch.cpuid import guest_cpuid, snp_cpuid_page
from kvmlaunch.sim import SimPlatform

ONES = 0xFFFFFFFF


def leaf(function: int, index: int = 0, **registers: int) -> dict[str, int]:
    base = {"function": function, "index": index, "flags": 0}
    return {**base, "eax": 0, "ebx": 0, "ecx": 0, "edx": 0, **registers}


def full(function: int, index: int = 0) -> dict[str, int]:
    return leaf(function, index, eax=ONES, ebx=ONES, ecx=ONES, edx=ONES)


def one(given: dict[str, int], vcpu: int = 0, *, confidential: bool = True) -> dict[str, int]:
    (got,) = guest_cpuid([given], vcpu, confidential=confidential)
    return got


def entries(page: bytes) -> list[tuple[int, ...]]:
    """(eax_in, ecx_in, xcr0_in, xss_in, eax, ebx, ecx, edx), unpacked by hand (AMD 56860)."""
    (count,) = struct.unpack_from("<I12x", page)
    return [struct.unpack_from("<IIQQIIII8x", page, 16 + 48 * n) for n in range(count)]


# APIC ids


@pytest.mark.parametrize("vcpu", [0, 1, 3, 255])
def test_leaf_1_when_given_to_a_vcpu_has_its_apic_id_in_the_top_byte(vcpu: int) -> None:
    assert one(leaf(1, ebx=0xAA123456), vcpu)["ebx"] == vcpu << 24 | 0x013456


def test_leaf_1_when_the_vcpu_number_is_above_255_keeps_its_low_byte() -> None:
    assert one(leaf(1), 0x102)["ebx"] == 0x02010000


@pytest.mark.parametrize(("vcpus", "told"), [(1, 1), (2, 2), (255, 255), (256, 255), (4096, 255)])
def test_leaf_1_when_there_are_many_vcpus_tells_how_many(vcpus: int, told: int) -> None:
    """APM volume 3, E.3.2: EBX bits 23:16, which count where EDX bit 28 (HTT) is set."""
    for edx in (0, ONES):
        (got,) = guest_cpuid([leaf(1, ebx=ONES, edx=edx)], 0, confidential=True, vcpus=vcpus)
        assert got["ebx"] == 0x00FF0000 & told << 16 | 0xFFFF
        assert got["edx"] == edx & ~(1 << 28) | (vcpus > 1) << 28


@pytest.mark.parametrize("function", [0xB, 0x1F])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_topology_leaf_when_given_to_a_vcpu_has_its_x2apic_id(function: int, index: int) -> None:
    assert one(leaf(function, index, edx=7), 0x102)["edx"] == 0x102


def test_leaf_8000001e_when_given_to_a_vcpu_has_its_extended_apic_id() -> None:
    assert one(leaf(0x8000001E, eax=9), 3)["eax"] == 3


def test_other_leaf_when_given_to_a_vcpu_stays() -> None:
    given = leaf(0x80000002, eax=1, ebx=2, ecx=3, edx=4)
    assert one(given, 3) == given


def test_apic_ids_when_the_vm_is_plain_are_set_as_well() -> None:
    assert one(leaf(0xB), 5, confidential=False)["edx"] == 5


def test_supported_cpuid_when_used_is_not_changed() -> None:
    given = full(1)
    guest_cpuid([given], 3, confidential=True)
    assert given == full(1)


# Bits that firmware refuses (QEMU: kvm_cpuid_fixup of sev-snp-guest)

REFUSED = [
    (0x1, 0, "ecx", [24]),
    (0x7, 0, "ebx", [1]),
    (0x7, 0, "edx", [26, 27, 28, 29, 30, 31]),
    (0x80000008, 0, "ebx", [25]),
    (0x80000021, 0, "eax", [9]),
]


@pytest.mark.parametrize(("function", "index", "register", "bits"), REFUSED)
def test_refused_bits_when_the_guest_is_confidential_are_cleared_and_no_others(
    function: int, index: int, register: str, bits: list[int]
) -> None:
    cleared = ONES ^ one(full(function, index))[register]
    assert [bit for bit in range(32) if cleared >> bit & 1] == bits


@pytest.mark.parametrize(("function", "index", "register", "_bits"), REFUSED)
def test_refused_bits_when_the_vm_is_plain_stay(
    function: int, index: int, register: str, _bits: list[int]
) -> None:
    assert one(full(function, index), confidential=False)[register] == ONES


def test_refused_bits_when_the_index_is_another_stay() -> None:
    assert one(full(0x7, 1))["edx"] == ONES


# SEV (leaf 0x8000001F)


def test_sev_leaf_when_the_vm_is_plain_is_zero() -> None:
    assert one(full(0x8000001F), confidential=False) == leaf(0x8000001F)


def test_sev_leaf_when_the_guest_is_confidential_stays() -> None:
    assert one(full(0x8000001F)) == full(0x8000001F)


# The page


def test_page_when_made_has_4096_bytes() -> None:
    assert len(snp_cpuid_page([full(1)])) == 4096


def test_page_when_made_holds_the_leaf() -> None:
    page = snp_cpuid_page([leaf(0x8000001D, 2, eax=1, ebx=2, ecx=3, edx=4)])
    assert entries(page) == [(0x8000001D, 2, 0, 0, 1, 2, 3, 4)]


def test_page_when_a_leaf_is_all_zero_leaves_it_out() -> None:
    assert entries(snp_cpuid_page([leaf(2), leaf(3, edx=1)])) == [(3, 0, 0, 0, 0, 0, 0, 1)]


@pytest.mark.parametrize("index", [0, 1])
def test_page_when_the_leaf_is_xsave_has_the_size_for_x87_alone(index: int) -> None:
    """512 bytes of FXSAVE image and 64 of header, for XCR0 = 1."""
    ((_, _, xcr0, xss, _, size, _, _),) = entries(
        snp_cpuid_page([leaf(0xD, index, eax=0x207, ebx=0x988)])
    )
    assert (xcr0, xss, size) == (1, 0, 576)


def test_page_when_the_leaf_is_an_xsave_component_keeps_its_place() -> None:
    (entry,) = entries(snp_cpuid_page([leaf(0xD, 2, eax=256, ebx=576)]))
    assert entry == (0xD, 2, 0, 0, 256, 576, 0, 0)


def many(count: int) -> list[dict[str, int]]:
    return [full(0x80000000 + n) for n in range(count)]


@pytest.mark.parametrize(("given", "held"), [(63, 63), (64, 64), (65, 64), (200, 64)])
def test_page_when_there_are_many_leaves_holds_at_most_64(given: int, held: int) -> None:
    assert len(entries(snp_cpuid_page(many(given)))) == held


def test_page_when_there_is_no_room_loses_hypervisor_leaves_first() -> None:
    page = snp_cpuid_page([full(0x40000000), full(0x40000001), *many(63)])
    found = [entry[0] for entry in entries(page)]
    assert [function for function in found if function < 0x80000000] == [0x40000000]


def test_page_when_there_is_room_keeps_hypervisor_leaves_last() -> None:
    page = snp_cpuid_page([full(0x40000000), full(1)])
    assert [entry[0] for entry in entries(page)] == [1, 0x40000000]


# On simulated hosts


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_page_when_made_of_a_hosts_cpuid_is_what_its_vcpu_gets(product: str) -> None:
    """But for the size of the XSAVE area, which follows XCR0."""
    with SimPlatform(product=product) as platform, Kvm.open(platform) as kvm:
        leaves = guest_cpuid(kvm.supported_cpuid(), 0, confidential=True)
    held: dict[Any, tuple[int, ...]] = {
        entry[:2]: entry[4:] for entry in entries(snp_cpuid_page(leaves)) if entry[0] != 0xD
    }
    given = {
        (one["function"], one["index"]): (one["eax"], one["ebx"], one["ecx"], one["edx"])
        for one in leaves
    }
    assert held
    assert all(given[key] == registers for key, registers in held.items())
