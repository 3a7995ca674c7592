from __future__ import annotations

import base64
import contextlib
import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.digest import (
    LaunchDigest,
    format_digest,
    page_contents,
    page_info,
    parse_digest,
    sha384,
)
from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.reset import qemu_reset
from kvmlaunch.errors import FormatError

from . import vectors

ZERO_CONTENTS = bytes(48)
DIGEST_HEX = vectors.SINGLE_PAGE["V1"][3]
DIGEST = bytes.fromhex(DIGEST_HEX)


@pytest.mark.parametrize("page", vectors.PAGE_HASHES, ids=["Z", "C", "F"])
def test_sha384_of_vector_page_is_published_value(page: bytes) -> None:
    assert sha384(page).hex() == vectors.PAGE_HASHES[page]


@pytest.mark.parametrize("name", vectors.SINGLE_PAGE)
def test_update_one_page_gives_vector(name: str) -> None:
    page_type, gpa, page, expected = vectors.SINGLE_PAGE[name]
    digest = LaunchDigest()
    digest.update(page_type, gpa, page)
    assert digest.hex() == expected


def test_update_vmsa_as_given_gives_v9() -> None:
    digest = LaunchDigest()
    digest.update(PageType.VMSA, vectors.VMSA_GPA, vectors.COUNTING, as_given=True)
    assert digest.hex() == vectors.V9_AS_GIVEN


def test_update_vmsa_takes_tsc_fields_as_zero() -> None:
    digest = LaunchDigest()
    digest.update(PageType.VMSA, vectors.VMSA_GPA, vectors.COUNTING)
    assert digest.hex() == vectors.V9_FIRMWARE


@pytest.mark.parametrize("convert", [bytes, bytearray, memoryview])
def test_page_contents_of_vmsa_accepts_each_buffer(convert: Any) -> None:
    contents = page_contents(PageType.VMSA, convert(vectors.COUNTING))
    assert contents.hex() == vectors.V9_FIRMWARE_CONTENTS


def test_page_contents_of_normal_keeps_bytes_at_tsc_offset() -> None:
    contents = page_contents(PageType.NORMAL, vectors.COUNTING)
    assert contents.hex() == vectors.PAGE_HASHES[vectors.COUNTING]


@pytest.mark.parametrize("last", vectors.V12_STEPS)
def test_update_sequence_gives_v12_after_each_step(last: str) -> None:
    digest = LaunchDigest()
    for step in [s for s in vectors.V12_STEPS if s <= last]:
        page_type, pages, expected = vectors.V12_STEPS[step]
        for gpa, page in pages:
            digest.update(page_type, gpa, page)
    assert digest.hex() == expected


@pytest.mark.parametrize("name", vectors.IMI_AND_VMPL)
def test_update_with_imi_or_vmpl_gives_vector(name: str) -> None:
    imi_page, vmpl_perms, expected = vectors.IMI_AND_VMPL[name]
    digest = LaunchDigest()
    digest.update(1, 0, vectors.ZEROS, imi_page=imi_page, vmpl_perms=vmpl_perms)
    assert digest.hex() == expected


@pytest.mark.parametrize("name", vectors.RANGES)
def test_update_range_gives_vector(name: str) -> None:
    page_type, gpa, pages, expected = vectors.RANGES[name]
    digest = LaunchDigest()
    for number, page in enumerate(pages):
        digest.update(page_type, gpa + number * 0x1000, page)
    assert digest.hex() == expected


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_update_minimal_guest_gives_v20(steps: int) -> None:
    digest = LaunchDigest()
    for page_type, gpa, page, _ in vectors.V20_PAGES[:steps]:
        digest.update(page_type, gpa, page)
    assert digest.hex() == vectors.V20_PAGES[steps - 1][3]


def test_update_minimal_guest_with_qemu_vmsa_gives_v20() -> None:
    digest = LaunchDigest(bytes.fromhex(vectors.V20_PAGES[-1][3]))
    vmsa = qemu_reset(0xFFFFFFF0, signature=0xA00F11, sev_features=1)
    digest.update(PageType.VMSA, vectors.VMSA_GPA, vmsa.encode())
    assert digest.hex() == vectors.V20_WITH_VMSA


def test_page_info_of_v1_is_published_bytes() -> None:
    # snp-firmware-abi.md, below V11
    info = page_info(bytes(48), page_contents(1, vectors.ZEROS), 1, 0)
    tail = "70000100000000000000000000000000"
    assert info.hex() == "00" * 48 + vectors.PAGE_HASHES[vectors.ZEROS] + tail


def test_page_info_of_v16_ends_in_published_tail() -> None:
    info = page_info(bytes(48), bytes(48), 1, 0, vmpl_perms=(0xF, 3, 1))
    assert info[0x60:].hex() == vectors.V16_TAIL


def test_page_info_is_112_bytes() -> None:
    assert len(page_info(bytes(48), bytes(48), 6, 0x1000)) == 112


def test_page_info_puts_gpa_at_0x68() -> None:
    info = page_info(bytes(48), bytes(48), 1, 0x1122334455667000)
    assert info[0x68:] == bytes.fromhex("0070665544332211")


@pytest.mark.parametrize(
    ("current", "contents", "page_type", "gpa"),
    [
        (bytes(47), bytes(48), 1, 0),
        (bytes(48), bytes(49), 1, 0),
        (bytes(48), bytes(48), 0, 0),
        (bytes(48), bytes(48), 7, 0),
        (bytes(48), bytes(48), 1, 0x800),
        (bytes(48), bytes(48), 1, -0x1000),
        (bytes(48), bytes(48), 1, 1 << 64),
    ],
)
def test_page_info_out_of_range_is_format_error(
    current: bytes, contents: bytes, page_type: int, gpa: int
) -> None:
    with pytest.raises(FormatError):
        page_info(current, contents, page_type, gpa)


