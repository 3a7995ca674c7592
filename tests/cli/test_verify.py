"""kvmlaunch verify and bisect: what they print, log, and return."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.uapi import RealPlatform, Result
from tests.cli.command import Cli, events
from tests.images.builders import Seg, elf64

SIM = ("--platform", "sim")
SWAP = (*SIM, "--sim", "6.12,debug-swap")
MODES = {"sync": (), "page": ("--vmsa-mode", "page"), "direct": ("--vmsa-mode", "direct")}


def digest_of(cli: Cli, *args: object) -> str:
    return cli("measure", *args).out.strip()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vcpus", [1, 3])
def test_verify_of_what_the_host_measures_is_0_with_the_proof(
    cli: Cli, halt: Path, mode: str, vcpus: int
) -> None:
    options = (*MODES[mode], "--vcpus", vcpus, halt)
    done = cli("verify", *SIM, *options)
    digest = digest_of(cli, *options)
    wrong = f"{int(digest[:2], 16) ^ 1:02x}{digest[2:]}"
    unsigned = "  an unsigned ID block with digest"
    assert done.code == 0
    assert done.out.splitlines() == [
        f"confirmed: the firmware measured the predicted launch digest {digest}",
        f"{unsigned} {digest}: SNP_LAUNCH_FINISH gave 0Ah (BAD_SIGNATURE)",
        f"{unsigned} {wrong}: SNP_LAUNCH_FINISH gave 0Bh (BAD_MEASUREMENT)",
    ]


@pytest.fixture
def id_key(cli: Cli, tmp_path: Path) -> Path:
    path = tmp_path / "id.pem"
    assert cli("id-block", "keygen", path).code == 0
    return path


def test_verify_with_a_key_is_proven_by_success(cli: Cli, halt: Path, id_key: Path) -> None:
    done = cli("verify", *SIM, "--id-key", id_key, halt)
    assert done.code == 0
    assert done.out.splitlines()[1:] == [
        f"  a signed ID block with digest {digest_of(cli, halt)}: "
        "SNP_LAUNCH_FINISH gave 00h (SUCCESS)"
    ]


@pytest.mark.parametrize("signed", [False, True])
def test_verify_on_a_host_with_debug_swap_names_the_vmsa(
    cli: Cli, halt: Path, id_key: Path, signed: bool
) -> None:
    done = cli("verify", *SWAP, *(("--id-key", id_key) if signed else ()), halt)
    lines = done.out.splitlines()
    assert (done.code, lines[0]) == (1, "differs: VMSA of vCPU 0")
    assert lines[1].endswith("SNP_LAUNCH_FINISH gave 0Bh (BAD_MEASUREMENT)")
    assert lines[3] == "    sev_features (offset 0x3b0): 0x1 predicted, 0x21 measured"


def test_bisect_on_a_host_with_debug_swap_names_the_feature(cli: Cli, halt: Path) -> None:
    done = cli("bisect", *SWAP, "--vcpus", 2, halt)
    assert done.code == 1
    assert done.out.splitlines()[0] == "differs: VMSA of vCPU 0"
    assert "  GPA      0xfffffffff000" in done.out
    assert "  the host's digest is that of: SEV feature debug_swap is set" in done.out
    assert "    sev_features (offset 0x3b0): 0x1 predicted, 0x21 measured" in done.out


def test_verify_with_the_features_of_the_host_is_0(cli: Cli, halt: Path) -> None:
    assert cli("verify", *SWAP, "--guest-features", "0x21", halt).code == 0


def test_bisect_where_nothing_differs_is_0(cli: Cli, halt: Path) -> None:
    done = cli("bisect", *SIM, halt)
    assert (done.code, done.out) == (
        0,
        f"confirmed: the firmware measured the predicted launch digest {digest_of(cli, halt)}\n",
    )


def test_bisect_of_a_planted_page_shows_origin_type_and_gpa(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmlaunch import platforms
    from tests.launch.planted import Planted, other_content

    real = platforms.open_platform

    def planted(*args: Any, **more: Any) -> Any:
        choice = real(*args, **more)
        return choice._replace(platform=Planted(choice.platform, other_content(0x102000)))

    image = tmp_path / "x.elf"
    image.write_bytes(elf64([Seg(0x100000, bytes(range(256)) * 64)]))
    predicted = next(
        event
        for event in _events(cli, tmp_path, image)
        if event["event"] == "page" and event["gpa"] == "0x102000"
    )
    monkeypatch.setattr(platforms, "open_platform", planted)
    done = cli("bisect", *SIM, image)
    assert done.code == 1
    assert done.out.splitlines() == [
        "differs: first at a page",
        f"  page     {predicted['seq']}",
        "  GPA      0x102000",
        "  type     NORMAL",
        f"  label    {predicted['label']}",
        f"  origin   {predicted['origin']}",
        f"  contents {predicted['contents']} (predicted)",
    ]
    as_json = json.loads(cli("bisect", *SIM, "--json", image).out)
    assert as_json["culprit"] == predicted
    assert as_json["launches"] == len(as_json["questions"])
    verified = cli("verify", *SIM, image)
    assert verified.out.startswith("differs: among the ")


def _events(cli: Cli, tmp_path: Path, image: Path) -> list[dict[str, Any]]:
    log = tmp_path / "predicted.jsonl"
    assert cli("measure", "--log", log, image).code == 0
    return events(log)


@pytest.mark.parametrize(
    ("sim", "agrees"),
    [(SIM, True), (SWAP, False), ((*SIM, "--sim-fault", "SNP_LAUNCH_FINISH:fw=1@1+"), None)],
)
def test_log_of_verify_has_the_pages_and_whether_the_host_agrees(
    cli: Cli, halt: Path, tmp_path: Path, sim: tuple[str, ...], agrees: bool | None
) -> None:
    log = tmp_path / "x.jsonl"
    cli("verify", *sim, "--log", log, halt)
    found = events(log)
    assert [event["event"] for event in found] == ["header", "page", "vmsa", "finish"]
    assert found[0]["platform"] == "sim"
    assert found[-1]["digest"] == digest_of(cli, halt)
    assert found[-1].get("host_agrees") is agrees


def test_log_of_bisect_has_every_question(cli: Cli, halt: Path, tmp_path: Path) -> None:
    log = tmp_path / "x.jsonl"
    cli("bisect", *SWAP, "--log", log, halt)
    found = events(log)
    assert [event["event"] for event in found] == ["header", "bisect"]
    assert found[1]["answer"] == "differs"
    assert [q["answer"] for q in found[1]["questions"]] == ["right", "differs", "right"]


def test_json_of_verify_has_answer_and_proof(cli: Cli, halt: Path) -> None:
    found = json.loads(cli("verify", *SIM, "--json", halt).out)
    assert (found["answer"], found["digest"]) == ("right", digest_of(cli, halt))
    assert [reply["status"] for reply in found["proof"]] == [0x0A, 0x0B]
    found = json.loads(cli("verify", *SWAP, "--json", halt).out)
    assert (found["answer"], found["where"]) == ("differs", "VMSA of vCPU 0")
    assert found["fits"] == "SEV feature debug_swap is set"


def test_verify_that_can_not_say_where_still_says_that_it_differs(cli: Cli, halt: Path) -> None:
    done = cli("verify", *SWAP, "--sim-fault", "SNP_LAUNCH_FINISH:fw=1@2", halt)
    lines = done.out.splitlines()
    assert (done.code, lines[0]) == (
        1,
        f"differs: the firmware measured another launch digest than {digest_of(cli, halt)}",
    )
    assert lines[2].startswith("  where it differs is unknown: not expected: ")


# Exit codes


@pytest.mark.parametrize("command", ["verify", "bisect"])
@pytest.mark.parametrize("status", ["0x00000001", "0x16", "7"])
def test_an_answer_that_is_not_expected_is_unknown_and_1(
    cli: Cli, halt: Path, command: str, status: str
) -> None:
    done = cli(command, *SIM, "--sim-fault", f"SNP_LAUNCH_FINISH:fw={status}@1+", halt)
    assert done.code == 1
    assert done.out.startswith("unknown: ")


@pytest.mark.parametrize("command", ["verify", "bisect"])
@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENXIO, errno.ENODEV])
def test_host_that_was_asked_for_and_is_not_there_is_4(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int
) -> None:
    monkeypatch.setattr(RealPlatform, "open", lambda self, path, flags: Result(-1, code))
    done = cli(command, "--platform", "kvm", halt)
    assert (done.code, done.out, len(done.errors)) == (4, "", 1)


@pytest.mark.parametrize("command", ["verify", "bisect"])
def test_host_that_was_not_asked_for_is_simulated(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(RealPlatform, "open", lambda self, path, flags: Result(-1, errno.ENOENT))
    done = cli(command, halt)
    assert done.code == 0
    assert done.err.startswith("platform sim (6.12): a simulated host, since ")


@pytest.mark.parametrize("command", ["verify", "bisect"])
def test_launch_that_fails_before_the_question_is_1(cli: Cli, halt: Path, command: str) -> None:
    done = cli(command, *SIM, "--sim-fault", "SNP_LAUNCH_UPDATE:fw=0x0a@1+", halt)
    assert (done.code, done.out, len(done.errors)) == (1, "", 1)
    assert done.errors[0].startswith("kvmlaunch: SNP_LAUNCH_UPDATE ret=-5 fw_error=10 ")


@pytest.mark.parametrize("command", ["verify", "bisect"])
@pytest.mark.parametrize(
    ("args", "rule"),
    [
        (("--author-key", "x"), "--author-key needs --id-key FILE"),
        (("--sim", "5.15"), "no kernel profile is named '5.15'"),
        (("--sim-fault", "nonsense"), "fault 'nonsense'"),
        (("--id-key", "/nosuch"), "/nosuch: can't be read"),
        (("--policy", "0"), "bit 17"),
    ],
)
def test_bad_input_is_2_with_one_sentence(
    cli: Cli, halt: Path, tmp_path: Path, command: str, args: tuple[str, ...], rule: str
) -> None:
    log = tmp_path / "x.jsonl"
    done = cli("-q", command, *SIM, "--log", log, *args, halt)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert rule in done.err
    assert not log.exists()


@pytest.mark.parametrize("command", ["verify", "bisect"])
def test_help_says_what_is_not_confirmed_on_hardware(cli: Cli, command: str) -> None:
    text = " ".join(cli(command, "--help").out.split())
    assert "not confirmed on" in text
    assert "hardware" in text
