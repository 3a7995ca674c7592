"""The page log: schema, equality of prediction and launch, and disks that are full."""

from __future__ import annotations

import base64
import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.uapi import RealPlatform
from kvmlaunch.version import __version__
from tests.cli.command import Cli, Done, events, page_events, spawn
from tests.images.builders import Seg, elf64
from tests.images.builders import ovmf as synthetic_ovmf

SIM = ("--platform", "sim")
IMAGES = {
    "flat": b"\xf4" * 5000,
    "elf-with-bss": elf64([Seg(0x100000, b"\xf4" * 16, memsz=0x5000)]),
    "firmware": synthetic_ovmf(),
}


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image of each kind."""
    path = tmp_path / f"{request.param}.img"
    path.write_bytes(IMAGES[request.param])
    return path


def logged(cli: Cli, path: Path, *args: object) -> list[dict[str, Any]]:
    """The events of a command that gets to its end; firmware made up for a test fails there."""
    assert cli(args[0], "--log", path, *args[1:]).code in (0, 1)
    return events(path)


@pytest.mark.parametrize("vcpus", [1, 3])
def test_log_of_measure_and_run_has_the_same_pages(
    cli: Cli, image: Path, tmp_path: Path, vcpus: int
) -> None:
    predicted, launched = tmp_path / "m.jsonl", tmp_path / "r.jsonl"
    logged(cli, predicted, "measure", "--vcpus", vcpus, image)
    logged(cli, launched, "run", *SIM, "--vcpus", vcpus, image)
    assert page_events(predicted) == page_events(launched)


def test_log_of_measure_and_run_has_the_same_lines_for_a_page(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    predicted, launched = tmp_path / "m.jsonl", tmp_path / "r.jsonl"
    logged(cli, predicted, "measure", halt)
    logged(cli, launched, "run", *SIM, halt)
    assert predicted.read_bytes().splitlines()[1:3] == launched.read_bytes().splitlines()[1:3]


def test_log_with_ioctls_has_the_same_pages(cli: Cli, image: Path, tmp_path: Path) -> None:
    predicted, launched = tmp_path / "m.jsonl", tmp_path / "r.jsonl"
    logged(cli, predicted, "measure", image)
    logged(cli, launched, "run", *SIM, "--ioctls", image)
    assert page_events(predicted) == page_events(launched)


def test_log_header_names_platform_image_and_policy(cli: Cli, halt: Path, tmp_path: Path) -> None:
    first = logged(cli, tmp_path / "x.jsonl", "run", *SIM, "--sim", "6.18", halt)[0]
    assert first == {
        "event": "header",
        "schema": "kvmlaunch.log/1",
        "platform": "sim",
        "profile": "6.18",
        "image": str(halt),
        "sha256": hashlib.sha256(halt.read_bytes()).hexdigest(),
        "policy": "0x30000",
        "vmsa_mode": "sync",
        "version": __version__,
    }


def test_log_header_of_measure_claims_no_platform(cli: Cli, halt: Path, tmp_path: Path) -> None:
    first = logged(cli, tmp_path / "x.jsonl", "measure", halt)[0]
    assert (first["platform"], first["profile"]) == ("prediction", "")


def test_log_header_of_a_plain_vm_names_the_real_platform(
    cli: Cli, halt: Path, tmp_path: Path, real_kvm: RealPlatform
) -> None:
    options = ("--platform", "kvm", "--vm-type", "plain")
    first = logged(cli, tmp_path / "x.jsonl", "run", *options, halt)[0]
    assert (first["platform"], first["vmsa_mode"]) == ("kvm", "none")


def test_log_of_a_plain_vm_ends_with_the_exit(
    cli: Cli, halt: Path, tmp_path: Path, real_kvm: RealPlatform
) -> None:
    options = ("--platform", "kvm", "--vm-type", "plain")
    last = logged(cli, tmp_path / "x.jsonl", "run", *options, halt)[-1]
    assert last == {"event": "exit", "vcpu": 0, "reason": "KVM_EXIT_HLT", "detail": "KVM_EXIT_HLT"}


def test_log_page_has_the_hash_of_its_contents(cli: Cli, halt: Path, tmp_path: Path) -> None:
    page = logged(cli, tmp_path / "x.jsonl", "measure", halt)[1]
    contents = hashlib.sha384(b"\xf4".ljust(4096, b"\0")).digest()
    # PAGE_INFO (AMD 56860): digest, contents, length, type, imi, VMPL permissions, GPA.
    info = bytes(48) + contents + (0x70).to_bytes(2, "little") + b"\x01\0" + bytes(4)
    info += (0x1000).to_bytes(8, "little")
    assert page == {
        "event": "page",
        "seq": 0,
        "gpa": "0x1000",
        "type": "NORMAL",
        "contents": contents.hex(),
        "digest": hashlib.sha384(info).hexdigest(),
        "origin": "halt.bin+0x0",
        "label": "image",
    }


def test_log_vmsa_is_at_the_kernels_address(cli: Cli, halt: Path, tmp_path: Path) -> None:
    records = logged(cli, tmp_path / "x.jsonl", "measure", "--vcpus", 2, halt)
    vmsas = [record for record in records if record["event"] == "vmsa"]
    # INITIAL_VMSA_GPA of Linux svm/sev.c.
    assert [(v["seq"], v["vcpu"], v["gpa"], v["type"], v["origin"]) for v in vmsas] == [
        (1, 0, "0xfffffffff000", "VMSA", "kvm-sync"),
        (2, 1, "0xfffffffff000", "VMSA", "kvm-sync"),
    ]


def test_log_contents_are_zeros_where_none_is_measured(cli: Cli, tmp_path: Path) -> None:
    image = tmp_path / "F.fd"
    image.write_bytes(IMAGES["firmware"])
    records = logged(cli, tmp_path / "x.jsonl", "measure", image)
    unmeasured = {r["type"] for r in records if r.get("contents") == "0" * 96}
    assert unmeasured == {"ZERO", "SECRETS", "CPUID"}


def test_log_of_debian_ovmf_counts_its_pages(cli: Cli, ovmf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    logged(cli, path, "run", *SIM, "--ovmf", ovmf)
    assert [event["seq"] for event in page_events(path)] == list(range(544))


def test_log_finish_has_the_printed_digest(cli: Cli, halt: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    digest = cli("measure", "--log", path, halt).out.strip()
    assert events(path)[-1] == {"event": "finish", "digest": digest, "pages": 2, "predicted": True}


def test_log_finish_of_a_launch_says_that_the_host_agrees(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    records = logged(cli, tmp_path / "x.jsonl", "run", *SIM, halt)
    assert [r["host_agrees"] for r in records if r["event"] == "finish"] == [True]


def test_log_to_stdout_replaces_the_digest(cli: Cli, halt: Path) -> None:
    lines = cli("measure", "--log", "-", halt).out.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["header", "page", "vmsa", "finish"]


def test_log_with_ioctls_has_the_launch_in_order(cli: Cli, halt: Path, tmp_path: Path) -> None:
    records = logged(cli, tmp_path / "x.jsonl", "run", *SIM, "--ioctls", halt)
    names = [r["name"] for r in records if r["event"] == "ioctl"]
    wanted = ["SEV_INIT2", "SNP_LAUNCH_START", "SNP_LAUNCH_UPDATE", "SNP_LAUNCH_FINISH"]
    assert [n.removeprefix("KVM_").removeprefix("SEV_SNP_") for n in names if "LAUNCH" in n] == [
        name.removeprefix("SNP_") for name in wanted[1:]
    ]
    assert names.index("KVM_SEV_INIT2") < names.index("KVM_CREATE_VCPU")


def test_log_with_ioctls_keeps_errno_and_firmware_word(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    cli("run", *SIM, "--ioctls", "--log", path, "--sim-fault", "SNP_LAUNCH_START:fw=7", halt)
    (failed,) = (r for r in events(path) if r.get("name") == "KVM_SEV_SNP_LAUNCH_START")
    assert (failed["ret"], failed["errno"], failed["fw_error"]) == (-1, 5, 7)


def test_log_of_a_failed_launch_holds_what_was_done(cli: Cli, guests: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    fault = ("--sim-fault", "SNP_LAUNCH_UPDATE:fw=0x1a@3+")
    assert cli("run", *SIM, *fault, "--log", path, guests / "hello.elf").code == 1
    assert [event["event"] for event in events(path)] == ["header", "page", "page"]


def full(done: Done, path: object) -> bool:
    """True if the command failed because of the log, and said only that."""
    sentence = f"kvmlaunch: log {path}: No space left on device"
    return (done.code, done.out, done.errors) == (1, "", [sentence])


@pytest.mark.parametrize("command", [("measure",), ("run", *SIM)])
def test_log_on_a_full_disk_fails_with_one_sentence(
    cli: Cli, halt: Path, command: tuple[str, ...]
) -> None:
    assert full(cli(*command, "--log", "/dev/full", halt), "/dev/full")


def test_log_on_a_full_disk_during_a_plain_run_fails_with_one_sentence(
    cli: Cli, halt: Path, real_kvm: RealPlatform
) -> None:
    done = cli("run", "--platform", "kvm", "--vm-type", "plain", "--log", "/dev/full", halt)
    assert full(done, "/dev/full")


@pytest.mark.parametrize("command", [("measure",), ("run", *SIM)])
@pytest.mark.parametrize("limit", [100, 1000, 70_000])
def test_log_when_the_disk_fills_up_keeps_whole_lines(
    tmp_path: Path, command: tuple[str, ...], limit: int
) -> None:
    image, log = tmp_path / "big.bin", tmp_path / "x.jsonl"
    image.write_bytes(bytes(400 * 4096))
    done = spawn(
        *(*command, "--log", log, image),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.code == 1
    assert done.errors == [f"kvmlaunch: log {log}: File too large"]
    assert log.stat().st_size <= limit
    events(log)


def test_log_in_a_missing_directory_fails_with_one_sentence(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    path = tmp_path / "no" / "x.jsonl"
    done = cli("measure", "--log", path, halt)
    assert (done.code, done.out) == (1, "")
    assert done.errors == [f"kvmlaunch: log {path}: No such file or directory"]


def test_log_that_is_a_directory_fails_with_one_sentence(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    done = cli("measure", "--log", tmp_path, halt)
    assert (done.code, done.out) == (1, "")
    assert done.errors == [f"kvmlaunch: log {tmp_path}: Is a directory"]


def test_log_replaces_an_older_one(cli: Cli, halt: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"x" * 100_000)
    assert len(logged(cli, path, "measure", halt)) == 4


def test_log_names_an_image_in_no_encoding(halt: Path, tmp_path: Path) -> None:
    image = bytes(tmp_path) + b"/\xff.bin"
    Path(image.decode(errors="surrogateescape")).write_bytes(halt.read_bytes())
    log = tmp_path / "x.jsonl"
    spawn("measure", "--log", log, image.decode(errors="surrogateescape"))
    assert events(log)[0]["image"] == f"{tmp_path}/\udcff.bin"


def test_id_block_with_base64_of_the_other_tool_is_read(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    block, auth = tmp_path / "block", tmp_path / "auth"
    block.write_bytes(base64.b64encode(bytes(96)) + b"\n")
    auth.write_bytes(base64.b64encode(bytes(4096)) + b"\n")
    done = cli("run", *SIM, "--id-block", block, "--id-auth", auth, halt)
    assert done.code == 1
    assert "SNP_LAUNCH_FINISH ret=-5 fw_error=11" in done.err


def test_log_with_ioctls_shows_the_host_data_that_was_sent(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    options = (*SIM, "--ioctls", "--host-data", "0x" + "aB" * 32)
    records = logged(cli, tmp_path / "x.jsonl", "run", *options, halt)
    (finish,) = (r for r in records if r.get("name") == "KVM_SEV_SNP_LAUNCH_FINISH")
    assert finish["sent"]["data"]["host_data"] == "ab" * 32
