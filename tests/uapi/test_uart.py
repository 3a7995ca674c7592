"""The 16550 of csrc/run.c, and the run loop that serves it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from kvmlaunch.uapi import ffi, lib

_BASE = 0x3F8
_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCRATCH = range(8)
_DLAB = 0x80
_TEXT_SIZE = ffi.sizeof(dict(ffi.typeof("struct kl_uart").fields)["text"].type)


@pytest.fixture
def uart() -> Any:
    return ffi.new("struct kl_uart *", {"base": _BASE})


def _out(uart: Any, register: int, *values: int) -> None:
    for value in values:
        lib.kl_uart_out(uart, _BASE + register, value)


def _in(uart: Any, register: int) -> int:
    return lib.kl_uart_in(uart, _BASE + register)


def _text(uart: Any) -> bytes:
    return bytes(ffi.buffer(uart.text, uart.used))


def test_text_when_written_is_kept_in_order(uart: Any) -> None:
    _out(uart, _DATA, *b"hello\n")
    assert _text(uart) == b"hello\n"


def test_data_when_read_is_0(uart: Any) -> None:
    _out(uart, _DATA, 0x55)
    assert _in(uart, _DATA) == 0


def test_dlab_when_set_writes_the_divisor_and_no_text(uart: Any) -> None:
    _out(uart, _LCR, _DLAB)
    _out(uart, _DATA, 0x0C)
    _out(uart, _IER, 0x01)
    assert (_in(uart, _DATA), _in(uart, _IER)) == (0x0C, 0x01)
    assert _text(uart) == b""


def test_dlab_when_cleared_again_writes_text(uart: Any) -> None:
    _out(uart, _LCR, _DLAB | 3, 3)
    _out(uart, _DATA, ord("x"))
    assert _text(uart) == b"x"


def test_dlab_when_cleared_again_has_its_own_ier(uart: Any) -> None:
    _out(uart, _IER, 0x05)
    _out(uart, _LCR, _DLAB)
    _out(uart, _IER, 0x77)
    _out(uart, _LCR, 0)
    assert _in(uart, _IER) == 0x05


@pytest.mark.parametrize(
    ("register", "value"),
    [(_LSR, 0x60), (_IIR, 0x01), (_MSR, 0xB0)],
    ids=["LSR transmitter empty", "IIR no interrupt", "MSR DCD DSR CTS"],
)
def test_status_when_read_is_that_of_an_idle_line(uart: Any, register: int, value: int) -> None:
    _out(uart, register, 0xFF)  # FCR, or a read-only register
    assert _in(uart, register) == value


@pytest.mark.parametrize("register", [_IER, _LCR, _MCR, _SCRATCH])
def test_register_when_written_reads_back(uart: Any, register: int) -> None:
    _out(uart, register, 0x5A)
    assert _in(uart, register) == 0x5A


def test_text_when_full_drops_the_rest(uart: Any) -> None:
    _out(uart, _DATA, *b"a" * _TEXT_SIZE, *b"b" * 10)
    assert _text(uart) == b"a" * _TEXT_SIZE


def test_uart_when_text_is_full_has_nothing_written_behind_it() -> None:
    size = ffi.sizeof("struct kl_uart")
    memory = ffi.new("char[]", size + 64)
    ffi.buffer(memory)[:] = b"\xa5" * (size + 64)
    uart = ffi.cast("struct kl_uart *", memory)
    uart.base, uart.used, uart.regs[_LCR] = _BASE, 0, 0
    for _ in range(_TEXT_SIZE + 100):
        lib.kl_uart_out(uart, _BASE, 0)
    assert bytes(ffi.buffer(memory))[size:] == b"\xa5" * 64


def test_uart_when_base_differs_counts_its_registers_from_there() -> None:
    uart = ffi.new("struct kl_uart *", {"base": 0x2F8})
    lib.kl_uart_out(uart, 0x2F8 + _SCRATCH, 0x42)
    assert lib.kl_uart_in(uart, 0x2F8 + _SCRATCH) == 0x42


# KVM_RUN that always gives 0 and leaves the exit as it is: a seccomp filter answers it, so
# that the loop can be seen to work on exits that this machine's KVM never makes.
_LOOP = """
import ctypes, json, mmap, sys
from kvmlaunch.uapi import ffi, lib

