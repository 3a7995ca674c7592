"""Each exit of KVM_RUN and what becomes of it; the exits come from a script."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmlaunch.kvm.exits import Exit
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import run_guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import RunResult, lib

from .rig import (
    Script,
    exited,
    failed,
    io_data,
    io_in,
    io_out,
    map_gpa,
    memory_fault,
    out_and_exit,
    plain_exit,
    plan,
    playing,
    system_event,
)
from .scripted import CONSOLE, EXIT, TIMEOUT, one, outcome_of, play

# Ports


def test_console_when_written_byte_by_byte_is_heard() -> None:
    assert play(out_and_exit(b"hello\n")).text == b"hello\n"


def test_console_when_written_by_a_string_out_is_heard() -> None:
    def script(run: Any) -> Script:
        yield io_out(run, CONSOLE, b"a string\n")
        yield io_out(run, EXIT, b"\0")

    assert play(script).text == b"a string\n"


def test_console_when_written_as_words_is_not_the_uarts() -> None:
    def script(run: Any) -> Script:
        yield io_out(run, CONSOLE, b"ab", size=2)
        yield io_out(run, EXIT, b"\0")

    assert play(script).text == b""


def test_console_when_the_guest_ends_is_shown_to_the_last_byte() -> None:
    assert play(out_and_exit(b"no newline")).text == b"no newline"


def test_console_when_the_guest_fails_is_shown_to_the_last_byte() -> None:
    def script(run: Any) -> Script:
        yield io_out(run, CONSOLE, b"last words")
        yield failed(errno.EIO)

    assert play(script).text == b"last words"


def test_console_when_its_divisor_is_set_is_silent() -> None:
    """DLAB (bit 7 of LCR) turns port 0 into the divisor latch."""

    def script(run: Any) -> Script:
        yield io_out(run, CONSOLE + 3, b"\x80")
        yield io_out(run, CONSOLE, b"\x01")
        yield io_out(run, CONSOLE + 3, b"\x03")
        yield io_out(run, CONSOLE, b"T")
        yield io_out(run, EXIT, b"\0")

    assert play(script).text == b"T"


def answers(port: int, size: int = 1, count: int = 1) -> bytes:
    seen: list[bytes] = []

    def script(run: Any) -> Script:
        yield io_in(run, port, size, count)
        seen.append(io_data(run, size * count))
        yield io_out(run, EXIT, b"\0")

    play(script)
    return seen[0]


def test_line_status_when_read_says_that_the_sender_is_empty() -> None:
    assert answers(CONSOLE + 5) == b"\x60"


@pytest.mark.parametrize("port", [0, 0x70, 0x3F7, 0x400, 0xCFC, EXIT, 0xFFFF])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_port_when_nothing_is_there_reads_as_ones(port: int, size: int) -> None:
    assert answers(port, size) == b"\xff" * size


def test_port_when_a_string_is_read_gives_ones_for_each_item() -> None:
    assert answers(0x1F0, 2, 256) == b"\xff" * 512


def test_console_when_read_as_a_word_reads_as_ones() -> None:
    assert answers(CONSOLE, 2) == b"\xff\xff"


def test_port_when_nothing_is_there_takes_a_write() -> None:
    def script(run: Any) -> Script:
        yield io_out(run, 0x80, b"\x55")
        yield io_out(run, EXIT, b"\0")

    assert play(script).outcome.ok


@pytest.mark.parametrize(
    ("data", "size", "ok", "text"),
    [
        (b"\0", 1, True, "vCPU 0: the guest wrote 0x0 to the exit port"),
        (b"\1", 1, False, "vCPU 0: the guest wrote 0x1 to the exit port"),
        (b"\xff", 1, False, "vCPU 0: the guest wrote 0xff to the exit port"),
        (b"\0\1", 2, False, "vCPU 0: the guest wrote 0x100 to the exit port"),
        (b"\0\0\0\0", 4, True, "vCPU 0: the guest wrote 0x0 to the exit port"),
    ],
)
def test_exit_port_when_written_ends_the_run(data: bytes, size: int, ok: bool, text: str) -> None:
    outcome = outcome_of(lambda run: io_out(run, EXIT, data, size))
    assert (outcome.kind, outcome.ok, str(outcome)) == ("exit-port", ok, text)


def test_exits_when_they_are_port_io_are_not_told_but_for_the_exit_port() -> None:
    def script(run: Any) -> Script:
        yield io_out(run, 0x80, b"\x55")
        yield io_in(run, 0x70)
        yield io_out(run, EXIT, b"\0")

    assert [str(exit_) for _, exit_ in play(script).exits] == [
        "KVM_EXIT_IO out port=0xf4 size=1 count=1 data=00"
    ]


# HLT, SHUTDOWN, system events


def halt(run: Any) -> RunResult:
    return plain_exit(run, lib.KVM_EXIT_HLT)


def test_hlt_when_there_is_one_vcpu_ends_the_run_well() -> None:
    outcome = outcome_of(halt)
    assert (outcome.kind, outcome.ok, str(outcome)) == ("halted", True, "vCPU 0: the guest halted")


def test_hlt_when_others_still_run_ends_only_that_vcpu() -> None:
    outcome = play(one(halt), out_and_exit(b"still here\n", 7), one(halt)).outcome
    assert (outcome.kind, outcome.vcpu) == ("exit-port", 1)


def test_hlt_when_the_last_vcpu_halts_ends_the_run() -> None:
    result = play(one(halt), one(halt), one(halt))
    assert result.outcome.kind == "halted"
    assert sorted(vcpu for vcpu, _ in result.exits) == [0, 1, 2]


def hold(run: Any) -> RunResult:
    return plain_exit(run, lib.KVM_EXIT_AP_RESET_HOLD)


def test_reset_hold_when_others_still_run_ends_only_that_vcpu() -> None:
    result = play(one(hold), out_and_exit(b"still here\n", 7), one(hold))
    assert (result.outcome.kind, result.outcome.vcpu) == ("exit-port", 1)
    assert "KVM_EXIT_AP_RESET_HOLD" in [str(exit_) for _, exit_ in result.exits]


def test_reset_hold_when_every_vcpu_halts_or_holds_ends_the_run_well() -> None:
    outcome = play(one(hold), one(halt), one(hold)).outcome
    assert (outcome.kind, outcome.ok) == ("halted", True)


def test_reset_hold_when_there_is_one_vcpu_says_what_it_waits_for() -> None:
    assert str(outcome_of(hold)) == "vCPU 0: the guest waits for a SIPI"


def test_shutdown_when_the_guest_is_protected_names_the_rmp() -> None:
    outcome = outcome_of(lambda run: plain_exit(run, lib.KVM_EXIT_SHUTDOWN))
    assert (outcome.kind, outcome.ok) == ("shutdown", False)
    assert "triple fault or a fatal RMP violation" in str(outcome)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0x000100, "reason set 0 (GHCB specification), code 0 (general termination request)"),
        (0x021100, "reason set 1 (Linux), code 2 (PVALIDATE failed)"),
        (0x7FFFF000, "only in the host's kernel log"),
    ],
)
def test_sev_term_when_it_comes_is_decoded(value: int, text: str) -> None:
    outcome = outcome_of(lambda run: system_event(run, 6, value))
    assert (outcome.kind, outcome.ok) == ("terminated", False)
    assert "KVM_EXIT_SYSTEM_EVENT SEV_TERM" in str(outcome)
    assert text in str(outcome)


def test_sev_term_when_it_has_no_data_still_has_a_text() -> None:
    outcome = outcome_of(lambda run: system_event(run, 6))
    assert (outcome.kind, outcome.ok) == ("terminated", False)


def test_system_event_when_it_is_a_shutdown_ends_the_run_well() -> None:
    outcome = outcome_of(lambda run: system_event(run, 1))
    assert (outcome.kind, outcome.ok) == ("shutdown", True)


@pytest.mark.parametrize(("kind", "name"), [(2, "RESET"), (3, "CRASH"), (77, "77")])
def test_system_event_when_it_is_another_fails_with_its_name(kind: int, name: str) -> None:
    outcome = outcome_of(lambda run: system_event(run, kind))
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert f"KVM_EXIT_SYSTEM_EVENT {name} " in str(outcome)


# MMIO


def mmio(run: Any, gpa: int, *, write: bool = False) -> RunResult:
    run.exit_reason = lib.KVM_EXIT_MMIO
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = gpa, 4, int(write)
    run.mmio.data = b"\x78\x56\x34\x12\0\0\0\0"
    return exited()


def test_mmio_when_nothing_is_there_names_gpa_and_nearest_range() -> None:
    outcome = outcome_of(lambda run: mmio(run, 0x8010))
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert "KVM_EXIT_MMIO read gpa=0x8010 size=4" in str(outcome)
    assert "nearest launched range: unmeasured 0x7000..0x8000" in str(outcome)


def test_mmio_when_it_is_a_write_shows_the_data() -> None:
    outcome = outcome_of(lambda run: mmio(run, 0xFEC00000, write=True))
    assert "KVM_EXIT_MMIO write gpa=0xfec00000 size=4 data=78563412" in str(outcome)


# MEMORY_FAULT


def test_memory_fault_when_a_page_was_launched_there_names_it() -> None:
    outcome = outcome_of(lambda run: memory_fault(run, 0x2000, private=False))
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert "KVM_EXIT_MEMORY_FAULT gpa=0x2000 size=0x1000 access=shared" in str(outcome)
    assert "page 1 of image (image.bin+0x1000), launched as NORMAL" in str(outcome)


def test_memory_fault_when_the_page_has_no_file_names_its_origin() -> None:
    outcome = outcome_of(lambda run: memory_fault(run, 0x5000, private=False))
    assert "page 0 of secrets (kvmlaunch:secrets), launched as SECRETS" in str(outcome)


def test_memory_fault_when_no_page_was_launched_there_names_the_nearest_range() -> None:
    outcome = outcome_of(lambda run: memory_fault(run, 0x3000, private=True))
    assert "access=private" in str(outcome)
    assert "no page was launched there (nearest launched range: image 0x1000..0x3000)" in str(
        outcome
    )


def test_memory_fault_when_nothing_was_launched_says_so() -> None:
    outcome = outcome_of(lambda run: memory_fault(run, 0x3000, private=True), launch_plan=plan([]))
    assert str(outcome).endswith("no page was launched there")


@pytest.mark.parametrize("gpa", [0x2000, 0x3000])
def test_memory_fault_when_the_hosts_memory_is_broken_says_so(gpa: int) -> None:
    poisoned = 133  # EHWPOISON on x86-64 Linux
    outcome = outcome_of(lambda run: memory_fault(run, gpa, private=True, number=poisoned))
    assert "EHWPOISON" in str(outcome)
    assert "C-bit" not in str(outcome)


def test_efault_when_it_is_no_memory_fault_is_a_failed_call() -> None:
    outcome = outcome_of(lambda run: plain_exit(run, lib.KVM_EXIT_UNKNOWN) and failed(14))
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert "KVM_RUN ret=-14 (EFAULT" in str(outcome)


# The rest


def internal_error(run: Any, suberror: int, insn: bytes = b"") -> RunResult:
    run.exit_reason = lib.KVM_EXIT_INTERNAL_ERROR
    run.internal.suberror, run.internal.ndata = suberror, 4 if insn else 0
    if insn:
        run.emulation_failure.flags = 1
        run.emulation_failure.insn_size = len(insn)
        run.emulation_failure.insn_bytes = insn.ljust(15, b"\0")
    return exited()


def test_internal_error_when_the_instruction_is_known_shows_its_bytes() -> None:
    outcome = outcome_of(lambda run: internal_error(run, 1, b"\x0f\x01\xff"))
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert "KVM_EXIT_INTERNAL_ERROR suberror=1 (emulation failed) insn=0f01ff" in str(outcome)


@pytest.mark.parametrize(
    ("suberror", "text"),
    [(1, "emulation failed"), (2, "simultaneous"), (3, "delivered"), (4, "unexpected exit")],
)
def test_internal_error_when_it_comes_is_explained(suberror: int, text: str) -> None:
    outcome = outcome_of(lambda run: internal_error(run, suberror))
    assert text in str(outcome)
    assert "kernel log" in str(outcome)


def fail_entry(run: Any) -> RunResult:
    run.exit_reason = lib.KVM_EXIT_FAIL_ENTRY
    run.fail_entry.hardware_entry_failure_reason = 0xFFFFFFFF
    run.fail_entry.cpu = 3
    return exited()


def test_fail_entry_when_it_comes_is_explained() -> None:
    outcome = outcome_of(fail_entry)
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert "KVM_EXIT_FAIL_ENTRY hardware_reason=0xffffffff cpu=3" in str(outcome)
    assert "before SNP_LAUNCH_FINISH" in str(outcome)


def test_run_when_the_launch_is_not_finished_is_a_failed_entry() -> None:
    """By the simulated kernel itself: nothing is scripted."""
    with SimPlatform("6.12") as host, Guest(plan([]), host) as guest:
        guest.start()
        outcome = run_guest(guest, console=print, timeout=TIMEOUT)
    assert "KVM_EXIT_FAIL_ENTRY" in str(outcome)


@pytest.mark.parametrize(
    ("number", "name"), [(38, "KVM_EXIT_NOTIFY|KVM_EXIT_38"), (999, "KVM_EXIT_999")]
)
def test_exit_when_it_is_unknown_is_named_by_its_number(number: int, name: str) -> None:
    outcome = outcome_of(lambda run: plain_exit(run, number))
    assert (outcome.kind, outcome.ok) == ("failed", False)
    assert any(part in str(outcome) for part in name.split("|"))


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR])
def test_run_when_told_to_try_again_tries_again(number: int) -> None:
    def script(run: Any) -> Script:
        yield failed(number)
        yield failed(number)
        yield io_out(run, EXIT, b"\0")

    result = play(script)
    assert (result.outcome.kind, len(result.exits)) == ("exit-port", 1)


@pytest.mark.parametrize(
    ("number", "name"), [(errno.EIO, "EIO"), (errno.EINVAL, "EINVAL"), (errno.ENOEXEC, "ENOEXEC")]
)
def test_run_when_the_call_fails_names_errno_and_vcpu(number: int, name: str) -> None:
    outcome = outcome_of(lambda run: failed(number))
    assert (outcome.kind, outcome.ok, outcome.vcpu) == ("failed", False, 0)
    assert f"KVM_RUN ret=-{number} ({name}" in str(outcome)


def test_run_when_the_call_fails_says_that_registers_can_not_be_read() -> None:
    assert "protected vCPU can't be read" in str(outcome_of(lambda run: failed(errno.EIO)))


def test_run_when_the_simulated_host_has_no_engine_names_the_command() -> None:
    outcome = outcome_of(lambda run: failed(errno.ENOSYS))
    assert (outcome.kind, outcome.ok) == ("no-cpu", False)
    assert "pip install 'kvmlaunch[softcpu]'" in str(outcome)
    assert "\n" not in str(outcome)


# Outcomes and callbacks


def test_exits_when_told_name_the_vcpu() -> None:
    def first(run: Any) -> Script:
        yield map_gpa(run, 0x3000, 1, private=False)
        yield halt(run)

    result = play(first)
    assert [(vcpu, str(exit_)) for vcpu, exit_ in result.exits] == [
        (0, "KVM_EXIT_HYPERCALL MAP_GPA_RANGE gpa=0x3000 pages=1 to=shared"),
        (0, "KVM_EXIT_HLT"),
    ]


def test_outcome_when_an_exit_ended_the_run_has_it() -> None:
    outcome = outcome_of(halt)
    assert (outcome.vcpu, outcome.exit and outcome.exit.reason) == (0, "KVM_EXIT_HLT")


class Broken(Exception):
    """Raised by a callback."""


def test_run_when_the_console_fails_raises_its_error() -> None:
    def console(text: bytes) -> None:
        raise Broken

    with playing(out_and_exit(b"text\n")) as (guest, _), pytest.raises(Broken):
        run_guest(guest, console=console, timeout=TIMEOUT)


def test_run_when_the_console_fails_behind_the_last_exit_raises_its_error() -> None:
    def console(text: bytes) -> None:
        raise Broken

    def script(run: Any) -> Script:
        yield io_out(run, CONSOLE, b"left")
        yield failed(errno.EIO)

    with playing(script) as (guest, _), pytest.raises(Broken):
        run_guest(guest, console=console, timeout=TIMEOUT)


def test_run_when_on_exit_fails_raises_its_error() -> None:
    def on_exit(vcpu: int, exit_: Exit) -> None:
        raise Broken

    with playing(one(halt)) as (guest, _), pytest.raises(Broken):
        run_guest(guest, console=print, on_exit=on_exit, timeout=TIMEOUT)


def test_run_when_done_once_can_be_done_again() -> None:
    def script(run: Any) -> Script:
        yield io_out(run, EXIT, b"\1")
        yield io_out(run, EXIT, b"\2")

    with playing(script) as (guest, _):
        details = [run_guest(guest, console=print, timeout=TIMEOUT).detail for _ in range(2)]
    assert [detail.split()[3] for detail in details] == ["0x1", "0x2"]
