"""Nothing is left: no descriptor, mapping or thread, after success, any failure, or Ctrl-C."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import run_guest
from kvmlaunch.launch.session import Session
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Call, Platform, Recorder, Result, RunResult
from tests.host import require_kvm

from .rig import (
    SPIN,
    Accounting,
    Playback,
    Wrapped,
    out_and_exit,
    prints,
    small_plan,
    spin,
)
from .test_threads import interrupts

TIMEOUT = 20.0
# More than the interpreter's heap, thread stacks and the simulated host's own RAM (64 MiB)
# move by; less than the guest's memory. Accounting sees smaller mappings.
SETTLED = 128 << 20
GUEST_MEMORY = 256 << 20


def fds() -> set[str]:
    with os.scandir("/proc/self/fd") as entries:
        names = {entry.name for entry in entries}
    # One of them was the directory itself, closed by now.
    return {name for name in names if os.path.exists(f"/proc/self/fd/{name}")}


def mapped_bytes() -> int:
    """Bytes of writable mappings; what malloc only reserves for its arenas is not writable."""
    total = 0
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        for line in file:
            place, permissions = line.split()[:2]
            if "w" in permissions:
                start, end = (int(part, 16) for part in place.split("-"))
                total += end - start
    return total


@contextmanager
def nothing_left() -> Iterator[None]:
    """The process has the same descriptors and threads, and no guest's worth more memory."""
    gc.collect()
    before = fds(), threading.enumerate(), mapped_bytes()
    yield
    gc.collect()
    assert fds() == before[0]
    assert threading.enumerate() == before[1]
    assert mapped_bytes() < before[2] + SETTLED


def big_plan(vcpus: int = 2) -> LaunchPlan:
    """Every page type, two regions, and enough memory to be seen if it stays mapped."""
    return small_plan(vcpus=vcpus, memory=[(0, GUEST_MEMORY), (1 << 32, 1 << 20)], apic=vcpus > 1)


def launch(platform: Platform) -> None:
    with Guest(big_plan(), platform) as guest:
        guest.launch(retry_cpuid=True)
        guest.witness()


class Nth(Wrapped):
    """Call number ``at`` does ``instead`` and never reaches the host; closing always works."""

    def __init__(self, inner: Platform, at: int = -1, instead: Callable[[], Result] | None = None):
        super().__init__(inner)
        self.at = at
        self.instead = instead
        self.made = 0

    def _hit(self) -> bool:
        self.made += 1
        return self.made - 1 == self.at

    def _fail(self) -> Result:
        assert self.instead is not None
        return self.instead()

    def open(self, path: str, flags: int) -> Result:
        return self._fail() if self._hit() else super().open(path, flags)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        return self._fail() if self._hit() else super().ioctl(fd, request, arg)

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> Result:
        return self._fail() if self._hit() else super().mmap(fd, length, prot, flags, offset)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Result:
        return self._fail() if self._hit() else super().fallocate(fd, mode, offset, length)

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        if self._hit():
            return RunResult(*self._fail(), False, 1)
        return super().run(fd, run, uart)


def number_of_calls(use: Callable[[Platform], object], host: Platform) -> int:
    counting = Nth(host)
    use(counting)
    return counting.made


SIM_CALLS = number_of_calls(launch, SimPlatform())


NEEDED = [
    *["open", "mmap", "KVM_CREATE_VM", "KVM_CREATE_GUEST_MEMFD", "KVM_SET_USER_MEMORY_REGION2"],
    *["KVM_SET_MEMORY_ATTRIBUTES", "KVM_CREATE_VCPU", "KVM_SET_CPUID2", "KVM_SET_SREGS"],
    *["KVM_SEV_INIT2", "KVM_SEV_SNP_LAUNCH_START", "KVM_SEV_SNP_LAUNCH_UPDATE"],
    *["KVM_SEV_SNP_LAUNCH_FINISH"],
]


@pytest.mark.parametrize("name", NEEDED)
def test_launch_when_every_call_is_made_to_fail_in_turn_has_this_one_among_them(
    name: str,
) -> None:
    """Nth sees the same calls as a Recorder, but for those that give something back."""
    calls: list[Call] = []
    launch(Recorder(SimPlatform(), calls.append))
    names = [call.name for call in calls if call.name not in ("close", "munmap")]
    assert name in names
    assert len(names) == SIM_CALLS


