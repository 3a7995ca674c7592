"""Break each rule of the simulated kernel in turn: exactly the cases that are about it fail."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from kvmlaunch.selftest import Host, Spec, Verdict, guests, run, select
from kvmlaunch.sim import SimPlatform
from tests.host import require_simulated_cpu
from tests.selftest import mutants_finish, mutants_start, mutants_update, mutants_vmsa
from tests.selftest.mutants import Mutant

LAUNCH = (*mutants_start.MUTANTS, *mutants_update.MUTANTS, *mutants_finish.MUTANTS)
VMSA = mutants_vmsa.MUTANTS
# On a kernel with a proposal, mainline's cases are the same: a few of them stand for the rest.
SAMPLE = ("vmsa.*", "r[0-9]*", "*.taken", "golden.reset-2", "id-block.digest")


def failing(mutant: Mutant, specs: list[Spec]) -> set[str]:
    with SimPlatform(mutant.profile) as platform, Host(platform) as host:
        ended = {result.spec.name: result.verdict for result in run(specs, host)}
    return {name for name, verdict in ended.items() if verdict in (Verdict.FAIL, Verdict.ERROR)}


def check(mutant: Mutant, specs: list[Spec], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mutant.expected(spec.name for spec in specs)
    assert expected, "the mutant names no case"
    mutant.apply(monkeypatch)
    assert failing(mutant, specs) == expected


@pytest.fixture(scope="module", autouse=True)
def _simulated_cpu() -> None:
    require_simulated_cpu()


@pytest.mark.parametrize("mutant", LAUNCH, ids=lambda mutant: mutant.rule)
def test_cases_when_a_rule_of_the_launch_is_broken_are_those_about_it(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(mutant, select(), monkeypatch)


@pytest.mark.parametrize("mutant", VMSA, ids=lambda mutant: mutant.rule)
def test_cases_when_a_rule_of_the_proposals_is_broken_are_those_about_it(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "TIMEOUT", mutant.seconds)
    check(mutant, select(SAMPLE), monkeypatch)


def test_every_case_is_failed_by_a_mutant() -> None:
    """Or it checks nothing that the simulated kernel does."""
    globs = [glob for mutant in (*LAUNCH, *VMSA) for glob in mutant.cases.split()]
    never = {s.name for s in select() if not any(fnmatchcase(s.name, glob) for glob in globs)}
    assert never == NO_MUTANT


@pytest.mark.parametrize("profile", ["6.12", "6.18", "7.0", "vmsa-page", "direct-vmsa"])
def test_cases_when_no_rule_is_broken_all_pass(profile: str) -> None:
    with SimPlatform(profile) as platform, Host(platform) as host:
        results = list(run(select(), host))
    assert {r.spec.name: r.reason for r in results if r.verdict in BAD} == {}
    skipped = {r.spec.name for r in results if r.verdict is Verdict.SKIP}
    assert len(skipped) == SKIPPED[profile]


# Without the first two nothing else can pass; no simulated firmware has the third's policy bits.
NO_MUTANT = {"init2.taken", "start.taken", "start.policy-offered"}
BAD = (Verdict.FAIL, Verdict.ERROR)
SKIPPED = {"6.12": 47, "6.18": 47, "7.0": 47, "vmsa-page": 31, "direct-vmsa": 3}
