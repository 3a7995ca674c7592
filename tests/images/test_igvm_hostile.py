"""Hostile IGVM files: a plan or one clear error, in bounded memory."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch.errors import FormatError
from kvmlaunch.images import PlanOptions, load_image
from tests.images import igvm_files as f

FIXED = settings(max_examples=300, deadline=None)
DATA = f.pattern(1) + f.vmsa()
VALID = [
    *(f.platform(), f.platform(2, f.TDX), f.policy(), f.area(0, 0x1000, 0)),
    *(f.parameter(0x307, 0), f.parameter(0x30C, 0, 24), f.parameter(0x309, 0, 0x200)),
    *(f.insert(0x10000, 0), f.page(0x1000, 0), f.page(0x2000), f.page(0x3000, 0, mask=3)),
    *(f.page(0x4000, kind=1), f.page(0x5000, kind=2), f.page(0x200000, flags=1)),
    *(f.page(0x6000, 0, flags=4), f.required(0, 0x100000), f.error_range(0x20000, 0x1000)),
    *(f.context(0x9000, 0x1000), f.page(0x7000, flags=2), (0x30B, b"\1" + bytes(695))),
    (1 << 31 | 0x3FF, b"abc"),
]
WHOLE = f.igvm(VALID, DATA)
VARIABLE_END = sum(struct.unpack_from("<II", WHOLE, 8))
MEMORY = 16 << 20


def outcome(data: bytes) -> str:
    """ "" for a plan whose pages can all be had, else the one sentence."""
    try:
        plan = load_image(data, PlanOptions(image_type="igvm", memory=MEMORY, vcpus=2))
    except FormatError as error:
        sentence = str(error)
        assert sentence
        assert "\n" not in sentence
        return sentence
    for step in plan.steps:
        assert sum(len(run) for run in step.runs(0, min(step.npages, 2))) % 4096 == 0
        assert step.origin_of(0)
    return ""


def with_checksum(image: bytes) -> bytes:
    """The file with the checksum of what it says its headers are."""
    fixed = 32 if image[4:5] == b"\2" else 24
    offset, size = struct.unpack_from("<II", image, 8)
    covered = image[:20] + bytes(4) + image[24:fixed] + image[offset : offset + size]
    return image[:20] + struct.pack("<I", zlib.crc32(covered)) + image[24:]


def test_the_valid_file_is_valid() -> None:
    assert outcome(WHOLE) == ""


@FIXED
@given(st.binary(max_size=2000))
def test_load_when_bytes_are_arbitrary_plans_or_refuses(data: bytes) -> None:
    assert outcome(data) != ""


@FIXED
@given(st.binary(max_size=1000).map(lambda raw: raw + bytes(-len(raw) % 8)), st.booleans())
def test_load_when_headers_are_arbitrary_plans_or_refuses(body: bytes, platform: bool) -> None:
    head = struct.pack("<IIIIII", 0x4D564749, 1, 24, 0, 0, 0)
    if platform:
        body = struct.pack("<II", *(1, 16)) + struct.pack("<IBBHQ", 1, 0, 2, 1, 0) + body
    image = head[:12] + struct.pack("<II", len(body), 24 + len(body) + 4096) + head[20:]
    outcome(with_checksum(image + body + bytes(4096)))


HEADERS = st.one_of(
    st.tuples(
        st.sampled_from([0x101, 0x301, 0x302, 0x303, 0x304, 0x305, 0x30D, *range(0x307, 0x314)]),
        st.lists(
            st.sampled_from([0, 1, 2, 3, 4, 0x1000, 0x2000, 1 << 20, 1 << 31, (1 << 32) - 1]),
            min_size=10,
            max_size=10,
        ),
    )
)
SIZES = {
    **{0x101: 16, 0x301: 16, 0x302: 24, 0x303: 16, 0x304: 20, 0x305: 24, 0x30D: 16},
    **{0x30B: 696, 0x311: 864},
}


@FIXED
@given(st.lists(HEADERS, max_size=8))
def test_load_when_header_values_are_arbitrary_plans_or_refuses(
    drawn: list[tuple[int, list[int]]],
) -> None:
    headers: list[f.Header] = [f.platform()]
    for kind, words in sorted(drawn, key=lambda header: header[0] >= 0x301):
        raw = struct.pack("<10I", *words).ljust(900, b"\0")[: SIZES.get(kind, 8)]
        headers.append((kind, raw))
    outcome(f.igvm(headers, DATA))


def test_load_when_any_byte_of_the_headers_is_changed_is_refused_by_the_checksum() -> None:
    for at in range(VARIABLE_END):
        for bit in (0, 7):
            image = bytearray(WHOLE)
            image[at] ^= 1 << bit
            assert outcome(bytes(image)) != "", at


@pytest.mark.parametrize("change", [1, 0x80, 0xFF])
def test_load_when_any_byte_is_changed_and_the_checksum_right_plans_or_refuses(change: int) -> None:
    ends = set()
    for at in range(VARIABLE_END):
        image = bytearray(WHOLE)
        image[at] ^= change
        ends.add(outcome(with_checksum(bytes(image))) == "")
    assert ends == {True, False}


def test_load_when_cut_anywhere_is_refused() -> None:
    for end in range(0, len(WHOLE), 13):
        assert outcome(WHOLE[:end]) != ""


LOAD = """
import re, sys
from kvmlaunch.errors import FormatError
from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.measure import measure
try:
    plan = load_image(sys.argv[1], PlanOptions(memory=1 << 30))
    print(len(plan.steps), measure(plan).pages)
