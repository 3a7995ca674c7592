"""Our own launcher on the simulated host as a program like any other: told ``--platform kvm``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import guests
from tests.cli.command import command, events, page_events
from tests.host import require_simulated_cpu
from tests.supervisor import rig


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rig.require_supervision()
    require_simulated_cpu()
    return guests.build(tmp_path_factory.mktemp("guests"))


def launched(log: Path, platform: str, *words: object, sim: str = "6.12") -> rig.Ran:
    """``kvmlaunch run`` with its page log, in process or supervised."""
    run = ("run", "--platform", platform, "--log", log, *words)
    if platform == "sim":
        return rig.run(command("-q", *run, "--sim", sim))
    return rig.sim(*command("-q", *run), options=("--sim", sim))


def _without(event: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in fields}


@pytest.mark.parametrize(
    ("guest", "sim", "words"),
    [
        ("hello", "6.12", ()),
        ("hello", "7.0,product=Genoa", ()),
        ("hello", "vmsa-page", ("--vmsa-mode", "page")),
        ("hello", "direct-vmsa", ("--vmsa-mode", "direct")),
        ("psc", "6.12", ()),
        ("smp", "6.12", ("--vcpus", "4")),
        ("vc", "6.12", ()),
    ],
)
def test_page_log_when_supervised_is_that_of_the_simulated_host(
    built: Path, tmp_path: Path, guest: str, sim: str, words: tuple[str, ...]
) -> None:
    image = built / f"{guest}.elf"
    mine, theirs = tmp_path / "supervised", tmp_path / "in-process"
    supervised = launched(mine, "kvm", *words, image, sim=sim)
    assert supervised == launched(theirs, "sim", *words, image, sim=sim)
    assert supervised.code == 0
    assert page_events(mine) == page_events(theirs)
    header, other = events(mine)[0], events(theirs)[0]
    named = ("platform", "profile")
    assert _without(header, *named) == _without(other, *named)
    assert [event for event in events(mine) if event["event"] == "exit"] == [
        event for event in events(theirs) if event["event"] == "exit"
    ]


def test_header_when_supervised_says_that_the_kernel_is_simulated(
    built: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    launched(log, "kvm", built / "hello.elf", sim="vmsa-page")
    header = events(log)[0]
    assert (header["platform"], header["profile"]) == ("kvm", "simulated vmsa-page")


def test_log_of_the_supervisor_when_our_launcher_runs_has_the_same_pages(
    built: Path, tmp_path: Path
) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    run = command("-q", "run", "--platform", "kvm", "--log", inner, built / "hello.elf")
    assert rig.sim(*run, options=("--log", str(outer))).code == 0
    fields = ("event", "seq", "gpa", "type", "contents", "digest")
    assert [[page[field] for field in fields] for page in page_events(outer)] == [
        [page[field] for field in fields] for page in page_events(inner)
    ]
    finish = next(event for event in events(outer) if event["event"] == "finish")
    assert finish["digest"] == page_events(inner)[-1]["digest"]
    assert (finish["predicted"], events(outer)[0]["platform"]) == (False, "sim")


def test_fault_when_ordered_reaches_the_launcher(built: Path) -> None:
    run = command("-q", "run", "--platform", "kvm", built / "hello.elf")
    ran = rig.sim(*run, options=("--fault", "SNP_LAUNCH_FINISH:fw=0x0b"))
    assert ran.code == 1
    assert "SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'" in ran.err


def test_selftest_when_supervised_has_no_failure() -> None:
    rig.require_supervision()
    require_simulated_cpu()
    ran = rig.sim(*command("selftest", "--platform", "kvm"))
    assert ran.code == 0, ran.out
    assert "# Totals: pass:142 fail:0" in ran.out
