"""The player, without a machine: the simulated host on both sides."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Result, lib
from tests.mainline.compare import difference
from tests.mainline.kept import CASES
from tests.mainline.player import Player
from tests.mainline.script import (
    GPA,
    PAGE,
    Script,
    close,
    cpuid_page,
    finish,
    init2,
    ioctl,
    launch,
    mmap,
    open_kvm,
    run,
    sev,
    start,
    update,
    vm,
    write,
)
from tests.mainline.simulated import SimHost, play_simulated


class Mutant(SimPlatform):
    """A simulated host that answers one request with another errno."""

    wrong = 0

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        result = super().ioctl(fd, request, arg)
        if request == self.wrong and result.ret == -1:
            return Result(-1, errno.EPERM)
        return result


def steps(script: Script, **how: Any) -> list[dict[str, Any]]:
    return play_simulated(script, **how)["steps"]


@pytest.mark.parametrize("name", CASES)
def test_case_plays_alike_when_played_twice(name):
    script, orders = CASES[name]
    first, second = play_simulated(script, orders), play_simulated(script, orders)
    assert first == second
    assert difference(script, orders, first, second) is None
    assert not [step for step in first["steps"] if "bad step" in step]


def test_case_script_survives_json():
    for script, _ in CASES.values():
        assert json.loads(json.dumps(script)) == script


def test_launch_is_noted_with_pages_and_words():
    outcome = play_simulated(launch(update(0, 2), finish()))
    assert outcome["steps"][-2] == {
        "ret": 0,
        "fw": 0,
        "back": {"gfn_start": GPA // PAGE + 2, "uaddr": f"+{2 * PAGE:#x}", "len": 0},
    }
    assert outcome["steps"][-1] == {"ret": 0, "fw": 0}
    (pages,) = outcome["guests"]
    assert [page[:2] for page in pages] == [
        [1, f"{GPA:x}"],
        [1, f"{GPA + PAGE:x}"],
        [2, "fffffffff000"],
    ]
    assert len(outcome["vmsas"]) == 1
    # RIP of a vCPU at reset (APM 2, VMSA offset 0x178).
    assert bytes.fromhex(outcome["vmsas"][0])[0x178:0x180] == b"\xf0\xff" + bytes(6)
    names = [name for name, _ in outcome["log"]]
    assert names[:4] == ["SNP_GCTX_CREATE", "SNP_LAUNCH_START", "SNP_ACTIVATE", "SNP_LAUNCH_UPDATE"]
    assert outcome["memory"] == {}


def test_word_is_noted_when_it_was_set_before():
    script = [open_kvm(), vm(), {**init2(flags=1), "error": 7}]
    assert steps(script)[-1] == {"ret": -1, "errno": "EINVAL", "fw": 7}


def test_memory_change_is_noted_when_firmware_corrects_a_page():
    script = launch(write("arena", cpuid_page()), update(type=6))
    outcome = play_simulated(script, ["CPUID:correct=0x40000000.eax"])
    assert list(outcome["memory"]) == ["arena+0x0"]
    assert play_simulated(script)["memory"] == {}


def test_memory_is_as_before_when_a_struct_was_placed_in_it():
    script = launch({**update(), "at": "arena+0x10f00", "data_at": "arena+0x11f00"})
    outcome = play_simulated(script)
    assert outcome["steps"][-1]["ret"] == 0
    assert outcome["memory"] == {}


@pytest.mark.parametrize(
    ("address", "code"),
    [("guard", "EFAULT"), ("arena+0x1fff8", "EFAULT"), ("kernel", "EFAULT"), (8, "EFAULT")],
)
def test_struct_is_unreadable_when_it_is_nowhere(address, code):
    script = [open_kvm(), vm(), {**init2(), "at": address}]
    assert steps(script)[-1]["errno"] == code


def test_read_only_struct_is_taken_but_not_written_back():
    assert steps([open_kvm(), vm(), {**init2(), "at": "rom"}, init2()])[-2:] == [
        {"ret": -1, "errno": "EFAULT", "fw": 0},
        {"ret": -1, "errno": "EPERM", "fw": 0},
    ]


def test_number_is_minus_one_when_its_step_failed():
    script = [open_kvm(path="/none"), ioctl("kvm", "KVM_GET_API_VERSION"), close("kvm")]
    assert [step["errno"] for step in steps(script)] == ["ENOENT", "EBADF", "EBADF"]


def test_run_is_noted_with_its_exit():
    assert steps(launch(run()))[-1] == {
        "ret": 0,
        "exit": "KVM_EXIT_FAIL_ENTRY",
        "hardware_entry_failure_reason": 0xFFFFFFFF,
    }
    assert steps(launch(run(immediate_exit=1)))[-1]["errno"] == "EINTR"


def test_everything_is_closed_when_a_step_is_nonsense():
    script = [*launch(update(), finish()), {"op": "none"}, {"op": "ioctl", "fd": 3}, mmap("vm", 1)]
    outcome = play_simulated(script)  # asserts that nothing is left open
    assert [list(step) for step in outcome["steps"][-3:-1]] == [["bad step"], ["bad step"]]


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_fds = st.sampled_from(["kvm", "vm", "vcpu0", "gmem", "sev", "", "no"])
_nonsense = st.fixed_dictionaries(
    {"op": st.sampled_from(["open", "close", "ioctl", "sev", "fallocate", "mmap", "write", "run"])},
    optional={
        "fd": _fds | _json,
        "path": _json,
        "flags": _json,
        "request": st.sampled_from(["KVM_SET_REGS", "KVM_SET_SREGS", "KVM_ENABLE_CAP"]) | _json,
        "id": st.sampled_from(["KVM_SEV_INIT2", "KVM_SEV_SNP_LAUNCH_START"]) | _json,
        "arg": _json,
        "data": _json,
        "at": st.sampled_from(["arena", "rom+0xfff", "guard-1", "top"]) | _json,
        "entries": _json,
        "struct": _json,
        "mode": _json,
        "offset": _json,
        "length": _json,
        "to": _json,
        "bytes": _json,
        "as": _json,
    },
)


@settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(between=st.lists(_nonsense | _json, max_size=4))
def test_player_answers_when_script_is_nonsense(between):
    outcome = play_simulated([*launch(), *between, update(), finish()])
    assert len(outcome["steps"]) == len(launch()) + len(between) + 2


def test_difference_is_found_when_an_errno_is_wrong():
    script = [open_kvm(), vm(), init2(flags=1)]
    with Mutant("6.12", random=bytes) as mutant:
        mutant.wrong = lib.KVM_MEMORY_ENCRYPT_OP
        theirs = Player(mutant, SimHost(mutant)).play(script)
    found = difference(script, (), theirs, play_simulated(script))
    assert found is not None
    assert found.startswith("step 2: ")
    assert "EPERM" in found
    assert "EINVAL" in found
    # The literal can be pasted.
    literal = found.partition("kept/found.py:\n")[2]
    assert eval(literal) == (script, ())


def test_difference_is_found_when_a_digest_is_other():
    script = launch(update(), finish())
    theirs, ours = play_simulated(script), play_simulated(script)
    theirs["guests"][0][0][3] = "00" * 48
    found = difference(script, (), theirs, ours)
    assert found is not None
    assert found.startswith("guests:")


def test_difference_is_found_when_a_vmsa_is_other():
    plain = launch(finish())
    other = launch(ioctl("vcpu0", "KVM_SET_REGS", {"rip": 1, "rflags": 2}), finish())
    theirs, ours = play_simulated(other), play_simulated(plain)
    theirs["steps"] = ours["steps"]
    found = difference(plain, (), theirs, ours)
    assert found is not None
    assert found.startswith("vmsas:")
    assert '"0x178": "0x1"' in found


def test_difference_is_found_when_a_command_is_missing_from_the_log():
    script = [open_kvm(), vm(), init2()]
    theirs, ours = play_simulated(script), play_simulated(script)
    theirs["log"] = []
    assert "log:" in str(difference(script, (), theirs, ours))


def test_difference_is_found_when_memory_changed_on_one_side():
    script = launch(update())
    theirs, ours = play_simulated(script), play_simulated(script)
    theirs["memory"] = {"arena+0x0": "00"}
    assert "memory:" in str(difference(script, (), theirs, ours))


def test_difference_is_found_when_one_side_could_not_play():
    script = [open_kvm()]
    assert "lost" in str(difference(script, (), {"error": "lost"}, play_simulated(script)))


def test_unknown_command_is_played_by_number():
    assert steps([open_kvm(), vm(), sev("vm", 99, error=3)])[-1] == {
        "ret": -1,
        "errno": "EINVAL",
        "fw": 3,
    }


def test_orders_are_forgotten_when_the_next_script_is_played():
    script = launch(started=False)
    with SimPlatform("6.12", random=bytes) as platform:
        player = Player(platform, SimHost(platform))
        first = player.play([*script, start()], ["SNP_LAUNCH_START:fw=7"])
        second = player.play([*script, start()])
    assert [out["steps"][-1]["fw"] for out in (first, second)] == [7, 0]