except FormatError as error:
    print(str(error)[:300])
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
LIMIT = 64 << 20


def peak(tmp_path: Path, image: bytes) -> tuple[str, int]:
    """What loading and measuring says, and the peak of the process beyond the file."""
    path = tmp_path / "hostile.igvm"
    path.write_bytes(image)
    command = [sys.executable, "-c", LOAD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    said, kib = done.stdout.splitlines()
    return said, int(kib) * 1024 - len(image)


def many(count: int, make: bytes) -> bytes:
    """``count`` equal headers of type and value ``make`` behind a platform."""
    start = f.igvm([f.platform()], b"")
    body = start[24:] + make * count
    total = 24 + len(body) + 4096
    head = struct.pack("<IIIIII", 0x4D564749, 1, 24, len(body), total, 0)
    return with_checksum(head + body + bytes(4096))


def test_load_when_there_are_many_ranges_takes_little_memory(tmp_path: Path) -> None:
    pages = b"".join(
        f.framed(0x302, struct.pack("<QIIIHH", n * 0x2000, 1, 0, 0, 0, 0)) for n in range(100_000)
    )
    said, size = peak(tmp_path, many(1, pages))
    assert "header 65537 (PAGE_DATA): more than 65536 ranges of successive pages" in said
    assert size < LIMIT


@pytest.mark.parametrize(
    ("kind", "raw", "rule"),
    [
        (0x301, struct.pack("<QII", 0x1000, 0, 0), "parameter area 0 is declared twice"),
        (0x101, struct.pack("<QII", 0x30000, 1, 0), "the platform has one already"),
        (1 << 31 | 0x3FF, b"", "0 0"),
        (0x305, struct.pack("<QIIII", 0, 1, 0x1000, 0, 0), "0 0"),
        (0x30D, struct.pack("<QII", 0, 1, 0x1000), "is taken by header"),
    ],
)
def test_load_when_headers_repeat_takes_little_memory(
    tmp_path: Path, kind: int, raw: bytes, rule: str
) -> None:
    said, size = peak(tmp_path, many(60_000, f.framed(kind, raw)))
    assert rule in said or said == "0 1"  # the VMSA that KVM makes
    assert size < LIMIT


def test_load_when_an_area_is_huge_takes_little_memory(tmp_path: Path) -> None:
    headers = [
        *(f.platform(), f.area(0, 1 << 29), f.parameter(0x307, 0, (1 << 29) - 4)),
        f.insert(0x1000, 0),
    ]
    said, size = peak(tmp_path, f.igvm(headers, bytes(8)))
    assert said == f"1 {(1 << 29) // 4096 + 1}"
    assert size < LIMIT


def test_load_when_parameters_are_many_is_refused_in_little_memory(tmp_path: Path) -> None:
    parameters = b"".join(f.framed(0x312, struct.pack("<II", 0, n * 0x1000)) for n in range(5000))
    area = f.framed(0x301, struct.pack("<QII", 1 << 29, 0, 0))
    said, size = peak(tmp_path, many(1, area + parameters))
    assert "more than 4096 parameters" in said
    assert size < LIMIT


@pytest.mark.parametrize("flags", [0, 1])
def test_load_when_pages_without_data_are_many_takes_little_memory(
    tmp_path: Path, flags: int
) -> None:
    size = [0x1000, 0x200000][flags]
    count = (1 << 30) // size
    pages = b"".join(
        f.framed(0x302, struct.pack("<QIIIHH", n * size, 1, 0, flags, 0, 0)) for n in range(count)
    )
    said, peaked = peak(tmp_path, many(1, pages))
    assert said == f"1 {(1 << 30) // 4096 + 1}"
    assert peaked < LIMIT


SHOW = """
import re, sys
from kvmlaunch.cli import main
code = main(sys.argv[1:])
print(code, re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.parametrize("command", [["measure"], ["igvm", "show"], ["igvm", "show", "--json"]])
def test_command_when_the_file_has_256_mib_stays_below_64_mib(
    tmp_path: Path, command: list[str]
) -> None:
    path = tmp_path / "large.igvm"
    f.write_large(path, 65536)
    words = [sys.executable, "-c", SHOW, *command, "--memory", "512M", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    code, kib = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert int(kib) < LIMIT // 1024
