"""Kernel hashes in OVMF's launch: their page, files that are read, and each refusal."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch.abi.kernel_hashes import KernelHashes
from kvmlaunch.errors import ImageError
from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.images.plan import PageRange
from tests.images.builders import Seg as Segment
from tests.images.builders import elf64, metadata_bytes, ovmf, standard_entries

OTHERS = [(0x80D000, 0x1000, 2), (0x80E000, 0x1000, 3)]
NUL = hashlib.sha256(b"\0").digest()


def image(
    *sections: tuple[int, int, int], hashes: tuple[int, int] | None = (0x810C00, 0x400)
) -> bytes:
    return ovmf(
        metadata=metadata_bytes([*OTHERS, *sections]), entries=standard_entries(hashes=hashes)
    )


def hash_steps(data: bytes, **options: Any) -> list[PageRange]:
    plan = load_image(data, PlanOptions(**options))
    return [step for step in plan.steps if step.label == "kernel-hashes"]


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(data, PlanOptions(**{"kernel": b"", **options}))
    text = str(caught.value)
    assert "\n" not in text
    return text


# The page


def test_page_when_there_is_a_kernel_is_normal_with_the_table_at_its_place() -> None:
    (step,) = hash_steps(ovmf(), kernel=b"kernel", initrd=b"initrd", append="quiet")
    page = bytes(step.page(0))
    assert (step.gpa, step.size, step.type.name) == (0x810000, 0x1000, "NORMAL")
    assert KernelHashes.decode(page[0xC00 : 0xC00 + 176]) == KernelHashes(
        hashlib.sha256(b"kernel").digest(),
        hashlib.sha256(b"initrd").digest(),
        hashlib.sha256(b"quiet\0").digest(),
    )
    assert not any(page[:0xC00])
    assert not any(page[0xC00 + 176 :])
    assert step.origin_of(0) == "kvmlaunch:kernel-hashes"


def test_page_when_there_is_no_kernel_is_zero() -> None:
    (step,) = hash_steps(ovmf())
    assert (step.type.name, step.pieces) == ("ZERO", ())


def test_section_when_it_has_more_pages_is_normal_as_a_whole() -> None:
    (step,) = hash_steps(image((0x810000, 0x2000, 0x10)), kernel=b"")
    assert (step.npages, step.type.name) == (2, "NORMAL")
    assert not any(step.page(1))


@pytest.mark.parametrize("offset", [0, 0x10, 0xF50])
def test_table_when_elsewhere_in_its_page_is_there(offset: int) -> None:
    data = image((0x7000, 0x1000, 0x10), hashes=(0x7000 + offset, 0x400))
    (step,) = hash_steps(data, kernel=b"")
    table = bytes(step.page(0))[offset : offset + 176]
    assert KernelHashes.decode(table).cmdline == NUL


# No place


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            image((0x810000, 0x1000, 0x10), hashes=None),
            "a kernel was given, but this firmware has no place for its hashes: the GUIDed table's "
            "SEV hash table entry is missing; use edk2's AmdSevX64 build",
        ),
        (
            image((0x810000, 0x1000, 0x10), hashes=(0, 0)),
            "this firmware has no place for its hashes: the GUIDed table's SEV hash table entry is "
            "empty; use edk2's AmdSevX64 build",
        ),
        (
            image((0x810000, 0x1000, 0x10), hashes=(0x810C00, 175)),
            "the place for kernel hashes has 175 bytes, they need 176",
        ),
        (
            image((0x810000, 0x2000, 0x10), hashes=(0x810F51, 0x400)),
            "the kernel hashes table at 0x810f51 leaves its page",
        ),
        (
            image((0x810000, 0x1000, 1)),
            "a kernel was given, but the SEV metadata has no section of type 0x10",
        ),
        (
            image((0x811000, 0x1000, 0x10)),
            "the kernel hashes table at 0x810c00 is not in the first page of metadata section 2 "
            "(kernel-hashes, 0x811000..0x812000)",
        ),
        (
            image((0x80F000, 0x2000, 0x10)),
            "the kernel hashes table at 0x810c00 is not in the first page of metadata section 2 "
            "(kernel-hashes, 0x80f000..0x811000)",
        ),
    ],
    ids=["no-entry", "empty", "small", "crossing", "no-section", "outside", "second-page"],
)
def test_kernel_when_the_firmware_has_no_place_for_it_is_refused_with_the_reason(
    data: bytes, sentence: str
) -> None:
    assert sentence in refusal(data)
    assert load_image(data).steps  # without a kernel it's launched


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"\xf4", "flat"), (elf64([Segment(0x100000, b"\xf4" * 16)]), "elf")],
    ids=["flat", "elf"],
)
def test_kernel_when_the_image_is_no_firmware_is_refused(data: bytes, kind: str) -> None:
    assert refusal(data) == f"<bytes>: kernel hashes are for OVMF firmware, this image is {kind}"


# Files


def test_files_when_they_are_named_are_hashed(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(b"k" * 3_000_001)
    initrd.write_bytes(b"i" * 5)
    (named,) = hash_steps(ovmf(), kernel=kernel, initrd=str(initrd))
    (given_bytes,) = hash_steps(ovmf(), kernel=b"k" * 3_000_001, initrd=b"i" * 5)
    assert bytes(named.page(0)) == bytes(given_bytes.page(0))


def piped(path: Path, parts: Sequence[bytes]) -> threading.Thread:
    """A named pipe that somebody writes ``parts`` into, then closes."""
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            for part in parts:
                pipe.write(part)

    writer = threading.Thread(target=write)
    writer.start()
    return writer


def test_file_when_it_is_a_pipe_is_hashed_to_its_end(tmp_path: Path) -> None:
    parts = [b"a" * 100_000, b"b", b"c" * 70_000]
    writer = piped(tmp_path / "pipe", parts)
    (step,) = hash_steps(ovmf(), kernel=tmp_path / "pipe")
    writer.join()
    found = KernelHashes.decode(bytes(step.page(0))[0xC00 : 0xC00 + 176])
    assert found.kernel == hashlib.sha256(b"".join(parts)).digest()


def test_file_when_it_is_large_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        hash_steps(ovmf(), kernel=b"", initrd=path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def bzimage(size: int, *, sectors: int = 3, paragraphs: int = 0x20, version: int = 0x20F) -> bytes:
    """Bytes with a setup header that says how many follow it."""
    head = bytearray(0x264)
    head[0x1F1] = sectors
    struct.pack_into("<I", head, 0x1F4, paragraphs)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    return bytes(head).ljust(size, b"\x90")[:size]


WHOLE = 4 * 512 + 16 * 0x20


@pytest.mark.parametrize("size", [WHOLE, WHOLE - 15, WHOLE + 1000])
def test_kernel_when_it_has_all_that_its_header_says_is_taken(size: int) -> None:
    assert hash_steps(ovmf(), kernel=bzimage(size))


def test_kernel_when_its_header_counts_no_sectors_has_four() -> None:
    assert hash_steps(ovmf(), kernel=bzimage(5 * 512 + 512, sectors=0))
    assert "it has 0xbf0" in refusal(ovmf(), kernel=bzimage(0xBF0, sectors=0))


def test_kernel_when_its_header_is_old_has_a_short_size() -> None:
    """Before protocol 2.04 syssize had 16 bits."""
    kernel = bzimage(WHOLE, paragraphs=0xFFFF0020, version=0x203)
    assert hash_steps(ovmf(), kernel=kernel)


@pytest.mark.parametrize("size", [0x264, 2048, WHOLE - 16])
def test_kernel_when_a_pipe_broke_off_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "pipe"
    writer = piped(path, [bzimage(size)])
    sentence = refusal(ovmf(), kernel=path)
    writer.join()
    assert sentence == (
        f"{path}: the kernel is cut off: its header says {WHOLE - 15:#x} bytes, it has {size:#x}"
    )


@pytest.mark.parametrize("role", ["kernel", "initrd"])
def test_file_when_it_cannot_be_read_is_refused_by_name(tmp_path: Path, role: str) -> None:
    missing = tmp_path / "nosuch"
    assert refusal(ovmf(), **{role: missing}) == (
        f"{missing}: can't be read: No such file or directory"
    )
    assert refusal(ovmf(), **{role: tmp_path}) == f"{tmp_path}: can't be read: Is a directory"
    assert "can't be read: embedded null byte" in refusal(ovmf(), **{role: "a\0b"})


def test_file_when_reading_breaks_off_is_refused() -> None:
    """/proc/self/mem fails at its first byte, as a broken disk would."""
    sentence = refusal(ovmf(), kernel="/proc/self/mem")
    assert sentence == "/proc/self/mem: can't be read: Input/output error"


# Hostile places

U32 = st.integers(0, 0xFFFFFFFF) | st.sampled_from([0x810C00, 0x810000, 0x810F50, 0x811000])


@settings(max_examples=300, deadline=None)
@given(U32, U32, st.lists(st.tuples(U32, U32, st.sampled_from([1, 0x10, 0x11])), max_size=4))
def test_place_when_arbitrary_is_used_wholly_or_refused(
    base: int, size: int, sections: list[tuple[int, int, int]]
) -> None:
    data = image(*sections, (0x810000, 0x1000, 0x10), hashes=(base, size))
    try:
        steps = hash_steps(data, kernel=b"k", memory=1 << 32)
    except ImageError:
        return
    holder = next(step for step in steps if step.gpa == base & -0x1000)
    table = bytes(holder.page(0))[base % 4096 :][:176]
    assert KernelHashes.decode(table).kernel == hashlib.sha256(b"k").digest()
