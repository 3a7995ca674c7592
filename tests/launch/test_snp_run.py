"""Guests on the runtime of examples/guests: as SNP guests and in plain VMs, real and simulated.

On a real KVM the SNP ones need a host that can launch and run them (KVMLAUNCH_REQUIRE=snp). What
is expected is what the guests' sources say.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.errors import IoctlError
from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.kvm.exits import Exit, HypercallExit, IoExit, MmioExit, SystemEventExit
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.uapi import Platform, lib
from tests.host import require_simulated_cpu

MEMORY = 16 << 20
TIMEOUT = 60.0
DOORBELL, EXIT_PORT = 0x10, 0xF4
DEVICE = 0xD0000000
# What the device answers to a read: a byte and its successors.
FIRST_BYTES = {
    **{0x10: 0x51, 0x12: 0x62, 0x14: 0x74, 0x18: 0x88},
    **{0: 0x90, 0x40: 0x90, 0x44: 0xA0, 0x48: 0xB0},
}
PAGE = 4096
ENCRYPTED = lib.KVM_MAP_GPA_RANGE_ENCRYPTED


def launched(
    image: Path,
    platform: Platform,
    confidential: bool,
    *,
    vcpus: int = 1,
    memory: int = MEMORY,
    ghcb_version: int = 0,
    **options: Any,
) -> Guest:
    plan_options = PlanOptions(memory=memory, confidential=confidential, vcpus=vcpus, **options)
    guest = Guest(load_image(image, plan_options), platform, ghcb_version=ghcb_version)
    if confidential:
        guest.launch()
    return guest


class Run:
    """Outcome, console and exits of a guest that ran to its end."""

    def __init__(self, image: Path, platform: Platform, confidential: bool, **options: Any):
        console = bytearray()
        self.exits: list[tuple[int, Exit]] = []
        with launched(image, platform, confidential, **options) as guest:
            self.outcome: Outcome = run_guest(
                guest,
                console=console.extend,
                on_exit=lambda vcpu, exit_: self.exits.append((vcpu, exit_)),
                timeout=TIMEOUT,
            )
        self.text = console.decode()


def exits_of(guest: Guest) -> Iterator[Exit]:
    """Each exit of the first vCPU but for page state changes, until it ends well."""
    vcpu = guest.vcpus[0]
    while True:
        exit_ = vcpu.run()
        assert exit_ is not None
        if isinstance(exit_, HypercallExit):
            gpa, npages, attributes = exit_.args[:3]
            guest.convert(gpa, npages * PAGE, private=bool(attributes & ENCRYPTED))
            vcpu.complete_hypercall(0)
        elif isinstance(exit_, IoExit) and exit_.port == EXIT_PORT:
            assert int.from_bytes(exit_.data, "little") == 0
            return
        else:
            yield exit_


# The example


@pytest.mark.parametrize("vcpus", [1, 4])
def test_hello_when_plain_prints_its_line_only(
    plain_host: Platform, guests: Path, vcpus: int
) -> None:
    run = Run(guests / "hello.elf", plain_host, False, vcpus=vcpus)
    assert (run.outcome.kind, run.outcome.ok) == ("exit-port", True)
    assert run.text == "hello from a kvmlaunch guest\n"


@pytest.mark.parametrize("vcpus", [1, 4])
def test_hello_when_an_snp_guest_says_where_it_runs(
    snp_host: Platform, guests: Path, vcpus: int
) -> None:
    run = Run(guests / "hello.elf", snp_host, True, vcpus=vcpus)
    assert (run.outcome.kind, run.outcome.ok) == ("exit-port", True)
    first, second = run.text.splitlines()
    assert first == "hello from a kvmlaunch guest"
    assert second.startswith("SEV-SNP guest, C-bit ")
    assert second.endswith(", GHCB protocol 2")


def test_hello_when_an_snp_guest_changes_two_pages(snp_host: Platform, guests: Path) -> None:
    changes = [
        exit_.args[::2][:2]
        for _, exit_ in Run(guests / "hello.elf", snp_host, True).exits
        if isinstance(exit_, HypercallExit)
    ]
    # Its GHCB, somewhere in its bss, becomes shared; a page that was not launched private.
    (ghcb, to_shared), accepted = changes
    assert 0x100000 < ghcb < 0x180000
    assert to_shared & ENCRYPTED == 0
    assert accepted == (0x1F0000, ENCRYPTED)


def test_waiting_vcpus_when_an_snp_guest_are_held_in_reset(
    snp_host: Platform, test_guests: Path
) -> None:
    """mmio waits for an answer that never comes, so that each vCPU has the time to get there."""
    with launched(test_guests / "mmio.elf", snp_host, True, vcpus=3) as guest:
        first = next(exits_of(guest))
        others = [vcpu.run() for vcpu in guest.vcpus[1:]]
    assert isinstance(first, MmioExit)
    assert [str(exit_) for exit_ in others] == ["KVM_EXIT_AP_RESET_HOLD"] * 2


def test_start_info_when_read_by_the_guest_has_its_memory(
    kind: tuple[Platform, bool], test_guests: Path
) -> None:
    run = Run(test_guests / "start_info.elf", *kind)
    assert (run.outcome.ok, run.text) == (True, "0 16384 ram\n")


# Exits that the guest's own code makes


def test_mmio_when_answered_reaches_the_guest(
    kind: tuple[Platform, bool], test_guests: Path
) -> None:
    seen = []
    with launched(test_guests / "mmio.elf", *kind) as guest:
        for exit_ in exits_of(guest):
            assert isinstance(exit_, MmioExit)
            seen.append((exit_.gpa - DEVICE, exit_.size, exit_.data.hex()))
            if not exit_.is_write:
                at = exit_.gpa - DEVICE
                # Each byte names its place: read 0x18 as 8 bytes gives 88 89 8a ...
                first = FIRST_BYTES[at]
                guest.vcpus[0].complete_mmio(bytes(range(first, first + exit_.size)))
    assert seen == [
        (0, 1, "11"),
        (2, 2, "2223"),
        (4, 4, "34353637"),
        (8, 8, "48494a4b4c4d4e4f"),
        (0x10, 1, ""),
        (0x12, 2, ""),
        (0x14, 4, ""),
        (0x18, 8, ""),
        (0x28, 8, "feffffffffffffff"),
        (0x30, 2, "3412"),
        (0x10014, 4, "78563412"),
        (0x40, 2, ""),
        (0, 2, ""),
        (0x44, 4, ""),
        (0x48, 1, ""),
    ]


def test_mmio_when_nobody_answers_ends_the_run_with_its_address(
    kind: tuple[Platform, bool], test_guests: Path
) -> None:
    outcome = Run(test_guests / "mmio.elf", *kind).outcome
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert str(outcome).startswith(
        "vCPU 0: KVM_EXIT_MMIO write gpa=0xd0000000 size=1 data=11: nothing is at this GPA"
    )


def test_page_when_shared_is_heard_on_both_sides_and_can_be_taken_back(
    snp_host: Platform, test_guests: Path
) -> None:
    heard = []
    with launched(test_guests / "convert.elf", snp_host, True) as guest:
        for exit_ in exits_of(guest):
            assert isinstance(exit_, IoExit)
            assert exit_.port == DOORBELL
            gpa = int.from_bytes(exit_.data, "little")
            heard.append(bytes(guest.memory_view(gpa, 8)))
            guest.memory_view(gpa, 8)[:] = b"yes!".ljust(8, b"\0")
    # The second time the page is the guest's own: the shared side was freed, and reads as zero.
    assert heard == [b"ready?\n\0", bytes(8)]


def test_termination_when_asked_for_has_its_set_and_code(
    snp_host: Platform, test_guests: Path
) -> None:
    outcome = Run(test_guests / "terminate.elf", snp_host, True).outcome
    assert (outcome.kind, outcome.ok) == ("terminated", False)
    assert str(outcome) == (
        "vCPU 0: KVM_EXIT_SYSTEM_EVENT SEV_TERM data=['0x425100']: the guest asked for "
        "termination: reason set 5 (unknown set), code 66 (unknown code)"
    )


def test_ports_when_nothing_is_there_read_as_ones(
    kind: tuple[Platform, bool], test_guests: Path
) -> None:
    outcome = Run(test_guests / "ports.elf", *kind).outcome
    assert (outcome.kind, outcome.ok) == ("exit-port", True)


def test_cpuid_and_msrs_when_asked_are_answered(
    kind: tuple[Platform, bool], test_guests: Path
) -> None:
    run = Run(test_guests / "registers.elf", *kind)
    assert (run.outcome.kind, run.outcome.ok) == ("exit-port", True)
    assert run.text in ("AuthenticAMD\n", "GenuineIntel\n")


APIC_IDS = "APIC IDs 0 1 2\n"


def test_apic_ids_when_asked_for_are_listed_or_there_is_no_such_event(
    snp_host: Platform, test_guests: Path
) -> None:
    run = Run(test_guests / "apic_ids.elf", snp_host, True, vcpus=3)
    assert run.outcome.ok, run.outcome
    assert run.text in ("no APIC ID list\n", APIC_IDS)


@pytest.mark.simulated
@pytest.mark.parametrize(
    ("profile", "text"), [("7.0", "no APIC ID list\n"), ("direct-vmsa", APIC_IDS)]
)
def test_apic_ids_when_simulated_are_listed_where_the_kernel_has_the_event(
    test_guests: Path, profile: str, text: str
) -> None:
    run = Run(test_guests / "apic_ids.elf", require_simulated_cpu(profile), True, vcpus=3)
    assert (run.outcome.ok, run.text) == (True, text), run.outcome


# 64-bit guests, whose page tables are the launcher's


@pytest.mark.parametrize(
    ("name", "kind", "ok"), [("halt", "halted", True), ("misbehave", "shutdown", False)]
)
def test_64_bit_guest_when_its_page_tables_have_the_hosts_c_bit_ends_as_it_should(
    snp_host: Platform, guests: Path, name: str, kind: str, ok: bool
) -> None:
    """hello says where the C-bit is, since the host's CPUID may not."""
    said = Run(guests / "hello.elf", snp_host, True).text
    cbitpos = int(said.partition("C-bit ")[2].partition(",")[0])
    outcome = Run(guests / f"{name}.elf", snp_host, True, cbitpos=cbitpos).outcome
    assert (outcome.kind, outcome.ok) == (kind, ok)


