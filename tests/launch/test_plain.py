"""Plain VMs, real and simulated: the same plans, loaders and run loop, unprotected.

Guest code is tiny and integer only, since KVM may run it in its instruction emulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.launch.session import Session
from kvmlaunch.uapi import Platform
from tests.images.builders import Seg, elf64

from .rig import SPIN, prints, prints64

TIMEOUT = 20.0


Run = Callable[..., tuple[Outcome, bytes]]


@pytest.fixture
def run(plain_host: Platform) -> Run:
    """``run(image, **options)`` gives outcome and console."""

    def once(
        image: bytes, *, vcpus: int = 1, timeout: float = TIMEOUT, **options: Any
    ) -> tuple[Outcome, bytes]:
        plan = load_image(
            image, PlanOptions(vcpus=vcpus, memory=4 << 20, confidential=False, **options)
        )
        text = bytearray()
        with Guest(plan, plain_host) as guest:
            outcome = run_guest(guest, console=text.extend, timeout=timeout)
        return outcome, bytes(text)

    return once


def elf(code: bytes) -> bytes:
    return elf64([Seg(0x100000, code)])


@pytest.mark.parametrize(
    "image", [prints(b"hello\n"), elf(prints64(b"hello\n"))], ids=["real-mode", "elf-64"]
)
def test_guest_when_it_prints_is_heard(run: Run, image: bytes) -> None:
    assert run(image)[1] == b"hello\n"


@pytest.mark.parametrize(
    "image", [prints(b"hello\n"), elf(prints64(b"hello\n"))], ids=["real-mode", "elf-64"]
)
def test_guest_when_it_writes_zero_to_the_exit_port_ended_well(run: Run, image: bytes) -> None:
    outcome = run(image)[0]
    assert (outcome.kind, outcome.ok) == ("exit-port", True)


def test_guest_when_it_writes_another_value_to_the_exit_port_failed(run: Run) -> None:
    outcome = run(prints(b"", code=3))[0]
    assert (outcome.kind, outcome.ok) == ("exit-port", False)
    assert str(outcome) == "vCPU 0: the guest wrote 0x3 to the exit port"


def test_guest_when_it_ends_without_a_line_end_is_heard_to_the_last_byte(run: Run) -> None:
    assert run(prints(b"no newline"))[1] == b"no newline"


def test_guest_when_it_halts_without_an_apic_ended_well(run: Run) -> None:
    outcome = run(prints(b"", code=None))[0]
    assert (outcome.kind, outcome.ok) == ("halted", True)


def test_guest_when_flat_code_starts_in_64_bit_mode_runs(run: Run) -> None:
    assert run(prints64(b"64\n"), load_addr=0x200000)[1] == b"64\n"


def test_guest_when_the_image_is_a_rom_starts_at_the_reset_vector(run: Run) -> None:
    # 64 KiB below 4 GiB: at 0xFFFFFFF0 a jump back to the ROM's start.
    rom = prints(b"rom\n").ljust(0xFFF0, b"\x90") + b"\xe9\x0d\x00" + bytes(13)
    assert run(rom, load_addr=0xFFFF0000)[1] == b"rom\n"


def test_guest_when_the_uart_is_asked_says_that_it_can_send(run: Run) -> None:
    # in al, 0x3fd; and al, 0x20; xor al, 0x20; out 0xf4, al; hlt
    code = b"\xba\xfd\x03\xec\x24\x20\x34\x20\xe6\xf4\xf4"
    assert run(code)[0].ok


def test_guest_when_nothing_answers_at_a_port_reads_ones(run: Run) -> None:
    # mov dx, 0x70; in al, dx; not al; out 0xf4, al; hlt
    assert run(b"\xba\x70\x00\xec\xf6\xd0\xe6\xf4\xf4")[0].ok


def test_guest_when_it_prints_by_string_out_is_heard(run: Run) -> None:
    # mov si, text; mov cx, 4; mov dx, 0x3f8; cld; rep outsb; mov al, 0; out 0xf4, al; hlt
    code = b"\xbe\x11\x10\xb9\x04\x00\xba\xf8\x03\xfc\xf3\x6e\xb0\x00\xe6\xf4\xf4str\n"
    assert run(code)[1] == b"str\n"


def test_guest_when_it_reads_where_nothing_is_ends_with_the_gpa(run: Run) -> None:
    # mov ebx, 0x90000000; mov eax, [rbx]
    outcome = run(elf(b"\xbb\x00\x00\x00\x90\x8b\x03\xf4"))[0]
    assert outcome.kind == "failed"
    assert "gpa=0x90000000 size=4" in str(outcome)


def test_guest_when_it_triple_faults_is_a_shutdown(run: Run) -> None:
    # ud2 without an IDT
    outcome = run(elf(b"\x0f\x0b\xf4"))[0]
    assert (outcome.kind, outcome.ok) == ("shutdown", False)
    assert "triple fault" in str(outcome)
    assert "RMP" not in str(outcome)


def test_guest_when_four_vcpus_print_all_are_heard(run: Run) -> None:
    outcome, text = run(prints(b"x", code=None), vcpus=4)
    assert (outcome.kind, text) == ("halted", b"xxxx")


def test_guest_when_it_never_ends_times_out(run: Run) -> None:
    outcome = run(SPIN, timeout=0.2)[0]
    assert (outcome.kind, outcome.ok) == ("timeout", False)
    assert str(outcome) == "the guest still ran after 0.2 s"


def test_guest_when_it_is_plain_has_no_state(plain_host: Platform) -> None:
    plan = load_image(prints(b""), PlanOptions(memory=1 << 20, confidential=False))
    with Guest(plan, plain_host) as guest:
        assert guest.state is None
        assert "plain" in repr(guest)


def test_session_when_the_guest_is_plain_runs_it(plain_host: Platform) -> None:
    plan = load_image(prints(b"session\n"), PlanOptions(memory=1 << 20, confidential=False))
    text = bytearray()
    with Session(plan, plain_host) as session:
        outcome: Outcome = session.run(text.extend, timeout=TIMEOUT)
    assert (outcome.ok, bytes(text)) == (True, b"session\n")
