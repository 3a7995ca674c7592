"""Finding the report in what people have."""

from __future__ import annotations

import base64
import contextlib
import io
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.attestation.source import decode_file, find_report, read_file
from kvmlaunch.errors import FormatError, ImageError

REPORT = bytes(n * 7 % 251 for n in range(1184))
# snp-firmware-abi 8.4: STATUS, REPORT_SIZE, 24 reserved bytes.
ANSWER = bytes(4) + b"\xa0\x04\0\0" + bytes(24) + REPORT
CONSOLE = (
    b"hello\r\n-----BEGIN ATTESTATION REPORT-----\r\n"
    + REPORT.hex().encode()
    + b"\r\n-----END ATTESTATION REPORT-----\r\nbye\n"
)


@pytest.mark.parametrize("binary", [REPORT, ANSWER, ANSWER.ljust(4000, b"\0")])
@pytest.mark.parametrize(
    "written",
    [
        bytes,
        lambda raw: raw.hex().encode(),
        lambda raw: b"0x" + raw.hex().upper().encode() + b"\n",
        lambda raw: b"\n".join(raw[n : n + 16].hex(" ").encode() for n in range(0, len(raw), 16)),
        base64.b64encode,
        base64.encodebytes,
    ],
)
def test_report_when_written_in_any_way_is_found(binary, written):
    assert find_report(written(binary)) == REPORT


def test_report_when_printed_on_a_console_is_found():
    assert find_report(CONSOLE) == REPORT


def test_report_when_the_firmware_refused_says_its_status():
    with pytest.raises(FormatError, match="STATUS is 0x16"):
        find_report(b"\x16" + ANSWER[1:])


@pytest.mark.parametrize("size", [0, 0x4A1, 1 << 20])
def test_report_when_the_answer_has_another_size_is_refused(size):
    with pytest.raises(FormatError, match=f"has {size} bytes, not 1184"):
        find_report(ANSWER[:4] + size.to_bytes(4, "little") + ANSWER[8:])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        REPORT[:-1],
        REPORT + b"x",
        ANSWER[:-1],
        ANSWER + b"x",
        ANSWER.ljust(4097, b"\0"),
        REPORT.hex().encode()[:-1],
        b"zz" * 1184,
        b"\n" * 5000,
    ],
)
def test_report_when_there_is_none_says_what_was_given(data):
    with pytest.raises(FormatError, match=f"this is {len(data)} bytes"):
        find_report(data)


@given(st.one_of(st.binary(max_size=3000), st.text(max_size=3000).map(str.encode)))
def test_report_when_anything_raises_format_error_only(data):
    with contextlib.suppress(FormatError):
        assert len(find_report(data)) == 1184


@given(st.integers(0, len(CONSOLE) - 1), st.integers(0, 255))
def test_report_when_a_byte_of_a_console_changes_raises_format_error_only(at, byte):
    with contextlib.suppress(FormatError):
        assert len(find_report(CONSOLE[:at] + bytes([byte]) + CONSOLE[at + 1 :])) == 1184


def test_file_when_it_is_a_dash_is_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\x00")))
    assert read_file("-") == b"\xff\x00"


def test_file_when_missing_names_it(tmp_path: Path):
    with pytest.raises(ImageError, match=r"none: can't be read: No such file"):
        read_file(str(tmp_path / "none"))


def test_file_when_it_never_ends_is_refused():
    with pytest.raises(ImageError, match="/dev/zero: is larger than 4194304 bytes"):
        read_file("/dev/zero")


def test_file_when_standard_input_never_ends_is_refused(monkeypatch):
    with open("/dev/zero") as zeros, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", zeros)
        with pytest.raises(ImageError, match="-: is larger than 4194304 bytes"):
            read_file("-")


def test_file_when_it_cannot_be_decoded_names_it(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(ImageError, match="file: no attestation report"):
        decode_file(str(path), find_report)
