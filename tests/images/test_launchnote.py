"""ELF files with notes of the owner kvmlaunch: pages of other types, and AP creation."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import ImageError
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image
from kvmlaunch.launch.measure import measure
from tests.images.builders import PT_NOTE, Seg, data_offset, elf64, note_bytes, pvh_note

# 0x100000 with bytes of the file, 0x101000..0x105000 without.
CODE = Seg(0x100000, b"\xf4" * 0x123, memsz=0x5000)
SECRETS, CPUID = 5, 6
OWNER = b"kvmlaunch\0"


def note(kind: int, descriptor: bytes, owner: bytes = OWNER) -> bytes:
    return note_bytes(kind, descriptor, owner=owner)


def page(gpa: int, kind: int) -> bytes:
    return note(1, struct.pack("<QI", gpa, kind))


def plan(*notes: bytes, code: Seg = CODE, **options: Any) -> LaunchPlan:
    segment = Seg(0, b"".join(notes), type=PT_NOTE, align=4)
    return load_image(elf64([code, pvh_note(0x100000), segment]), PlanOptions(**options))


def ranges(planned: LaunchPlan) -> list[tuple[int, int, PageType]]:
    """(GPA, pages, type) of what the file has, without the start info."""
    return [(step.gpa, step.npages, step.type) for step in planned.steps[1:]]


def refusal(*notes: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        plan(*notes, **options)
    return str(caught.value)


def test_page_when_named_is_launched_with_its_type_and_the_rest_as_before() -> None:
    assert ranges(plan()) == [(0x100000, 1, PageType.NORMAL), (0x101000, 4, PageType.ZERO)]
    assert ranges(plan(page(0x102000, SECRETS))) == [
        (0x100000, 1, PageType.NORMAL),
        (0x101000, 1, PageType.ZERO),
        (0x102000, 1, PageType.SECRETS),
        (0x103000, 2, PageType.ZERO),
    ]


def test_pages_when_named_in_any_order_give_one_plan() -> None:
    notes = [page(0x104000, SECRETS), page(0x101000, CPUID)]
    planned = plan(*notes)
    assert ranges(planned) == [
        (0x100000, 1, PageType.NORMAL),
        (0x101000, 1, PageType.CPUID),
        (0x102000, 2, PageType.ZERO),
        (0x104000, 1, PageType.SECRETS),
    ]
    assert measure(planned).digest == measure(plan(*reversed(notes))).digest


def test_pages_when_all_of_the_bss_leave_no_zero_page() -> None:
    planned = plan(*(page(0x101000 + n * 0x1000, SECRETS) for n in range(4)))
    assert [kind for _, _, kind in ranges(planned)] == [PageType.NORMAL] + [PageType.SECRETS] * 4


def test_page_when_named_is_labelled_for_people() -> None:
    step = plan(page(0x102000, SECRETS)).step_at(0x102000)
    assert step is not None
    assert (step.label, step.origin, step.pieces) == ("secrets", "<bytes>", ())


def test_page_when_the_entry_is_chosen_is_there_as_well() -> None:
    planned = plan(page(0x102000, CPUID), entry=0x100000)
    assert planned.steps[0].label == "page-tables"
    assert planned.step_at(0x102000).type is PageType.CPUID


def test_page_when_the_vm_is_plain_is_there_as_well() -> None:
    assert plan(page(0x102000, SECRETS), confidential=False).step_at(0x102000).pieces == ()


@pytest.mark.parametrize("owner", [b"kvmlaunch", b"Kvmlaunch\0", b"GNU\0"])
def test_note_when_of_another_owner_is_ignored(owner: bytes) -> None:
    other = note(1, struct.pack("<QI", 0x102000, SECRETS), owner=owner)
    assert ranges(plan(other)) == ranges(plan())


@pytest.mark.parametrize(
    ("gpa", "reason"),
    [
        (0x102800, "a kvmlaunch note for 0x102800, where no 4 KiB page begins"),
        (0x100000, "the SECRETS page 0x100000 of a kvmlaunch note is not in a segment's memory"),
        (0x105000, "the SECRETS page 0x105000 of a kvmlaunch note is not in a segment's memory"),
        (0x1000, "the SECRETS page 0x1000 of a kvmlaunch note is not in a segment's memory"),
        ((1 << 64) - 0x1000, "the SECRETS page 0xfffffffffffff000 of a kvmlaunch note is not in"),
    ],
)
def test_page_when_not_in_the_bss_is_refused(gpa: int, reason: str) -> None:
    assert reason in refusal(page(gpa, SECRETS))


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 7, 0xFFFFFFFF])
def test_page_when_of_another_type_is_refused(kind: int) -> None:
    assert f"asks for page type {kind}, not SECRETS (5) or CPUID (6)" in refusal(
        page(0x102000, kind)
    )


def test_page_when_named_twice_is_refused() -> None:
    both = page(0x102000, SECRETS), page(0x102000, CPUID)
    where = data_offset(3) + len(CODE.data) + len(pvh_note(0).data) + len(both[0])
    assert refusal(*both) == f"<bytes>: offset {where:#x}: a second note for page 0x102000"


@pytest.mark.parametrize("size", [0, 8, 11, 13, 16])
def test_note_when_its_size_is_wrong_is_refused(size: int) -> None:
    assert f"a kvmlaunch note for a page has {size} bytes, not 12" in refusal(note(1, bytes(size)))


@pytest.mark.parametrize("kind", [0, 4, 0xFFFFFFFF])
def test_note_when_its_type_is_unknown_is_refused(kind: int) -> None:
    assert f"an unknown kvmlaunch note, type {kind}" in refusal(note(kind, b""))


@pytest.mark.parametrize(
    ("notes", "confidential", "apic"),
    [
        ((note(2, b""),), True, True),
        ((note(2, b""), note(2, b"more")), True, True),
        ((note(2, b""),), False, False),
        ((), True, False),
        ((note(2, b"", owner=b"Xen\0"),), True, False),
    ],
)
def test_ap_creation_when_asked_for_brings_apics_to_an_snp_guest(
    notes: tuple[bytes, ...], confidential: bool, apic: bool
) -> None:
    assert plan(*notes, confidential=confidential).apic is apic


@pytest.mark.parametrize(
    ("notes", "confidential", "vmpls"),
    [
        ((note(3, b""),), True, True),
        ((note(3, b""),), False, False),
        ((note(2, b""),), True, False),
    ],
)
def test_vmpls_when_asked_for_are_for_an_snp_guest(
    notes: tuple[bytes, ...], confidential: bool, vmpls: bool
) -> None:
    assert plan(*notes, confidential=confidential).vmpls is vmpls


@pytest.mark.parametrize("kind", [2, 3])
def test_note_when_it_names_no_page_is_nothing_that_is_measured(kind: int) -> None:
    assert measure(plan(note(kind, b""))).digest == measure(plan()).digest
