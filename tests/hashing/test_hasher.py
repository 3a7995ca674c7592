"""Every backend gives the same bytes, which are those of hashlib and the known answers."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch import hashing
from kvmlaunch.abi.digest import LaunchDigest
from kvmlaunch.abi.reset import qemu_reset
from kvmlaunch.errors import FormatError, KvmLaunchError
from kvmlaunch.hashing.plain import PlainHasher
from tests.abi import vectors

PAGE = 4096
ZERO = bytes(48)
BACKENDS = hashing.backends()


@pytest.fixture(params=BACKENDS)
def hasher(request: pytest.FixtureRequest) -> hashing.Hasher:
    return hashing.hasher(request.param)


def noise(npages: int, seed: int = 0) -> bytes:
    """Pages that differ from each other (SHAKE-128 of the seed)."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(npages * PAGE)


def chain(
    pages: list[bytes | None], page_type: int, gpa: int, start: bytes = ZERO
) -> list[tuple[bytes, bytes]]:
    """(CONTENTS, digest) after each page, by hashlib and struct alone."""
    digest, found = start, []
    for number, page in enumerate(pages):
        contents = ZERO if page is None else hashlib.sha384(page).digest()
        info = digest + contents
        info += struct.pack("<HB5xQ", 0x70, page_type, gpa + number * PAGE)
        digest = hashlib.sha384(info).digest()
        found.append((contents, digest))
    return found


def split(data: bytes) -> list[bytes | None]:
    return [data[at : at + PAGE] for at in range(0, len(data), PAGE)]


