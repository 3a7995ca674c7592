"""New -> Started -> Finished: as types, and at run time."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.errors import IoctlError, LaunchStateError
from kvmlaunch.snp import Finished, New, Started

from .rig import GPA, NORMAL, PAGE, POLICY, Rig, snp_vm

CASES = Path(__file__).with_name("typing_cases.py")

ARGUMENTS: dict[str, tuple[int, ...]] = {
    "start": (POLICY,),
    "update": (GPA, NORMAL, 0, PAGE),
    "update_all": (GPA, NORMAL, 0, PAGE),
    "finish": (),
}


def mypy_errors(path: Path) -> dict[int, str]:
    """Error lines of a strict run over one file."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    out, err, _ = api.run(
        ["--strict", "--follow-imports=silent", "--no-error-summary", "--config-file=", str(path)]
    )
    assert not err
    found = (re.search(r":(\d+): error: (.*)", line) for line in out.splitlines())
    return {int(match[1]): match[2] for match in found if match}


def test_types_when_a_step_is_out_of_order_are_an_error_on_that_line_only() -> None:
    lines = CASES.read_text().splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if line.endswith("# wrong")]
    assert sorted(mypy_errors(CASES)) == wrong


def test_types_when_a_new_launch_is_finished_name_the_state_and_the_step() -> None:
    messages = mypy_errors(CASES).values()
    assert any("New" in message and "finish" in message for message in messages)


def new(rig: Rig) -> New:
    return rig.new()


def started(rig: Rig) -> Started:
    return rig.started()


def finished(rig: Rig) -> Finished:
    return rig.started().finish()


def new_after_start(rig: Rig) -> New:
    state = rig.new()
    state.start(POLICY)
    return state


def started_after_finish(rig: Rig) -> Started:
    state = rig.started()
    state.finish()
    return state


WRONG = [
    (new, "update", "New", "Started"),
    (new, "update_all", "New", "Started"),
    (new, "finish", "New", "Started"),
    (started, "start", "Started", "New"),
    (finished, "start", "Finished", "New"),
    (finished, "update", "Finished", "Started"),
    (finished, "update_all", "Finished", "Started"),
    (finished, "finish", "Finished", "Started"),
    (new_after_start, "start", "Started", "New"),
    (new_after_start, "finish", "Started", "Started"),
    (started_after_finish, "update", "Finished", "Started"),
    (started_after_finish, "finish", "Finished", "Started"),
    (started_after_finish, "start", "Finished", "New"),
]


@pytest.mark.parametrize(("make", "step", "have", "need"), WRONG)
def test_step_when_out_of_order_names_both_states(
    make: Callable[[Rig], Any], step: str, have: str, need: str
) -> None:
    with snp_vm() as rig:
        state = make(rig)
        with pytest.raises(LaunchStateError) as caught:
            getattr(state, step)(*ARGUMENTS[step])
    assert (caught.value.step, caught.value.have, caught.value.need) == (step, have, need)
    assert have in str(caught.value)
    assert need in str(caught.value)


def test_update_all_when_its_state_is_consumed_raises_at_the_first_page() -> None:
    with snp_vm() as rig:
        state = started_after_finish(rig)
        with pytest.raises(LaunchStateError):
            next(state.update_all(GPA, NORMAL, rig.source.address, PAGE))


@pytest.mark.parametrize(("make", "step"), [(row[0], row[1]) for row in WRONG])
def test_step_when_out_of_order_issues_no_call(make: Callable[[Rig], Any], step: str) -> None:
    with snp_vm() as rig:
        state = make(rig)
        before = len(rig.calls)
        with pytest.raises(LaunchStateError):
            getattr(state, step)(*ARGUMENTS[step])
        assert len(rig.calls) == before


def test_attribute_when_no_state_has_it_is_an_attribute_error() -> None:
    with snp_vm() as rig, pytest.raises(AttributeError, match="finnish"):
        rig.new().finnish  # type: ignore[attr-defined] # noqa: B018


def test_start_when_the_kernel_refused_it_can_be_repeated() -> None:
    with snp_vm() as rig:
        state = rig.new()
        with pytest.raises(IoctlError):
            state.start(0)
        assert isinstance(state.start(POLICY), Started)


def test_update_when_refused_leaves_the_launch_started() -> None:
    with snp_vm() as rig:
        state = rig.started()
        with pytest.raises(IoctlError):
            state.update(0, NORMAL, rig.source.address, PAGE)
        assert state.state == "Started"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (new, "New"),
        (started, "Started"),
        (finished, "Finished"),
        (new_after_start, "Started"),
        (started_after_finish, "Finished"),
    ],
)
def test_repr_names_the_state_that_the_launch_is_in_now(
    make: Callable[[Rig], Any], name: str
) -> None:
    with snp_vm() as rig:
        assert repr(make(rig)).startswith(f"<{name} launch of ")


def test_steps_when_in_order_reach_finished() -> None:
    with snp_vm() as rig:
        state = rig.started()
        state.update(GPA, NORMAL, rig.source.address, PAGE)
        assert state.finish().state == "Finished"
