"""Every guest of examples/guests ends as the table of tests/guest_ends.py says.

The SNP ones need a host that can launch and run them (KVMLAUNCH_REQUIRE=snp).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.kvm.exits import Exit
from kvmlaunch.launch.checks import FailedCheck
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.platforms import host_cbitpos
from kvmlaunch.uapi import Platform, RealPlatform
from tests import guest_ends
from tests.guests import EXAMPLES
from tests.host import require_simulated_cpu

GUESTS = sorted(path.stem for path in (EXAMPLES / "guests").glob("*.[cs]"))
TIMEOUT = 40.0


class Run:
    """Outcome, console and exits of a guest."""

    def __init__(self, name: str, guests: Path, platform: Platform, *, confidential: bool) -> None:
        options = PlanOptions(
            memory=guest_ends.MEMORY,
            vcpus=guest_ends.VCPUS.get(name, 1),
            confidential=confidential,
            cbitpos=host_cbitpos(platform) if confidential else None,
        )
        endless = guest_ends.SNP[name].kind == "timeout"
        console = bytearray()
        self.exits: list[tuple[int, Exit]] = []
        with Guest(load_image(guests / f"{name}.elf", options), platform) as guest:
            if confidential:
                guest.launch()
            self.outcome: Outcome = run_guest(
                guest,
                console=console.extend,
                on_exit=lambda vcpu, exit_: self.exits.append((vcpu, exit_)),
                timeout=guest_ends.ENDLESS_SECONDS if endless else TIMEOUT,
            )
        self.text = console.decode()


def test_table_when_compared_with_the_sources_has_every_guest() -> None:
    assert sorted(guest_ends.SNP) == sorted(guest_ends.PLAIN) == GUESTS


def test_table_when_a_platform_has_ends_of_its_own_says_why() -> None:
    for ends in guest_ends.OWN.values():
        for name, end in ends.items():
            assert name in GUESTS
            assert end.why


@pytest.mark.parametrize("name", GUESTS)
def test_guest_when_plain_ends_as_it_says(real_kvm: RealPlatform, guests: Path, name: str) -> None:
    run = Run(name, guests, real_kvm, confidential=False)
    guest_ends.check(guest_ends.end_of(name, "plain"), run.outcome, run.text, run.exits)


@pytest.mark.parametrize("name", GUESTS)
def test_guest_when_an_snp_guest_ends_as_it_says(
    real_snp: RealPlatform, guests: Path, name: str
) -> None:
    run = Run(name, guests, real_snp, confidential=True)
    end = guest_ends.end_of(name, guest_ends.snp_kind())
    guest_ends.check(end, run.outcome, run.text, run.exits)


@pytest.mark.simulated
@pytest.mark.parametrize("name", GUESTS)
@pytest.mark.parametrize("confidential", [True, False], ids=["snp", "plain"])
def test_guest_when_simulated_ends_as_on_kvm(
    guests: Path, name: str, *, confidential: bool
) -> None:
    run = Run(name, guests, require_simulated_cpu(), confidential=confidential)
    end = guest_ends.end_of(name, "snp" if confidential else "plain")
    guest_ends.check(end, run.outcome, run.text, run.exits)


@pytest.mark.simulated
def test_vmpl_when_the_simulated_host_has_vmpls_ends_at_what_vmpl1_must_not(
    guests: Path,
) -> None:
    run = Run("vmpl", guests, require_simulated_cpu("multi-vmpl"), confidential=True)
    guest_ends.check(guest_ends.end_of("vmpl", "sim"), run.outcome, run.text, run.exits)


def test_failed_check_when_an_snp_guest_reaches_the_host_with_its_values(
    real_snp: RealPlatform, guests: Path
) -> None:
    check = Run("bad-ghcb-private", guests, real_snp, confidential=True).outcome.check
    lines = (EXAMPLES / "guests" / "bad-ghcb-private.c").read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "check_equal(answered, 1)" in text)
    assert check == FailedCheck("bad-ghcb-private.c", line, "answered", 0, 1)


def test_failed_check_when_plain_reaches_the_host_with_its_values(
    real_kvm: RealPlatform, test_guests: Path
) -> None:
    plan = load_image(
        test_guests / "failed_check.elf",
        PlanOptions(memory=guest_ends.MEMORY, confidential=False),
    )
    with Guest(plan, real_kvm) as guest:
        outcome = run_guest(guest, console=lambda text: None, timeout=TIMEOUT)
    assert str(outcome) == (
        "vCPU 0: the guest wrote 0xc to the exit port: check failed: failed_check.c:6: "
        "0x1234 + 1 is 0x1235, expected 0xffffffffffffffff"
    )
