"""OVMF firmware: GUIDed table, SEV metadata, the plan in QEMU's order, each refusal."""

from __future__ import annotations

import struct
import uuid
from typing import Any

import pytest

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import ImageError
from kvmlaunch.images import ImageSource, PlanOptions, load_image
from kvmlaunch.images.ovmf_table import has_table, parse_table
from tests.images.builders import (
    AMDSEV_SECTIONS,
    GUID_FOOTER,
    GUID_HASHES,
    GUID_METADATA,
    GUID_RESET,
    GUID_SVSM,
    entry_bytes,
    metadata_bytes,
    ovmf,
    standard_entries,
)

SIZE = 0x4000
METADATA = SIZE - 0x600


def refusal(image: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(image, PlanOptions(image_type="ovmf", **options))
    return str(caught.value).removeprefix("<bytes>: ")


def sections(*listed: tuple[int, int, int], **header: Any) -> bytes:
    return ovmf(metadata=metadata_bytes(listed, **header))


def test_plan_when_amdsev_build_is_in_qemu_order() -> None:
    plan = load_image(ovmf())
    steps = [(step.label, step.gpa, step.size, step.type.name) for step in plan.steps]
    assert steps == [
        ("firmware", 0xFFFFC000, 0x4000, "NORMAL"),
        ("sec-mem", 0x800000, 0x9000, "ZERO"),
        ("sec-mem", 0x80A000, 0x3000, "ZERO"),
        ("secrets", 0x80D000, 0x1000, "SECRETS"),
        ("cpuid", 0x80E000, 0x1000, "CPUID"),
        ("svsm-caa", 0x80F000, 0x1000, "ZERO"),
        ("kernel-hashes", 0x810000, 0x1000, "ZERO"),
        ("sec-mem", 0x811000, 0xF000, "ZERO"),
    ]
    assert plan.steps[3].origin_of(0) == "<bytes> metadata[2]"
    assert plan.steps[0].origin_of(2) == "<bytes>+0x2000"


def test_firmware_pages_when_planned_are_those_of_the_file() -> None:
    image = ovmf()
    step = load_image(image).steps[0]
    assert b"".join(bytes(step.page(n)) for n in range(step.npages)) == image


def test_memory_when_not_chosen_is_256_mib_and_the_firmware() -> None:
    memory = [(r.gpa, r.end, r.label) for r in load_image(ovmf()).memory]
    assert memory == [(0, 0x10000000, "ram"), (0xFFFFC000, 0x100000000, "firmware")]


def test_memory_when_more_than_3_gib_is_sorted_around_the_firmware() -> None:
    memory = load_image(ovmf(), PlanOptions(memory=4 << 30)).memory
    assert [region.label for region in memory] == ["ram", "firmware", "ram-high"]


def test_vcpus_when_several_start_aps_at_the_reset_block() -> None:
    plan = load_image(ovmf(), PlanOptions(vcpus=3, signature=0xA00F11, sev_features=0x21))
    starts = [(vmsa.cs.selector, vmsa.cs.base, vmsa.rip) for vmsa in plan.vcpus]
    assert starts == [(0xF000, 0xFFFF0000, 0xFFF0)] + [(0xF000, 0x800000, 0xB004)] * 2
    assert {(vmsa.rdx, vmsa.sev_features) for vmsa in plan.vcpus} == {(0xA00F11, 0x21)}


def test_section_when_type_is_unknown_is_zero_pages_as_in_qemu() -> None:
    step = load_image(sections((0x800000, 0x2000, 0x77))).steps[1]
    assert (step.type, step.label) == (PageType.ZERO, "section-type-0x77")


def test_single_vcpu_when_there_is_no_reset_block_is_planned() -> None:
    assert len(load_image(ovmf(entries=standard_entries(reset_eip=None))).vcpus) == 1


def test_tables_when_parsed_say_what_the_file_says() -> None:
    tables = parse_table(ImageSource.of(ovmf()))
    assert [(str(e.guid), e.name, e.size) for e in tables.entries] == [
        (GUID_RESET, "SEV-ES reset block", 4),
        ("4c2eb361-7d9b-4cc3-8081-127c90d3d294", "SEV launch secret area", 8),
        (GUID_HASHES, "SEV hash table", 8),
        (GUID_METADATA, "SEV metadata", 4),
    ]
    # From the end: 32 bytes reset vector, 18 footer, 18 trailer of the reset block, 4 data.
    assert tables.entries[0].offset == SIZE - 32 - 18 - 18 - 4
    assert (tables.reset_eip, tables.hash_base, tables.hash_size) == (0x80B004, 0x810C00, 0x400)
    assert tuple((s.gpa, s.size, s.type) for s in tables.sections) == AMDSEV_SECTIONS
    assert tables.sections[1].offset == METADATA + 16 + 12


def test_tables_when_build_has_no_sev_entries_are_empty() -> None:
    tables = parse_table(ImageSource.of(ovmf(entries=[])))
    assert (tables.entries, tables.sections, tables.reset_eip) == ((), (), None)
    assert (tables.hash_base, tables.hash_size) == (0, 0)


def test_tables_when_entry_is_foreign_are_still_read() -> None:
    guid = "11111111-2222-3333-4444-555555555555"
    tables = parse_table(ImageSource.of(ovmf(entries=[entry_bytes(guid, b"?" * 5)])))
    found = tables.find(guid)
    assert found is not None
    assert (found.name, found.size) == ("unknown", 5)
    assert tables.find(GUID_RESET) is None


def test_image_when_it_is_too_short_for_a_table_has_none() -> None:
    end = uuid.UUID(GUID_FOOTER).bytes_le + bytes(32)
    assert not has_table(ImageSource("short", memoryview(end)))
    assert has_table(ImageSource("long enough", memoryview(bytes(2) + end)))


def test_firmware_when_there_is_no_table_is_refused() -> None:
    assert refusal(bytes(SIZE)) == (
        "no GUIDed table: its footer GUID 96b582de-1fb2-45f7-baea-a366c55a082d is not at "
        "48 bytes before the end, so this is not OVMF code (SeaBIOS, qboot and OVMF_VARS files "
        "have no table); use a build that supports SEV-SNP (Debian's OVMF.fd or OVMF.amdsev.fd)"
    )


def test_firmware_when_there_is_no_metadata_is_refused() -> None:
    image = ovmf(entries=standard_entries(metadata=None))
    assert refusal(image) == (
        "the GUIDed table has no SEV metadata (GUID dc886566-984a-4798-a75e-5585a7bf67cc with at "
        "least one section), so SEV-SNP can't launch this build; its entries are: "
        "SEV-ES reset block (00f771de-1a7e-4fcb-890e-68c77e2fb44e), "
        "SEV launch secret area (4c2eb361-7d9b-4cc3-8081-127c90d3d294), "
        "SEV hash table (7255371f-3a3b-4b04-927b-1da6efa8d454); "
        "use a build that supports SEV-SNP (Debian's OVMF.fd or OVMF.amdsev.fd)"
    )


def test_firmware_when_table_is_empty_says_so() -> None:
    assert "its entries are: none;" in refusal(ovmf(entries=[]))


def test_firmware_when_metadata_has_no_sections_is_refused() -> None:
    assert "no SEV metadata" in refusal(sections())


def test_vcpus_when_several_without_reset_block_are_refused() -> None:
    text = refusal(ovmf(entries=standard_entries(reset_eip=None)), vcpus=2)
    assert text.startswith(
        "2 vCPUs need a SEV-ES reset block (GUID 00f771de-1a7e-4fcb-890e-68c77e2fb44e), "
        "which says where the second starts; this build's table has: SEV launch secret area"
    )


def test_svsm_when_given_as_firmware_is_refused() -> None:
    entries = [*standard_entries(), entry_bytes(GUID_SVSM, struct.pack("<I", 0))]
    assert refusal(ovmf(entries=entries)).startswith("this is an SVSM, not firmware")


@pytest.mark.parametrize("options", [{"load_addr": 0x1000}, {"entry": 0x1000}])
def test_firmware_when_address_is_chosen_is_refused(options: dict[str, int]) -> None:
    assert "it takes no load address or entry point" in refusal(ovmf(), **options)


@pytest.mark.parametrize("size", [0x3FFF, 0x4001, (16 << 20) + 0x1000])
def test_firmware_when_size_is_odd_or_huge_is_refused(size: int) -> None:
    image = ovmf()
    image = image.rjust(size, b"\0") if size > len(image) else image[len(image) - size :]
    assert refusal(image) == (
        f"offset {size:#x}: firmware of {size:#x} bytes: the size must be a multiple of 4 KiB "
        "and at most 16 MiB"
    )


RESET_DATA = SIZE - 32 - 18 - 18 - 4  # where standard_entries() puts the reset block's u32


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (
            ovmf(table_size=17),
            f"offset {SIZE - 50:#x}: the GUIDed table's size 0x11 is less than its footer "
            "or beyond the image",
        ),
        (
            ovmf(table_size=0xFFFF),
            f"offset {SIZE - 50:#x}: the GUIDed table's size 0xffff is less than its footer "
            "or beyond the image",
        ),
        (
            ovmf(table_size=18 + 10),
            f"offset {SIZE - 60:#x}: a GUIDed table entry begins before its table",
        ),
        (
            ovmf(entries=[entry_bytes(GUID_RESET, b"1234", length=17)]),
            f"offset {SIZE - 68:#x}: GUIDed table entry SEV-ES reset block ({GUID_RESET}): "
            "length 0x11 is less than its trailer or beyond the table",
        ),
        (
            ovmf(entries=[entry_bytes(GUID_RESET, b"1234", length=23)]),
            f"offset {SIZE - 68:#x}: GUIDed table entry SEV-ES reset block ({GUID_RESET}): "
            "length 0x17 is less than its trailer or beyond the table",
        ),
        (
            ovmf(entries=[entry_bytes(GUID_RESET, b"1234")] * 2),
            f"offset {SIZE - 68 - 22:#x}: GUIDed table entry SEV-ES reset block ({GUID_RESET}) "
            "is there twice",
        ),
        (
            ovmf(entries=[entry_bytes(GUID_RESET, b"123")]),
            f"offset {SIZE - 71:#x}: GUIDed table entry SEV-ES reset block ({GUID_RESET}) "
            "has 3 bytes of data, not 4",
        ),
        (
            ovmf(entries=[entry_bytes(GUID_HASHES, b"1234")]),
            f"offset {SIZE - 72:#x}: GUIDed table entry SEV hash table ({GUID_HASHES}) "
            "has 4 bytes of data, not 8",
        ),
        (
            ovmf(entries=[entry_bytes(GUID_METADATA, struct.pack("<I", 15))]),
            f"offset {SIZE - 72:#x}: the SEV metadata's place, 0xf bytes before the end, "
            "is not in the image",
        ),
        (
            ovmf(entries=[entry_bytes(GUID_METADATA, struct.pack("<I", SIZE + 1))]),
            f"offset {SIZE - 72:#x}: the SEV metadata's place, 0x4001 bytes before the end, "
            "is not in the image",
        ),
        (
            sections((0x800000, 0x1000, 1), magic=b"ASEW"),
            f"offset {METADATA:#x}: SEV metadata begins with b'ASEW', not b'ASEV'",
        ),
        (
            sections((0x800000, 0x1000, 1), version=2),
            f"offset {METADATA + 8:#x}: SEV metadata version 2 is not 1",
        ),
        (
            sections((0x800000, 0x1000, 1), size=27),
            f"offset {METADATA + 4:#x}: SEV metadata size 0x1b doesn't fit its 1 sections",
        ),
        (
            sections((0x800000, 0x1000, 1), count=0x200),
            f"offset {METADATA:#x}: SEV metadata needs 0x1810 bytes, the image ends at 0x4000",
        ),
        (
            sections((0x800001, 0x1000, 1)),
            f"offset {METADATA + 16:#x}: metadata section 0 (sec-mem, 0x800001..0x801001) is not "
            "a positive number of 4 KiB pages",
        ),
        (
            sections((0x800000, 0x1000, 1), (0x900000, 0x800, 1)),
            f"offset {METADATA + 28:#x}: metadata section 1 (sec-mem, 0x900000..0x900800) is not "
            "a positive number of 4 KiB pages",
        ),
        (
            sections((0x800000, 0, 1)),
            f"offset {METADATA + 16:#x}: metadata section 0 (sec-mem, 0x800000..0x800000) is not "
            "a positive number of 4 KiB pages",
        ),
        (
            sections((0x800000, 0x2000, 2)),
            f"offset {METADATA + 16:#x}: metadata section 0 (secrets, 0x800000..0x802000) "
            "must be one page",
        ),
        (
            sections((0x800000, 0x2000, 3)),
            f"offset {METADATA + 16:#x}: metadata section 0 (cpuid, 0x800000..0x802000) "
            "must be one page",
        ),
        (
            sections((0x10000000, 0x1000, 1)),
            f"offset {METADATA + 16:#x}: metadata section 0 (sec-mem, 0x10000000..0x10001000) is "
            "outside the guest's memory (0x0..0x10000000)",
        ),
        (
            sections((0xFFFFC000, 0x1000, 1)),
            "is outside the guest's memory (0x0..0x10000000)",
        ),
        (
            sections((0x802000, 0x2000, 1), (0x801000, 0x2000, 3 + 1)),
            f"offset {METADATA + 16:#x}: metadata section 0 (sec-mem, 0x802000..0x804000) "
            "overlaps metadata section 1 (svsm-caa, 0x801000..0x803000)",
        ),
    ],
)
def test_firmware_when_it_breaks_a_rule_is_refused(image: bytes, sentence: str) -> None:
    assert sentence in refusal(image)


def test_firmware_when_memory_is_too_small_names_the_section() -> None:
    assert "section 0 (sec-mem, 0x800000..0x809000) is outside the guest's memory" in refusal(
        ovmf(), memory=0x800000
    )
