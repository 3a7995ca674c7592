"""Certificates for extended guest requests: what the run loop answers, and what a guest gets."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.errors import MissingCapability
from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import ffi, lib
from tests.host import require_simulated_cpu

from .rig import PAGE, Playback, Script, exited, io_out, small_plan
from .scripted import EXIT, TIMEOUT

TABLE = bytes(range(256)) * 24  # one and a half pages


def answers(*wanted: tuple[int, int]) -> tuple[list[tuple[int, int]], bytes, Outcome]:
    """(ret, npages) of each request for (gpa, npages); memory at 0x8000, and the outcome."""
    found = []

    def script(run: Any) -> Script:
        # kernel-snp-abi 3.7: gpa, npages and ret from 0x20 on
        words = ffi.cast("uint64_t *", run)
        for gpa, npages in wanted:
            run.exit_reason = lib.KVM_EXIT_SNP_REQ_CERTS
            words[4], words[5], words[6] = gpa, npages, 0
            yield exited()
            found.append((int(words[6]), int(words[5])))
        yield io_out(run, EXIT, b"\0")

    with SimPlatform("7.0") as host:
        platform = Playback(host, {0: script})
        with Guest(small_plan(), platform, certificates=TABLE) as guest:
            guest.memory_view(0x8000, 4 * PAGE)[:] = b"x" * 4 * PAGE
            guest.launch()
            outcome = run_guest(guest, console=print, timeout=TIMEOUT)
            return found, bytes(guest.memory_view(0x8000, 4 * PAGE)), outcome


def test_request_with_room_gets_the_table() -> None:
    found, memory, outcome = answers((0x8000, 3))
    assert (found, outcome.ok) == ([(0, 3)], True)
    assert memory == TABLE + bytes(2 * PAGE - len(TABLE)) + b"x" * 2 * PAGE


@pytest.mark.parametrize("npages", [0, 1])
def test_request_with_too_little_room_gets_the_number_of_pages(npages: int) -> None:
    found, memory, outcome = answers((0x8000, npages), (0x8000, 2))
    assert (found, outcome.ok) == ([(errno.ENOSPC, 2), (0, 2)], True)
    assert memory[: len(TABLE)] == TABLE


@pytest.mark.parametrize("gpa", [63 * PAGE, 1 << 40, (1 << 64) - PAGE])
def test_request_outside_of_memory_gets_an_error_and_the_guest_goes_on(gpa: int) -> None:
    found, memory, outcome = answers((gpa, 1 << 63))
    assert (found, outcome.ok) == ([(errno.EIO, 1 << 63)], True)
    assert memory == b"x" * 4 * PAGE


def test_guest_when_the_kernel_has_no_such_exits_is_refused() -> None:
    with SimPlatform("6.18") as host:
        with pytest.raises(MissingCapability, match="certificates for guest requests"):
            Guest(small_plan(), host, certificates=TABLE)
        assert host.open_fds == ()


def test_guest_when_it_asks_gets_what_the_host_was_given(guests: Path) -> None:
    # Its buffer is 4 pages; a blob behind the table says how large that is.
    blob = bytes(n % 251 for n in range(2 * PAGE))
    guid = "63da758de6644564adc5f4b93be8accd"  # snp-firmware-abi 8.3: VCEK
    entry = bytes.fromhex(guid) + (48).to_bytes(4, "little") + len(blob).to_bytes(4, "little")
    table = entry + bytes(24) + blob
    platform = require_simulated_cpu("7.0")
    plan = load_image(guests / "certs.elf", PlanOptions(memory=16 << 20))
    console = bytearray()
    with Guest(plan, platform, certificates=table) as guest:
        guest.launch()
        outcome = run_guest(guest, console=console.extend, timeout=TIMEOUT)
    assert outcome.ok
    text = console.decode()
    assert text.startswith("the certificates need 3 pages\n-----BEGIN ATTESTATION REPORT")
    shown = text.split("-----BEGIN CERTIFICATE TABLE-----\n")[1].split("-----END")[0]
    assert bytes.fromhex(shown)[: len(table)] == table


def test_guest_when_its_room_is_too_small_has_a_report_no_less(guests: Path) -> None:
    platform = require_simulated_cpu("7.0")
    plan = load_image(guests / "certs.elf", PlanOptions(memory=16 << 20))
    console = bytearray()
    with Guest(plan, platform, certificates=bytes(5 * PAGE)) as guest:
        guest.launch()
        outcome = run_guest(guest, console=console.extend, timeout=TIMEOUT)
    assert outcome.ok
    assert b"the certificates need 5 pages\n" in console
    assert b"-----END ATTESTATION REPORT-----" in console
