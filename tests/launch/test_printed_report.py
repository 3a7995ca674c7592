"""The attestation report on a guest's console, and the file that it goes to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmlaunch.errors import FormatError, KvmLaunchError
from kvmlaunch.launch.files import check_folder, write_whole
from kvmlaunch.launch.printed_report import PrintedReport

REPORT = bytes((n * 7) % 251 for n in range(1184))
BEGIN = b"-----BEGIN ATTESTATION REPORT-----\n"
END = b"-----END ATTESTATION REPORT-----\n"


def block(report: bytes = REPORT, width: int = 64) -> bytes:
    text = report.hex()
    lines = [text[at : at + width] for at in range(0, len(text), width)]
    return BEGIN + "\n".join(lines).encode() + b"\n" + END


def heard(*parts: bytes) -> PrintedReport:
    printed = PrintedReport()
    for part in parts:
        printed.add(part)
    return printed


@pytest.mark.parametrize("width", [2, 64, 80, 5000])
def test_report_when_printed_in_lines_of_any_length_is_found(width: int) -> None:
    assert heard(block(width=width)).report() == REPORT


def test_report_when_other_text_is_around_it_is_found() -> None:
    assert heard(b"hello\n----\n", b"x" * 9000, block(), b"bye\n").report() == REPORT


def test_report_when_heard_byte_by_byte_is_found() -> None:
    text = b"hello\r\n" + block().replace(b"\n", b"\r\n") + b"bye\n"
    assert heard(*(bytes([byte]) for byte in text)).report() == REPORT


def test_report_when_there_are_two_is_the_first() -> None:
    assert heard(block(), block(bytes(1184))).report() == REPORT


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "the guest printed no attestation report"),
        (END + REPORT.hex().encode(), "the guest printed no attestation report"),
        (block()[:-40], "the guest's attestation report has no end"),
        (block(REPORT[:-1]), "the guest's attestation report has 1183 bytes, not 1184"),
        (block(b""), "the guest's attestation report has 0 bytes, not 1184"),
        (block().replace(b"07", b"g7"), "the guest's attestation report is not hex"),
        (BEGIN + b"\xff" + END, "the guest's attestation report is not hex"),
        (block(REPORT * 5), "the guest's attestation report has"),
    ],
)
def test_report_when_it_is_none_is_one_sentence(text: bytes, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        heard(text).report()


@pytest.mark.parametrize("start", [b"", BEGIN])
def test_console_when_it_never_ends_is_not_kept(start: bytes) -> None:
    printed = heard(start)
    for _ in range(200):
        printed.add(b"a" * 4096)
        assert len(printed._text) < 10000


def test_file_when_written_has_the_report_and_nothing_beside_it(tmp_path: Path) -> None:
    write_whole(str(tmp_path / "report.bin"), REPORT)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("report.bin", REPORT)
    ]


def test_file_when_there_already_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.bin"
    path.write_bytes(b"old" * 1000)
    write_whole(str(path), REPORT)
    assert path.read_bytes() == REPORT


def test_file_when_a_link_is_written_where_it_points(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "report.bin")
    write_whole(str(link), REPORT)
    assert link.is_symlink()
    assert (tmp_path / "report.bin").read_bytes() == REPORT


def test_file_when_a_device_is_not_replaced() -> None:
    write_whole(os.devnull, REPORT)
    assert Path(os.devnull).is_char_device()


def test_file_when_the_disk_is_full_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KvmLaunchError, match="/dev/full: No space left"):
        write_whole("/dev/full", REPORT)
    with pytest.raises(KvmLaunchError, match=r"none/report\.bin: No such file"):
        write_whole(str(tmp_path / "none" / "report.bin"), REPORT)
    assert not list(tmp_path.iterdir())


def test_file_when_another_is_named_as_a_part_of_it_leaves_that_alone(tmp_path: Path) -> None:
    (tmp_path / "report.bin.part").write_bytes(b"mine")
    write_whole(str(tmp_path / "report.bin"), REPORT)
    assert (tmp_path / "report.bin.part").read_bytes() == b"mine"


def test_file_when_written_may_be_read_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(str(tmp_path / "report.bin"), REPORT)
    finally:
        os.umask(before)
    assert (tmp_path / "report.bin").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["nowhere/report.bin", "file/report.bin", ""])
def test_folder_when_no_file_can_be_there_is_told_before(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KvmLaunchError, match=r"is (not )?a folder"):
        check_folder(str(tmp_path / name))


def test_folder_when_it_is_there_is_fine(tmp_path: Path) -> None:
    check_folder(str(tmp_path / "report.bin"))
