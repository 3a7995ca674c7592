"""Run a program on the simulated host: start it, answer its calls, wait for its end."""

from __future__ import annotations

import errno
import os
import platform as machine
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from kvmlaunch.errors import FormatError, KvmLaunchError, MissingCapability
from kvmlaunch.launch.pagelog import PageLog
from kvmlaunch.sim import SimPlatform
from kvmlaunch.sim.cpumodel import cpu_model
from kvmlaunch.sim.faults import Faults
from kvmlaunch.sim.spec import SimSpec
from kvmlaunch.supervisor.clients import Clients
from kvmlaunch.supervisor.cpuid import cpuid_table, differs
from kvmlaunch.supervisor.descriptors import ClientFds
from kvmlaunch.supervisor.dispatcher import Dispatcher
from kvmlaunch.supervisor.log import LaunchLog
from kvmlaunch.supervisor.memory import ClientMemory
from kvmlaunch.uapi import Call, ffi, lib

__all__ = ["Supervisor"]

_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Supervisor:
    """One program, and all the processes that it starts, on one simulated host.

    ``log`` gets the pages of its launches. ``on_call`` is told the thread and each call of it.
    """

    def __init__(
        self,
        spec: SimSpec,
        *,
        faults: Faults | None = None,
        log: PageLog | None = None,
        on_call: Callable[[int, Call], object] | None = None,
    ) -> None:
        if machine.machine() != "x86_64":
            raise MissingCapability("an x86-64 CPU", "kvmlaunch sim")
        self._spec = spec
        self._faults = faults or Faults()
        self._log = log
        self._on_call = on_call

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
        """Run ``command`` to its end: its exit code, or 128 and the signal that ended it.

        Processes that it leaves behind are waited for, as is every other child of this process.
        Raises KvmLaunchError where the program can't be started or watched, and at the end
        where a call could not be answered for a reason that no kernel has.
        """
        waited_for = (signal.SIGCHLD, *_FROM_TERMINAL, *_FORWARDED)
        with _blocked(*waited_for), _limit_kept():
            return self._run(command, os.environ if env is None else env)

    def _run(self, command: Sequence[str], env: Mapping[str, str]) -> int:
        cpu = cpu_model(self._spec.product)
        table = cpuid_table(cpu) if differs(cpu) and lib.kl_can_trap_cpuid() else None
        pid, listener = _spawn(command, env, traced=table is not None)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        clients = Clients(listener)
        try:
            dispatcher = self._dispatcher(clients, command[0])
        except (OSError, KvmLaunchError) as error:
            os.kill(pid, signal.SIGKILL)
            clients.close()  # nobody else waits for an answer either
            _wait(pid, table)
            if isinstance(error, KvmLaunchError):
                raise
            raise KvmLaunchError(f"{command[0]} can't be watched: {error.strerror}") from None
        try:
            code = _wait(pid, table)
        finally:
            dispatcher.close()
        for failure in dispatcher.failures:
            if isinstance(failure, KvmLaunchError):
                raise failure
            raise KvmLaunchError(f"a bug of the simulated host: {_described(failure)}") from failure
        return code

    def _dispatcher(self, clients: Clients, program: str) -> Dispatcher:
        """What answers the calls of ``clients``, from now on. Raises OSError, KvmLaunchError."""
        fds = ClientFds(clients, self._spec.kernel().name)
        platform = SimPlatform(
            self._spec.kernel(),
            product=self._spec.product,
            seed=self._spec.seed,
            faults=self._faults,
            user=ClientMemory(clients),
            fds=fds,
        )
        dispatcher = Dispatcher(platform, clients, fds, self._watcher(platform, clients, program))
        try:
            dispatcher.open()
        except KvmLaunchError:
            fds.shut()
            raise
        return dispatcher

    def _watcher(
        self, platform: SimPlatform, clients: Clients, program: str
    ) -> Callable[[Call], None] | None:
        """Who is told each call; None where nobody wants to know."""
        on_call = self._on_call
        pages = None if self._log is None else LaunchLog(self._log, platform, program)
        if on_call is None and pages is None:
            return None

        def watcher(call: Call) -> None:
            if on_call is not None:
                on_call(clients.call.thread.tid, call)
            if pages is not None:
                pages.note(call)

        return watcher


def _spawn(command: Sequence[str], env: Mapping[str, str], *, traced: bool) -> tuple[int, int]:
    """Start ``command``: its process id, and the listener that its calls come from."""
    file = shutil.which(command[0], path=env.get("PATH", os.defpath))
    if file is None:
        why = "it may not be executed" if os.path.exists(command[0]) else "no such program"
        raise FormatError(f"{command[0]}: {why}")
    arguments = [ffi.new("char[]", os.fsencode(word)) for word in command]
    variables = [ffi.new("char[]", os.fsencode(f"{name}={env[name]}")) for name in env]
    spawned = lib.kl_spawn(
        os.fsencode(file),
        ffi.new("char *[]", [*arguments, ffi.NULL]),
        ffi.new("char *[]", [*variables, ffi.NULL]),
        traced,
    )
    if not spawned.stage:
        return spawned.pid, spawned.listener
    why = os.strerror(spawned.err)
    if spawned.stage == lib.KL_SPAWN_FILTER and spawned.err == errno.EBUSY:
        raise KvmLaunchError("this is a supervised program already, which can have no supervisor")
    if spawned.stage == lib.KL_SPAWN_FILTER:
        raise MissingCapability(
            f"seccomp user notification as of Linux 5.19 (seccomp: {why})", "kvmlaunch sim"
        )
    raise KvmLaunchError(f"{file} can't be started: {why}")


def _described(error: BaseException) -> str:
    """What was raised, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})"


def _addressees(pid: int) -> list[int]:
    """Who gets a signal: the program, or what it left behind once it has ended."""
    import psutil

    children = {child.pid: child.status() for child in psutil.Process().children()}
    ended = children.pop(pid, psutil.STATUS_ZOMBIE) == psutil.STATUS_ZOMBIE
    return list(children) if ended else [pid]


def _wait(pid: int, cpuid: Any) -> int:
    """Wait for every process that is left; the exit code of ``pid``.

    ``cpuid``: what CPUID instructions give, None where they aren't trapped.
    """
    code: int | None = None
    status, number = ffi.new("int *"), ffi.new("int *")
    mask = sum(1 << taken - 1 for taken in (*_FROM_TERMINAL, *_FORWARDED))
    table, count = (ffi.NULL, 0) if cpuid is None else (cpuid, len(cpuid))
    while True:
        ended = lib.kl_wait(table, count, mask, status, number)
        if ended.ret == pid:
            code = os.waitstatus_to_exitcode(status[0])
        elif not ended.ret and number[0] in _FORWARDED:  # the terminal tells the program itself
            for target in _addressees(pid):
                with suppress(ProcessLookupError):
                    os.kill(target, number[0])
        elif ended.ret < 0 and ended.err != errno.EINTR:
            assert code is not None
            return code if code >= 0 else 128 - code


@contextmanager
def _limit_kept() -> Iterator[None]:
    """The limit of descriptors is put back: there is one for each of all the clients."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def _blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Signals that are waited for: none comes between two waits, or to another thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        while signal.sigtimedwait(numbers, 0):  # those that came at the very end
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
