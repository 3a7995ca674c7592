"""ELF64 images: layout by physical address, zero pages, and each refusal."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import ImageError
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image
from tests.images.builders import (
    ET_DYN,
    ET_REL,
    PT_INTERP,
    PT_LOAD,
    PT_NOTE,
    Seg,
    data_offset,
    elf64,
)


def layout(plan: LaunchPlan) -> list[tuple[str, int, int, PageType]]:
    """What the plan launches behind the page tables."""
    assert plan.steps[0].label == "page-tables"
    return [(step.label, step.gpa, step.end, step.type) for step in plan.steps[1:]]


def refusal(image: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(image, PlanOptions(image_type="elf", **options))
    return str(caught.value)


def test_segment_when_page_aligned_becomes_one_normal_range() -> None:
    plan = load_image(elf64([Seg(0x100000, b"A" * 0x2000)]))
    assert layout(plan) == [("segment", 0x100000, 0x102000, PageType.NORMAL)]
    assert bytes(plan.steps[1].page(1)) == b"A" * 4096


def test_segment_when_unaligned_is_zero_around_its_bytes() -> None:
    plan = load_image(elf64([Seg(0x100F00, b"B" * 0x300)], entry=0x100F00))
    assert layout(plan) == [("segment", 0x100000, 0x102000, PageType.NORMAL)]
    assert bytes(plan.steps[1].page(0)) == bytes(0xF00) + b"B" * 0x100
    assert bytes(plan.steps[1].page(1)) == b"B" * 0x200 + bytes(0xE00)


def test_segment_when_loaded_goes_to_its_physical_address() -> None:
    image = elf64([Seg(0x400000, b"C" * 16, vaddr=0xFFFFFFFF81000000)], entry=0xFFFFFFFF81000004)
    plan = load_image(image)
    assert layout(plan)[0][1] == 0x400000
    assert plan.vcpus[0].rip == 0x400004


def test_segment_origin_when_asked_names_file_offset() -> None:
    plan = load_image(elf64([Seg(0x100F00, b"B" * 0x300)], entry=0x100F00))
    start = data_offset(1)
    assert plan.steps[1].origin == "<bytes> segment[0]"
    assert plan.steps[1].origin_of(0) == f"<bytes>+{start:#x}"
    assert plan.steps[1].origin_of(1) == f"<bytes>+{start + 0x100:#x}"


def test_segments_when_they_share_a_page_become_one_range() -> None:
    segments = [Seg(0x100000, b"A" * 0x800), Seg(0x100900, b"B" * 0x1000)]
    plan = load_image(elf64(segments))
    assert layout(plan) == [("segment", 0x100000, 0x102000, PageType.NORMAL)]
    assert plan.steps[1].origin == "<bytes> segment[0,1]"
    page = bytes(plan.steps[1].page(0))
    assert page == b"A" * 0x800 + bytes(0x100) + b"B" * 0x700


def test_segments_when_on_successive_pages_stay_separate() -> None:
    segments = [Seg(0x101000, b"B" * 0x1000), Seg(0x100000, b"A" * 0x1000)]
    plan = load_image(elf64(segments))
    assert layout(plan) == [
        ("segment", 0x100000, 0x101000, PageType.NORMAL),
        ("segment", 0x101000, 0x102000, PageType.NORMAL),
    ]


def test_bss_when_it_covers_whole_pages_is_zero_pages() -> None:
    plan = load_image(elf64([Seg(0x100000, b"D" * 0x1800, memsz=0x4800)]))
    assert layout(plan) == [
        ("segment", 0x100000, 0x102000, PageType.NORMAL),
        ("bss", 0x102000, 0x105000, PageType.ZERO),
    ]
    assert bytes(plan.steps[1].page(1)) == b"D" * 0x800 + bytes(0x800)
    assert plan.steps[2].pieces == ()
    assert plan.steps[2].origin_of(0) == "<bytes> bss"


def test_bss_when_segment_has_no_file_bytes_is_all_zero_pages() -> None:
    segments = [Seg(0x100000, b"E" * 16), Seg(0x200800, memsz=0x1000)]
    assert layout(load_image(elf64(segments))) == [
        ("segment", 0x100000, 0x101000, PageType.NORMAL),
        ("bss", 0x200000, 0x202000, PageType.ZERO),
    ]


def test_bss_when_next_segment_begins_in_its_last_page_leaves_that_page_normal() -> None:
    segments = [Seg(0x100000, b"F" * 0x10, memsz=0x2800), Seg(0x102800, b"G" * 0x10)]
    plan = load_image(elf64(segments))
    assert layout(plan) == [
        ("segment", 0x100000, 0x101000, PageType.NORMAL),
        ("bss", 0x101000, 0x102000, PageType.ZERO),
        ("segment", 0x102000, 0x103000, PageType.NORMAL),
    ]
    assert bytes(plan.steps[3].page(0)) == bytes(0x800) + b"G" * 0x10 + bytes(0x7F0)


def test_bss_when_another_segment_fills_part_of_it_yields() -> None:
    segments = [Seg(0x100000, b"H", memsz=0x5000), Seg(0x102000, b"I" * 0x1000)]
    plan = load_image(elf64(segments))
    assert layout(plan) == [
        ("segment", 0x100000, 0x101000, PageType.NORMAL),
        ("bss", 0x101000, 0x102000, PageType.ZERO),
        ("segment", 0x102000, 0x103000, PageType.NORMAL),
        ("bss", 0x103000, 0x105000, PageType.ZERO),
    ]


def test_headers_when_not_pt_load_or_empty_are_ignored() -> None:
    segments = [
        Seg(0x999, b"note", type=PT_NOTE),
        Seg(0x100000, b"J"),
        Seg(0xFFFFFFFFFFFFFFFF, memsz=0),
    ]
    plan = load_image(elf64(segments))
    assert layout(plan) == [("segment", 0x100000, 0x101000, PageType.NORMAL)]
    assert plan.steps[1].origin == "<bytes> segment[1]"


def test_page_tables_when_segment_is_at_0x1000_move_behind_it() -> None:
    plan = load_image(elf64([Seg(0x1000, b"K" * 0x1000)], entry=0x1000))
    assert plan.steps[0].gpa == 0x2000


def test_entry_when_chosen_overrides_the_file() -> None:
    plan = load_image(elf64([Seg(0x100000, b"L" * 16)]), PlanOptions(entry=0x100008, vcpus=2))
    assert [vcpu.rip for vcpu in plan.vcpus] == [0x100008, 0x100008]


def test_entry_when_both_physical_and_virtual_is_taken_as_physical() -> None:
    segments = [Seg(0x200000, b"M" * 16, vaddr=0x100000), Seg(0x100000, b"N" * 16, vaddr=0)]
    assert load_image(elf64(segments, entry=0x100004)).vcpus[0].rip == 0x100004


def test_entry_when_in_bss_is_accepted() -> None:
    plan = load_image(elf64([Seg(0x100000, b"O", memsz=0x2000)], entry=0x101000))
    assert plan.vcpus[0].rip == 0x101000


def test_static_pie_when_it_has_physical_addresses_is_loaded() -> None:
    plan = load_image(elf64([Seg(0x100000, b"P")], etype=ET_DYN))
    assert layout(plan) == [("segment", 0x100000, 0x101000, PageType.NORMAL)]


TWO = [Seg(0x100000, b"Q" * 0x20), Seg(0x10001F, b"R" * 0x20)]


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (
            elf64([Seg(0x100000, b"x")], ei_class=1),
            "offset 0x4: a 32-bit ELF file; only ELF64 is loaded",
        ),
        (
            elf64([Seg(0x100000, b"x")], ei_data=2),
            "offset 0x5: a big-endian ELF file; x86-64 is little-endian",
        ),
        (
            elf64([Seg(0x100000, b"x")], machine=183),
            "offset 0x12: an ELF file for EM_AARCH64, not EM_X86_64",
        ),
        (
            elf64([Seg(0x100000, b"x")], machine=0x7777),
            f"offset 0x12: an ELF file for {0x7777}, not EM_X86_64",
        ),
        (
            elf64([Seg(0x100000, b"x")], etype=ET_REL),
            "offset 0x10: an ELF file of type ET_REL, not an executable (ET_EXEC)",
        ),
        (elf64([]), "offset 0x20: no PT_LOAD segment, so there is nothing to load"),
        (
            elf64([Seg(0x100000, b"x", type=PT_NOTE)]),
            "offset 0x20: no PT_LOAD segment, so there is nothing to load",
        ),
        (
            elf64(TWO),
            "offset 0x78: the file's bytes of segment 1 (0x10001f..0x10003f) overlap those of "
            "segment 0 (0x100000..0x100020)",
        ),
        (
            elf64([Seg(0x100000, b"xy", memsz=1)]),
            "offset 0x40: segment 0 (0x100000..0x100001) has more bytes in the file (0x2) "
            "than in memory",
        ),
        (
            elf64([Seg(0x100000, b"xy", offset=0x79)]),
            "offset 0x40: segment 0 (0x100000..0x100002) ends at file offset 0x7b, "
            "the file at 0x7a",
        ),
        (
            elf64([Seg(0x100000, b"x", memsz=1 << 40)]),
            "offset 0x40: segment 0 (0x100000..0x10000100000) is outside the guest's memory "
            "(0x0..0x10000000)",
        ),
        (
            elf64([Seg(0x10000000, b"x")]),
            "offset 0x40: segment 0 (0x10000000..0x10000001) is outside the guest's memory "
            "(0x0..0x10000000)",
        ),
        (
            elf64([Seg(0xFFFFFFFFFFFFFFF0, b"x", memsz=0xFFFFFFFFFFFFFFFF)]),
            "is outside the guest's memory (0x0..0x10000000)",
        ),
        (
            elf64([Seg(0x100000, b"x")], entry=0x100001),
            "offset 0x18: the entry point 0x100001 is in no loaded segment",
        ),
        (
            elf64([Seg(0x100000, b"x")], phentsize=0),
            "offset 0x36: program headers of 0 bytes, not 56",
        ),
        (
            elf64([Seg(0x100000, b"x")], phnum=0xFFFF),
            "offset 0x20: 65535 program headers at 0x40 are outside the file",
        ),
        (
            elf64([Seg(0x100000, b"x")], phoff=1 << 63),
            "offset 0x20: 1 program headers at 0x8000000000000000 are outside the file",
        ),
        (
            elf64([Seg(0, b"x")], etype=ET_DYN, entry=0),
            "offset 0x10: a position-independent ELF file linked at physical address 0 doesn't "
            "say where it is loaded; link it at a fixed address (-no-pie)",
        ),
        (
            elf64([Seg(0x100000, b"x"), Seg(0, b"/ld.so", type=PT_INTERP)], etype=ET_DYN),
            "offset 0x10: a dynamically linked ELF file: it needs a dynamic linker, "
            "link it statically",
        ),
        (
            elf64([Seg(0x100000, b"x")])[:40],
            "the ELF header needs 0x40 bytes, the image ends at 0x28",
        ),
        (b"\x7fELF", "the ELF header needs 0x40 bytes, the image ends at 0x4"),
        (b"\x7fEL", "offset 0x0: not an ELF file: it doesn't begin with 7f 45 4c 46"),
    ],
)
def test_elf_when_it_breaks_a_rule_is_refused(image: bytes, sentence: str) -> None:
    text = refusal(image)
    assert text.startswith("<bytes>: ")
    assert sentence in text


def test_elf_when_load_address_is_chosen_is_refused() -> None:
    image = elf64([Seg(0x100000, b"x")])
    assert "an ELF image says itself where it is loaded" in refusal(image, load_addr=0x100000)


def test_elf_when_chosen_entry_is_outside_is_refused_without_offset() -> None:
    image = elf64([Seg(0x100000, b"x")])
    assert refusal(image, entry=0x5000) == (
        "<bytes>: the entry point 0x5000 is in no loaded segment"
    )


def test_elf_when_memory_is_full_has_no_room_for_tables() -> None:
    image = elf64([Seg(0x1000, b"x", memsz=0xF000)], entry=0x1000)
    assert "no six successive pages of memory are left" in refusal(image, memory=0x10000)


def test_dynamic_segment_when_broken_is_not_followed() -> None:
    dynamic = struct.pack("<QQ", 5, 0xFFFFFFFFFFFF) * 4
    image = elf64([Seg(0x100000, b"x"), Seg(0x100800, dynamic, type=2)])
    assert layout(load_image(image)) == [("segment", 0x100000, 0x101000, PageType.NORMAL)]


def test_segments_when_many_are_all_loaded() -> None:
    segments = [Seg(0x100000 + n * 0x2000, b"x", type=PT_LOAD) for n in range(300)]
    assert len(layout(load_image(elf64(segments)))) == 300
