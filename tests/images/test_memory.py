"""A plan holds views of the mapped file and costs no memory of the image's size."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import ImageError
from kvmlaunch.hashing import backends
from kvmlaunch.images import ImageSource, PageRange, Piece, PlanOptions, load_image, open_image
from kvmlaunch.images.source import forget
from kvmlaunch.launch.measure import measure
from tests.images.builders import Seg, elf64, ovmf

GIB = 1 << 30
MEASURE = """
import resource, sys
import kvmlaunch
from kvmlaunch.launch.measure import record_batches
from kvmlaunch.launch.pagelog import PageLog
plan = kvmlaunch.load_image(sys.argv[1], kvmlaunch.PlanOptions(memory=1 << 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
digest, pages = kvmlaunch.measure(plan), 0
if sys.argv[2:]:
    with PageLog(sys.argv[2]) as log:
        log.header(plan, platform="prediction", profile="", vmsa_mode="sync")
        for batch in record_batches(plan):
            log.records(batch)
            pages += len(batch)
print(digest, pages, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


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


@pytest.mark.parametrize("backend", backends())
def test_measure_when_the_image_is_large_keeps_little_of_it(tmp_path: Path, backend: str) -> None:
    """256 MiB (a hole, so that the disk keeps nothing of it); also with a page log."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(256 << 20)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, "/dev/null"],
        env={**os.environ, "KVMLAUNCH_HASH": backend},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    _, records, kib = done.stdout.split()
    assert int(records) == 65536 + 1
    assert int(kib) < 20 << 10


def test_measure_when_a_large_image_comes_from_a_pipe_keeps_little_of_it() -> None:
    """64 MiB by standard input."""
    measured = subprocess.Popen(
        [sys.executable, "-c", MEASURE, "/dev/stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert measured.stdin is not None
    for page in range(16384):
        measured.stdin.write(page.to_bytes(4, "little") * 1024)
    out, _ = measured.communicate(timeout=50)
    assert int(out.split()[2]) < 20 << 10


@st.composite
def pages_of_steps(draw: st.DrawFn) -> tuple[PageRange, int, int]:
    """A range whose pieces lie anywhere, and (first page, count) of some of its pages."""
    gaps, sizes = st.sampled_from([0, 1, 4095, 4096, 9000]), st.integers(1, 3 * 4096)
    origins = st.sampled_from(["file", "other", "kvmlaunch:made"])
    at, pieces = 0, []
    for gap, size, origin in draw(st.lists(st.tuples(gaps, sizes, origins), max_size=8)):
        data = bytes([len(pieces) + 1]) * size
        pieces.append(Piece(at + gap, memoryview(data), origin, 7 * at))
        at += gap + size
    npages = at // 4096 + draw(st.integers(1, 3))
    first = draw(st.integers(0, npages))
    step = PageRange(0, npages * 4096, PageType.NORMAL, "image", "", tuple(pieces))
    return step, first, draw(st.integers(0, npages - first))


class TestRuns:
    """PageRange.runs and origin_runs: the same as page by page, in few buffers."""

    @given(pages_of_steps())
    def test_runs_when_pieces_lie_anywhere_are_the_pages(
        self, pages: tuple[PageRange, int, int]
    ) -> None:
        step, first, count = pages
        runs = list(step.runs(first, count))
        assert all(len(run) and not len(run) % 4096 for run in runs)
        expected = b"".join(bytes(step.page(first + n)) for n in range(count))
        assert b"".join(bytes(run) for run in runs) == expected

    @given(pages_of_steps())
    def test_origins_when_pieces_lie_anywhere_are_those_of_the_pages(
        self, pages: tuple[PageRange, int, int]
    ) -> None:
        step, first, count = pages
        found = [
            origin if offset is None else f"{origin}+{offset + 4096 * n:#x}"
            for origin, offset, together in step.origin_runs(first, count)
            for n in range(together)
        ]
        assert found == [step.origin_of(first + n) for n in range(count)]

    def test_runs_when_one_piece_has_all_are_one_view(self) -> None:
        image = bytes(range(256)) * 16 * 300
        step = load_image(image, PlanOptions(image_type="flat")).steps[0]
        (run,) = step.runs(0, 300)
        assert run.obj is image

    def test_runs_when_nothing_covers_them_are_few(self) -> None:
        step = PageRange(0, 1000 * 4096, PageType.NORMAL, "zeros", "")
        assert len(list(step.runs(0, 1000))) == 4


def test_forget_when_the_file_is_mapped_keeps_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 0x3000)
    data = open_image(path).data
    assert bytes(data[:4]) == b"xxxx"
    forget(data[0x1000:])
    assert bytes(data) == b"x" * 0x3000


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_forget_when_memory_has_no_file_keeps_its_bytes(flags: int) -> None:
    """MADV_DONTNEED would make private anonymous memory zeros."""
    memory = mmap.mmap(-1, 0x2000, flags=flags)
    memory[:4] = b"kept"
    source = ImageSource.of(memoryview(memory))
    forget(source.data)
    assert memory[:4] == b"kept"
    private = bytearray(b"kept")
    forget(memoryview(private))
    assert private == b"kept"


# What can't be mapped


def piped(data: bytes) -> int:
    """A pipe that will have given ``data``."""
    reader, writer = os.pipe()

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as file:
            file.write(data)

    threading.Thread(target=write, daemon=True).start()
    return reader


def test_image_when_it_comes_from_a_pipe_is_that_of_the_file(tmp_path: Path) -> None:
    image = bytes(range(256)) * 0x2000
    path = tmp_path / "image"
    path.write_bytes(image)
    reader = piped(image)
    plan = load_image(f"/dev/fd/{reader}")
    os.close(reader)
    assert measure(plan) == measure(load_image(path))
    assert isinstance(plan.data.obj, mmap.mmap)


def test_image_when_a_pipe_ends_at_once_is_empty() -> None:
    reader = piped(b"")
    with pytest.raises(ImageError, match=rf"^/dev/fd/{reader}: the image is empty$"):
        load_image(f"/dev/fd/{reader}")
    os.close(reader)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (elf64([Seg(0x100000, b"x" * 0x9000)]), "ends at file offset 0x9078, the file at 0x5000"),
        (ovmf(size=0x8000), r"ovmf|table|metadata"),
    ],
    ids=["elf", "ovmf"],
)
def test_image_when_a_pipe_is_cut_off_is_one_sentence(image: bytes, sentence: str) -> None:
    reader = piped(image[:0x5000])
    kind = "ovmf" if image[:4] != b"\x7fELF" else "elf"
    with pytest.raises(ImageError, match=sentence) as caught:
        load_image(f"/dev/fd/{reader}", PlanOptions(image_type=kind))
    os.close(reader)
    assert "\n" not in str(caught.value)


def test_image_when_there_is_no_room_for_a_pipe_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    reader = piped(b"x")
    with pytest.raises(ImageError, match="can't be copied to the folder for temporary files: No"):
        load_image(f"/dev/fd/{reader}")
    os.close(reader)


def test_image_when_it_is_a_block_device_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 64)
    made = (
        subprocess.run(
            ["losetup", "--find", "--show", "--read-only", path],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        if shutil.which("losetup")
        else None
    )
    if made is None or made.returncode:
        pytest.skip("there is no losetup, or it may not make a loop device")
    device = made.stdout.strip()
    try:
        plan = load_image(device)
        assert (bytes(plan.data), measure(plan)) == (
            path.read_bytes(),
            measure(load_image(path)),
        )
        del plan
    finally:
        subprocess.run(["losetup", "--detach", device], timeout=20, check=True)
