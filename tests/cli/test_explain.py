"""kvmlaunch measure --explain: what it prints, its exit codes and its progress."""

from __future__ import annotations

import base64
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from kvmlaunch.launch import explain
from tests.cli.command import SECONDS, Cli, command
from tests.images import published

FIRMWARE = Path(__file__).parents[1] / "images" / "fixtures" / published.AMDSEV
# QEMU, features 1, no kernel; then with features 0x21; then gce with four vCPUs and a kernel.
ASKED, DEBUG_SWAP, GCE = (published.SNP[row][5] for row in (5, 4, 15))
UNKNOWN = "ab" * 48


def test_inputs_when_they_differ_as_expected_are_in_the_published_rows() -> None:
    assert published.SNP[5][:5] == (published.AMDSEV, "QEMU", 1, 0x1, None)
    assert published.SNP[4][:5] == (published.AMDSEV, "QEMU", 1, 0x21, None)
    assert published.SNP[15][:5] == (published.AMDSEV, "gce", 4, 0x1, "")


def test_explain_when_found_prints_what_to_type_and_ends_with_0(cli: Cli) -> None:
    done = cli("measure", "--ovmf", FIRMWARE, "--explain", DEBUG_SWAP)
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert lines[0] == "--guest-features 0x21 gives this digest:"
    assert lines[1].startswith("  SEV_FEATURES: 0x21, not 0x1 (with debug_swap; Linux 6.6")


@pytest.mark.parametrize("form", ["0x{}", "{}\n", "base64"])
def test_explain_when_the_digest_is_written_otherwise_takes_it(cli: Cli, form: str) -> None:
    raw = bytes.fromhex(DEBUG_SWAP)
    text = base64.b64encode(raw).decode() if form == "base64" else form.format(raw.hex().upper())
    done = cli("measure", "--ovmf", FIRMWARE, "--explain", text)
    assert done.out.startswith("--guest-features 0x21 gives")


def test_explain_when_it_is_the_predicted_one_says_so(cli: Cli) -> None:
    done = cli("measure", "--ovmf", FIRMWARE, "--explain", ASKED)
    assert (done.code, done.out, done.err) == (0, "that is the predicted digest\n", "")


def test_explain_when_several_inputs_differ_names_all(cli: Cli) -> None:
    options = ("--kernel", "/dev/null", "--initrd", "/dev/null", "--vcpus", "2")
    done = cli("measure", "--ovmf", FIRMWARE, *options, "--explain", GCE)
    assert done.code == 0
    assert done.out.splitlines()[0] == "--vcpus 4 --vmm-type gce gives this digest:"


def test_explain_when_nothing_is_found_ends_with_1(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, halt: Path
) -> None:
    monkeypatch.setattr(explain.explain_digest, "__kwdefaults__", {**_DEFAULTS, "most": 5000})
    done = cli("measure", halt, "--explain", UNKNOWN)
    first, *suspects = done.out.splitlines()
    assert (done.code, done.err) == (1, "")
    assert first.startswith("nothing explains this digest: 50")
    assert any("the image's bytes" in line for line in suspects)


_DEFAULTS = explain.explain_digest.__kwdefaults__


@pytest.mark.parametrize("text", ["", "ab", "xyz", "0x" + "ab" * 32, "ab" * 49, "=" * 96])
def test_explain_when_the_text_is_no_digest_is_one_sentence(cli: Cli, text: str) -> None:
    done = cli("measure", "--ovmf", FIRMWARE, "--explain", text)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("kvmlaunch: --explain: a launch digest ")


@pytest.mark.parametrize("mode", ["sev", "seves", "snp:ovmf-hash"])
def test_explain_when_the_mode_is_no_snp_launch_is_refused(cli: Cli, mode: str) -> None:
    done = cli("measure", "--mode", mode, "--ovmf", FIRMWARE, "--explain", ASKED)
    assert done.code == 2
    assert done.errors == [
        f"kvmlaunch: --explain is for digests of SNP launches, not for --mode {mode}"
    ]


@pytest.mark.parametrize("options", [("--log", "-"), ("--dump-vmsa",)])
def test_explain_when_files_of_one_launch_are_wanted_is_refused(
    cli: Cli, options: tuple[str, ...]
) -> None:
    done = cli("measure", "--ovmf", FIRMWARE, "--explain", ASKED, *options)
    assert (done.code, len(done.errors)) == (2, 1)
    assert options[0] in done.errors[0]


def on_terminal(*options: str) -> tuple[int, str]:
    """Exit code, and what a terminal shows on stderr."""
    ours, theirs = pty.openpty()
    words = command(*options, "measure", "--ovmf", FIRMWARE, "--explain", UNKNOWN)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # Linux's EIO: nobody has the other end open
            pass
        code = process.wait(timeout=SECONDS)
    os.close(ours)
    return code, shown.decode()


def test_progress_when_stderr_is_a_terminal_is_shown_and_taken_away() -> None:
    code, shown = on_terminal()
    assert code == 1
    parts = shown.split("\r")
    assert sum(part.strip().endswith("launches tried") for part in parts) >= 2
    assert parts[-1] == ""
    assert parts[-2].isspace()


def test_progress_when_quiet_is_not_shown() -> None:
    assert on_terminal("-q") == (1, "")


def test_explain_when_asked_for_needs_no_extension() -> None:
    code = (
        "import sys; sys.modules['kvmlaunch.uapi._ext'] = None; "
        "sys.modules['kvmlaunch.hashing._ext'] = None; "
        "from kvmlaunch.cli import main; sys.exit(main())"
    )
    words = ["measure", "--ovmf", str(FIRMWARE), "--explain", DEBUG_SWAP]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("--guest-features 0x21 gives")
