"""kvmlaunch selftest: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest

from kvmlaunch.uapi import RealPlatform, Result
from tests.cli.command import Cli, command, spawn

SIM = ("selftest", "--platform", "sim")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KSFT_TAP_LEVEL", "KVMLAUNCH_PROPOSAL"):
        monkeypatch.delenv(name, raising=False)


def test_selftest_when_run_on_the_simulated_host_names_it_and_is_0(cli: Cli) -> None:
    done = cli(*SIM, "--sim", "7.0", "--filter", "init2.*")
    lines = done.out.splitlines()
    assert lines[0] == "TAP version 13"
    assert lines[1] == f"1..{sum(line.startswith('ok ') for line in lines)}"
    assert "# platform: sim (7.0)" in lines
    assert lines[4] == "ok 1 init2.taken"
    assert lines[-1].startswith("# Totals: pass:11 fail:0 ")
    assert (done.code, done.err) == (0, "platform sim (7.0): a simulated host, as asked\n")


def test_selftest_when_nested_begins_with_its_plan(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSFT_TAP_LEVEL", "1")
    assert cli(*SIM, "--filter", "start.taken").out.startswith("1..1\n# kvmlaunch ")


def test_selftest_when_all_is_skipped_is_4(cli: Cli) -> None:
    done = cli(*SIM, "--filter", "vmsa.c*")
    assert done.code == 4
    assert "ok 1 vmsa.c1-plain-vm # SKIP needs VMSA mode direct, this host has sync: " in done.out


def test_selftest_when_a_case_fails_is_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmlaunch.sim.sev._GHCB_VERSION_MAX", 3)
    done = cli(*SIM, "--filter", "init2.ghcb-version")
    assert done.code == 1
    assert done.out.splitlines()[-3:] == [
        "# INIT2 with ghcb_version=0x3: expected errno EINVAL, got success",
        "not ok 1 init2.ghcb-version",
        "# Totals: pass:0 fail:1 xfail:0 xpass:0 skip:0 error:0",
    ]


def test_selftest_when_the_host_that_was_asked_for_has_no_kvm_is_4(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RealPlatform, "open", lambda self, path, flags: Result(-1, 2))
    done = cli("selftest", "--platform", "kvm")
    assert done.code == 4
    assert done.out.splitlines()[1].startswith("1..0 # SKIP open /dev/kvm ret=-2 ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--filter", "nothing"], "kvmlaunch: no case's name matches 'nothing': see --list"),
        (["--sim", "5.0"], "kvmlaunch: no kernel profile is named '5.0'; known are "),
        (["--proposal-cap", "X=1"], "kvmlaunch: 'X=1' names no number of the proposals; "),
    ],
)
def test_selftest_when_an_option_is_wrong_is_one_sentence_and_2(
    cli: Cli, args: list[str], said: str
) -> None:
    done = cli(*SIM, *args)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert done.err.startswith(said)


def test_list_when_asked_for_tells_each_case_and_opens_nothing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RealPlatform, "open", None)
    done = cli("selftest", "--list", "--filter", "start.t*")
    assert (done.code, done.err) == (0, "")
    assert [line.split(maxsplit=1) for line in done.out.splitlines()] == [
        ["start.taken", "Policy 0x30000, without memory and vCPUs"],
        ["start.twice", "A second START is EINVAL"],
    ]


def test_list_when_asked_for_as_json_has_an_object_per_case(cli: Cli) -> None:
    out = cli("selftest", "--list", "--json", "--filter", "start.twice").out
    assert json.loads(out) == {"name": "start.twice", "about": "A second START is EINVAL"}


def test_json_when_asked_for_has_whole_lines_that_name_the_platform(cli: Cli) -> None:
    done = cli(*SIM, "--json", "--filter", "start.t*")
    header, *cases, totals = map(json.loads, done.out.splitlines())
    assert (header["platform"], header["profile"]) == ("sim", "6.12")
    assert [case["name"] for case in cases] == ["start.taken", "start.twice"]
    assert (totals["pass"], done.code) == (2, 0)


def test_proposal_cap_when_it_is_another_kernels_makes_the_cases_skip(cli: Cli) -> None:
    here = (*SIM, "--sim", "direct-vmsa", "--filter", "vmsa.c6*")
    assert cli(*here).code == 0
    done = cli(*here, "--proposal-cap", "DIRECT_VMSA=250")
    assert done.code == 4
    assert "KVM_CAP_SNP_DIRECT_VMSA (250) can't be enabled" in done.out


def test_proposal_cap_when_it_is_in_the_environment_counts(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMLAUNCH_PROPOSAL", "DIRECT_VMSA=250")
    assert cli(*SIM, "--sim", "direct-vmsa", "--filter", "vmsa.c6*").code == 4


def test_result_when_a_pipe_reads_is_there_at_once() -> None:
    """A buffered stream would have it all at the end."""
    process = subprocess.Popen(
        command(*SIM), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    with process:
        times = [time.monotonic() for line in process.stdout if line.startswith("ok ")]
    assert process.returncode == 0
    assert times[-1] - times[0] > 0.05


def test_selftest_when_its_reader_goes_ends_without_a_word() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" | head -n 1', "sh", *command(*SIM)],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.stdout == b"TAP version 13\n"
    assert b"Traceback" not in done.stderr


def test_selftest_when_quiet_says_nothing_beside_the_results() -> None:
    assert spawn("-q", *SIM, "--filter", "command.null").err == ""
