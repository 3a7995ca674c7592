"""kvmlaunch run --certs and --chain-out, and report get: a report from guest to verification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmlaunch.platforms import Choice
from kvmlaunch.sim import SimPlatform
from tests.attestation import ca
from tests.cli.command import Cli
from tests.host import require_simulated_cpu
from tests.launch.rig import Wrapped


@pytest.fixture(autouse=True)
def _few_rsa_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three RSA keys for all tests: one takes up to a second."""
    keys = [ca.rsa_key(name) for name in ("ark", "ask", "x")]
    counter = iter(keys * 8)
    monkeypatch.setattr(
        "cryptography.hazmat.primitives.asymmetric.rsa.generate_private_key",
        lambda *_: next(counter),
    )


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_report_when_simulated_verifies_with_what_the_guest_was_given(
    cli: Cli, guests: Path, tmp_path: Path, product: str
) -> None:
    require_simulated_cpu()
    image, out, chain = guests / "certs.elf", tmp_path / "report", tmp_path / "chain.pem"
    sim = ("--platform", "sim", "--sim", f"product={product}")
    fields = ("--policy", "0x30000", "--host-data", "5a" * 32)
    done = cli("run", *sim, "--certs", "simulated", "--report-out", out, "--chain-out", chain,
               *fields, image)  # fmt: skip
    assert (done.code, done.errors) == (0, [])
    assert f"certificates of the simulated host written to {chain}" in done.err
    assert f"platform sim (7.0,product={product})" in done.err
    console = tmp_path / "console"
    console.write_text(done.out)
    expected = (*fields, "--image", image, "--vmpl", "0", "--no-debug")
    for report, certs in ((out, chain), (console, console)):
        words = ("report", "verify", report, "--certs", certs, *expected)
        done = cli(*words)
        assert (done.code, done.errors) == (1, ["kvmlaunch: not verified: root"])
        assert f"got ARK-{product} SIMULATED, of a simulated host" in done.out
        done = cli(*words, "--allow-simulated", "--json")
        assert (done.code, done.err) == (0, "")
        verdict = json.loads(done.out)
        assert verdict["simulated"] is True
        assert verdict["notes"][0].startswith("SIMULATED")
    shown = cli("report", "show", console).out
    assert f"product {product}" in shown or product == "Milan"


def test_report_when_got_is_a_file_and_no_console(cli: Cli, guests: Path, tmp_path: Path) -> None:
    require_simulated_cpu()
    out = tmp_path / "report"
    done = cli("report", "get", "--platform", "sim", "--report-out", out, guests / "attest.elf")
    assert (done.code, done.out, done.errors) == (0, "", [])
    assert len(out.read_bytes()) == 1184
    digest = cli("measure", guests / "attest.elf").out.strip()
    shown = json.loads(cli("report", "show", out, "--json").out)
    assert shown["fields"]["measurement"] == digest


def test_get_when_no_file_is_named_is_usage(cli: Cli, halt: Path) -> None:
    done = cli("report", "get", "--platform", "sim", halt)
    assert done.code == 2
    assert "--report-out" in done.err


def test_get_when_the_guest_prints_none_fails(cli: Cli, halt: Path, tmp_path: Path) -> None:
    require_simulated_cpu()
    out = tmp_path / "report"
    done = cli("report", "get", "--platform", "sim", "--report-out", out, halt)
    assert (done.code, out.exists()) == (1, False)
    assert done.errors == ["kvmlaunch: --report-out: the guest printed no attestation report"]


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--certs", "simulated", "--certs", "x"], 2, "is all that the simulated host has"),
        (["--certs", "/nowhere"], 2, "/nowhere: can't be read"),
        (["--certs", "/dev/null"], 2, "/dev/null: no certificate"),
        (["--certs", "simulated", "--sim", "6.12"], 1,
         "lacks KVM_SEV_SNP_ENABLE_REQ_CERTS (Linux 7.0)"),
        (["--certs", "simulated", "--vm-type", "plain"], 2, "not for --vm-type plain"),
        (["--chain-out", "/nowhere/chain"], 1, "/nowhere is not a folder"),
    ],
)  # fmt: skip
def test_run_when_certificates_cant_be_given_is_one_sentence(
    cli: Cli, halt: Path, options: list[str], code: int, sentence: str
) -> None:
    done = cli("run", "--platform", "sim", *options, halt)
    assert (done.code, done.out) == (code, "")
    assert len(done.errors) == 1
    assert sentence in done.errors[0]


@pytest.mark.parametrize("option", ["--chain-out", "--certs"])
def test_run_when_the_host_is_real_has_no_chain_of_it(
    cli: Cli, halt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    value = tmp_path / "chain" if option == "--chain-out" else "simulated"
    host = SimPlatform("7.0")
    choice = Choice(Wrapped(host), "platform kvm")
    monkeypatch.setattr("kvmlaunch.platforms.open_platform", lambda *args, **more: choice)
    done = cli("run", option, value, halt)
    assert done.code == 2
    assert "is for the simulated host" in done.errors[0]
    assert host.open_fds == ()


def test_chain_out_when_it_is_the_image_is_refused(cli: Cli, halt: Path) -> None:
    done = cli("run", "--platform", "sim", "--chain-out", halt, halt)
    assert (done.code, halt.read_bytes()) == (2, b"\xf4")
    assert "--chain-out" in done.err
