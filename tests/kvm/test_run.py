"""Guest code on this machine's KVM: a few bytes of real mode per test."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvmlaunch.errors import IoctlError
from kvmlaunch.kvm.exits import (
    HltExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    RetryExit,
    ShutdownExit,
)
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import RunResult, ffi, lib
from tests.host import require_kvm
from tests.kvm.machines import Denying, Machine, load, machine, run

_CONSOLE = 0x3F8

# 16-bit code.
_MOV_DX_CONSOLE = b"\xba\xf8\x03"
_MOV_DX_80 = b"\xba\x80\x00"
_MOV_AL_A = b"\xb0A"
_OUT_DX_AL, _OUT_DX_AX, _OUT_DX_EAX = b"\xee", b"\xef", b"\x66\xef"
_IN_AL_DX, _IN_AX_DX, _IN_EAX_DX = b"\xec", b"\xed", b"\x66\xed"
_HLT = b"\xf4"
_SELF = b"\xeb\xfe"
_DS_F000 = b"\xb8\x00\xf0\x8e\xd8"  # mov ax, 0xf000; mov ds, ax
_GPA = 0xF1234


@pytest.fixture
def made() -> Iterator[Machine]:
    with ExitStack() as stack:
        yield machine(require_kvm(), stack)


@pytest.fixture
def uart() -> Any:
    return ffi.new("struct kl_uart *", {"base": _CONSOLE})


def _text(uart: Any) -> bytes:
    return bytes(ffi.buffer(uart.text, uart.used))


def test_hlt_when_run_is_hlt_exit(made: Machine) -> None:
    load(made, _HLT)
    assert run(made.vcpu) == HltExit()


def test_registers_when_the_guest_stops_are_what_it_left(made: Machine) -> None:
    load(made, b"\xb8\x34\x12\x05\x02\x00" + _HLT)  # mov ax, 0x1234; add ax, 2
    run(made.vcpu)
    regs = made.vcpu.get_regs()
    assert (regs["rax"], regs["rip"]) == (0x1236, 7)


@pytest.mark.parametrize(
    ("code", "size", "data"),
    [(_OUT_DX_AL, 1, b"\x44"), (_OUT_DX_AX, 2, b"\x44\x33"), (_OUT_DX_EAX, 4, b"\x44\x33\x22\x11")],
    ids=["byte", "word", "dword"],
)
def test_out_when_run_is_io_exit_with_its_data(
    made: Machine, code: bytes, size: int, data: bytes
) -> None:
    load(made, _MOV_DX_80 + code + _HLT, rax=0x11223344)
    assert run(made.vcpu) == IoExit(0x80, size, 1, True, data)


def test_run_when_called_after_an_out_goes_on(made: Machine) -> None:
    load(made, _MOV_DX_80 + _OUT_DX_AL + _HLT)
    exits = [run(made.vcpu), run(made.vcpu)]
    assert exits[1] == HltExit()


def test_runs_when_counted_are_the_calls_of_kvm_run(made: Machine) -> None:
    load(made, _MOV_DX_80 + _OUT_DX_AL + _HLT)
    run(made.vcpu)
    run(made.vcpu)
    assert made.vcpu.runs == 2


@pytest.mark.parametrize(
    ("code", "size", "data", "rax"),
    [
        (_IN_AL_DX, 1, b"\x5a", 0x1122335A),
        (_IN_AX_DX, 2, b"\x5a\x6b", 0x11226B5A),
        (_IN_EAX_DX, 4, b"\x5a\x6b\x7c\x8d", 0x8D7C6B5A),
    ],
    ids=["byte", "word", "dword"],
)
def test_in_when_completed_gives_the_guest_the_data(
    made: Machine, code: bytes, size: int, data: bytes, rax: int
) -> None:
    load(made, _MOV_DX_80 + code + _HLT, rax=0x11223344)
    assert run(made.vcpu) == IoExit(0x80, size, 1, False, b"")
    made.vcpu.complete_io(data)
    assert run(made.vcpu) == HltExit()
    assert made.vcpu.get_regs()["rax"] == rax


@pytest.mark.parametrize(
    ("code", "size", "data"),
    [
        (b"\xa2\x34\x12", 1, b"\x00"),
        (b"\xc7\x06\x34\x12\x78\x56", 2, b"\x78\x56"),
        (b"\x66\xc7\x06\x34\x12\x78\x56\x34\x12", 4, b"\x78\x56\x34\x12"),
    ],
    ids=["byte", "word", "dword"],
)
def test_write_when_no_memory_is_there_is_mmio_exit(
    made: Machine, code: bytes, size: int, data: bytes
) -> None:
    load(made, _DS_F000 + code + _HLT)
    assert run(made.vcpu) == MmioExit(_GPA, size, True, data)


@pytest.mark.parametrize(
    ("code", "size", "data", "value"),
    [
        (b"\xa0\x34\x12", 1, b"\x5a", 0xF05A),
        (b"\xa1\x34\x12", 2, b"\x5a\x6b", 0x6B5A),
        (b"\x66\xa1\x34\x12", 4, b"\x5a\x6b\x7c\x8d", 0x8D7C6B5A),
    ],
    ids=["byte", "word", "dword"],
)
def test_read_when_completed_gives_the_guest_the_data(
    made: Machine, code: bytes, size: int, data: bytes, value: int
) -> None:
    load(made, _DS_F000 + code + _HLT)
    assert run(made.vcpu) == MmioExit(_GPA, size, False, b"")
    made.vcpu.complete_mmio(data)
    assert run(made.vcpu) == HltExit()
    assert made.vcpu.get_regs()["rax"] == value


def test_mmio_when_completed_with_too_much_is_value_error(made: Machine) -> None:
    load(made, _DS_F000 + b"\xa0\x34\x12" + _HLT)
    run(made.vcpu)
    with pytest.raises(ValueError, match="length"):
        made.vcpu.complete_mmio(bytes(9))


@pytest.mark.parametrize("size", [0, 1, 3, 8192])
def test_in_when_completed_with_another_length_is_value_error(made: Machine, size: int) -> None:
    """Also what would reach beyond the run page."""
    load(made, _MOV_DX_80 + _IN_AX_DX + _HLT)
    run(made.vcpu)
    with pytest.raises(ValueError, match="length"):
        made.vcpu.complete_io(bytes(size))


def test_exception_when_the_idt_is_empty_ends_the_guest(made: Machine) -> None:
    """A triple fault; a KVM that only emulates gives up instead."""
    load(made, b"\x0f\x0b")
    sregs = made.vcpu.get_sregs()
    sregs["idt"] = {"base": 0, "limit": 0}
    made.vcpu.set_sregs(sregs)
    assert isinstance(run(made.vcpu), (ShutdownExit, InternalErrorExit))


def test_console_when_a_line_ends_hands_its_text_over(made: Machine, uart: Any) -> None:
    code = b"".join(b"\xb0" + bytes([byte]) + _OUT_DX_AL for byte in b"hello\n")
    load(made, _MOV_DX_CONSOLE + code + _HLT)
    assert run(made.vcpu, uart) is None
    assert _text(uart) == b"hello\n"
    assert made.vcpu.runs == 6


def test_console_when_text_was_taken_goes_on_to_the_next_exit(made: Machine, uart: Any) -> None:
    load(made, _MOV_DX_CONSOLE + b"\xb0\n" + _OUT_DX_AL + _MOV_AL_A + _OUT_DX_AL + _HLT)
    assert run(made.vcpu, uart) is None
    uart.used = 0
    assert run(made.vcpu, uart) == HltExit()
    assert _text(uart) == b"A"


def test_console_when_another_port_is_used_is_io_exit(made: Machine, uart: Any) -> None:
    load(made, _MOV_DX_80 + _MOV_AL_A + _OUT_DX_AL + _HLT)
    assert run(made.vcpu, uart) == IoExit(0x80, 1, 1, True, b"A")
    assert _text(uart) == b""


def test_console_when_the_guest_waits_for_the_line_status_sees_it_empty(
    made: Machine, uart: Any
) -> None:
    """The usual driver loop: IN from LSR until 0x20 is set, then OUT."""
    wait = b"\xba\xfd\x03" + b"\xec\xa8\x20\x74\xfb"  # mov dx, LSR; in al, dx; test; jz -5
    load(made, wait + _MOV_DX_CONSOLE + _MOV_AL_A + _OUT_DX_AL + _HLT)
    assert run(made.vcpu, uart) == HltExit()
    assert _text(uart) == b"A"


def test_console_when_a_string_is_written_has_all_of_it(made: Machine, uart: Any) -> None:
    text = bytes(range(32, 96))
    code = _MOV_DX_CONSOLE + b"\xbe\x00\x01" + b"\xb9\x40\x00" + b"\xfc\xf3\x6e" + _HLT
    load(made, code)  # mov si, 0x100; mov cx, 64; cld; rep outsb
    made.memory.view[0x100 : 0x100 + len(text)] = text
    assert run(made.vcpu, uart) == HltExit()
    assert _text(uart) == text


def test_console_when_nearly_full_hands_over_without_a_line(made: Machine, uart: Any) -> None:
    load(made, _MOV_DX_CONSOLE + _MOV_AL_A + _OUT_DX_AL + b"\xeb\xfd")  # out; jmp -3
    assert run(made.vcpu, uart) is None
    assert _text(uart) == b"A" * made.vcpu.runs


def test_exit_request_when_made_before_interrupts_at_once(made: Machine) -> None:
    load(made, _SELF)
    made.vcpu.request_exit()
    assert run(made.vcpu) == InterruptedExit()


def test_exit_request_when_cleared_lets_the_guest_run(made: Machine) -> None:
    load(made, _HLT)
    made.vcpu.request_exit()
    run(made.vcpu)
    made.vcpu.clear_exit_request()
    assert run(made.vcpu) == HltExit()


def test_kick_when_the_guest_never_exits_interrupts_it(made: Machine) -> None:
    """From another thread: request_exit() and the signal; the guest runs on afterwards."""
    load(made, b"\x40" + b"\xeb\xfd")  # inc ax; jmp -3
    number = lib.kl_kick_signal()
    thread = threading.get_ident()
    running = threading.Event()

    def kick() -> None:
        running.wait()
        made.vcpu.request_exit()
        signal.pthread_kill(thread, number)

    kicker = threading.Thread(target=kick)
    kicker.start()
    running.set()
    exit_ = run(made.vcpu)
    kicker.join()
    assert exit_ == InterruptedExit()


def test_string_out_when_no_console_is_given_is_io_exits(made: Machine) -> None:
    """Each exit holds a part of the string, of whatever length KVM likes."""
    load(made, _MOV_DX_80 + b"\xbe\x00\x01\xb9\x04\x00\xfc\xf3\x6e" + _HLT)
    made.memory.view[0x100:0x104] = b"abcd"
    seen = b""
    while isinstance(exit_ := run(made.vcpu), IoExit):
        assert len(exit_.data) == exit_.count * exit_.size
        seen += exit_.data
    assert (seen, exit_) == (b"abcd", HltExit())


# Results that this machine's KVM doesn't give.


@pytest.fixture
def simulated() -> Iterator[Machine]:
    with ExitStack() as stack:
        yield machine(SimPlatform(), stack)


class _Running(Denying):
    """A platform whose KVM_RUN gives a fixed result."""

    def __init__(self, inner: Any, result: RunResult) -> None:
        super().__init__(inner, lambda name: 0)
        self.result = result

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        return self.result


def _given(simulated: Machine, number: int) -> None:
    simulated.vcpu.platform = _Running(simulated.vcpu.platform, RunResult(-1, number, False, 1))


def test_run_when_it_gives_eagain_is_retry_exit(simulated: Machine) -> None:
    _given(simulated, errno.EAGAIN)
    assert simulated.vcpu.run() == RetryExit()


@pytest.mark.parametrize("number", [errno.EFAULT, lib.KL_EHWPOISON], ids=["EFAULT", "EHWPOISON"])
def test_run_when_memory_faults_is_an_exit_with_errno(simulated: Machine, number: int) -> None:
    _given(simulated, number)
    page = simulated.vcpu.kvm_run
    page.exit_reason = lib.KVM_EXIT_MEMORY_FAULT
    page.memory_fault = {"flags": lib.KVM_MEMORY_EXIT_FLAG_PRIVATE, "gpa": 0x4000, "size": 4096}
    assert simulated.vcpu.run() == MemoryFaultExit(0x4000, 4096, True, number)


def test_run_when_it_faults_without_that_exit_is_an_error(simulated: Machine) -> None:
    _given(simulated, errno.EFAULT)
    simulated.vcpu.kvm_run.exit_reason = lib.KVM_EXIT_HLT
    with pytest.raises(IoctlError) as info:
        simulated.vcpu.run()
    assert (info.value.ioctl, info.value.errno) == ("KVM_RUN", errno.EFAULT)


def test_hypercall_when_completed_has_its_answer_in_the_run_page(simulated: Machine) -> None:
    simulated.vcpu.kvm_run.hypercall.ret = 99
    simulated.vcpu.complete_hypercall(22)
    assert simulated.vcpu.kvm_run.hypercall.ret == 22


@pytest.mark.parametrize(("npages", "left"), [(None, 7), (3, 3)])
def test_req_certs_when_completed_has_its_answer_in_the_run_page(
    simulated: Machine, npages: int | None, left: int
) -> None:
    # kernel-snp-abi 3.7: npages at 0x28 of the run page, ret at 0x30
    page = ffi.cast("uint64_t *", simulated.vcpu.kvm_run)
    page[5], page[6] = 7, 99
    simulated.vcpu.complete_req_certs(errno.ENOSPC, npages=npages)
    assert (page[5], page[6]) == (left, 28)
