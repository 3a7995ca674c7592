"""Raw binaries: where they go and how they start."""

from __future__ import annotations

import pytest

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import ImageError
from kvmlaunch.images import PlanOptions, load_image


def test_flat_when_nothing_chosen_is_at_0x1000_in_real_mode() -> None:
    plan = load_image(b"\xf4" * 5)
    (step,) = plan.steps
    assert (step.gpa, step.size) == (0x1000, 0x1000)
    assert (step.type, step.label) == (PageType.NORMAL, "image")
    vmsa = plan.vcpus[0]
    assert (vmsa.cs.selector, vmsa.cs.base, vmsa.rip) == (0, 0, 0x1000)
    assert (vmsa.cr0, vmsa.efer, vmsa.rdx) == (0x10, 0x1000, 0x800F12)


def test_flat_when_last_page_is_partial_ends_with_zeroes() -> None:
    data = bytes(range(256)) * 20
    step = load_image(data).steps[0]
    assert bytes(step.page(0)) == data[:4096]
    assert bytes(step.page(1)) == data[4096:] + bytes(8192 - len(data))


@pytest.mark.parametrize(
    ("load_addr", "entry", "selector", "base", "rip"),
    [
        (0x7000, 0x7C00, 0, 0, 0x7C00),
        (0xF000, 0xFFFF, 0, 0, 0xFFFF),
        (0x10000, 0x10000, 0x1000, 0x10000, 0),
        (0x9F000, 0x9F123, 0x9000, 0x90000, 0xF123),
        (0xFF000, 0xFFFFF, 0xF000, 0xF0000, 0xFFFF),
    ],
)
def test_real_mode_when_entry_is_below_1_mib_has_cs_and_ip(
    load_addr: int, entry: int, selector: int, base: int, rip: int
) -> None:
    plan = load_image(bytes(4096), PlanOptions(load_addr=load_addr, entry=entry))
    vmsa = plan.vcpus[0]
    assert (vmsa.cs.selector, vmsa.cs.base, vmsa.rip) == (selector, base, rip)
    assert (vmsa.cs.attrib, vmsa.cs.limit) == (0x9B, 0xFFFF)
    assert len(plan.steps) == 1


def test_rom_when_it_ends_at_4_gib_starts_at_the_reset_vector() -> None:
    plan = load_image(bytes(0x10000), PlanOptions(load_addr=0xFFFF0000, vcpus=2))
    for vmsa in plan.vcpus:
        assert (vmsa.cs.selector, vmsa.cs.base, vmsa.rip) == (0xF000, 0xFFFF0000, 0xFFF0)
    assert [(r.gpa, r.end, r.label) for r in plan.memory] == [
        (0, 256 << 20, "ram"),
        (0xFFFF0000, 1 << 32, "rom"),
    ]
    assert len(plan.steps) == 1


def test_rom_when_ram_goes_beyond_4_gib_lies_between() -> None:
    plan = load_image(bytes(0x1000), PlanOptions(load_addr=0xFFFFF000, memory=4 << 30))
    assert [r.label for r in plan.memory] == ["ram", "rom", "ram-high"]


def test_rom_when_entry_is_chosen_starts_there_in_64_bit_mode() -> None:
    plan = load_image(bytes(0x1000), PlanOptions(load_addr=0xFFFFF000, entry=0xFFFFF010))
    assert plan.vcpus[0].rip == 0xFFFFF010
    assert [step.label for step in plan.steps] == ["page-tables", "image"]


def test_flat_when_entry_is_at_1_mib_starts_in_64_bit_mode() -> None:
    plan = load_image(b"\xf4", PlanOptions(load_addr=0x100000, vcpus=2))
    assert [(step.label, step.gpa) for step in plan.steps] == [
        ("page-tables", 0x1000),
        ("image", 0x100000),
    ]
    assert plan.vcpus[0] == plan.vcpus[1]
    assert (plan.vcpus[0].rip, plan.vcpus[0].efer) == (0x100000, 0x1500)


def test_flat_when_image_covers_low_memory_has_tables_behind_it() -> None:
    plan = load_image(bytes(0x200000), PlanOptions(entry=0x180000))
    assert plan.steps[0].gpa == 0x201000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (PlanOptions(load_addr=0x1001), "the load address 0x1001 is not aligned to 4 KiB pages"),
        (
            PlanOptions(entry=0xFFF),
            "the entry point 0xfff is outside the image, which is at 0x1000..0x1064",
        ),
        (
            PlanOptions(entry=0x1064),
            "the entry point 0x1064 is outside the image, which is at 0x1000..0x1064",
        ),
        (
            PlanOptions(load_addr=1 << 30),
            "the image (0x40000000..0x40001000) is outside the guest's memory (0x0..0x10000000)",
        ),
        (
            PlanOptions(load_addr=0xFFFFFFFFFFFFF000),
            "image at GPA 0xfffffffffffff000 ends beyond the 52 physical address bits of x86-64",
        ),
    ],
)
def test_flat_when_it_cannot_be_placed_is_refused(options: PlanOptions, sentence: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(bytes(100), options)
    assert str(caught.value) == f"<bytes>: {sentence}"


def test_flat_when_no_room_for_page_tables_is_refused() -> None:
    options = PlanOptions(load_addr=0x5000, entry=0x100000, memory=0x105000)
    with pytest.raises(ImageError, match="no six successive pages of memory are left"):
        load_image(bytes(0x100000), options)