@pytest.mark.parametrize("perms", [(256, 0, 0), (0, -1, 0)])
def test_page_info_with_wide_permission_is_format_error(perms: tuple[int, int, int]) -> None:
    with pytest.raises(FormatError, match="VMPL"):
        page_info(bytes(48), bytes(48), 1, 0, vmpl_perms=perms)


@pytest.mark.parametrize("page_type", [3, 4, 5, 6])
def test_page_contents_of_unmeasured_types_is_zeros(page_type: int) -> None:
    assert page_contents(page_type, vectors.COUNTING) == ZERO_CONTENTS


@pytest.mark.parametrize("page_type", [0, 7, -1])
def test_page_contents_of_no_page_type_is_format_error(page_type: int) -> None:
    with pytest.raises(FormatError, match="page type"):
        page_contents(page_type, vectors.ZEROS)


def test_page_contents_without_page_names_the_type() -> None:
    with pytest.raises(FormatError, match="VMSA"):
        page_contents(2, None)


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_page_contents_of_wrong_size_is_format_error(size: int) -> None:
    with pytest.raises(FormatError, match="4096"):
        page_contents(1, bytes(size))


def test_update_returns_contents() -> None:
    contents = LaunchDigest().update(1, 0, vectors.ZEROS)
    assert contents.hex() == vectors.PAGE_HASHES[vectors.ZEROS]


def test_update_contents_equals_update_with_page() -> None:
    digest = LaunchDigest()
    digest.update_contents(1, 0, bytes.fromhex(vectors.PAGE_HASHES[vectors.ZEROS]))
    assert digest.hex() == vectors.SINGLE_PAGE["V1"][3]


def test_update_refused_leaves_value() -> None:
    digest = LaunchDigest(DIGEST)
    with pytest.raises(FormatError):
        digest.update(1, 1, vectors.ZEROS)
    assert digest.value == DIGEST


def test_launch_digest_with_short_start_is_format_error() -> None:
    with pytest.raises(FormatError, match="48"):
        LaunchDigest(bytes(32))


def test_launch_digest_repr_recreates_it() -> None:
    assert eval(repr(LaunchDigest(DIGEST))).value == DIGEST


@pytest.mark.parametrize(
    "text",
    [
        DIGEST_HEX,
        DIGEST_HEX.upper(),
        f"0x{DIGEST_HEX}",
        f"0X{DIGEST_HEX.upper()}",
        f"  {DIGEST_HEX}\n",
        base64.b64encode(DIGEST).decode(),
        base64.b64encode(DIGEST_HEX.encode()).decode(),
        base64.b64encode(DIGEST_HEX.encode() + b"\n").decode(),
        base64.encodebytes(DIGEST_HEX.encode()).decode(),
    ],
    ids=[
        "hex",
        "HEX",
        "0x",
        "0X",
        "spaces",
        "b64",
        "b64-hex",
        "b64-hex-newline",
        "b64-hex-wrapped",
    ],
)
def test_parse_digest_of_each_spelling_is_the_digest(text: str) -> None:
    assert parse_digest(text) == DIGEST


@pytest.mark.parametrize(
    "text", ["", "0x", DIGEST_HEX[:-1], DIGEST_HEX + "0", "g" * 96, "AAAA", "é" * 64, "===="]
)
def test_parse_digest_of_anything_else_is_format_error(text: str) -> None:
    with pytest.raises(FormatError):
        parse_digest(text)


def test_parse_digest_of_sha256_is_not_taken_for_base64() -> None:
    with pytest.raises(FormatError, match="this has 64"):
        parse_digest(hashlib.sha256(b"").hexdigest())


def test_format_digest_hex_is_lower_case() -> None:
    assert format_digest(DIGEST, "hex") == DIGEST_HEX


def test_format_digest_base64_is_published_value() -> None:
    # sev-snp-measure tests/test_id_block.py: ID block and its LD, both in base64
    block = base64.b64decode(vectors.SSM_ID_BLOCK_BASE64)
    assert format_digest(block[:48], "base64") == vectors.SSM_ID_BLOCK_LD_BASE64


def test_format_digest_of_wrong_size_is_format_error() -> None:
    with pytest.raises(FormatError):
        format_digest(bytes(32))


def test_format_digest_of_unknown_form_is_format_error() -> None:
    with pytest.raises(FormatError, match="base32"):
        format_digest(DIGEST, "base32")  # type: ignore[arg-type]


@given(st.binary(min_size=48, max_size=48), st.sampled_from(["hex", "base64"]))
def test_parse_digest_of_format_digest_is_identity(digest: bytes, form: Any) -> None:
    assert parse_digest(format_digest(digest, form)) == digest


@given(st.text())
def test_parse_digest_of_arbitrary_text_raises_format_error_only(text: str) -> None:
    with contextlib.suppress(FormatError):
        assert len(parse_digest(text)) == 48


@given(st.integers(), st.integers(), st.none() | st.binary())
def test_update_with_arbitrary_arguments_raises_format_error_only(
    page_type: int, gpa: int, page: bytes | None
) -> None:
    with contextlib.suppress(FormatError):
        LaunchDigest().update(page_type, gpa, page)
