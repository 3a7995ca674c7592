"""Guests on the simulated host: what a real one can't promise, and what only it lacks."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.errors import IoctlError, MissingCapability
from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Platform, lib
from tests.guests import SPIN
from tests.host import require_simulated_cpu

from .rig import prints

# Each vCPU takes a letter and prints it eight times, with some work before each. Real mode:
#   mov al, 1; lock xadd [0x2000], al; add al, 'a'; mov bx, 8; mov dx, 0x3f8
#   again: mov cx, 0x3000; loop $; out dx, al; dec bx; jnz again; hlt
LETTERS = bytes.fromhex("b001 f00fc0060020 0461 bb0800 baf803 b90030 e2fe ee 4b 75f7 f4")


def run(
    image: bytes | Path, platform: Platform, *, confidential: bool = False, **options: Any
) -> tuple[Outcome, str]:
    """Outcome and console."""
    timeout = options.pop("timeout", 30.0)
    plan = load_image(image, PlanOptions(memory=4 << 20, confidential=confidential, **options))
    text = bytearray()
    with Guest(plan, platform) as guest:
        if confidential:
            guest.launch()
        outcome = run_guest(guest, console=text.extend, timeout=timeout)
    return outcome, text.decode()


def letters(seed: int) -> str:
    outcome, text = run(LETTERS, require_simulated_cpu(seed=seed), vcpus=4)
    assert (outcome.kind, sorted(text)) == ("halted", sorted("abcd" * 8))
    return text


def test_vcpus_when_the_seed_is_the_same_print_the_same() -> None:
    first = letters(1)
    assert [letters(1) for _ in range(3)] == [first] * 3


def test_vcpus_when_the_seed_is_another_print_in_another_order() -> None:
    assert len({letters(seed) for seed in range(5)}) > 1


def test_lines_of_several_vcpus_when_complete_are_shown_before_others_go_on() -> None:
    # As LETTERS, but once, and with a line end: the letters come in lines of their own.
    code = bytes.fromhex("b001 f00fc0060020 0461 baf803 ee b00a ee b90000 e2fe f4")
    outcome, text = run(code, require_simulated_cpu(), vcpus=4)
    assert (outcome.kind, sorted(text.splitlines())) == ("halted", ["a", "b", "c", "d"])


@pytest.mark.parametrize("confidential", [False, True], ids=["plain", "snp"])
@pytest.mark.parametrize("vcpus", [1, 3])
def test_endless_loop_when_the_time_is_up_ends_soon(confidential: bool, vcpus: int) -> None:
    platform = require_simulated_cpu()
    before = time.monotonic()
    outcome, _ = run(SPIN, platform, confidential=confidential, vcpus=vcpus, timeout=0.3)
    assert (outcome.kind, outcome.ok) == ("timeout", False)
    assert time.monotonic() - before < 5


def test_endless_loop_when_its_thread_is_kicked_is_interrupted() -> None:
    """The signal alone, as a real KVM_RUN would be."""
    platform = require_simulated_cpu()
    plan = load_image(SPIN, PlanOptions(memory=1 << 20, confidential=False))
    seen: list[str] = []
    with Guest(plan, platform) as guest:
        kick = lib.kl_kick_signal()
        thread = threading.Thread(target=lambda: seen.append(str(guest.vcpus[0].run())))
        thread.start()
        time.sleep(0.2)
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, kick)
        thread.join(10)
    assert seen == ["KVM_EXIT_INTR"]


def test_tsc_when_the_guest_is_the_same_is_the_same() -> None:
    # rdtsc, then AL, AH and the rest as bytes to port 0x3f8: mov dx, 0x3f8 comes after it.
    code = bytes.fromhex("0f31 baf803 ee 88e0 ee f4")
    platform = require_simulated_cpu()
    assert run(code, platform)[1] == run(code, platform)[1]


def test_run_when_there_is_no_engine_names_the_command() -> None:
    def none(memory: Any, options: Any) -> Any:
        raise MissingCapability("unicorn", "the software CPU")

    platform = SimPlatform(machine=none)
    outcome, text = run(prints(b"x"), platform, confidential=True)
    assert (outcome.kind, outcome.ok, text) == ("no-cpu", False, "")
    assert "pip install 'kvmlaunch[softcpu]'" in str(outcome)
    plan = load_image(prints(b"x"), PlanOptions(memory=1 << 20, confidential=False))
    with (
        Guest(plan, platform) as guest,
        pytest.raises(IoctlError, match=r"pip install 'kvmlaunch\[softcpu\]'"),
    ):
        guest.vcpus[0].run()


def test_memory_when_the_guest_touches_a_page_of_the_wrong_side_is_a_memory_fault() -> None:
    """Real-mode code of an SNP guest whose page was made shared: every access is private."""
    platform = require_simulated_cpu()
    plan = load_image(SPIN, PlanOptions(memory=1 << 20, confidential=True))
    with Guest(plan, platform) as guest:
        guest.launch()
        guest.vm.set_memory_attributes(0x1000, 0x1000, private=False)
        exit_ = guest.vcpus[0].run()
    assert str(exit_) == "KVM_EXIT_MEMORY_FAULT gpa=0x1000 size=0x1000 access=private"