class Line(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8),
                ("k", ctypes.c_uint32)]

class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_uint16), ("filter", ctypes.POINTER(Line))]

LD, JEQ, RET, ALLOW, ERRNO_0, SYS_IOCTL = 0x20, 0x15, 0x06, 0x7fff0000, 0x00050000, 16
lines = (Line * 6)(
    Line(LD, 0, 0, 0), Line(JEQ, 0, 3, SYS_IOCTL),
    Line(LD, 0, 0, 24), Line(JEQ, 0, 1, lib.KVM_RUN),
    Line(RET, 0, 0, ERRNO_0), Line(RET, 0, 0, ALLOW))
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
program = Program(6, lines)
assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)) == 0

wanted = json.loads(sys.argv[1])
pages = ffi.new("char[]", 3 * 4096)
run = ffi.cast("struct kvm_run *", pages)
run.exit_reason = wanted.pop("reason", lib.KVM_EXIT_IO)
text = wanted.pop("text", "").encode()
run.io = {"direction": lib.KVM_EXIT_IO_OUT, "size": 1, "port": 0x3f8, "count": len(text),
          "data_offset": 4096, **wanted}
ffi.memmove(pages + 4096, text, len(text))
uart = ffi.new("struct kl_uart *", {"base": 0x3f8})
out = lib.kl_run(0, run, uart)
print(json.dumps({"ret": out.ret, "err": out.err, "handled": out.handled, "runs": out.runs,
                  "used": uart.used, "text": bytes(uart.text)[:uart.used].decode()}))
"""


def _loop(**exit_: Any) -> dict[str, Any]:
    """Outcome of kl_run() where KVM_RUN gives this exit again and again."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, json.dumps(exit_)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def test_loop_when_a_line_ends_hands_its_text_over() -> None:
    outcome = _loop(text="line\n")
    assert (outcome["handled"], outcome["runs"], outcome["text"]) == (1, 1, "line\n")


def test_loop_when_no_line_ends_runs_on() -> None:
    outcome = _loop(text="x" * 1000)
    assert outcome["handled"] == 1
    assert outcome["runs"] > 1


@pytest.mark.parametrize("count", [1, 700, 1500, 3000, 4095, 4096])
def test_loop_when_strings_are_long_loses_no_text(count: int) -> None:
    """A string exit has up to 4096 bytes, whatever is in the buffer already."""
    outcome = _loop(text="x" * count)
    assert outcome["used"] == outcome["runs"] * count


@pytest.mark.parametrize(
    "exit_",
    [
        {"text": "xx", "size": 2, "count": 1},
        {"text": "x", "port": _BASE - 1},
        {"text": "x", "port": _BASE + 8},
        {"text": "x", "reason": lib.KVM_EXIT_HLT},
    ],
    ids=["a word", "the port below", "the port above", "no I/O"],
)
def test_loop_when_exit_is_not_the_consoles_returns_it(exit_: dict[str, Any]) -> None:
    outcome = _loop(**exit_)
    assert (outcome["ret"], outcome["handled"], outcome["runs"]) == (0, 0, 1)
    assert outcome["used"] == 0


def test_loop_when_kvm_run_fails_returns_errno_at_once() -> None:
    uart = ffi.new("struct kl_uart *", {"base": _BASE})
    outcome = lib.kl_run(-1, ffi.new("struct kvm_run *"), uart)
    assert (outcome.ret, outcome.err, outcome.handled, outcome.runs) == (-1, 9, 0, 1)
