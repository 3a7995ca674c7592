"""kvmlaunch report show and verify: output, exit codes, and one sentence for bad input."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import pytest

from tests.attestation import ca
from tests.cli.command import Cli, Done

REPORT = ca.report(measurement=b"\xab" * 48, host_data=b"h" * 32, vmpl=1)
HEX = {"--digest": "ab" * 48, "--host-data": "0x" + (b"h" * 32).hex(), "--vmpl": "1"}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report as a file."""
    path = tmp_path / "report.bin"
    path.write_bytes(REPORT)
    return path


@pytest.fixture
def trust(tmp_path: Path) -> list[object]:
    """Options for the chain, and for a root that isn't AMD's."""
    leaf, rest, ark = (tmp_path / name for name in ("vcek.der", "chain.pem", "ark.pem"))
    leaf.write_bytes(ca.vcek().der)
    rest.write_bytes(ca.ark().pem + ca.ask().pem)
    ark.write_bytes(ca.ark().pem)
    return ["--certs", rest, "--certs", leaf, "--trust-ark", ark, "--at", "2025-06-01T00:00Z"]


def test_show_when_a_file_prints_its_fields(cli: Cli, report: Path) -> None:
    done = cli("report", "show", report)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["version", "3"]
    assert f"measurement          {'ab' * 48}" in lines
    assert "reported_tcb         0x7308000000000003 bootloader=3,tee=0,snp=8,microcode=115" in lines


def test_show_when_standard_input_takes_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    text = base64.encodebytes(REPORT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    done = cli("report", "show", "-", "--json")
    assert done.code == 0
    assert json.loads(done.out)["fields"]["host_data"] == (b"h" * 32).hex()


def test_show_when_a_product_is_given_takes_its_layout(cli: Cli, report: Path) -> None:
    done = cli("report", "show", report, "--product", "Turin", "--json")
    assert json.loads(done.out)["fields"]["launch_tcb"]["parts"]["fmc"] == 3


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "no attestation report: that is 1184 bytes, raw, hex or base64, and this is 0 bytes"),
        (REPORT[:-1], "no attestation report: that is 1184 bytes, raw, hex or base64, and this is "
         "1183 bytes"),
    ],
)  # fmt: skip
def test_show_when_there_is_no_report_is_bad_input(
    cli: Cli, tmp_path: Path, data: bytes, sentence: str
) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    done = cli("report", "show", path)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"kvmlaunch: {path}: {sentence}\n"


def verify(cli: Cli, *args: object) -> Done:
    return cli("report", "verify", *args)


def test_verify_when_all_is_right_is_0(cli: Cli, report: Path, trust: list[object]) -> None:
    options = [word for pair in HEX.items() for word in pair]
    done = verify(cli, report, *trust, *options, "--policy", "smt", "--min-tcb", "snp=8")
    assert (done.code, done.err) == (0, "")
    names = [line.split()[1] for line in done.out.splitlines()]
    assert names == [
        "root:", "ark_signature:", "ark_validity:", "ask_signature:", "ask_validity:",
        "vcek_signature:", "vcek_validity:", "signature:", "product:", "reported_tcb:",
        "chip_id:", "measurement:", "host_data:", "policy:", "vmpl:", "min_reported_tcb:",
        "min_committed_tcb:", "min_current_tcb:",
    ]  # fmt: skip


def test_verify_when_fields_differ_is_1_and_names_each(
    cli: Cli, report: Path, trust: list[object]
) -> None:
    done = verify(cli, report, *trust, "--digest", "cd" * 48, "--vmpl", "0", "--json")
    assert done.code == 1
    assert done.errors == ["kvmlaunch: not verified: measurement, vmpl"]
    verdict = json.loads(done.out)
    assert not verdict["ok"]
    failed = [check for check in verdict["checks"] if not check["ok"]]
    assert [(c["name"], c["got"], c["expected"]) for c in failed] == [
        ("measurement", "ab" * 48, "cd" * 48),
        ("vmpl", "0x1", "0x0"),
    ]


def test_verify_when_the_image_gives_the_digest_compares_it(
    cli: Cli, halt: Path, tmp_path: Path, trust: list[object]
) -> None:
    digest = cli("measure", halt, "--vcpus", "2").out.strip()
    path = tmp_path / "mine"
    path.write_bytes(ca.report(measurement=bytes.fromhex(digest)))
    # --policy and --host-data are the report's here, and may be any
    fields = ("--policy", "0x30000", "--host-data", "00" * 32)
    assert verify(cli, path, "--image", halt, "--vcpus", "2", *trust, *fields).code == 0
    done = verify(cli, path, *trust, "--image", halt)
    assert (done.code, done.errors) == (1, ["kvmlaunch: not verified: measurement"])


def test_verify_when_the_root_is_not_amds_needs_trust(
    cli: Cli, report: Path, trust: list[object]
) -> None:
    at = trust.index("--trust-ark")
    done = verify(cli, report, *trust[:at], *trust[at + 2 :])
    assert (done.code, done.errors) == (1, ["kvmlaunch: not verified: root"])


def test_verify_when_no_time_is_given_takes_now(
    cli: Cli, report: Path, trust: list[object]
) -> None:
    done = verify(cli, report, *trust[:-2])
    assert done.errors == ["kvmlaunch: not verified: ark_validity, ask_validity, vcek_validity"]


def test_verify_when_a_list_revokes_the_ask_fails(
    cli: Cli, report: Path, trust: list[object], tmp_path: Path
) -> None:
    path = tmp_path / "crl"
    path.write_bytes(ca.crl((0x10001,)))
    done = verify(cli, report, *trust, "--crl", path)
    assert done.errors == ["kvmlaunch: not verified: ask_revocation"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--digest", "ab" * 32], "a launch digest has 96 hex digits, this has 64"),
        (["--host-data", "ab" * 31], "--host-data is 31 bytes, it must be 32"),
        (["--id-key-digest", "?"], "--id-key-digest is neither hex nor base64"),
        (["--min-tcb", "snp=300"], "the TCB's snp is '300', must be a number up to 255"),
        (["--policy", "none"], "no policy bit is named 'none'"),
        (["--crl", "/dev/null"], "/dev/null: no revocation list"),
        (["--certs", "/dev/null"], "/dev/null: no certificate"),
        (["--certs", "/nowhere"], "/nowhere: can't be read: No such file or directory"),
        (["--trust-ark", "/dev/zero"], "/dev/zero: is larger than 4194304 bytes"),
    ],
)
def test_verify_when_an_option_is_bad_is_2_and_one_sentence(
    cli: Cli, report: Path, trust: list[object], options: list[str], sentence: str
) -> None:
    done = verify(cli, report, *trust, *options)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert sentence in done.err


def test_verify_when_digest_and_image_are_given_is_2(
    cli: Cli, report: Path, halt: Path, trust: list[object]
) -> None:
    done = verify(cli, report, "--image", halt, *trust, "--digest", "ab" * 48)
    assert (done.code, done.out) == (2, "")
    assert "give the launch digest once" in done.err


@pytest.mark.parametrize(
    "words", [(), ("show",), ("verify", "x"), ("verify", "x", "--certs", "y", "--at", "noon")]
)
def test_report_when_words_are_missing_is_usage(cli: Cli, words: tuple[str, ...]) -> None:
    assert cli("report", *words).code == 2
