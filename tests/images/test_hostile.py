"""Hostile images: whatever the bytes are, a loader plans or raises KvmLaunchError."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.images import PlanOptions, load_image
from tests.images.builders import (
    METADATA_FROM_END,
    PT_NOTE,
    Seg,
    elf64,
    note_bytes,
    ovmf,
    pvh_note,
)

FIXED = settings(max_examples=300, deadline=None)
TYPES = st.sampled_from(["auto", "flat", "elf", "ovmf"])
MEMORY = 16 << 20

ELF = elf64([Seg(0x100010, b"a" * 300, memsz=0x3000), Seg(0x200000, b"b" * 20), Seg(0, type=4)])
PVH = elf64([Seg(0x100000, b"a" * 300), pvh_note(0x100010, 8), pvh_note(0x100010)])
SECRETS_NOTE = note_bytes(1, struct.pack("<QI", 0x102000, 5), owner=b"kvmlaunch\0")
NOTED = elf64(
    [
        Seg(0x100000, b"a" * 300, memsz=0x4000),
        pvh_note(0x100010),
        Seg(0, SECRETS_NOTE, type=PT_NOTE, align=4),
    ]
)
OVMF = ovmf(size=0x1000)
INTERESTING = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 31, 0xFFFFFFFF, (1 << 64) - 1])


def plan(data: bytes, kind: str, vcpus: int = 2) -> None:
    """Load and touch every page, as measure would."""
    try:
        loaded = load_image(data, PlanOptions(image_type=kind, memory=MEMORY, vcpus=vcpus))
    except KvmLaunchError:
        return
    for step, index in loaded.pages():
        assert len(step.page(index)) == 4096
        assert step.origin_of(index)


@FIXED
@given(st.binary(max_size=6000), TYPES)
def test_load_when_bytes_are_arbitrary_plans_or_refuses(data: bytes, kind: str) -> None:
    plan(data, kind)


@FIXED
@given(st.binary(max_size=400))
def test_load_when_arbitrary_behind_an_elf_magic_plans_or_refuses(data: bytes) -> None:
    plan(b"\x7fELF\x02\x01\x01" + data, "elf")


@FIXED
@given(st.binary(max_size=200), st.sampled_from([0, 1, 4, 8, 1 << 63]))
def test_load_when_notes_are_arbitrary_plans_or_refuses(notes: bytes, align: int) -> None:
    segments = [Seg(0x100000, b"a" * 300), Seg(0, notes, type=PT_NOTE, align=align)]
    plan(elf64(segments), "elf")


@FIXED
@given(st.binary(max_size=1000))
def test_load_when_arbitrary_before_an_ovmf_footer_plans_or_refuses(data: bytes) -> None:
    tail = OVMF[-48:]
    plan(bytes(4096 - len(data) - len(tail)) + data + tail, "ovmf")


@pytest.mark.parametrize(
    ("valid", "kind", "places"),
    [
        (ELF, "elf", range(232)),
        (PVH, "elf", [*range(64, 232), *range(len(PVH) - 44, len(PVH))]),
        (NOTED, "elf", [*range(64, 288), *range(len(NOTED) - 40, len(NOTED))]),
        (OVMF, "ovmf", range(len(OVMF) - 200, len(OVMF))),
        (OVMF, "ovmf", range(len(OVMF) - METADATA_FROM_END, len(OVMF) - METADATA_FROM_END + 100)),
    ],
    ids=["elf-headers", "elf-notes", "elf-kvmlaunch-notes", "ovmf-table", "ovmf-metadata"],
)
def test_load_when_valid_image_is_mutated_plans_or_refuses(
    valid: bytes, kind: str, places: Sequence[int]
) -> None:
    @FIXED
    @given(
        st.lists(
            st.tuples(st.sampled_from(places), st.sampled_from([1, 2, 4, 8]), INTERESTING),
            min_size=1,
            max_size=4,
        )
    )
    def mutate(changes: list[tuple[int, int, int]]) -> None:
        image = bytearray(valid)
        for at, width, value in changes:
            raw = (value % (1 << 8 * width)).to_bytes(width, "little")
            image[at : at + width] = raw[: len(image) - at]
        plan(bytes(image), kind)

    mutate()


@pytest.mark.parametrize(
    ("valid", "kind"), [(ELF, "elf"), (PVH, "elf"), (NOTED, "elf"), (OVMF, "ovmf")]
)
def test_load_when_valid_image_is_cut_anywhere_plans_or_refuses(valid: bytes, kind: str) -> None:
    for end in range(0, len(valid), 13):
        plan(valid[:end], kind)
        plan(valid[end:], kind)
