"""kvmlaunch run --report-out: the report that a guest prints becomes a file, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlaunch.platforms import Choice
from kvmlaunch.sim import SimPlatform
from tests.cli.command import Cli, Done
from tests.launch.rig import Playback, out_and_exit

BEGIN = "-----BEGIN ATTESTATION REPORT-----\n"
END = "-----END ATTESTATION REPORT-----\n"

Prints = Callable[..., Done]


@pytest.fixture
def prints(cli: Cli, halt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prints:
    """Runs a guest that prints a text and ends with a code; its report goes to report.bin."""

    def run(text: str, code: int = 0, out: str = "report.bin") -> Done:
        host = SimPlatform()
        platform = Playback(host, {0: out_and_exit(text.encode(), code)})
        choice = Choice(platform, "platform scripted")
        monkeypatch.setattr("kvmlaunch.platforms.open_platform", lambda *args, **more: choice)
        done = cli("run", "--platform", "sim", "--report-out", tmp_path / out, halt)
        assert host.open_fds == ()
        return done

    return run


def report(measurement: bytes) -> bytes:
    """AMD 56860, ATTESTATION_REPORT: MEASUREMENT is at 0x90."""
    return b"r" * 0x90 + measurement + b"R" * (0x4A0 - 0x90 - 48)


def block(data: bytes) -> str:
    return BEGIN + data.hex() + "\n" + END


def digest(cli: Cli, halt: Path) -> bytes:
    return bytes.fromhex(cli("measure", halt).out)


def test_report_when_printed_is_written_and_compared(
    cli: Cli, halt: Path, tmp_path: Path, prints: Prints
) -> None:
    data = report(digest(cli, halt))
    done = prints("hello\n" + block(data))
    assert (done.code, done.errors) == (0, [])
    assert (tmp_path / "report.bin").read_bytes() == data
    assert done.out == "hello\n" + block(data)
    assert f"report written to {tmp_path}/report.bin: its measurement is the predicted" in done.err


def test_report_when_of_another_launch_is_written_but_fails(tmp_path: Path, prints: Prints) -> None:
    done = prints(block(report(b"m" * 48)))
    assert done.code == 1
    assert done.errors == [
        f"kvmlaunch: the report's measurement {(b'm' * 48).hex()} is not the launch digest"
    ]
    assert (tmp_path / "report.bin").read_bytes() == report(b"m" * 48)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the guest printed no attestation report"),
        (block(b"short"), "the guest's attestation report has 5 bytes, not 1184"),
        (block(bytes(1184)).replace("0", "x"), "the guest's attestation report is not hex"),
        (block(bytes(1184))[:-30], "the guest's attestation report has no end"),
    ],
)
def test_report_when_there_is_none_is_one_sentence_and_no_file(
    tmp_path: Path, prints: Prints, text: str, sentence: str
) -> None:
    done = prints(text)
    assert done.code == 1
    assert done.errors == [f"kvmlaunch: --report-out: {sentence}"]
    assert not (tmp_path / "report.bin").exists()


def test_report_when_the_guest_ends_badly_keeps_its_code_and_is_written(
    cli: Cli, halt: Path, tmp_path: Path, prints: Prints
) -> None:
    done = prints(block(report(digest(cli, halt))), code=3)
    assert done.code == 1
    assert done.errors == ["kvmlaunch: vCPU 0: the guest wrote 0x3 to the exit port"]
    assert (tmp_path / "report.bin").exists()


def test_report_when_its_folder_is_missing_is_told_before_the_launch(prints: Prints) -> None:
    done = prints("", out="nowhere/report.bin")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") == 1
    assert "nowhere is not a folder" in done.err


def test_run_without_report_out_does_not_care_for_a_report(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Playback(SimPlatform(), {0: out_and_exit(b"no report\n")})
    choice = Choice(platform, "platform scripted")
    monkeypatch.setattr("kvmlaunch.platforms.open_platform", lambda *args, **more: choice)
    assert cli("run", "--platform", "sim", halt).code == 0
