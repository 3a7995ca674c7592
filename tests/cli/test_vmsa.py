"""VMSA modes on the command line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.cli.command import Cli, events, page_events

SIM = ("run", "--platform", "sim")


@pytest.fixture
def vmsa_file(tmp_path: Path) -> Path:
    """A VMSA by hand: SEV_FEATURES 1, EFER.SVME, real mode at RIP 0x1000."""
    page = bytearray(4096)
    for offset, value in (
        (0x3B0, 1),
        (0x3E8, 1),
        (0xD0, 0x1000),
        (0x178, 0x1000),
        (0x170, 2),
        (0x158, 0x10),
    ):
        struct.pack_into("<Q", page, offset, value)
    path = tmp_path / "boot.vmsa"
    path.write_bytes(page)
    return path


def digest(cli: Cli, *args: object) -> str:
    done = cli("-q", "measure", *args)
    assert (done.code, done.err) == (0, "")
    return done.out.strip()


@pytest.mark.parametrize("mode", ["page", "direct"])
def test_measure_when_the_mode_has_vmsas_does_not_depend_on_vcpus(
    cli: Cli, halt: Path, mode: str
) -> None:
    digests = {digest(cli, "--vmsa-mode", mode, "--vcpus", n, halt) for n in (1, 2, 8)}
    assert len(digests) == 1


def test_measure_when_a_vmsa_is_given_takes_its_bytes_and_gpa(
    cli: Cli, halt: Path, vmsa_file: Path
) -> None:
    at_2000 = digest(cli, "--vmsa", vmsa_file, halt)
    assert at_2000 == digest(cli, "--vmsa", f"{vmsa_file}:0@0x2000", halt)
    assert at_2000 == digest(cli, "--vmsa", vmsa_file, "--vmsa-gpa", "8192", halt)
    edited = digest(cli, "--vmsa", vmsa_file, "--set-vmsa", "rbx=1", halt)
    moved = digest(cli, "--vmsa", vmsa_file, "--vmsa-gpa", "0x3000", halt)
    assert len({at_2000, edited, moved, digest(cli, "--vmsa-mode", "direct", halt)}) == 4
    bytes_ = vmsa_file.read_bytes()
    vmsa_file.write_bytes(bytes_[:0x318] + b"\1" + bytes_[0x319:])  # RBX
    assert digest(cli, "--vmsa", vmsa_file, halt) == edited


@pytest.mark.parametrize("mode", ["page", "direct"])
def test_run_when_the_mode_is_asked_for_says_so_and_logs_it(
    cli: Cli, halt: Path, tmp_path: Path, mode: str
) -> None:
    log = tmp_path / "log.jsonl"
    done = cli(*SIM, "--vmsa-mode", mode, "--vcpus", 4, "--log", log, halt)
    assert done.code == 0
    assert f"VMSA mode {mode}: as asked" in done.err.splitlines()
    assert f"launch digest {digest(cli, '--vmsa-mode', mode, halt)}" in done.err.splitlines()
    assert (events(log)[0]["vmsa_mode"], events(log)[0]["profile"]) == (
        mode,
        {"page": "vmsa-page", "direct": "direct-vmsa"}[mode],
    )
    (vmsa,) = [event for event in page_events(log) if event["event"] == "vmsa"]
    assert (vmsa["vcpu"], vmsa["gpa"], vmsa["origin"]) == (0, "0x2000", "kvmlaunch:vmsa")


def test_run_when_the_image_has_a_vmsa_takes_the_best_mode_of_the_host(
    cli: Cli, halt: Path, vmsa_file: Path
) -> None:
    for kernel, mode in (("vmsa-page", "page"), ("direct-vmsa", "direct")):
        done = cli(*SIM, "--sim", kernel, "--vmsa", vmsa_file, halt)
        assert done.code == 0
        assert any(line.startswith(f"VMSA mode {mode}: KVM_") for line in done.err.splitlines())


def test_run_when_only_sync_is_left_refuses_unless_allowed(
    cli: Cli, halt: Path, vmsa_file: Path
) -> None:
    options = ("--sim", "7.0", "--vmsa", vmsa_file, "--set-vmsa", "cr2=5")
    refused = cli(*SIM, *options, halt)
    assert (refused.code, len(refused.errors)) == (1, 1)
    assert "needed for this image's launch digest; --allow-digest-change" in refused.errors[0]
    *_, carried, change = refused.err.splitlines()
    assert carried == "vCPU 0: KVM can't carry cr2 (offset 0x240): 0x5 in the VMSA, 0x0 measured"
    allowed = cli(*SIM, "--allow-digest-change", *options, halt)
    assert allowed.code == 0
    lines = allowed.err.splitlines()
    assert lines.index(carried) < lines.index(change) < lines.index(f"launch digest {change[-96:]}")


def test_run_when_sync_is_asked_for_an_image_with_a_vmsa_is_bad_input(
    cli: Cli, halt: Path, vmsa_file: Path
) -> None:
    done = cli(*SIM, "--vmsa-mode", "sync", "--vmsa", vmsa_file, halt)
    assert done.code == 2
    assert done.errors == [
        "kvmlaunch: mode sync changes the launch digest; "
        "--allow-digest-change leaves the VMSAs to KVM all the same"
    ]


def test_measure_when_sync_is_asked_for_says_what_is_lost(
    cli: Cli, halt: Path, vmsa_file: Path
) -> None:
    done = cli("measure", "--vmsa-mode", "sync", "--vmsa", vmsa_file, "--set-vmsa", "cr2=5", halt)
    assert done.code == 0
    assert (
        "vCPU 0: KVM can't carry cr2 (offset 0x240): 0x5 in the VMSA, 0x0 measured"
        in done.err.splitlines()
    )
    assert done.err.splitlines()[-1].endswith(f" to {done.out.strip()}")


def test_run_when_the_host_that_was_asked_for_lacks_the_mode_names_the_number(
    cli: Cli, halt: Path
) -> None:
    done = cli(*SIM, "--sim", "7.0", "--vmsa-mode", "direct", halt)
    assert done.code == 1
    assert done.errors == [
        "kvmlaunch: this host lacks KVM_CAP_SNP_DIRECT_VMSA (number 252: --proposal-cap), "
        "needed for VMSA mode direct"
    ]
    other = cli(*SIM, "--sim", "direct-vmsa", "--vmsa-mode", "direct", *OTHER, halt)
    assert "KVM_CAP_SNP_DIRECT_VMSA (number 251: --proposal-cap)" in other.errors[0]


OTHER = ("--proposal-cap", "DIRECT_VMSA=251")


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ("NO_SUCH=1", "'NO_SUCH=1' names no number of the proposals; known are DIRECT_VMSA, "),
        ("DIRECT_VMSA=x", "'DIRECT_VMSA=x': 'x' is not a number"),
        ("DIRECT_VMSA=1,KVM_CAP_SNP_DIRECT_VMSA=2", "DIRECT_VMSA of the proposals is given twice"),
        ("PAGE_TYPE_VMSA=256", "PAGE_TYPE_VMSA=0x100 doesn't fit into 8 bits"),
        ("SET_VCPU_STATE=0x100000000", "SET_VCPU_STATE=0x100000000 doesn't fit into 32 bits"),
        ("DIRECT_VMSA=-1", "DIRECT_VMSA=-0x1 doesn't fit into 32 bits"),
    ],
)
def test_numbers_when_they_make_no_sense_are_bad_input(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch, numbers: str, sentence: str
) -> None:
    done = cli(*SIM, "--proposal-cap", numbers, halt)
    assert (done.code, len(done.errors)) == (2, 1)
    assert done.errors[0].startswith(f"kvmlaunch: {sentence}")
    monkeypatch.setenv("KVMLAUNCH_PROPOSAL", numbers)
    done = cli(*SIM, halt)
    assert (done.code, len(done.errors)) == (2, 1)
    assert done.errors[0].startswith(f"kvmlaunch: KVMLAUNCH_PROPOSAL: {sentence}")


def test_run_when_a_broken_vmsa_is_forced_is_refused_by_the_kernel(cli: Cli, halt: Path) -> None:
    broken = ("--vmsa-mode", "direct", "--set-vmsa", "vmpl=1")
    assert cli(*SIM, *broken, halt).code == 2
    done = cli(*SIM, *broken, "--force", halt)
    assert done.code == 1
    assert done.errors[0].startswith("kvmlaunch: SNP_LAUNCH_UPDATE ret=-22 fw_error=0 ")
    assert "gpa=0x2000 type=0x2" in done.errors[0]


# Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--vmsa", "FILE:2"), "a VMSA is for vCPU 2, but the guest has 2"),
        (("--vmsa", "FILE", "--vmsa", ":0"), "vCPU 0 has two VMSAs"),
        (("--vmsa", "FILE@0x1000"), "overlaps"),
        (("--vmsa", "FILE@0x5000", "--vmsa", ":1@0x5000"), "overlaps vmsa 1"),
        (("--vmsa", "FILE@0x5000", "--vmsa-gpa", "0x6000"), "vCPU 0's VMSA has two GPAs"),
        (("--vmsa-gpa", "0x200000"), "aligned to 2 MiB, where no vCPU can start (SNP erratum)"),
        (("--vmsa-gpa", "0x5004"), "GPA 0x5004 is not aligned to 4 KiB"),
        (("--vmsa-gpa", "0x7fffffff000"), "is outside the guest's memory"),
        (("--set-vmsa", "nosuch=1"), "a VMSA has no field 'nosuch'"),
        (("--set-vmsa", "cs.nosuch=1"), "nosuch"),
        (("--set-vmsa", "cpl=256"), "cpl 0x100 does not fit in 8 bits"),
        (("--set-vmsa", "cs.attrib=0x10000"), "cs.attrib 0x10000 does not fit in 16 bits"),
        (("--set-vmsa", "cs=1"), "cs takes a segment, not 1"),
        (("--set-vmsa", "rip=ten"), "--set-vmsa rip=ten: 'ten' is not a number"),
        (("--set-vmsa", "rip=" + "1" * 5000), "... is no number of a VMSA: 5000 digits"),
        (("--set-vmsa", "1" * 5000 + ":rip=1"), "... is no number of a VMSA: 5000 digits"),
        (("--vmsa", ":" + "1" * 5000), "... is no number of a VMSA: 5000 digits"),
        (("--vmsa", "@" + "1" * 5000), "... is no number of a VMSA: 5000 digits"),
        (("--set-vmsa", "rip"), "--set-vmsa rip: not [VCPU:]FIELD=VALUE"),
        (("--set-vmsa", "fpreg_xmm=xy"), "--set-vmsa fpreg_xmm=xy: 'xy' is not hex"),
        (("--set-vmsa", "fpreg_xmm=00"), "fpreg_xmm"),
        (("--set-vmsa", "2:rip=1"), "a VMSA is for vCPU 2, but the guest has 2"),
        (("--set-vmsa", "vmpl=1"), "vmpl is 1, but a guest starts at VMPL 0"),
        (("--set-vmsa", "sev_features=0"), "sev_features is 0x0, but the VM's are 0x1"),
        (("--vmsa-mode", "page", "--vmsa", ":1"), "VMSA mode page takes one VMSA"),
    ],
)
def test_vmsa_when_it_makes_no_sense_is_one_sentence(
    cli: Cli, halt: Path, vmsa_file: Path, options: tuple[str, ...], sentence: str
) -> None:
    named = [option.replace("FILE", str(vmsa_file)) for option in options]
    done = cli("measure", "--vcpus", 2, *named, halt)
    assert (done.code, done.out, len(done.errors)) == (2, "", 1)
    assert sentence in done.errors[0]


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_vmsa_file_when_it_is_no_page_names_file_and_size(
    cli: Cli, halt: Path, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(size))
    done = cli("measure", "--vmsa", path, halt)
    assert done.code == 2
    assert done.errors == [f"kvmlaunch: {path}: a VMSA page is 4096 bytes, this file has {size}"]
    missing = cli("measure", "--vmsa", tmp_path / "none", halt)
    assert (missing.code, len(missing.errors)) == (2, 1)
    assert missing.errors[0].endswith("none: can't be read: No such file or directory")


def test_vmsa_when_the_vm_is_plain_is_bad_input(cli: Cli, halt: Path) -> None:
    done = cli("run", "--vm-type", "plain", "--vmsa-gpa", "0x5000", halt)
    assert (done.code, len(done.errors)) == (2, 1)
    assert "VMSA mode direct is for SNP guests" in done.errors[0]


# Inspect


def test_inspect_when_vmsas_are_ours_shows_who_starts_from_which(
    cli: Cli, halt: Path, vmsa_file: Path
) -> None:
    options = ("--vcpus", 4, "--vmsa", f"{vmsa_file}:none@0x8000", "--vmsa", ":1", "--vmsa", ":0")
    lines = cli("inspect", *options, halt).out.splitlines()
    assert [line for line in lines if line.startswith(("VMSA", "vCPU"))] == [
        "VMSA at GPA 0x8000, measured only, no vCPU starts from it (fields that are not 0)",
        "VMSA at GPA 0x2000, vCPU 1 (fields that are not 0)",
        "VMSA at GPA 0x3000, vCPU 0 (fields that are not 0)",
        "vCPU 2-3 without a VMSA, until the guest makes one",
    ]
    assert "pages: 1 NORMAL, 3 VMSA" in lines
    plan = json.loads(cli("inspect", "--json", *options, halt).out)
    assert plan["vmsa_mode"] == "direct"
    assert [(v["gpa"], v["vcpu"], v["origin"]) for v in plan["vmsas"]] == [
        ("0x8000", None, "boot.vmsa"),
        ("0x2000", 1, "kvmlaunch:vmsa"),
        ("0x3000", 0, "kvmlaunch:vmsa"),
    ]
    assert plan["vmsas"][0]["fields"]["rip"] == "0x1000"