# Success


def test_nothing_is_left_when_a_guest_was_launched() -> None:
    with nothing_left():
        host = SimPlatform()
        accounting = Accounting(host)
        launch(accounting)
        assert accounting.left == (set(), [])
        assert host.open_fds == ()


def test_nothing_is_left_when_many_guests_were_launched() -> None:
    host = SimPlatform()
    launch(host)
    with nothing_left():
        for _ in range(20):
            launch(host)
    assert host.open_fds == ()


def test_nothing_is_left_when_a_guest_ran() -> None:
    with nothing_left():
        host = SimPlatform()
        accounting = Accounting(Playback(host, {0: out_and_exit(b"text\n"), 1: spin}))
        with Guest(big_plan(), accounting) as guest:
            guest.launch()
            assert run_guest(guest, console=len, timeout=TIMEOUT).ok
        assert accounting.left == (set(), [])


def test_nothing_is_left_when_a_guest_was_built_and_dropped() -> None:
    with nothing_left():
        accounting = Accounting(SimPlatform())
        with Guest(big_plan(), accounting):
            pass
        assert accounting.left == (set(), [])


def test_nothing_is_left_when_updating_was_given_up() -> None:
    with nothing_left():
        accounting = Accounting(SimPlatform())
        with Guest(big_plan(), accounting) as guest:
            guest.start()
            next(guest.update())
        gc.collect()
        assert accounting.left == (set(), [])


def test_guest_when_open_holds_something() -> None:
    """The counting itself sees what a guest holds."""
    before = mapped_bytes()
    accounting = Accounting(SimPlatform())
    with Guest(big_plan(), accounting):
        held, mappings = len(accounting.fds), len(accounting.mappings)
        assert mapped_bytes() > before + GUEST_MEMORY // 2
    # /dev/kvm, /dev/sev, the VM, two guest_memfds, two vCPUs; two regions and two run pages.
    assert (held, mappings) == (7, 4)


# Failure


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EINVAL])
def test_nothing_is_left_when_any_one_call_of_a_launch_fails(number: int) -> None:
    launch(SimPlatform())
    for at in range(SIM_CALLS):
        host = SimPlatform()
        accounting = Accounting(host)
        with nothing_left():
            with pytest.raises(KvmLaunchError):
                launch(Nth(accounting, at, lambda: Result(-1, number)))
            assert accounting.left == (set(), []), f"call {at}"
        assert host.open_fds == (), f"call {at}"


def test_nothing_is_left_when_ctrl_c_comes_at_any_call_of_a_launch() -> None:
    def interrupt() -> Result:
        raise KeyboardInterrupt

    for at in range(SIM_CALLS):
        host = SimPlatform()
        accounting = Accounting(host)
        with nothing_left():
            with pytest.raises(KeyboardInterrupt):
                launch(Nth(accounting, at, interrupt))
            assert accounting.left == (set(), []), f"call {at}"
        assert host.open_fds == (), f"call {at}"


@pytest.mark.parametrize(
    "fault",
    [
        "INIT2:errno=EBUSY",
        "SNP_GCTX_CREATE:fw=0x17",
        "SNP_LAUNCH_START:fw=0x07",
        "SNP_ACTIVATE:fw=0x0d",
        *[f"SNP_LAUNCH_UPDATE:fw=0x1a@{n}+" for n in range(1, 9)],
        "SNP_LAUNCH_UPDATE:signal=0",
        "CPUID:correct=0x1.ecx@1+",
        "SNP_LAUNCH_FINISH:fw=0x0b",
    ],
)
def test_nothing_is_left_when_the_firmware_refuses(fault: str) -> None:
    with nothing_left():
        host = SimPlatform(faults=[fault])
        accounting = Accounting(host)
        with pytest.raises(KvmLaunchError):
            launch(accounting)
        assert accounting.left == (set(), [])
        assert host.open_fds == ()


def test_nothing_is_left_when_the_kernel_kills_the_vm() -> None:
    with nothing_left():
        host = SimPlatform(faults=["SNP_LAUNCH_UPDATE:fw=0x1a@2", "SNP_PAGE_RECLAIM:fail"])
        accounting = Accounting(host)
        with pytest.raises(KvmLaunchError):
            launch(accounting)
        assert accounting.left == (set(), [])
        assert host.open_fds == ()


