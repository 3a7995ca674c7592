"""Random scripts get far, go wrong in many ways, and are the same each time."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.mainline.kept import Case
from tests.mainline.script import finish, init2, ioctl, launch, run
from tests.mainline.simulated import play_simulated
from tests.mainline.strategies import cases, playable

_COUNT = 300


def drawn(number: int, count: int) -> list[Case]:
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


@pytest.fixture(scope="module")
def played() -> list[tuple[Case, dict]]:
    return [(case, play_simulated(*case)) for case in drawn(1, _COUNT)]


def test_scripts_are_the_same_when_the_seed_is():
    assert drawn(7, 20) == drawn(7, 20)
    assert drawn(7, 20) != drawn(8, 20)


def test_scripts_are_plain_data(played):
    for case, _ in played:
        assert json.loads(json.dumps(case.script)) == case.script


def test_steps_make_sense_to_the_player(played):
    assert not [step for _, out in played for step in out["steps"] if "bad step" in step]


def test_simulator_answers_every_step(played):
    # ENOSYS is how the simulator says that there is nothing behind a call.
    assert not [step for _, out in played for step in out["steps"] if step.get("errno") == "ENOSYS"]


def test_many_scripts_come_to_the_end_of_a_launch(played):
    ended = sum(
        any(
            step.get("id") == "KVM_SEV_SNP_LAUNCH_FINISH" and done["ret"] == 0
            for step, done in zip(case.script, out["steps"], strict=True)
        )
        for case, out in played
    )
    assert _COUNT // 4 < ended < _COUNT * 9 // 10


def test_scripts_meet_many_refusals(played):
    codes: Counter[tuple[str, str]] = Counter()
    for case, out in played:
        for step, done in zip(case.script, out["steps"], strict=True):
            if done.get("ret") == -1:
                codes[str(step.get("id") or step.get("request") or step["op"]), done["errno"]] += 1
    assert len(codes) > 40
    commands = {name for name, _ in codes}
    assert commands >= {
        "KVM_SEV_INIT2",
        "KVM_SEV_SNP_LAUNCH_START",
        "KVM_SEV_SNP_LAUNCH_UPDATE",
        "KVM_SEV_SNP_LAUNCH_FINISH",
        "KVM_SET_USER_MEMORY_REGION2",
        "KVM_CREATE_VCPU",
        "KVM_SET_SREGS",
    }
    # How seldom it is refused depends on hypothesis' version.
    assert any(step["op"] == "fallocate" for case, _ in played for step in case.script)


def test_firmware_orders_are_met(played):
    words = {
        step["fw"] for case, out in played if case.orders for step in out["steps"] if "fw" in step
    }
    assert len(words) >= 4


def test_xsave_state_isnt_looked_at_when_the_vcpu_ran():
    fpu = ioctl("vcpu0", "KVM_GET_XSAVE", {})
    assert fpu in playable(launch(fpu, finish()))
    assert playable([init2(), fpu, run("vcpu0")]) == [init2(), run("vcpu0")]
