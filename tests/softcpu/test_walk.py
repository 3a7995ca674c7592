"""The page walk against tables made by hand. No engine is needed."""

from __future__ import annotations

import struct

import pytest

from kvmlaunch.softcpu import CpuOptions
from kvmlaunch.softcpu.engine import FETCH, READ, WRITE
from kvmlaunch.softcpu.events import FaultReason
from kvmlaunch.softcpu.faults import GuestFault, HostFault
from kvmlaunch.softcpu.pages import Pages
from kvmlaunch.softcpu.walk import Walker
from tests.softcpu.model import ASID, Entry, Memory

RWX = READ | WRITE | FETCH
P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
NX = 1 << 63
PG, WP, PE = 1 << 31, 1 << 16, 1
PSE, PAE, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 20, 1 << 21
LMA, NXE = 1 << 10, 1 << 11
AC = 1 << 18
PF, GP, VC = 14, 13, 29
PML4, PDPT, PD, PT = 0x10000, 0x11000, 0x12000, 0x13000
LINEAR = 0x5000


class Bench:
    """Tables in memory, and the registers for a walk."""

    def __init__(self, *, snp: bool = False, c_bit: int = 51, physical_bits: int = 48) -> None:
        self.memory = Memory(snp=snp)
        options = CpuOptions(snp=snp, c_bit=c_bit, asid=ASID, physical_bits=physical_bits)
        self.pages = Pages(self.memory, options)
        self.walker = Walker(self.pages, options)
        self.cr0 = PG | PE | WP
        self.cr3 = PML4
        self.cr4 = PAE
        self.efer = LMA | NXE
        self.flags = 2

    def entry(self, table: int, index: int, value: int, size: int = 8) -> None:
        at = table + size * index
        self.memory.main[at : at + size] = value.to_bytes(size, "little")

    def get(self, table: int, index: int, size: int = 8) -> int:
        at = table + size * index
        return int.from_bytes(self.memory.main[at : at + size], "little")

    def map_long(self, leaf: int, upper: int = P | W | U) -> None:
        """LINEAR by a 4 KiB page."""
        self.entry(PML4, 0, PDPT | upper)
        self.entry(PDPT, 0, PD | upper)
        self.entry(PD, 0, PT | upper)
        self.entry(PT, 5, leaf)

    def walk(
        self, kind: int = READ, *, user: bool = False, linear: int = LINEAR, vmpl: int = 0
    ) -> tuple[int, bool, int]:
        return self.walker.walk(
            linear, kind, user, vmpl, self.cr0, self.cr3, self.cr4, self.efer, self.flags
        )

    def fault(self, kind: int = READ, *, user: bool = False, linear: int = LINEAR) -> int:
        """Error code of the #PF."""
        with pytest.raises(GuestFault) as caught:
            self.walk(kind, user=user, linear=linear)
        assert caught.value.vector == PF
        assert caught.value.address == linear
        assert caught.value.error_code is not None
        return caught.value.error_code


def test_walk_when_paging_is_off_is_identity() -> None:
    bench = Bench()
    bench.cr0, bench.efer = PE, 0
    assert bench.walk(linear=0x7000) == (0x7000, False, RWX)
    assert bench.walk(linear=0x1_0000_7000) == (0x7000, False, RWX)


def test_walk_when_4_kib_page_in_long_mode_takes_all_levels() -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | W | U | D)
    assert bench.walk() == (0x123000, False, RWX)


@pytest.mark.parametrize(
    ("level", "shift"), [(PDPT, 30), (PD, 21)], ids=["1 GiB page", "2 MiB page"]
)
def test_walk_when_large_page_adds_the_rest_of_the_address(level: int, shift: int) -> None:
    bench = Bench()
    bench.map_long(0)
    bench.entry(level, 0, 3 << shift | P | W | U | PS | D)
    assert bench.walk(linear=0x5000) == ((3 << shift) + 0x5000, False, RWX)


def test_walk_when_address_is_not_canonical_is_general_protection() -> None:
    bench = Bench()
    for linear in (1 << 47, 0xFFFF7FFFFFFFF000):
        with pytest.raises(GuestFault) as caught:
            bench.walk(linear=linear)
        assert (caught.value.vector, caught.value.error_code) == (GP, 0)


def test_walk_when_address_is_in_the_upper_half_works() -> None:
    bench = Bench()
    bench.map_long(0x123000 | P)
    bench.entry(PML4, 511, PDPT | P)
    bench.entry(PDPT, 511, PD | P)
    bench.entry(PD, 511, PT | P)
    bench.entry(PT, 511, 0x123000 | P)
    assert bench.walk(linear=0xFFFFFFFFFFFFF000)[0] == 0x123000