def joined(found: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(contents + digest for contents, digest in found)


# Known answers: snp-firmware-abi.md, section 1.4


@pytest.mark.parametrize("page", vectors.PAGE_HASHES, ids=["Z", "C", "F"])
def test_contents_when_the_page_is_a_vector_is_its_hash(
    hasher: hashing.Hasher, page: bytes
) -> None:
    assert hasher.contents(page).hex() == vectors.PAGE_HASHES[page]


@pytest.mark.parametrize("name", vectors.SINGLE_PAGE)
def test_extend_when_one_page_is_added_gives_the_vector(hasher: hashing.Hasher, name: str) -> None:
    page_type, gpa, page, expected = vectors.SINGLE_PAGE[name]
    assert hasher.extend(ZERO, page_type, gpa, page, 1).hex() == expected


def test_extend_when_a_vmsa_has_tsc_fields_takes_them_as_zero(hasher: hashing.Hasher) -> None:
    found = hasher.extend(ZERO, 2, vectors.VMSA_GPA, vectors.COUNTING, 1)
    assert found.hex() == vectors.V9_FIRMWARE


def test_extend_when_a_vmsa_counts_as_given_gives_v9(hasher: hashing.Hasher) -> None:
    found = hasher.extend(ZERO, 2, vectors.VMSA_GPA, vectors.COUNTING, 1, as_given=True)
    assert found.hex() == vectors.V9_AS_GIVEN


def test_extend_when_it_goes_on_gives_v12_after_each_step(hasher: hashing.Hasher) -> None:
    digest = ZERO
    for page_type, pages, expected in vectors.V12_STEPS.values():
        data = b"".join(page for _, page in pages if page) or None
        digest = hasher.extend(digest, page_type, pages[0][0], data, len(pages))
        assert digest.hex() == expected


@pytest.mark.parametrize("name", vectors.IMI_AND_VMPL)
def test_extend_when_imi_or_vmpl_is_set_gives_the_vector(hasher: hashing.Hasher, name: str) -> None:
    imi_page, perms, expected = vectors.IMI_AND_VMPL[name]
    found = hasher.extend(ZERO, 1, 0, vectors.ZEROS, 1, imi_page=imi_page, vmpl_perms=perms)
    assert found.hex() == expected


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("name", vectors.RANGES)
def test_extend_when_a_range_is_added_gives_the_vector(
    hasher: hashing.Hasher, name: str, threads: int
) -> None:
    page_type, gpa, pages, expected = vectors.RANGES[name]
    data = b"".join(page for page in pages if page) or None
    found = hasher.extend(ZERO, page_type, gpa, data, len(pages), threads=threads)
    assert found.hex() == expected


def test_extend_when_it_is_a_minimal_guest_gives_v20(hasher: hashing.Hasher) -> None:
    digest = ZERO
    for page_type, gpa, page, expected in vectors.V20_PAGES:
        digest = hasher.extend(digest, page_type, gpa, page, 1)
        assert digest.hex() == expected
    vmsa = qemu_reset(0xFFFFFFF0, signature=0xA00F11, sev_features=1).encode()
    found = hasher.extend(digest, 2, vectors.VMSA_GPA, vmsa, 1)
    assert found.hex() == vectors.V20_WITH_VMSA


# Equal digests


class Asked(PlainHasher):
    """Notes how many threads it is to hash with."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def _contents(self, data: memoryview, out: memoryview, threads: int) -> None:
        self.threads.append(threads)

    def _records(self, *args: Any) -> None:
        self.threads.append(args[-1])


@pytest.mark.parametrize(
    ("npages", "wanted", "threads"), [(127, None, 1), (128, None, 3), (128, 0, 1), (2, 5, 5)]
)
def test_threads_when_nobody_says_are_the_cpus_but_for_few_pages(
    monkeypatch: pytest.MonkeyPatch, npages: int, wanted: int | None, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5})
    asked, data = Asked(), bytes(npages * PAGE)
    asked.extend(ZERO, 1, 0, data, npages, threads=wanted)
    asked.records(ZERO, 1, 0, data, npages, threads=wanted)
    asked.contents(data, threads=wanted)
    assert asked.threads == [threads] * 3


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("npages", [*range(10), 31, 32, 33, 65, 131])
def test_records_when_pages_differ_are_those_of_hashlib(
    hasher: hashing.Hasher, npages: int, threads: int
) -> None:
    data = noise(npages)
    expected = joined(chain(split(data), 1, 0x5000))
    assert hasher.records(ZERO, 1, 0x5000, data, npages, threads=threads) == expected


@pytest.mark.parametrize("npages", [0, 1, 4097, 2 * 4096])
def test_records_when_there_are_several_batches_are_those_of_hashlib(
    hasher: hashing.Hasher, npages: int
) -> None:
    data = noise(8) * (npages // 8) + noise(npages % 8)
    found = chain(split(data), 1, 0)
    assert hasher.records(ZERO, 1, 0, data, npages) == joined(found)
    assert hasher.extend(ZERO, 1, 0, data, npages) == (found[-1][1] if found else ZERO)
    assert hasher.contents(data) == b"".join(contents for contents, _ in found)


@pytest.mark.parametrize("offset", [1, 3, 8, 33])
def test_records_when_the_buffer_is_not_aligned_are_the_same(
    hasher: hashing.Hasher, offset: int
) -> None:
    data = noise(9)
    moved = memoryview(bytes(offset) + data + bytes(7))[offset : offset + len(data)]
    assert hasher.records(ZERO, 1, 0, moved, 9) == hasher.records(ZERO, 1, 0, data, 9)


@pytest.mark.parametrize("convert", [bytes, bytearray, memoryview])
def test_records_when_the_buffer_is_of_another_kind_are_the_same(
    hasher: hashing.Hasher, convert: Any
) -> None:
    data = noise(5)
    expected = joined(chain(split(data), 1, 0))
    assert hasher.records(ZERO, 1, 0, convert(data), 5) == expected


@pytest.mark.parametrize("value", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_contents_when_a_page_is_uniform_is_that_of_hashlib(
    hasher: hashing.Hasher, value: int
) -> None:
    """Twice: the second time they come from the table."""
    page = bytes([value]) * PAGE
    expected = hashlib.sha384(page).digest()
    assert hasher.contents(page * 3) == expected * 3
    assert hasher.contents(page) == expected


@pytest.mark.parametrize("at", [0, 1, 7, 8, 2048, 4094, 4095])
def test_contents_when_one_byte_breaks_uniformity_is_that_of_hashlib(
    hasher: hashing.Hasher, at: int
) -> None:
    page = bytearray(b"\xff" * PAGE)
    page[at] = 0xFE
    assert hasher.contents(page) == hashlib.sha384(page).digest()


@pytest.mark.parametrize("page_type", [3, 4, 5, 6])
@pytest.mark.parametrize("data", [None, b"\xff" * 3 * PAGE], ids=["none", "given"])
def test_records_when_contents_are_not_measured_have_zeros(
    hasher: hashing.Hasher, page_type: int, data: bytes | None
) -> None:
    expected = chain([None] * 3, page_type, 0x7000)
    assert hasher.records(ZERO, page_type, 0x7000, data, 3) == joined(expected)
    assert hasher.extend(ZERO, page_type, 0x7000, data, 3) == expected[-1][1]


@pytest.mark.parametrize("npages", [1, 2, 50])
def test_extend_contents_when_they_are_known_gives_the_same_digest(
    hasher: hashing.Hasher, npages: int
) -> None:
    found = chain(split(noise(npages)), 1, 0x3000, b"s" * 48)
    contents = b"".join(page for page, _ in found)
    assert hasher.extend_contents(b"s" * 48, 1, 0x3000, contents) == found[-1][1]


def test_extend_when_many_vmsas_have_tsc_fields_takes_each_as_zero(hasher: hashing.Hasher) -> None:
    digest = LaunchDigest()
    for number in range(3):
        digest.update(2, number * PAGE, vectors.COUNTING)
    assert hasher.extend(ZERO, 2, 0, vectors.COUNTING * 3, 3) == digest.value


PAGES = st.lists(
    st.one_of(
        st.integers(0, 255).map(lambda value: bytes([value]) * PAGE),
        st.integers(0, 1 << 32).map(lambda seed: noise(1, seed)),
    ),
    max_size=70,
)


@given(
    pages=PAGES,
    page_type=st.integers(1, 6),
    gfn=st.integers(0, (1 << 52) - 100),
    start=st.binary(min_size=48, max_size=48),
    imi_page=st.booleans(),
    vmpl_perms=st.tuples(*[st.integers(0, 255)] * 3),
    threads=st.integers(1, 4),
    cut=st.integers(0, 70),
)
@settings(max_examples=60, deadline=None)
def test_records_when_anything_is_asked_are_those_of_the_reference(
    pages: list[bytes],
    page_type: int,
    gfn: int,
    start: bytes,
    imi_page: bool,
    vmpl_perms: tuple[int, int, int],
    threads: int,
    cut: int,
) -> None:
    digest, expected = LaunchDigest(start), b""
    for number, page in enumerate(pages):
        contents = digest.update(
            page_type, (gfn + number) * PAGE, page, imi_page=imi_page, vmpl_perms=vmpl_perms
        )
        expected += contents + digest.value
    data, cut = b"".join(pages), min(cut, len(pages))
    asked: dict[str, Any] = {"imi_page": imi_page, "vmpl_perms": vmpl_perms, "threads": threads}
    for name in BACKENDS:
        hasher = hashing.hasher(name)
        found = hasher.records(start, page_type, gfn * PAGE, data, len(pages), **asked)
        assert found == expected, name
        # Cut in two anywhere, the chain is the same.
        half = hasher.extend(start, page_type, gfn * PAGE, data[: cut * PAGE], cut, **asked)
        rest, gpa = data[cut * PAGE :], (gfn + cut) * PAGE
        whole = hasher.extend(half, page_type, gpa, rest, len(pages) - cut, **asked)
        assert whole == digest.value, name


# Bad arguments


@pytest.mark.parametrize(
    "arguments",
    [
        (bytes(47), 1, 0, bytes(PAGE), 1),
        (ZERO, 0, 0, bytes(PAGE), 1),
        (ZERO, 7, 0, bytes(PAGE), 1),
        (ZERO, 1, 0x800, bytes(PAGE), 1),
        (ZERO, 1, -PAGE, bytes(PAGE), 1),
        (ZERO, 1, (1 << 64) - PAGE, bytes(2 * PAGE), 2),
        (ZERO, 1, 0, None, 1),
        (ZERO, 1, 0, bytes(PAGE - 1), 1),
        (ZERO, 1, 0, bytes(PAGE), 2),
        (ZERO, 3, 0, None, -1),
    ],
)
def test_extend_when_an_argument_is_out_of_range_is_a_format_error(
    hasher: hashing.Hasher, arguments: Any
) -> None:
    for method in (hasher.extend, hasher.records):
        with pytest.raises(FormatError):
            method(*arguments)


def test_contents_when_a_page_is_not_whole_is_a_format_error(hasher: hashing.Hasher) -> None:
    with pytest.raises(FormatError, match="4097 bytes are not whole pages"):
        hasher.contents(bytes(4097))
    with pytest.raises(FormatError, match="48 bytes per page"):
        hasher.extend_contents(ZERO, 1, 0, bytes(49))


# The choice


def test_hasher_when_the_environment_names_one_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        monkeypatch.setenv("KVMLAUNCH_HASH", name)
        assert hashing.hasher().name == name


@pytest.mark.parametrize("value", [None, ""])
def test_hasher_when_nothing_is_asked_is_the_best(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("KVMLAUNCH_HASH", raising=False)
    if value is not None:
        monkeypatch.setenv("KVMLAUNCH_HASH", value)
    assert hashing.hasher().name == BACKENDS[0]


def test_hasher_when_the_name_is_unknown_says_which_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVMLAUNCH_HASH", "sse9")
    with pytest.raises(KvmLaunchError, match=r"KVMLAUNCH_HASH=sse9: .*there are .*hashlib"):
        hashing.hasher()


def test_backends_when_the_processor_has_avx2_begin_with_a_vector_unit() -> None:
    with open("/proc/cpuinfo", encoding="ascii") as file:
        flags = next((line.split() for line in file if line.startswith("flags")), [])
    if not {"avx2", "bmi1", "bmi2"} <= set(flags):
        pytest.skip("this processor has no AVX2")
    vector = ("avx512", "avx2") if "avx512f" in flags else ("avx2",)
    assert (*vector, "portable", "hashlib") == BACKENDS


def test_backends_when_the_extension_is_missing_are_hashlib_alone() -> None:
    code = """
import sys
sys.modules["kvmlaunch.hashing._ext"] = None
from kvmlaunch import hashing
print(hashing.backends(), hashing.hasher().extend(bytes(48), 1, 0, bytes(4096), 1).hex())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == f"('hashlib',) {vectors.SINGLE_PAGE['V1'][3]}"


def test_import_when_pages_are_hashed_leaves_the_kernel_extension_alone() -> None:
    code = """
import sys
from kvmlaunch import hashing
hashing.hasher().contents(bytes(4096))
print([m for m in sys.modules if m.startswith(("kvmlaunch.uapi", "kvmlaunch.kvm"))])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
