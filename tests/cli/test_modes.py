"""Modes and options of sev-snp-measure: its command lines work, and print what it prints."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Cli, Done, page_events, refused
from tests.images.builders import ovmf, standard_entries, svsm_image

tool = pytest.importorskip("sevsnpmeasure.cli")

AMDSEV = Path(__file__).parents[1] / "images/fixtures/ovmf_AmdSev_suffix.bin"
DIGEST = "0123456789abcdef" * 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files of a launch."""
    (tmp_path / "OVMF.fd").write_bytes(AMDSEV.read_bytes())
    (tmp_path / "vmlinuz").write_bytes(b"kernel")
    (tmp_path / "initrd").write_bytes(b"initrd")
    (tmp_path / "VARS.fd").write_bytes(bytes(0x2000))
    (tmp_path / "svsm.bin").write_bytes(svsm_image(start=0, size=0x4000))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs sev-snp-measure in this process."""

    def run(*args: str) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["sev-snp-measure", *args])
        try:
            code = tool.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capfd.readouterr())

    return run


LINES = """
--mode snp --vcpus 1 --vcpu-type EPYC-v4 --ovmf OVMF.fd
--mode snp --vcpus=4 --vcpu-type=EPYC-Milan --ovmf=OVMF.fd --guest-features=0x21
--mode snp --vcpus 2 --vcpu-sig 0x800f12 --ovmf OVMF.fd --kernel vmlinuz
--mode snp --vcpus 2 --vcpu-sig 1 --ovmf OVMF.fd --kernel vmlinuz --initrd initrd
--mode snp --vcpus 2 --vcpu-type EPYC --ovmf OVMF.fd --kernel vmlinuz --append console=ttyS0
--mode snp --vcpus 1 --vcpu-family 23 --vcpu-model 49 --vcpu-stepping 0 --ovmf OVMF.fd
--mode snp --vcpus 1 --vcpu-type EPYC-v4 --vcpu-sig 0x800f12 --ovmf OVMF.fd
--mode snp --vcpus 2 --vmm-type ec2 --ovmf OVMF.fd --kernel vmlinuz --initrd initrd
--mode snp --vcpus 2 --vmm-type gce --ovmf OVMF.fd --output-format base64
--mode snp --vcpus 2 --vmm-type QEMU --vcpu-type EPYC-Turin --ovmf OVMF.fd --guest-features 0
--mode snp --vcpus 1 --vcpu-type EPYC-v4 --ovmf OVMF.fd --kernel vmlinuz --initrd= --append=
--mode snp --vcpus 1 --vcpu-type EPYC-v4 --ovmf OVMF.fd --kernel= --initrd= --append=
--mode snp --vcpus 1 --vcpu-type EPYC-v4 --ovmf OVMF.fd --snp-ovmf-hash={digest}
--mode snp --vcpus 1 --vcpu-type EPYC-v4 --ovmf OVMF.fd --snp-ovmf-hash=
--mode snp:ovmf-hash --ovmf OVMF.fd
--mode snp:ovmf-hash --ovmf OVMF.fd --vcpus 4 --vcpu-type EPYC
--mode seves --vcpus 1 --vcpu-type EPYC-v4 --ovmf OVMF.fd
--mode seves --vcpus 4 --vcpu-type EPYC-Rome --ovmf OVMF.fd --kernel vmlinuz --append quiet
--mode seves --vcpus 2 --vmm-type ec2 --ovmf OVMF.fd --output-format base64
--mode sev --ovmf OVMF.fd
--mode sev --ovmf OVMF.fd --kernel vmlinuz --initrd initrd --append quiet
--mode sev --ovmf OVMF.fd --output-format base64
--mode seves --vcpus 3 --vcpu-type EPYC-v4 --ovmf OVMF.fd --dump-vmsa
--mode snp --vcpus 3 --vcpu-type EPYC-v4 --ovmf OVMF.fd --dump-vmsa --guest-features 0x21
--mode snp --vcpus 2 --vcpu-t EPYC-v4 --ov OVMF.fd --guest 0x21 --out base64
"""
SVSM_LINES = """
--vcpus 2 --vcpu-type EPYC-v4 --ovmf OVMF.fd --svsm svsm.bin --vars-size 8192
--vcpus 4 --vcpu-type EPYC-Milan --ovmf OVMF.fd --svsm svsm.bin --vars-file VARS.fd
--vcpus 1 --vcpu-type EPYC --ovmf OVMF.fd --svsm svsm.bin --vars-size 8192 --dump-vmsa
"""


def dumped(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("vmsa*"))}
    for name in found:
        (folder / name).unlink()
    return found


@pytest.mark.parametrize("line", LINES.strip().splitlines())
def test_command_line_of_the_other_tool_prints_what_it_prints(
    cli: Cli, folder: Path, other: Any, line: str
) -> None:
    words = line.format(digest=DIGEST).split()
    expected = other(*words)
    files = dumped(folder)
    done = cli("measure", *words)
    assert (expected.code, done.code, done.out) == (0, 0, expected.out)
    assert bool(files) == ("--dump-vmsa" in words)
    assert dumped(folder) == files


@pytest.mark.parametrize("line", SVSM_LINES.strip().splitlines())
def test_command_line_with_an_svsm_needs_one_word_more(
    cli: Cli, folder: Path, other: Any, line: str
) -> None:
    words = ["--mode", "snp:svsm", *line.split()]
    expected = other(*words)
    files = dumped(folder)
    assert expected.code == 0
    assert cli("measure", *words, "--compat", "sev-snp-measure").out == expected.out
    assert dumped(folder) == files
    assert cli("measure", *words).out not in ("", expected.out)


def test_verbose_behind_the_command_is_that_before_it(cli: Cli, folder: Path) -> None:
    before = cli("-v", "measure", "OVMF.fd")
    assert "0x0000fffff000 NORMAL" in before.err
    assert cli("measure", "-v", "OVMF.fd") == before
    assert cli("measure", "--verbose", "OVMF.fd") == before


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_options_of_the_other_tool_are_all_here(cli: Cli, other: Any) -> None:
    theirs = options(other("--help").out) - {"--version", "--mode'"}
    assert len(theirs) > 20
    assert theirs - options(cli("measure", "--help").out) == set()


@pytest.mark.parametrize("choice", ["--mode", "--output-format"])
def test_choices_of_the_other_tool_are_all_here(cli: Cli, other: Any, choice: str) -> None:
    def choices(text: str) -> set[str]:
        found = re.search(re.escape(choice) + r"\s+\{([^}]*)\}", text)
        assert found is not None
        return set(re.sub(r"\s", "", found[1]).split(","))

    theirs = choices(other("--help").out)
    assert theirs <= choices(cli("measure", "--help").out)


# Refusals


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--mode snp:svsm", "--mode snp:svsm needs --svsm FILE, and --vars-size or --vars-file"),
        ("--mode snp:svsm --svsm svsm.bin", "--svsm needs --vars-size BYTES or --vars-file FILE"),
        ("--svsm svsm.bin", "--svsm needs --vars-size BYTES or --vars-file FILE"),
        ("--mode snp --svsm svsm.bin", "--svsm is for --mode snp:svsm, not for snp"),
        ("--mode seves --svsm svsm.bin", "--svsm is for --mode snp:svsm, not for seves"),
        ("--mode sev --dump-vmsa", "--dump-vmsa: a SEV guest has no VMSAs, see --mode seves"),
        ("--mode sev --log x", "--log is a log of an SNP launch, which --mode sev is not"),
        ("--mode snp:ovmf-hash --log x", "--log is a log of an SNP launch, which --mode snp:ovmf-"),
        ("--mode snp:ovmf-hash --dump-vmsa", "--dump-vmsa: --mode snp:ovmf-hash is of firmware"),
        (f"--mode sev --snp-ovmf-hash {DIGEST}", "--snp-ovmf-hash is for --mode snp, not for sev"),
        ("--snp-ovmf-hash 00", "a launch digest has 96 hex digits, this has 2"),
        (f"--vmm-type alioth --snp-ovmf-hash {DIGEST}", "alioth launches its metadata first"),
        ("--svsm svsm.bin --vars-file nosuch", "nosuch: can't be read: No such file or directory"),
        ("--svsm svsm.bin --vars-size 100", "a variable store of 100 bytes is not a number of 4"),
        ("--svsm nosuch --vars-size 0", "nosuch: can't be read: No such file or directory"),
        ("--initrd initrd", "an initrd goes with a kernel, and there is none"),
        ("--append quiet", "a kernel command line goes with a kernel, and there is none"),
        ("--kernel nosuch", "nosuch: can't be read: No such file or directory"),
        ("--mode seves --kernel nosuch", "nosuch: can't be read: No such file or directory"),
        ("--vmm-type mine.json", "mine.json: can't be read: No such file or directory"),
        ("--vcpu-type EPYC --vcpu-sig 1", "give the CPU once: --vcpu-type, or --vcpu-sig, or "),
        (
            "--vcpu-type Milan",
            "unknown CPU type 'Milan'; near to it: EPYC-Milan, EPYC-Milan-v3, EPYC-Milan-v2; "
            "known are EPYC, EPYC-v1, ",
        ),
    ],
)
def test_choice_that_makes_no_sense_is_refused(
    cli: Cli, folder: Path, words: str, sentence: str
) -> None:
    assert sentence in refused(cli("measure", *words.split(), "--ovmf", "OVMF.fd"))
    assert not list(folder.glob("vmsa*"))
    assert not (folder / "x").exists()


@pytest.mark.parametrize("mode", ["snp", "snp:ovmf-hash"])
def test_firmware_without_metadata_is_refused_where_the_other_tool_prints_a_digest(
    cli: Cli, folder: Path, other: Any, mode: str
) -> None:
    (folder / "plain.fd").write_bytes(ovmf(entries=standard_entries(metadata=None)))
    words = ["--mode", mode, "--vcpus", "1", "--vcpu-type", "EPYC-v4", "--ovmf", "plain.fd"]
    assert other(*words).code == 0
    assert "the GUIDed table has no SEV metadata" in refused(cli("measure", *words))


def test_features_without_snp_active_are_measured_and_remarked(cli: Cli, folder: Path) -> None:
    done = cli("measure", "--guest-features", "0x20", "OVMF.fd")
    assert (done.code, len(done.out)) == (0, 97)
    assert done.err == "SEV features 0x20 lack bit 0 (SNP active), which every SNP guest has\n"


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_kernel_that_comes_by_a_pipe_is_the_files(cli: Cli, folder: Path, kind: str) -> None:
    expected = cli("measure", "--kernel", "vmlinuz", "OVMF.fd").out
    if kind == "pipe":
        read, write = os.pipe()
        os.write(write, b"kernel")
        os.close(write)
        done = cli("measure", "--kernel", f"/dev/fd/{read}", "OVMF.fd")
        os.close(read)
    else:
        done = cli("measure", "--kernel", folder / "vmlinuz", "OVMF.fd")
    assert done.out == expected


@pytest.mark.parametrize(
    ("left", "rule"),
    [
        (5000, "firmware of 0x1388 bytes: the size must be a multiple of 4 KiB"),
        (0x3000, "no GUIDed table: its footer GUID"),
        (0, "the image is empty"),
    ],
)
@pytest.mark.parametrize("mode", ["snp", "snp:ovmf-hash", "seves"])
def test_firmware_whose_pipe_broke_off_is_refused(
    cli: Cli, mode: str, left: int, rule: str
) -> None:
    read, write = os.pipe()
    os.write(write, ovmf()[:left])
    os.close(write)
    words = ("--mode", mode, "--vcpus", 2, "--ovmf", f"/dev/fd/{read}")
    sentence = refused(cli("measure", *words))
    os.close(read)
    assert sentence.startswith(f"/dev/fd/{read}: ")
    assert rule in sentence


# Dumped VMSAs


def test_dump_over_what_is_launched_is_refused_and_leaves_it(cli: Cli, folder: Path) -> None:
    os.rename("initrd", "vmsa1.bin")
    kernel = ("--kernel", "vmlinuz", "--initrd", "vmsa1.bin")
    done = cli("measure", "--dump-vmsa", "--vcpus", 2, *kernel, "OVMF.fd")
    assert refused(done) == (
        "--dump-vmsa vmsa1.bin would overwrite vmsa1.bin, which is launched from"
    )
    assert dumped(folder) == {"vmsa1.bin": b"initrd"}


def test_dump_over_an_older_one_replaces_it(cli: Cli, folder: Path) -> None:
    (folder / "vmsa0.bin").write_bytes(b"old")
    assert cli("measure", "--dump-vmsa", "OVMF.fd").code == 0
    assert len((folder / "vmsa0.bin").read_bytes()) == 4096


def test_dump_that_cannot_be_written_leaves_nothing_half_written(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = os.fsync

    def full(fd: int) -> None:
        if "vmsa1" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        settled(fd)

    monkeypatch.setattr(os, "fsync", full)
    done = cli("measure", "--dump-vmsa", "--vcpus", 3, "OVMF.fd")
    assert (done.code, done.out) == (1, "")
    assert done.err == "kvmlaunch: vmsa1.bin: No space left on device\n"
    assert [path.name for path in folder.iterdir() if "vmsa" in path.name] == ["vmsa0.bin"]


def test_dump_of_pages_of_ours_has_those_that_are_measured(cli: Cli, folder: Path) -> None:
    done = cli(
        "measure", "--dump-vmsa", "--vmsa", ":0", "--vmsa", ":1@0x5000", "--vcpus", 3, AMDSEV
    )
    assert done.code == 0
    assert sorted(dumped(folder)) == ["vmsa0.bin", "vmsa1.bin"]


# Other commands


def test_inspect_shows_the_vmm_and_its_states(cli: Cli, folder: Path) -> None:
    text = cli("inspect", "--vmm-type", "EC2", "--kernel", "vmlinuz", "OVMF.fd").out
    assert "VMM ec2: VMSAs are measured as they are, at GPA 0xfffffffff000" in text
    assert "1 NORMAL     kernel-hashes (OVMF.fd metadata[5])" in text
    shown = json.loads(cli("inspect", "--json", "--vmm-type", "EC2", "OVMF.fd").out)
    assert (shown["vmm"], shown["steps"][-1]["type"]) == ("ec2", "CPUID")
    assert shown["vcpus"][0]["rdx"] == "0x600"


def test_inspect_shows_an_svsm(cli: Cli, folder: Path) -> None:
    done = cli("inspect", "--svsm", "svsm.bin", "--vars-size", "0", "OVMF.fd")
    assert "4 NORMAL     svsm (svsm.bin)" in done.out


def test_run_with_a_kernel_is_refused_with_the_reason(cli: Cli, folder: Path) -> None:
    sentence = refused(cli("run", "--platform", "sim", "--kernel", "vmlinuz", "OVMF.fd"))
    assert sentence == (
        "--kernel: the kernel itself goes to OVMF by QEMU's fw_cfg, a device that this launcher "
        "doesn't have; measure and inspect take it"
    )


def test_run_with_features_that_no_guest_has_is_refused(cli: Cli, halt: Path) -> None:
    done = cli("run", "--platform", "sim", "--guest-features", "0x20", halt)
    assert done.code == 2
    assert done.out == ""
    assert "SEV features 0x20 lack bit 0 (SNP active)" in done.err


def mine(folder: Path, **values: Any) -> str:
    text = {"format": "kvmlaunch.vmm/1", "name": "mine", "base": "ec2", **values}
    (folder / "mine.json").write_text(json.dumps(text))
    return "mine.json"


@pytest.mark.parametrize("changed", [False, True])
def test_run_with_another_vmm_says_if_that_changes_the_digest(
    cli: Cli, folder: Path, changed: bool
) -> None:
    """The firmware is too small to run: its launch is what counts."""
    vmm = ("--vmm-type", mine(folder, registers={"tsc_aux": 7} if changed else {"rsi": 7}))
    predicted = cli("measure", *vmm, "OVMF.fd").out.strip()
    launch = ("--platform", "sim", "--retry-cpuid", "--timeout", "10")
    said = cli("run", *launch, *vmm, "OVMF.fd").err
    assert ("mine has other VMSAs than KVM makes here: the launch digest is" in said) == changed
    assert (f"not {predicted}" in said) == changed
    assert (f"launch digest {predicted}" in said) == (not changed)
    assert "prediction and host agree on all " in said


def test_profile_that_breaks_a_rule_is_refused_by_file_key_and_rule(cli: Cli, folder: Path) -> None:
    name = mine(folder, registers={"cs.attrib": "0x10000"})
    assert refused(cli("measure", "--vmm-type", name, "OVMF.fd")) == (
        "mine.json: registers.cs.attrib: 0x10000 does not fit in 16 bits"
    )


def test_log_with_a_known_firmware_starts_behind_it(cli: Cli, folder: Path) -> None:
    whole = cli("measure", "--log", "whole", "OVMF.fd").out
    known = cli("measure", "--mode", "snp:ovmf-hash", "OVMF.fd").out.strip()
    assert cli("measure", "--snp-ovmf-hash", known, "--log", "rest", "OVMF.fd").out == whole
    pages = {
        name: [(e["digest"], e["gpa"]) for e in page_events(folder / name)]
        for name in ("whole", "rest")
    }
    assert pages["whole"][1:] == pages["rest"]
    assert pages["whole"][0][0] == known
