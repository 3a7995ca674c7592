"""The run loop: vCPUs on threads, their exits answered, and one result."""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvmlaunch.abi.ghcb_msr import EXAMPLES_SET, decode_termination
from kvmlaunch.errors import FormatError, IoctlError, KvmLaunchError
from kvmlaunch.kvm import Vcpu
from kvmlaunch.kvm.exits import (
    ApResetHoldExit,
    DebugExit,
    Exit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ReqCertsExit,
    RetryExit,
    ShutdownExit,
    SystemEventExit,
)
from kvmlaunch.launch.checks import CHECK_CODE, FailedCheck, LastLine
from kvmlaunch.launch.console import EXIT_PORT, Uart
from kvmlaunch.launch.debug import Debugger
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.trace import Trace
from kvmlaunch.uapi import ffi, lib

__all__ = ["Outcome", "run_guest"]

_KICK_SECONDS = 0.02
_LAST_EXITS = 8
_PAGE = 4096


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes: ``kind`` (``exit-port``, ``halted``, ``terminated``, ``shutdown``,
    ``timeout``, ``interrupted``, ``no-cpu``, ``failed``), ``ok`` (the guest ended
    well), ``detail`` (a sentence), ``vcpu`` and ``exit`` where one vCPU's exit
    ended it, and ``check`` where the guest says that a check of its own failed. ``no-cpu``
    is for a simulated host without the engine that it needs. ``last_exits`` are the last few
    (vCPU, exit) of the run, the latest at the end.
    """

    kind: str
    ok: bool
    detail: str
    vcpu: int | None = None
    exit: Exit | None = None
    check: FailedCheck | None = None
    last_exits: tuple[tuple[int, Exit], ...] = ()

    def __str__(self) -> str:
        where = "" if self.vcpu is None else f"vCPU {self.vcpu}: "
        check = "" if self.check is None else f": {self.check}"
        return f"{where}{self.detail}{check}"


def run_guest(
    guest: Guest,
    *,
    console: Callable[[bytes], object],
    on_exit: Callable[[int, Exit], object] = lambda vcpu, exit_: None,
    timeout: float | None = None,
    trace: Trace | None = None,
    debugger: Debugger | None = None,
) -> Outcome:
    """Run every vCPU until the guest ends; not one that has no VMSA and waits for no INIT.

    ``console`` gets what the guest prints, ``on_exit`` each exit that is more than
    port I/O; both are called from the vCPUs' threads, one call at a time.
    ``timeout`` in seconds. A KeyboardInterrupt ends the run cleanly with the
    outcome ``interrupted``. No thread is left when this returns. ``trace`` is told every
    exit; ``debugger`` holds the vCPUs until it lets them go.
    """
    run = _Run(guest, console, on_exit, trace, debugger)
    if trace is None:
        return run.until(timeout)
    trace.attach(guest)
    try:
        return run.until(timeout)
    finally:
        trace.detach()


class _Run:
    """One run: threads, their shared outcome, and the way to stop them."""

    def __init__(
        self,
        guest: Guest,
        console: Callable[[bytes], object],
        on_exit: Callable[[int, Exit], object],
        trace: Trace | None,
        debugger: Debugger | None,
    ) -> None:
        self._trace = trace
        self._debugger = debugger
        self._last: deque[tuple[int, Exit]] = deque(maxlen=_LAST_EXITS)
        self._threads: list[threading.Thread] = []
        self._guest = guest
        self._console = console
        self._on_exit = on_exit
        self._lock = threading.Lock()
        self._talking = threading.Lock()
        self._ends = threading.Lock()
        self._left = [threading.Event() for _ in guest.vcpus]
        self._last_lines = [LastLine() for _ in guest.vcpus]
        self._over = threading.Event()
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._runs = [
            guest.plan.starts(index) or guest.plan.apic for index in range(len(guest.vcpus))
        ]
        self._running = sum(self._runs)

    def until(self, timeout: float | None) -> Outcome:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._threads = threads = [
            threading.Thread(target=self._thread, args=(index, vcpu), name=f"vcpu-{index}")
            for index, vcpu in enumerate(self._guest.vcpus)
        ]
        lib.kl_kick_signal()
        if self._debugger is not None:
            self._debugger.attach(self._kick, self._kill)
        try:
            for index, thread in enumerate(threads):
                if self._runs[index]:
                    thread.start()
                elif self._debugger is not None:
                    self._debugger.gone(index)
            self._wait(deadline, timeout)
        except KeyboardInterrupt:
            self._end(Outcome("interrupted", False, "interrupted by the user"))
        finally:
            self._stop(threads)
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return replace(self._outcome, last_exits=tuple(self._last))

    def _wait(self, deadline: float | None, timeout: float | None) -> None:
        while not self._over.is_set():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self._end(Outcome("timeout", False, f"the guest still ran after {timeout:g} s"))
                return
            # Bounded, so that Ctrl-C is seen without a wake-up from a vCPU.
            self._over.wait(0.2 if left is None else min(left, 0.2))

    def _stop(self, threads: list[threading.Thread]) -> None:
        stopped = False
        while not stopped:
            # A second Ctrl-C must not leave a thread behind in KVM_RUN.
            with contextlib.suppress(KeyboardInterrupt):
                self._over.set()
                if self._debugger is not None:
                    self._debugger.end(self._outcome or self._error or "stopped")
                for index, thread in enumerate(threads):
                    self._stop_one(index, thread)
                stopped = True

    def _stop_one(self, index: int, thread: threading.Thread) -> None:
        if thread.ident is None:
            return  # never started
        left = self._left[index]
        # Not is_alive(): before Python 3.13 a Ctrl-C inside join() turns it false at once.
        while not left.is_set():
            self._kick(index)
            left.wait(_KICK_SECONDS)
        thread.join()
        self._guest.vcpus[index].clear_exit_request()

    def _kick(self, index: int) -> None:
        """Make a vCPU leave KVM_RUN."""
        self._guest.vcpus[index].request_exit()
        ident = self._threads[index].ident
        with self._ends:
            # A signal to a thread that is gone would be undefined behaviour.
            if ident is not None and not self._left[index].is_set():
                signal.pthread_kill(ident, lib.kl_kick_signal())

    def _kill(self) -> None:
        self._end(Outcome("interrupted", False, "ended by the debugger"))

    def _end(self, outcome: Outcome) -> None:
        """The first outcome counts."""
        with self._lock:
            if self._outcome is None and self._error is None:
                self._outcome = outcome
        self._over.set()

    def _thread(self, index: int, vcpu: Vcpu) -> None:
        uart = Uart()
        try:
            try:
                self._loop(index, vcpu, uart)
            finally:
                self._show(index, uart)
        except BaseException as error:  # reported by the thread that waits
            self._error = error
            self._over.set()
        finally:
            if self._debugger is not None:
                self._debugger.gone(index)
            with self._ends:
                self._left[index].set()

    def _loop(self, index: int, vcpu: Vcpu, uart: Uart) -> None:
        debugger, finished = self._debugger, True
        # A trace wants to see the console's exits as well.
        console = uart.native if self._trace is None else ffi.NULL
        while not self._over.is_set():
            if debugger is not None and finished:
                debugger.hold(index, vcpu)
                if self._over.is_set():
                    return
            try:
                exit_ = vcpu.run(console)
            except IoctlError as error:
                self._vcpu_failed(index, error)
                return
            finished = isinstance(exit_, (InterruptedExit, DebugExit))
            self._show(index, uart)
            outcome = None if exit_ is None else self._handle(index, vcpu, uart, exit_)
            if outcome is not None:
                if debugger is not None and not outcome.ok:
                    debugger.died(index, vcpu)
                self._vcpu_ends(self._with_check(outcome))
                return

    def _vcpu_failed(self, index: int, error: IoctlError) -> None:
        if error.errno == errno.ENOSYS and self._guest.platform.name == "sim":
            self._end(
                Outcome(
                    "no-cpu",
                    False,
                    f"the guest was launched, but not run. {error.explanation}",
                )
            )
            return
        hint = "" if self._guest.state is None else _PROTECTED
        self._end(Outcome("failed", False, f"{error}{hint}", index))

    def _vcpu_ends(self, outcome: Outcome) -> None:
        """A halted vCPU ends the run only when it was the last; all else ends it at once."""
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if outcome.kind != "halted" or last:
            self._end(outcome)

    def _with_check(self, outcome: Outcome) -> Outcome:
        if outcome.vcpu is None or not _is_failed_check(outcome):
            return outcome
        return replace(outcome, check=self._last_lines[outcome.vcpu].failed_check())

    def _show(self, index: int, uart: Uart) -> None:
        text = uart.take()
        if text:
            self._last_lines[index].add(text)
            with self._talking:
                self._console(text)

    def _handle(self, index: int, vcpu: Vcpu, uart: Uart, exit_: Exit) -> Outcome | None:
        """Answer an exit; an Outcome where it ends this vCPU."""
        if isinstance(exit_, (InterruptedExit, RetryExit)):
            return None
        if self._debugger is not None and isinstance(exit_, DebugExit):
            self._debugger.hit(index, exit_.pc)
            return None
        self._last.append((index, exit_))
        if self._trace is not None:
            self._trace.exit(index, exit_)
        if isinstance(exit_, IoExit):
            return self._port(index, vcpu, uart, exit_)
        if isinstance(exit_, MmioExit) and uart.owns(exit_):
            data = self._console_access(index, uart, exit_)
            if data:
                vcpu.complete_mmio(data)
            return None
        with self._talking:
            self._on_exit(index, exit_)
        if isinstance(exit_, HypercallExit):
            return self._hypercall(index, vcpu, exit_)
        if isinstance(exit_, ReqCertsExit) and self._guest.certificates is not None:
            self._certificates(vcpu, exit_, self._guest.certificates)
            return None
        return _final(self._guest, index, exit_)

    def _console_access(self, index: int, uart: Uart, exit_: IoExit | MmioExit) -> bytes:
        """Do it, and show it before another vCPU prints."""
        data = uart.access(exit_)
        self._show(index, uart)
        return data

    def _port(self, index: int, vcpu: Vcpu, uart: Uart, exit_: IoExit) -> Outcome | None:
        if uart.owns(exit_):
            data = self._console_access(index, uart, exit_)
        elif exit_.port == EXIT_PORT and exit_.is_write:
            with self._talking:
                self._on_exit(index, exit_)
            value = int.from_bytes(exit_.data, "little")
            detail = f"the guest wrote {value:#x} to the exit port"
            return Outcome("exit-port", value == 0, detail, index, exit_)
        else:
            # As on a PC: nothing answers, the bus reads as ones.
            data = b"" if exit_.is_write else b"\xff" * (exit_.size * exit_.count)
        if data:
            vcpu.complete_io(data)
        return None

    def _hypercall(self, index: int, vcpu: Vcpu, exit_: HypercallExit) -> Outcome | None:
        if exit_.nr != lib.KVM_HC_MAP_GPA_RANGE:
            return Outcome("failed", False, f"{exit_}: unknown hypercall", index, exit_)
        gpa, npages, attributes = exit_.args[:3]
        private = bool(attributes & lib.KVM_MAP_GPA_RANGE_ENCRYPTED)
        try:
            self._guest.convert(gpa, npages * _PAGE, private=private)
        except FormatError:
            # Outside its memory: the guest gets an error and decides itself.
            vcpu.complete_hypercall(errno.EINVAL)
        except KvmLaunchError as error:
            return Outcome("failed", False, f"{exit_}: {error}", index, exit_)
        else:
            vcpu.complete_hypercall(0)
        return None

    def _certificates(self, vcpu: Vcpu, exit_: ReqCertsExit, table: bytes) -> None:
        """Put the table where the guest wants it, or tell it how many pages that takes."""
        npages = -(-len(table) // _PAGE)
        if exit_.npages < npages:
            vcpu.complete_req_certs(errno.ENOSPC, npages=npages)
            return
        try:
            self._guest.memory_view(exit_.gpa, npages * _PAGE)[:] = table.ljust(
                npages * _PAGE, b"\0"
            )
        except FormatError:
            # Outside its memory: the guest gets an error and decides itself.
            vcpu.complete_req_certs(errno.EIO)
        else:
            vcpu.complete_req_certs(0)


def _is_failed_check(outcome: Outcome) -> bool:
    """True for the code that a guest ends with when a check of its own failed."""
    exit_ = outcome.exit
    if isinstance(exit_, IoExit):
        return int.from_bytes(exit_.data, "little") == CHECK_CODE
    if isinstance(exit_, SystemEventExit) and exit_.data and outcome.kind == "terminated":
        return decode_termination(exit_.data[0]) == (EXAMPLES_SET, CHECK_CODE)
    return False


_PROTECTED = "\nRegisters of a protected vCPU can't be read; the host's kernel log may say more."


def _final(guest: Guest, index: int, exit_: Exit) -> Outcome:
    """The outcome of an exit that a test guest does not come back from."""
    if isinstance(exit_, HltExit):
        return Outcome("halted", True, "the guest halted", index, exit_)
    if isinstance(exit_, ApResetHoldExit):
        # Nothing here could send the SIPI that it waits for: this vCPU is out of the run.
        return Outcome("halted", True, "the guest waits for a SIPI", index, exit_)
    if isinstance(exit_, SystemEventExit) and exit_.type == lib.KVM_SYSTEM_EVENT_SEV_TERM:
        why = str(decode_termination(exit_.data[0])) if exit_.data else "no reason given"
        return Outcome("terminated", False, f"{exit_}: {why}", index, exit_)
    if isinstance(exit_, SystemEventExit) and exit_.type == lib.KVM_SYSTEM_EVENT_SHUTDOWN:
        return Outcome("shutdown", True, "the guest switched itself off", index, exit_)
    if isinstance(exit_, ShutdownExit):
        what = "triple fault" if guest.state is None else "triple fault or a fatal RMP violation"
        return Outcome("shutdown", False, f"{exit_}: {what}", index, exit_)
    return Outcome("failed", False, f"{exit_}{_explain(guest, exit_)}", index, exit_)


def _explain(guest: Guest, exit_: Exit) -> str:
    if isinstance(exit_, MmioExit):
        return f": nothing is at this GPA{_nearest(guest, exit_.gpa)}"
    if isinstance(exit_, MemoryFaultExit):
        return _memory_fault(guest, exit_)
    if isinstance(exit_, FailEntryExit):
        return (
            ": the processor refused to enter the guest (VMSA never measured or invalid, "
            "or KVM_RUN before SNP_LAUNCH_FINISH)"
        )
    if isinstance(exit_, InternalErrorExit):
        return ": KVM could not emulate what the guest did; see the host's kernel log"
    return ": this launcher has no answer to it"


def _memory_fault(guest: Guest, exit_: MemoryFaultExit) -> str:
    broken = "the host's memory behind it is broken (EHWPOISON)"
    step = guest.plan.step_at(exit_.gpa)
    if step is not None:
        index = (exit_.gpa - step.gpa) // _PAGE
        why = "the guest's C-bit and the page's attribute disagree, or its VMPL may not use it"
        return (
            f": this is page {index} of {step.label} ({step.origin_of(index)}), launched as "
            f"{step.type.name}; {broken if exit_.errno == lib.KL_EHWPOISON else why}"
        )
    nearest = f"no page was launched there{_nearest(guest, exit_.gpa)}"
    return f": {nearest}; {broken}" if exit_.errno == lib.KL_EHWPOISON else f": {nearest}"


def _nearest(guest: Guest, gpa: int) -> str:
    """The launched range next to ``gpa``, for people."""
    steps = sorted(guest.plan.steps, key=lambda step: min(abs(step.gpa - gpa), abs(step.end - gpa)))
    if not steps:
        return ""
    step = steps[0]
    return f" (nearest launched range: {step.label} {step.gpa:#x}..{step.end:#x})"
