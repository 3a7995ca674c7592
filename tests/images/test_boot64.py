"""64-bit start state: registers and identity page tables, checked by an own table walk."""

from __future__ import annotations

import pytest

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images import LaunchPlan, MemoryRegion, PlanOptions, load_image
from kvmlaunch.images.boot64 import place_page_tables

C51 = 1 << 51


def guest(**options: object) -> LaunchPlan:
    return load_image(b"\xf4", PlanOptions(load_addr=0x200000, **options))  # type: ignore[arg-type]


def walk(plan: LaunchPlan, address: int, c_bit: int) -> tuple[int, int, list[int]]:
    """(physical address, C-bit of the mapping, the entries) as a CPU would find them."""
    tables = plan.steps[0]
    memory = b"".join(bytes(tables.page(n)) for n in range(tables.npages))
    at, entries = plan.vcpus[0].cr3, []
    for shift in (39, 30, 21):
        base = at & ~c_bit & ~0xFFF
        where = base - tables.gpa + 8 * (address >> shift & 0x1FF)
        entry = int.from_bytes(memory[where : where + 8], "little")
        assert entry & 3 == 3, f"{address:#x} is not mapped writable"
        entries.append(entry)
        at = entry
    assert at & 0x80, "not a 2 MiB page"
    return (at & ~c_bit & ~0x1FFFFF) + address % 0x200000, at & c_bit, entries


@pytest.mark.parametrize("address", [0, 0x1234, 0x200000, 0x0FFFFFFF, 0x10000000, 0xFFFFFFFF])
def test_tables_when_walked_map_the_low_4_gib_to_themselves(address: int) -> None:
    assert walk(guest(), address, C51)[0] == address


@pytest.mark.parametrize(
    ("address", "private"),
    [
        (0, True),
        (0x0FFFFFFF, True),
        (0x10000000, False),
        (0xC0000000, False),
        (0xFEC00000, False),
    ],
)
def test_c_bit_when_confidential_is_on_ram_only(address: int, private: bool) -> None:
    assert walk(guest(), address, C51)[1] == (C51 if private else 0)


def test_c_bit_when_a_2_mib_page_is_partly_ram_is_set() -> None:
    plan = guest(memory=0x401000)
    assert walk(plan, 0x400000, C51)[1] == C51
    assert walk(plan, 0x600000, C51)[1] == 0


def test_c_bit_when_memory_is_a_rom_is_set_there() -> None:
    plan = load_image(bytes(0x1000), PlanOptions(load_addr=0xFFFFF000, entry=0xFFFFF000))
    assert walk(plan, 0xFFFFF000, C51)[1] == C51


def test_c_bit_when_confidential_is_on_the_links_and_cr3() -> None:
    plan = guest()
    pml4e, pdpte, _ = walk(plan, 0, C51)[2]
    assert (pml4e & C51, pdpte & C51) == (C51, C51)
    assert plan.vcpus[0].cr3 == 0x1000 | C51


def test_c_bit_when_at_another_position_follows_it() -> None:
    plan = guest(cbitpos=47)
    assert plan.vcpus[0].cr3 == 0x1000 | 1 << 47
    assert walk(plan, 0, 1 << 47)[1] == 1 << 47


def test_c_bit_when_plain_is_nowhere() -> None:
    plan = guest(confidential=False)
    assert plan.vcpus[0].cr3 == 0x1000
    assert all(entry < 1 << 33 for entry in walk(plan, 0, 0)[2])
    assert walk(plan, 0xFFFFF000, 0)[0] == 0xFFFFF000


def test_tables_when_planned_are_first_and_six_normal_pages() -> None:
    step = guest().steps[0]
    assert (step.gpa, step.npages, step.type) == (0x1000, 6, PageType.NORMAL)
    assert (step.label, step.origin_of(5)) == ("page-tables", "kvmlaunch:page-tables")


def test_tables_when_upper_half_is_walked_are_empty() -> None:
    assert bytes(guest().steps[0].page(0))[8:] == bytes(4088)
    assert bytes(guest().steps[0].page(1))[32:] == bytes(4064)


def test_registers_when_64_bit_are_those_of_long_mode() -> None:
    vmsa = guest(sev_features=0x21).vcpus[0]
    assert (vmsa.cr0, vmsa.cr4, vmsa.efer) == (0x80000011, 0x60, 0x1500)
    assert (vmsa.rip, vmsa.rsp, vmsa.rdx, vmsa.rsi, vmsa.rdi) == (0x200000, 0, 0, 0, 0)
    assert (vmsa.rflags, vmsa.dr6, vmsa.dr7) == (2, 0xFFFF0FF0, 0x400)
    assert (vmsa.g_pat, vmsa.xcr0) == (0x0007040600070406, 1)
    assert (vmsa.mxcsr, vmsa.x87_fcw, vmsa.sev_features) == (0x1F80, 0x37F, 0x21)


def test_segments_when_64_bit_are_flat() -> None:
    vmsa = guest().vcpus[0]
    cs = vmsa.cs
    assert (cs.selector, cs.attrib, cs.limit, cs.base) == (8, 0xA9B, 0xFFFFFFFF, 0)
    for seg in (vmsa.ds, vmsa.es, vmsa.ss, vmsa.fs, vmsa.gs):
        assert (seg.selector, seg.attrib, seg.limit, seg.base) == (0x10, 0xC93, 0xFFFFFFFF, 0)
    assert (vmsa.ldtr.attrib, vmsa.tr.attrib, vmsa.tr.limit) == (0x82, 0x8B, 0xFFFF)
    assert (vmsa.gdtr.base, vmsa.gdtr.limit, vmsa.idtr.base, vmsa.idtr.limit) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("taken", "gpa"),
    [
        ([], 0x1000),
        ([(0, 0x1000)], 0x1000),
        ([(0x7000, 0x8000)], 0x1000),
        ([(0x6000, 0x8000)], 0x8000),
        ([(0x6000, 0x8000), (0xD000, 0xE000)], 0xE000),
        ([(0x9000, 0xA000), (0x1000, 0x4000)], 0xA000),
    ],
)
def test_placement_when_pages_are_taken_is_the_lowest_run(
    taken: list[tuple[int, int]], gpa: int
) -> None:
    assert place_page_tables([MemoryRegion(0, 0x100000, "ram")], taken) == gpa


def test_placement_when_first_region_is_full_uses_the_next() -> None:
    memory = [MemoryRegion(0, 0x6000, "ram"), MemoryRegion(0x10000, 0x6000, "more")]
    assert place_page_tables(memory, []) == 0x10000


def test_placement_when_there_is_no_room_is_refused() -> None:
    with pytest.raises(FormatError, match="no six successive pages of memory are left"):
        place_page_tables([MemoryRegion(0, 0x6000, "ram")], [])


def test_entry_when_beyond_4_gib_is_refused() -> None:
    with pytest.raises(
        ImageError, match="64-bit entry point 0x100000000 is not in the low 4 GiB of memory"
    ):
        load_image(b"\xf4", PlanOptions(load_addr=1 << 32, memory=4 << 30))