def test_host_when_one_launch_failed_takes_the_next() -> None:
    host = SimPlatform(faults=["SNP_LAUNCH_FINISH:fw=0x0b"])
    with pytest.raises(KvmLaunchError):
        launch(host)
    launch(host)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_nothing_is_left_when_kvm_run_fails(number: int) -> None:
    with nothing_left():
        host = SimPlatform()
        accounting = Accounting(Playback(host, {}))
        failing = Nth(accounting)
        with Guest(big_plan(), failing) as guest:
            guest.launch()
            failing.at, failing.instead = failing.made, lambda: Result(-1, number)
            assert run_guest(guest, console=len, timeout=TIMEOUT).kind == "failed"
        assert accounting.left == (set(), [])


def test_nothing_is_left_when_a_session_fails_in_its_log() -> None:
    class FullLog(Exception):
        pass

    def full(record: Any) -> None:
        raise FullLog

    with nothing_left():
        accounting = Accounting(SimPlatform())
        with Session(big_plan(), accounting) as session:
            session.on_record = full
            with pytest.raises(FullLog):
                session.launch()
        assert accounting.left == (set(), [])


# Ctrl-C and timeout while the guest runs


def test_nothing_is_left_when_ctrl_c_ends_a_run() -> None:
    with nothing_left():
        platform = Playback(SimPlatform(), {})
        accounting = Accounting(platform)
        with Guest(big_plan(4), accounting) as guest:
            guest.launch()
            with interrupts(platform, 4):
                assert run_guest(guest, console=len).kind == "interrupted"
        assert accounting.left == (set(), [])


def test_nothing_is_left_when_a_run_times_out() -> None:
    with nothing_left():
        accounting = Accounting(Playback(SimPlatform(), {}))
        with Guest(big_plan(4), accounting) as guest:
            guest.launch()
            assert run_guest(guest, console=len, timeout=0.05).kind == "timeout"
        assert accounting.left == (set(), [])


# The real kernel


def plain_plan(code: bytes, vcpus: int = 2) -> LaunchPlan:
    return load_image(code, PlanOptions(vcpus=vcpus, memory=GUEST_MEMORY, confidential=False))


def plain(platform: Platform) -> None:
    with Guest(plain_plan(prints(b"x\n")), platform) as guest:
        outcome = run_guest(guest, console=len, timeout=TIMEOUT)
        if not outcome.ok:
            raise KvmLaunchError(str(outcome))


def test_nothing_is_left_when_a_real_guest_ran() -> None:
    real = require_kvm()
    plain(real)
    with nothing_left():
        for _ in range(10):
            accounting = Accounting(real)
            plain(accounting)
            assert accounting.left == (set(), [])


def test_nothing_is_left_when_any_one_call_of_a_real_guest_fails() -> None:
    real = require_kvm()
    # KVM_RUN comes last and not always as often, so only the calls before it are gone through.
    with Guest(plain_plan(SPIN), counting := Nth(real)):
        calls = counting.made
    for at in range(calls):
        accounting = Accounting(real)
        with nothing_left():
            with pytest.raises(KvmLaunchError):
                plain(Nth(accounting, at, lambda: Result(-1, errno.ENOMEM)))
            assert accounting.left == (set(), []), f"call {at}"


def test_nothing_is_left_when_ctrl_c_ends_a_real_run() -> None:
    real = require_kvm()

    class Announced(Wrapped):
        def __init__(self, inner: Platform) -> None:
            super().__init__(inner)
            self.running = threading.Semaphore(0)
            self.told = threading.Event()

        def run(self, fd: int, run: Any, uart: Any) -> RunResult:
            self.running.release()
            return super().run(fd, run, uart)

    with nothing_left():
        platform = Announced(real)
        accounting = Accounting(platform)
        with (
            Guest(plain_plan(SPIN), accounting) as guest,
            interrupts(platform, 2),  # type: ignore[arg-type]
        ):
            assert run_guest(guest, console=len).kind == "interrupted"
        assert accounting.left == (set(), [])
