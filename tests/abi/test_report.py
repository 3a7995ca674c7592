from __future__ import annotations

import contextlib
import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.report import (
    PLATFORM_INFO,
    REPORT_FIELDS,
    AttestationReport,
    ReportField,
    SigningKey,
    fields_of,
    key_info,
)
from kvmlaunch.errors import FormatError

SIZE = 0x4A0
# snp-firmware-abi.md 8.1: offset, size, name, report version
TABLE = [
    (0x000, 4, "version", 2),
    (0x004, 4, "guest_svn", 2),
    (0x008, 8, "policy", 2),
    (0x010, 16, "family_id", 2),
    (0x020, 16, "image_id", 2),
    (0x030, 4, "vmpl", 2),
    (0x034, 4, "signature_algo", 2),
    (0x038, 8, "current_tcb", 2),
    (0x040, 8, "platform_info", 2),
    (0x048, 4, "key_info", 2),
    (0x050, 64, "report_data", 2),
    (0x090, 48, "measurement", 2),
    (0x0C0, 32, "host_data", 2),
    (0x0E0, 48, "id_key_digest", 2),
    (0x110, 48, "author_key_digest", 2),
    (0x140, 32, "report_id", 2),
    (0x160, 32, "report_id_ma", 2),
    (0x180, 8, "reported_tcb", 2),
    (0x188, 1, "cpuid_fam_id", 3),
    (0x189, 1, "cpuid_mod_id", 3),
    (0x18A, 1, "cpuid_step", 3),
    (0x1A0, 64, "chip_id", 2),
    (0x1E0, 8, "committed_tcb", 2),
    (0x1E8, 1, "current_build", 2),
    (0x1E9, 1, "current_minor", 2),
    (0x1EA, 1, "current_major", 2),
    (0x1EC, 1, "committed_build", 2),
    (0x1ED, 1, "committed_minor", 2),
    (0x1EE, 1, "committed_major", 2),
    (0x1F0, 8, "launch_tcb", 2),
    (0x1F8, 8, "launch_mit_vector", 5),
    (0x200, 8, "current_mit_vector", 5),
    (0x2A0, 512, "signature", 2),
]
EMPTY = AttestationReport(version=5)
BY_ID = [pytest.param(*row, id=row[2]) for row in TABLE if row[2] != "version"]


def raw(version: int, pokes: dict[int, int] | None = None) -> bytes:
    buf = bytearray(SIZE)
    for at, value in (pokes or {}).items():
        buf[at] = value
    buf[:4] = version.to_bytes(4, "little")
    return bytes(buf)


REPORTS = st.builds(
    raw,
    st.sampled_from([0, 1, 2, 3, 4, 5, 6, 0xFFFFFFFF]),
    st.dictionaries(st.integers(4, SIZE - 1), st.integers(0, 255), max_size=40),
)


def test_field_table_is_that_of_the_reference() -> None:
    assert [(f.offset, f.size, f.name, f.since) for f in REPORT_FIELDS] == TABLE


def test_field_table_is_in_order_without_overlap() -> None:
    assert all(a.offset + a.size <= b.offset for a, b in itertools.pairwise(REPORT_FIELDS))


@pytest.mark.parametrize(("offset", "size", "name", "since"), BY_ID)
def test_decode_reads_exactly_its_field(offset: int, size: int, name: str, since: int) -> None:
    buf = bytearray(raw(5))
    buf[offset : offset + size] = bytes(range(1, size + 1)) if size < 255 else b"\x01" * size
    report = AttestationReport.decode(buf)
    value = getattr(report, name)
    want = bytes(buf[offset : offset + size])
    assert value == (want if isinstance(value, bytes) else int.from_bytes(want, "little"))
    assert dataclasses.replace(report, **{name: getattr(EMPTY, name)}) == EMPTY


@pytest.mark.parametrize(("offset", "size", "name", "since"), BY_ID)
def test_encode_of_largest_value_fills_exactly_its_field(
    offset: int, size: int, name: str, since: int
) -> None:
    is_bytes = isinstance(getattr(AttestationReport, name), bytes)
    value = b"\xff" * size if is_bytes else (1 << size * 8) - 1
    want = bytearray(raw(5))
    want[offset : offset + size] = b"\xff" * size
    assert AttestationReport(version=5, **{name: value}).encode() == want