# Bad ends of the runtime


def test_exception_when_plain_ends_at_the_exit_port(
    plain_host: Platform, test_guests: Path
) -> None:
    outcome = Run(test_guests / "exception.elf", plain_host, False).outcome
    assert str(outcome) == "vCPU 0: the guest wrote 0x86 to the exit port"


@pytest.mark.parametrize(("name", "code"), [("exception", 0x86), ("unknown_vc", 10)])
def test_failure_when_an_snp_guest_is_a_termination_with_its_code(
    snp_host: Platform, test_guests: Path, name: str, code: int
) -> None:
    assert reason(Run(test_guests / f"{name}.elf", snp_host, True)) == (15, code)


def test_hello_when_the_host_refuses_a_page_state_change_ends_with_its_code(
    snp_host: Platform, guests: Path
) -> None:
    """The page that it wants to have is behind the end of this memory."""
    run = Run(guests / "hello.elf", snp_host, True, memory=0x180000)
    assert (reason(run), run.text) == ((15, 5), "hello from a kvmlaunch guest\n")


def test_hello_when_the_host_speaks_ghcb_version_1_only_ends_with_its_code(
    snp_host: Platform, guests: Path
) -> None:
    try:
        run = Run(guests / "hello.elf", snp_host, True, ghcb_version=1)
    except IoctlError as error:
        pytest.skip(f"this kernel doesn't take GHCB version 1 for SNP guests ({error.ioctl})")
    assert (reason(run), run.text) == ((15, 2), "")


def reason(run: Run) -> tuple[int, int]:
    """Set and code of a termination by the GHCB MSR (bits 15:12 and 23:16)."""
    exit_ = run.outcome.exit
    assert isinstance(exit_, SystemEventExit)
    assert run.outcome.kind == "terminated"
    assert exit_.data[0] & 0xFFF == 0x100
    return exit_.data[0] >> 12 & 0xF, exit_.data[0] >> 16