@pytest.mark.parametrize("table", [PML4, PDPT, PD, PT])
def test_walk_when_a_level_is_absent_faults_without_present(table: int) -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | W | U)
    bench.entry(table, 5 if table == PT else 0, 0x123000 | W | U)
    assert bench.fault(READ) == 0
    assert bench.fault(WRITE) == 2
    assert bench.fault(FETCH) == 0x10
    assert bench.fault(WRITE, user=True) == 6
    bench.efer = LMA
    assert bench.fault(FETCH) == 0


@pytest.mark.parametrize(
    ("table", "value"),
    [
        (PML4, PDPT | P | PS),
        (PDPT, 0x1000 | P | PS | 1 << 13),
        (PD, P | PS | 1 << 20),
        (PT, 0x123000 | P | 1 << 48),
        (PML4, PDPT | P | 1 << 51),
    ],
    ids=["PS in PML4E", "1 GiB unaligned", "2 MiB unaligned", "GPA too wide", "C-bit in plain"],
)
def test_walk_when_reserved_bit_is_set_says_so(table: int, value: int) -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | W | U)
    bench.entry(table, 5 if table == PT else 0, value)
    assert bench.fault(READ) == 9
    assert bench.fault(WRITE, user=True) == 0xF


def test_walk_when_nx_is_not_enabled_is_reserved() -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | NX)
    assert bench.fault(FETCH) == 0x11
    assert bench.walk(READ)[2] == READ
    bench.efer = LMA
    assert bench.fault(READ) == 9


@pytest.mark.parametrize("level", [PML4, PDPT, PD, PT])
def test_walk_when_one_level_denies_write_or_user_denies(level: int) -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | W | U)
    index = 5 if level == PT else 0
    value = bench.get(level, index)
    bench.entry(level, index, value & ~W)
    assert bench.fault(WRITE) == 3
    assert bench.walk(READ, user=True)[2] == READ | FETCH
    bench.entry(level, index, value & ~U)
    assert bench.fault(READ, user=True) == 5
    assert bench.fault(WRITE, user=True) == 7
    assert bench.fault(FETCH, user=True) == 0x15
    assert bench.walk(WRITE)[2] == RWX


def test_walk_when_wp_is_off_lets_supervisor_write() -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | U)
    bench.cr0 &= ~WP
    assert bench.walk(WRITE)[2] == RWX
    assert bench.fault(WRITE, user=True) == 7


def test_walk_when_smep_denies_supervisor_fetch_from_user_page() -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | U | D | W)
    bench.cr4 |= SMEP
    assert bench.fault(FETCH) == 0x11
    assert bench.walk(READ)[2] == READ | WRITE
    assert bench.walk(FETCH, user=True)[2] == RWX


def test_walk_when_smap_denies_supervisor_data_unless_ac() -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | U | D | W)
    bench.cr4 |= SMAP
    assert bench.fault(READ) == 1
    assert bench.fault(WRITE) == 3
    bench.flags |= AC
    assert bench.walk(READ)[2] == RWX


def test_walk_when_page_is_clean_gives_no_write_and_sets_bits() -> None:
    bench = Bench()
    bench.map_long(0x123000 | P | W | U)
    assert bench.walk(READ)[2] == READ | FETCH
    for table in (PML4, PDPT, PD):
        assert bench.get(table, 0) & (A | D) == A
    assert bench.get(PT, 5) == 0x123000 | P | W | U | A
    assert bench.walk(WRITE)[2] == RWX
    assert bench.get(PT, 5) == 0x123000 | P | W | U | A | D
    assert bench.walk(READ)[2] == RWX


def test_walk_when_access_faults_sets_no_bits_in_the_leaf() -> None:
    bench = Bench()
    bench.map_long(0x123000 | P)
    assert bench.fault(WRITE) == 3
    assert bench.get(PT, 5) == 0x123000 | P


# PAE


def pae() -> Bench:
    bench = Bench()
    bench.cr3, bench.efer = PDPT | 0x20, NXE
    bench.entry(PDPT + 0x20, 1, PD | P)
    bench.entry(PD, 0, PT | P | W | U)
    bench.entry(PT, 5, 0x123000 | P | W | U | D)
    return bench


def test_walk_when_pae_takes_three_levels() -> None:
    bench = pae()
    assert bench.walk(linear=0x40005000) == (0x123000, False, RWX)
    assert bench.get(PDPT + 0x20, 1) == PD | P, "a PDPE has no A bit"


@pytest.mark.parametrize("bit", [1, 2, 5, 8, 52, 63])
def test_walk_when_pdpe_has_reserved_bits_faults(bit: int) -> None:
    bench = pae()
    bench.entry(PDPT + 0x20, 1, PD | P | 1 << bit)
    assert bench.fault(READ, linear=0x40005000) == 9


def test_walk_when_pae_page_is_2_mib() -> None:
    bench = pae()
    bench.entry(PD, 0, 0x600000 | P | W | PS | D)
    assert bench.walk(linear=0x40005000) == (0x605000, False, RWX)