@pytest.mark.parametrize(("offset", "size", "name", "since"), BY_ID)
def test_report_with_wide_value_names_the_field(
    offset: int, size: int, name: str, since: int
) -> None:
    is_bytes = isinstance(getattr(AttestationReport, name), bytes)
    with pytest.raises(FormatError, match=f"^{name} "):
        AttestationReport(version=5, **{name: bytes(size + 1) if is_bytes else 1 << size * 8})


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (2, "cpuid_fam_id"),
        (2, "cpuid_mod_id"),
        (2, "cpuid_step"),
        (2, "launch_mit_vector"),
        (3, "launch_mit_vector"),
        (4, "current_mit_vector"),
    ],
)
def test_field_that_came_later_is_format_error_and_reserved(version: int, name: str) -> None:
    with pytest.raises(FormatError, match=f"{name} needs report version"):
        AttestationReport(version=version, **{name: 1})
    (offset,) = [row[0] for row in TABLE if row[2] == name]
    report = AttestationReport.decode(raw(version, {offset: 7}))
    assert getattr(report, name) == 0
    assert report.reserved == ((offset, b"\x07"),)


@pytest.mark.parametrize(
    ("version", "count"), [(0, 28), (1, 28), (2, 28), (3, 31), (4, 31), (5, 33), (6, 33)]
)
def test_fields_of_version_are_those_that_it_has(version: int, count: int) -> None:
    assert len(fields_of(version)) == count


@pytest.mark.parametrize("offset", [0x04C, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x208, 0x29F])
def test_decode_keeps_reserved_byte(offset: int) -> None:
    report = AttestationReport.decode(raw(5, {offset: 9}))
    assert report.reserved == ((offset, b"\x09"),)


@given(REPORTS)
def test_encode_of_decode_is_identity(buf: bytes) -> None:
    assert AttestationReport.decode(buf).encode() == buf


def test_encode_of_decode_of_all_ones_is_identity() -> None:
    assert AttestationReport.decode(b"\xff" * SIZE).encode() == b"\xff" * SIZE


@given(REPORTS)
def test_repr_recreates_it(buf: bytes) -> None:
    report = AttestationReport.decode(buf)
    assert eval(repr(report)) == report


def test_signed_bytes_end_before_the_signature() -> None:
    report = AttestationReport(signature=b"\x01" * 512, launch_tcb=1, reserved=((0x29F, b"\x02"),))
    assert report.signed_bytes == report.encode()[:0x2A0]
    assert report.signed_bytes[-1] == 2


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_decode_of_wrong_size_is_format_error(size: int) -> None:
    with pytest.raises(FormatError, match="1184"):
        AttestationReport.decode(bytes(size))


@given(st.binary(max_size=64) | st.binary(min_size=SIZE, max_size=SIZE))
def test_decode_of_arbitrary_bytes_raises_format_error_only(buf: bytes) -> None:
    with contextlib.suppress(FormatError):
        AttestationReport.decode(buf)


def test_report_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttestationReport().vmpl = 1  # type: ignore[misc]


def test_reserved_outside_a_gap_of_its_version_is_format_error() -> None:
    gap = ((0x1F8, b"\x01"),)
    assert AttestationReport(version=3, reserved=gap).reserved == gap
    with pytest.raises(FormatError, match="gap"):
        AttestationReport(version=5, reserved=gap)


@pytest.mark.parametrize(
    ("word", "author", "mask", "key"),
    # snp-firmware-abi.md 8.1
    [
        (0x00, False, False, SigningKey.VCEK),
        (0x01, True, False, SigningKey.VCEK),
        (0x02, False, True, SigningKey.VCEK),
        (0x04, False, False, SigningKey.VLEK),
        (0x1E, False, True, SigningKey.NONE),
        (0x0C, False, False, 3),
    ],
)
def test_key_info_has_the_references_bits(word: int, author: bool, mask: bool, key: int) -> None:
    report = AttestationReport(key_info=word)
    assert (report.author_key_en, report.mask_chip_key, report.signing_key) == (author, mask, key)
    assert key_info(key, author_key_en=author, mask_chip_key=mask) == word


@pytest.mark.parametrize(
    ("name", "bit"),
    # snp-firmware-abi.md 8.1
    [
        ("smt_en", 0),
        ("tsme_en", 1),
        ("ecc_en", 2),
        ("rapl_dis", 3),
        ("ciphertext_hiding_dram_en", 4),
        ("alias_check_complete", 5),
        ("sev_tio_en", 7),
    ],
)
def test_platform_info_bit_is_that_of_the_reference(name: str, bit: int) -> None:
    assert PLATFORM_INFO[name] == bit


def test_product_when_version_has_no_cpuid_is_none() -> None:
    assert AttestationReport(version=2).product is None
    assert AttestationReport(version=3, cpuid_fam_id=0x1A, cpuid_mod_id=2).product == "Turin"


def test_field_when_shown_has_its_version() -> None:
    assert REPORT_FIELDS[-2] == ReportField("current_mit_vector", 0x200, 8, 5)
