"""MAP_GPA_RANGE and other hypercalls: pages really change sides; the exits come from a script."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.snp import Started
from kvmlaunch.uapi import Call, Recorder

from .rig import (
    PAGE,
    Playback,
    Script,
    hypercall,
    io_out,
    map_gpa,
    plan,
    playing,
    step,
)
from .scripted import EXIT, TIMEOUT, outcome_of


def test_hypercall_when_it_is_unknown_fails_with_its_number() -> None:
    outcome = outcome_of(lambda run: hypercall(run, 99, 1, 2))
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert "KVM_EXIT_HYPERCALL nr=99" in str(outcome)
    assert "unknown hypercall" in str(outcome)


def two_regions() -> Any:
    return plan(
        [step(0x1000, [bytes([n]) * PAGE for n in range(8)], label="image")],
        memory=[(0, 32 * PAGE), (0x100000, 16 * PAGE)],
    )


def conversion(gpa: int, npages: int, *, private: bool) -> tuple[int, list[Call], Outcome]:
    """hypercall.ret of one MAP_GPA_RANGE, the calls that answered it, and the outcome."""
    answers: list[int] = []
    calls: list[Call] = []

    def script(run: Any) -> Script:
        calls.clear()
        yield map_gpa(run, gpa, npages, private=private)
        answers.append(int(run.hypercall.ret))
        yield io_out(run, EXIT, b"\0")

    with SimPlatform() as host:
        platform = Playback(Recorder(host, calls.append), {0: script})
        with Guest(two_regions(), platform) as guest:
            guest.launch()
            outcome = run_guest(guest, console=print, timeout=TIMEOUT)
            found = list(calls)
    return (answers or [-1])[0], found, outcome


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    ("gpa", "npages"), [(0x1000, 1), (0x3000, 3), (0, 32), (0x100000, 16), (0x10F000, 1)]
)
def test_map_gpa_range_when_inside_memory_succeeds(gpa: int, npages: int, private: bool) -> None:
    ret, _, outcome = conversion(gpa, npages, private=private)
    assert (ret, outcome.ok) == (0, True)


@pytest.mark.parametrize(("private", "attributes"), [(True, 8), (False, 0)])
def test_map_gpa_range_when_it_comes_sets_the_attribute_of_exactly_these_pages(
    private: bool, attributes: int
) -> None:
    calls = conversion(0x3000, 3, private=private)[1]
    sent = [call.sent for call in calls if call.name == "KVM_SET_MEMORY_ATTRIBUTES"]
    assert [(s["address"], s["size"], s["attributes"]) for s in sent] == [
        (0x3000, 3 * PAGE, attributes)
    ]


def test_map_gpa_range_when_it_makes_pages_shared_punches_a_hole() -> None:
    calls = conversion(0x102000, 2, private=False)[1]
    # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, at the offset in the second file.
    holes = [(call.arg, call.sent) for call in calls if call.name == "fallocate"]
    assert holes == [(3, {"offset": 0x2000, "length": 2 * PAGE})]


def test_map_gpa_range_when_it_makes_pages_shared_changes_the_attribute_first() -> None:
    names = [call.name for call in conversion(0x1000, 1, private=False)[1]]
    assert names.index("KVM_SET_MEMORY_ATTRIBUTES") < names.index("fallocate")


def test_map_gpa_range_when_it_makes_pages_private_punches_none() -> None:
    names = [call.name for call in conversion(0x1000, 1, private=True)[1]]
    assert "fallocate" not in names


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    ("gpa", "npages"),
    [
        (32 * PAGE, 1),
        (31 * PAGE, 2),
        (0x100000, 17),
        (0xFFFFF000, 1),
        ((1 << 64) - PAGE, 1),
        ((1 << 64) - PAGE, 2),
        (0, 1 << 63),
        (0x1001, 1),
        (0x1800, 2),
        (0x1000, 0),
    ],
)
def test_map_gpa_range_when_it_is_no_range_of_memory_is_the_guests_error(
    gpa: int, npages: int, private: bool
) -> None:
    ret, calls, outcome = conversion(gpa, npages, private=private)
    assert (ret, outcome.ok) == (errno.EINVAL, True)
    assert "KVM_SET_MEMORY_ATTRIBUTES" not in [call.name for call in calls]


def test_map_gpa_range_when_the_host_refuses_it_fails() -> None:
    def script(run: Any) -> Script:
        yield map_gpa(run, 0x1000, 1, private=False)

    # The second call: the first one made the memory private.
    with (
        SimPlatform(faults=["KVM_SET_MEMORY_ATTRIBUTES:errno=ENOMEM@2"]) as host,
        Guest(plan([]), Playback(host, {0: script})) as guest,
    ):
        guest.launch()
        outcome = run_guest(guest, console=print, timeout=TIMEOUT)
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert "MAP_GPA_RANGE gpa=0x1000 pages=1 to=shared: KVM_SET_MEMORY_ATTRIBUTES" in str(outcome)


def test_memory_when_it_was_made_private_has_lost_its_shared_contents() -> None:
    seen: list[bytes] = []

    def script(run: Any) -> Script:
        yield map_gpa(run, 0x3000, 1, private=True)
        yield io_out(run, EXIT, b"\0")

    with playing(script) as (guest, _):
        guest.memory_view(0x2FFF, PAGE + 2)[:] = b"s" * (PAGE + 2)
        run_guest(guest, console=print, timeout=TIMEOUT)
        seen.append(bytes(guest.memory_view(0x2FFF, PAGE + 2)))
    assert seen == [b"s" + bytes(PAGE) + b"s"]


def test_memory_when_it_was_made_shared_keeps_its_shared_contents() -> None:
    def script(run: Any) -> Script:
        yield map_gpa(run, 0x3000, 1, private=False)
        yield io_out(run, EXIT, b"\0")

    with playing(script) as (guest, _):
        guest.memory_view(0x3000, 4)[:] = b"kept"
        run_guest(guest, console=print, timeout=TIMEOUT)
        assert bytes(guest.memory_view(0x3000, 4)) == b"kept"


def populate_again(*ways: bool) -> int:
    """Convert launched page 0x1000 these ways, then launch it once more; bytes done."""

    def script(run: Any) -> Script:
        for private in ways:
            yield map_gpa(run, 0x1000, 1, private=private)
        yield io_out(run, EXIT, b"\0")

    with playing(script, launch=False) as (guest, _):
        guest.start()
        list(guest.update())
        run_guest(guest, console=print, timeout=TIMEOUT)
        assert isinstance(guest.state, Started)
        address = int(guest._backing[0].memory.address)
        result, done = guest.state.update_raw(0x1000, 1, address, PAGE)
        assert result.ret == (0 if done else -1)
        return done


def test_page_when_made_shared_and_private_again_is_a_fresh_page() -> None:
    """Only a punched hole lets the kernel take it a second time."""
    assert populate_again(False, True) == PAGE


def test_page_when_made_shared_is_not_private() -> None:
    assert populate_again(False) == 0


def test_page_when_made_private_twice_is_the_launched_one() -> None:
    assert populate_again(True) == 0