def test_walk_when_pae_entry_has_bits_above_51_faults() -> None:
    bench = pae()
    bench.entry(PT, 5, 0x123000 | P | 1 << 52)
    assert bench.fault(READ, linear=0x40005000) == 9


# 32-bit tables


def legacy() -> Bench:
    bench = Bench()
    bench.cr3, bench.cr4, bench.efer = PD, PSE, 0
    bench.entry(PD, 1, PT | P | W | U, 4)
    bench.entry(PT, 5, 0x123000 | P | W | U | D, 4)
    return bench


def test_walk_when_32_bit_tables_take_two_levels() -> None:
    bench = legacy()
    assert bench.walk(linear=0x405000) == (0x123000, False, RWX)
    assert bench.get(PD, 1, 4) == PT | P | W | U | A


def test_walk_when_4_mib_page_has_its_high_bits_in_the_middle() -> None:
    bench = legacy()
    bench.entry(PD, 1, 0x800000 | 3 << 13 | P | W | PS | D, 4)
    assert bench.walk(linear=0x405000) == (0x3_0080_5000, False, RWX)
    bench.entry(PD, 1, 0x800000 | 1 << 21 | P | PS, 4)
    assert bench.fault(READ, linear=0x405000) == 9


def test_walk_when_32_bit_tables_fault_has_no_fetch_bit() -> None:
    bench = legacy()
    bench.entry(PT, 5, 0, 4)
    assert bench.fault(FETCH, linear=0x405000, user=True) == 4
    bench.entry(PT, 5, 0x123000 | P, 4)
    assert bench.fault(WRITE, linear=0x405000) == 3


def test_walk_when_pse_is_off_takes_a_table() -> None:
    bench = legacy()
    bench.cr4 = 0
    bench.entry(PD, 1, PT | P | W | U | PS, 4)
    assert bench.walk(linear=0x405000)[0] == 0x123000


# SNP guests


@pytest.mark.parametrize("c_bit", [51, 47, 39])
def test_walk_when_c_bit_tells_sides_apart(c_bit: int) -> None:
    bench = Bench(snp=True, c_bit=c_bit)
    bench.map_long(0x123000 | P | W | U | D | 1 << c_bit)
    assert bench.walk() == (0x123000, True, RWX)
    bench.map_long(0x123000 | P | W | U | D)
    assert bench.walk() == (0x123000, False, READ | WRITE)


def test_walk_when_snp_fetches_they_are_private() -> None:
    bench = Bench(snp=True)
    bench.map_long(0x123000 | P | W | U | D)
    assert bench.walk(FETCH) == (0x123000, True, FETCH)


def test_walk_when_snp_has_no_paging_all_is_private() -> None:
    bench = Bench(snp=True)
    bench.cr0, bench.efer = PE, 0
    assert bench.walk() == (LINEAR, True, RWX)


def test_walk_when_snp_has_32_bit_tables_all_is_private() -> None:
    bench = Bench(snp=True)
    bench.cr3, bench.cr4, bench.efer = PD, 0, 0
    bench.entry(PD, 0, PT | P | W | U, 4)
    bench.entry(PT, 5, 0x123000 | P | W | D, 4)
    assert bench.walk() == (0x123000, True, RWX)


def test_walk_when_snp_tables_lack_the_c_bit_they_are_private() -> None:
    bench = Bench(snp=True)
    bench.map_long(0x123000 | P | D | 1 << 51)
    bench.memory.shared[PT : PT + 0x1000] = struct.pack("<Q", 0x77000 | P) * 512
    assert bench.walk()[0] == 0x123000


def test_walk_when_snp_table_is_shared_is_a_nested_fault() -> None:
    bench = Bench(snp=True)
    bench.map_long(0x123000 | P | 1 << 51)
    del bench.memory.rmp[PD]
    with pytest.raises(HostFault) as caught:
        bench.walk()
    event = caught.value.event
    assert (event.gpa, event.private, event.walk) == (PD, True, True)
    assert event.reason is FaultReason.ABSENT


def test_walk_when_snp_table_is_not_validated_is_vc() -> None:
    bench = Bench(snp=True)
    bench.map_long(0x123000 | P | 1 << 51)
    bench.memory.rmp_update(PD, validated=False)
    with pytest.raises(GuestFault) as caught:
        bench.walk()
    assert (caught.value.vector, caught.value.error_code) == (VC, 0x404)


def test_walk_when_vmpl_may_not_write_the_table_can_not_set_bits() -> None:
    bench = Bench(snp=True)
    bench.map_long(0x123000 | P | W | 1 << 51)
    for gpa in (PML4, PDPT, PD, PT):
        bench.memory.rmp[gpa] = Entry(gpa=gpa, perms=(15, 1, 0, 0))
    with pytest.raises(HostFault) as caught:
        bench.walk(vmpl=1)
    assert caught.value.event.reason is FaultReason.VMPL
    assert caught.value.event.walk
