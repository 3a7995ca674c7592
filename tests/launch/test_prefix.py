"""A prefix, or a section, of a plan is part of it."""

from __future__ import annotations

import pytest

from kvmlaunch.abi.page import PageType
from kvmlaunch.images.plan import PageRange, Piece
from kvmlaunch.launch.measure import page_records
from kvmlaunch.launch.prefix import prefix, section
from tests.launch.rig import PAGE, plan, small_plan


@pytest.mark.parametrize("pages", range(7))
@pytest.mark.parametrize("vcpus", [0, 1, 2])
def test_prefix_when_cut_has_the_first_records_of_the_plan(pages: int, vcpus: int) -> None:
    whole = small_plan(vcpus=2)
    part = prefix(whole, pages, vcpus)
    assert (part.npages, len(part.vcpus)) == (pages, vcpus)
    assert [r.digest for r in page_records(part)][:pages] == [
        r.digest for r in page_records(whole)
    ][:pages]


@pytest.mark.parametrize(("first", "end"), [(0, 0), (0, 6), (1, 2), (1, 6), (2, 4), (5, 6)])
def test_section_when_cut_has_these_pages_of_the_plan(first: int, end: int) -> None:
    whole = small_plan(vcpus=2)
    expected = [(r.gpa, r.type, r.contents, r.origin) for r in page_records(whole)][first:end]
    part = section(whole, first, end)
    assert [(r.gpa, r.type, r.contents, r.origin) for r in page_records(part)] == expected


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_prefix_when_a_step_is_cut_inside_a_piece_keeps_contents_and_origins(pages: int) -> None:
    data = bytes(range(256)) * 48  # three pages, less 256 bytes that are zero
    piece = Piece(0x100, memoryview(data)[:-0x100], "image.bin", 0x40)
    whole = plan([PageRange(0x1000, 3 * PAGE, PageType.NORMAL, "image", "image.bin", (piece,))])
    for first in range(pages):
        part = section(whole, first, pages).steps[0]
        assert [bytes(part.page(n)) for n in range(part.npages)] == [
            bytes(whole.steps[0].page(n)) for n in range(first, pages)
        ]
        assert [part.origin_of(n) for n in range(part.npages)] == [
            whole.steps[0].origin_of(n) for n in range(first, pages)
        ]
    cut = prefix(whole, pages).steps[0]
    assert cut.npages == pages
    assert [bytes(cut.page(n)) for n in range(pages)] == [
        bytes(whole.steps[0].page(n)) for n in range(pages)
    ]
    assert [cut.origin_of(n) for n in range(pages)] == [
        whole.steps[0].origin_of(n) for n in range(pages)
    ]


def test_prefix_when_cut_copies_no_contents() -> None:
    data = bytes(4 * PAGE)
    piece = Piece(0, memoryview(data), "image.bin")
    whole = plan([PageRange(0x1000, 4 * PAGE, PageType.NORMAL, "image", "image.bin", (piece,))])
    assert prefix(whole, 2).steps[0].pieces[0].data.obj is data
