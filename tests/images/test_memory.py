"""A plan holds views of the mapped file and costs no memory of the image's size."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from kvmlaunch.images import PlanOptions, load_image
from tests.images.builders import Seg, elf64, ovmf

GIB = 1 << 30


def resident() -> int:
    """Resident set of this process in bytes."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["flat", "elf", "ovmf"])
def test_page_when_one_piece_covers_it_is_a_view_of_the_file(tmp_path: Path, kind: str) -> None:
    images = {
        "flat": bytes(0x3000),
        "elf": elf64([Seg(0x100000, b"x" * 0x2000)]),
        "ovmf": ovmf(),
    }
    path = tmp_path / "image"
    path.write_bytes(images[kind])
    plan = load_image(path)
    step = next(step for step in plan.steps if step.label in ("image", "segment", "firmware"))
    assert isinstance(plan.data.obj, mmap.mmap)
    assert step.page(1).obj is plan.data.obj
    assert step.pieces[0].data.obj is plan.data.obj
    assert step.page(1).readonly


def test_plan_when_image_is_bytes_does_not_copy_them() -> None:
    image = bytes(0x2000)
    assert load_image(image).steps[0].page(1).obj is image


def test_plan_when_flat_image_is_1_gib_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "huge.bin"
    with path.open("wb") as file:
        file.truncate(GIB)
    before = resident()
    plan = load_image(path, PlanOptions(memory=2 * GIB))
    assert bytes(plan.steps[0].page(plan.npages - 1)) == bytes(4096)
    assert plan.npages == GIB // 4096
    assert resident() - before < 20 << 20


def test_plan_when_elf_segment_is_1_gib_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "huge.elf"
    with path.open("wb") as file:
        file.write(elf64([Seg(0x100000, filesz=GIB, memsz=GIB, offset=0x1000)]))
        file.truncate(GIB + 0x1000)
    before = resident()
    plan = load_image(path, PlanOptions(memory=2 * GIB))
    assert plan.steps[1].npages == GIB // 4096
    assert resident() - before < 20 << 20


def test_plan_when_bss_is_1_gib_stays_small() -> None:
    before = resident()
    image = elf64([Seg(0x100000, b"x", memsz=GIB)])
    plan = load_image(image, PlanOptions(memory=2 * GIB))
    assert plan.steps[2].npages == GIB // 4096 - 1
    assert resident() - before < 20 << 20
