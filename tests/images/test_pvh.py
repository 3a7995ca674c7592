"""ELF files with a PVH note: which note counts, the 32-bit start state, and the start info."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmlaunch.abi.kvm_sync import not_carried
from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import ImageError
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image
from kvmlaunch.launch.measure import measure
from tests.images.builders import PT_NOTE, Seg, data_offset, elf64, note_bytes, pvh_note

CODE = Seg(0x100000, b"\xf4" * 0x1234)
ENTRY = 0x100040


def plan(*notes: Seg, code: Seg = CODE, **options: Any) -> LaunchPlan:
    return load_image(elf64([code, *(notes or (pvh_note(ENTRY),))]), PlanOptions(**options))


def refusal(*notes: Seg, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        plan(*notes, **options)
    return str(caught.value)


def starts_in_32_bits(planned: LaunchPlan) -> bool:
    return planned.steps[0].label == "start-info"


def notes_of(*notes: bytes, align: int = 4) -> Seg:
    return Seg(0, b"".join(notes), type=PT_NOTE, align=align)


# Which note


@pytest.mark.parametrize("size", [4, 8])
def test_entry_when_in_a_note_of_either_size_is_where_it_starts(size: int) -> None:
    planned = plan(pvh_note(ENTRY, size))
    assert starts_in_32_bits(planned)
    assert planned.vcpus[0].rip == ENTRY


def test_entry_when_there_is_no_note_is_the_files_in_64_bit_mode() -> None:
    planned = load_image(elf64([CODE], entry=0x100008))
    assert not starts_in_32_bits(planned)
    assert planned.vcpus[0].rip == 0x100008


def test_entry_when_chosen_starts_in_64_bit_mode() -> None:
    planned = plan(entry=0x100008)
    assert planned.steps[0].label == "page-tables"
    assert (planned.vcpus[0].rip, planned.vcpus[0].efer) == (0x100008, 0x1500)


@pytest.mark.parametrize(
    "other",
    [
        note_bytes(3, b"build id of 20 bytes", owner=b"GNU\0"),
        note_bytes(18, ENTRY.to_bytes(4, "little"), owner=b"GNU\0"),
        note_bytes(17, b"\x01"),
        note_bytes(1, b"", owner=b""),
        note_bytes(19, bytes(12)),
    ],
    ids=["build-id", "owner", "padded", "empty", "relocation"],
)
def test_entry_when_behind_another_note_is_found(other: bytes) -> None:
    assert not starts_in_32_bits(plan(notes_of(other)))
    both = plan(notes_of(other, note_bytes(18, ENTRY.to_bytes(4, "little"))))
    assert both.vcpus[0].rip == ENTRY


def test_entry_when_notes_are_aligned_to_8_is_found() -> None:
    property_note = note_bytes(5, bytes(12), owner=b"GNU\0", align=8)
    entry = note_bytes(18, ENTRY.to_bytes(4, "little"), align=8)
    assert plan(notes_of(property_note, entry, align=8)).vcpus[0].rip == ENTRY


def test_entry_when_in_the_second_segment_of_notes_is_found() -> None:
    build_id = notes_of(note_bytes(3, bytes(20), owner=b"GNU\0"))
    assert plan(build_id, pvh_note(ENTRY)).vcpus[0].rip == ENTRY


def test_entry_when_there_are_two_is_the_first() -> None:
    assert plan(pvh_note(ENTRY), pvh_note(ENTRY + 8)).vcpus[0].rip == ENTRY


@pytest.mark.parametrize(
    "junk", [b"\0", b"\xff" * 11, b"\xff" * 400, struct.pack("<III", 4, 5, 18) + b"Xen\0" + b"1234"]
)
def test_notes_when_they_are_none_are_ignored(junk: bytes) -> None:
    assert not starts_in_32_bits(plan(notes_of(junk)))


@pytest.mark.parametrize("size", [0, 2, 12])
def test_note_when_its_entry_has_another_size_is_refused(size: int) -> None:
    note = notes_of(note_bytes(18, bytes(size)))
    where = data_offset(2) + len(CODE.data)
    assert refusal(note) == (
        f"<bytes>: offset {where:#x}: a PVH entry point of {size} bytes, not 4 or 8"
    )


@pytest.mark.parametrize("entry", [0, 0xFFFFF, 0x101234, 0xFFFFFFFF])
def test_note_when_its_entry_is_not_loaded_is_refused(entry: int) -> None:
    assert f"the PVH entry point {entry:#x} is in no loaded segment" in refusal(pvh_note(entry))


def test_note_when_its_entry_is_a_virtual_address_is_refused() -> None:
    code = Seg(0x100000, b"\xf4" * 64, vaddr=0x400000)
    with pytest.raises(ImageError, match="the PVH entry point 0x400000 is in no loaded segment"):
        load_image(elf64([code, pvh_note(0x400000)]))


def test_note_when_its_entry_is_above_4_gib_is_refused() -> None:
    code = Seg(1 << 32, b"\xf4" * 64)
    with pytest.raises(
        ImageError, match="32-bit entry point 0x100000000 is not in the low 4 GiB of memory"
    ):
        load_image(elf64([code, pvh_note(1 << 32, 8)]), PlanOptions(memory=4 << 30))


def test_notes_when_outside_the_file_are_refused() -> None:
    note = Seg(0, b"", filesz=20, type=PT_NOTE, align=4)
    assert "a segment of notes needs 0x14 bytes, the image ends at" in refusal(note)


def test_notes_when_the_same_from_many_headers_are_refused_soon() -> None:
    """A million zero bytes are 87381 empty notes, which 1000 headers would have read."""
    code = Seg(0x100000, b"\xf4" * 64)
    zeros = Seg(0, bytes(1 << 20), type=PT_NOTE, align=4)
    again = [
        Seg(0, b"", offset=data_offset(1002) + 64, filesz=1 << 20, type=PT_NOTE, align=4)
        for _ in range(1000)
    ]
    with pytest.raises(ImageError, match="more than 1 MiB of notes"):
        load_image(elf64([code, zeros, *again]))


# The start state


def test_registers_when_32_bit_are_those_of_pvh() -> None:
    vmsa = plan(vcpus=2, sev_features=0x21).vcpus[1]
    # PE and ET; no paging, no PAE, no long mode. MCE and SVME are KVM's.
    assert (vmsa.cr0, vmsa.cr3, vmsa.cr4, vmsa.efer) == (0x11, 0, 0x40, 0x1000)
    assert (vmsa.rip, vmsa.rbx, vmsa.rdx, vmsa.rsp) == (ENTRY, 0x1000, 0, 0)
    assert (vmsa.rflags, vmsa.sev_features) == (2, 0x21)


def test_segments_when_32_bit_are_flat() -> None:
    vmsa = plan().vcpus[0]
    # Attributes as in the VMCB: G, D/B, P, S, type.
    assert (vmsa.cs.attrib, vmsa.cs.limit, vmsa.cs.base) == (0xC9B, 0xFFFFFFFF, 0)
    for seg in (vmsa.ds, vmsa.es, vmsa.ss):
        assert (seg.attrib, seg.limit, seg.base) == (0xC93, 0xFFFFFFFF, 0)
    assert (vmsa.tr.attrib, vmsa.tr.limit, vmsa.tr.base) == (0x8B, 0x67, 0)


def test_state_when_32_bit_is_what_kvm_measures() -> None:
    assert not_carried(plan().vcpus[0], sev_features=1) == []


def test_digest_when_32_bit_does_not_depend_on_the_c_bit() -> None:
    digests = {measure(plan(cbitpos=bit)).digest for bit in (None, 39, 47, 51)}
    assert len(digests) == 1


def test_c_bit_when_32_bit_is_nowhere_in_the_plan() -> None:
    assert plan(cbitpos=47).cbitpos is None


@pytest.mark.parametrize("given", [None, 39, 51])
def test_c_bit_when_64_bit_is_in_the_plan(given: int | None) -> None:
    planned = load_image(elf64([CODE]), PlanOptions(cbitpos=given))
    assert planned.cbitpos == (given or 51)


def test_c_bit_when_plain_is_not_in_the_plan() -> None:
    assert load_image(elf64([CODE]), PlanOptions(confidential=False)).cbitpos is None


# The start info (Xen's start_info.h: magic, version 1, memory map at 40, its length at 48)


def info(planned: LaunchPlan) -> bytes:
    step = planned.steps[0]
    assert (step.npages, step.type) == (1, PageType.NORMAL)
    return bytes(step.page(0))


def test_start_info_when_planned_is_first_and_named() -> None:
    step = plan().steps[0]
    assert (step.gpa, step.label, step.origin_of(0)) == (
        0x1000,
        "start-info",
        "kvmlaunch:start-info",
    )


def test_start_info_when_read_has_magic_version_and_no_modules() -> None:
    page = info(plan())
    assert struct.unpack_from("<IIIIQQQ", page) == (0x336EC578, 1, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("memory", "regions"),
    [
        (2 << 20, [(0, 2 << 20)]),
        (4 << 30, [(0, 3 << 30), (4 << 30, 1 << 30)]),
    ],
)
def test_start_info_when_read_has_the_memory_map(
    memory: int, regions: list[tuple[int, int]]
) -> None:
    page = info(plan(memory=memory))
    at, count, reserved = struct.unpack_from("<QII", page, 40)
    entries = [struct.unpack_from("<QQII", page, at - 0x1000 + 24 * n) for n in range(count)]
    assert entries == [(gpa, size, 1, 0) for gpa, size in regions]
    assert reserved == 0
    assert page[at - 0x1000 + 24 * count :] == bytes(4096 - (at - 0x1000) - 24 * count)


def test_start_info_when_0x1000_is_taken_moves_behind_and_ebx_follows() -> None:
    planned = plan(pvh_note(0x1000), code=Seg(0x1000, b"\xf4" * 0x1800))
    assert (planned.steps[0].gpa, planned.vcpus[0].rbx) == (0x3000, 0x3000)
    at, _ = struct.unpack_from("<QI", info(planned), 40)
    assert at == 0x3000 + 56


def test_start_info_when_memory_is_full_is_refused() -> None:
    code = Seg(0x1000, b"x", memsz=0xF000)
    with pytest.raises(ImageError, match="no page of memory is left for the PVH start info"):
        load_image(elf64([code, pvh_note(0x1000)]), PlanOptions(memory=0x10000))
