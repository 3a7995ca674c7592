"""Where calls are answered, by as many threads as are needed at once."""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvmlaunch import uapi
from kvmlaunch.errors import MissingCapability
from kvmlaunch.sim import SimPlatform
from kvmlaunch.sim.fdtable import File
from kvmlaunch.sim.sevdev import SevDevice
from kvmlaunch.sim.system import KvmDevice
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.sim.vcpu import VcpuFile
from kvmlaunch.supervisor.clients import Call, Clients
from kvmlaunch.supervisor.descriptors import ClientFds
from kvmlaunch.supervisor.modules import parameter
from kvmlaunch.supervisor.paths import descriptor_path, device_path
from kvmlaunch.uapi import Platform, Recorder, Result, ffi, lib

__all__ = ["Dispatcher"]

_PARKED_THREADS = 2
_JOIN_SECONDS = 0.05
_U32 = 0xFFFFFFFF
_ACCESS_CALLS = (lib.KL_NR_access, lib.KL_NR_faccessat, lib.KL_NR_faccessat2)
_DONE = Result(0, 0)
_OPEN_HOW_SIZE = 24


class Dispatcher:
    """Takes calls from the listener and gives them to the simulated host.

    One thread takes what comes and answers it at once. A call that may take long, as KVM_RUN
    does, holds up nobody but its caller: before it, another thread takes over. ``watcher`` is
    told each call and its result before the client gets it, one at a time.
    """

    def __init__(
        self,
        platform: SimPlatform,
        clients: Clients,
        fds: ClientFds,
        watcher: Callable[[uapi.Call], None] | None = None,
    ) -> None:
        self._host = platform
        self._platform: Platform = platform
        if watcher is not None:
            self._platform = Recorder(platform, self._tell, read=clients.read)
        self._watcher = watcher
        self._clients = clients
        self._fds = fds
        self._trap = ffi.new("struct kl_trap *", [clients.listener, fds.watch, fds.device])
        self._changed = threading.Condition()
        self._releasing = threading.Lock()
        self._telling = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._parked = 0
        self._is_taken = False
        """Whether a thread waits for calls, or answers one that doesn't take long."""
        self._running: Counter[int] = Counter()
        """Inode of a vCPU -> threads in its KVM_RUN, or waiting for that to end."""
        self._closed = False
        self.failures: list[Exception] = []
        """What should not have happened, and is nothing that the client could help."""

    def open(self) -> None:
        """Start answering."""
        with self._changed:
            if not self._add_thread():
                raise MissingCapability("one more thread", "kvmlaunch sim")

    def close(self) -> None:
        """End: nobody calls any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        while threads := self._kick():
            for thread in threads:
                thread.join(_JOIN_SECONDS)
        self._host.shutdown()
        self._fds.shut()
        self._clients.close()

    def _kick(self) -> list[threading.Thread]:
        """Wake threads that wait for calls; those that have not ended yet.

        Before Linux 6.11 a receiver isn't told that nobody is left.
        """
        with self._changed:  # none ends while it is held
            for thread in self._threads:
                assert thread.ident is not None
                signal.pthread_kill(thread.ident, lib.kl_kick_signal())
            return list(self._threads)

    def _add_thread(self) -> bool:
        """False where no more can be had."""
        thread = threading.Thread(target=self._serve, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._threads.add(thread)
        return True

    def _serve(self) -> None:
        raw = ffi.new("struct kl_call *")
        try:
            while self._take_over():
                while self._take(raw):
                    vcpu = self._busy_vcpu(raw)
                    if vcpu is not None and self._hand_over(vcpu):
                        self._answer(raw)
                        self._leave(vcpu)
                        break
                    self._answer(raw)
                else:
                    return
        finally:
            with self._changed:
                self._threads.discard(threading.current_thread())

    def _take_over(self) -> bool:
        """Wait until nobody takes calls; False where this thread isn't needed any more."""
        with self._changed:
            while self._is_taken and not self._closed:
                if self._parked == _PARKED_THREADS:
                    return False
                self._parked += 1
                self._changed.wait()
                self._parked -= 1
            self._is_taken = True
            return not self._closed

    def _hand_over(self, vcpu: int) -> bool:
        """Let another thread take calls while this one is with ``vcpu``. False if there is none."""
        with self._changed:
            self._is_taken = False
            if self._parked:
                self._changed.notify()
            elif not self._add_thread():
                self._is_taken = True
                return False
            self._running[vcpu] += 1
            return True

    def _leave(self, vcpu: int) -> None:
        with self._changed:
            self._running[vcpu] -= 1
            if not self._running[vcpu]:
                del self._running[vcpu]

    def _busy_vcpu(self, raw: Any) -> int | None:
        """The vCPU that a call may have to wait for (its inode, 0 for any), else None."""
        if raw.nr != lib.KL_NR_ioctl:
            return None
        request = raw.args[1] & _U32
        if request == lib.KVM_RUN or raw.inode in self._running:
            return int(raw.inode)
        # SNP_LAUNCH_FINISH of some kernels waits for all.
        return 0 if self._running and request == lib.KVM_MEMORY_ENCRYPT_OP else None

    def _take(self, raw: Any) -> bool:
        """Wait for a call. False at the end."""
        while not self._closed:
            result = lib.kl_next_call(self._trap, raw)
            if result.ret >= 0:
                return True
            # ENOENT also tells that a caller was killed as it called.
            if result.err not in (errno.EINTR, errno.ENOENT) or self._nobody_left():
                return False
        return False

    def _nobody_left(self) -> bool:
        poll = select.poll()
        poll.register(self._clients.listener, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def _release(self) -> None:
        """Before a call is answered: what was closed before it is released."""
        with self._releasing:
            for file in self._fds.released():
                self._host.release(file)

    def _answer(self, raw: Any) -> None:
        try:
            if raw.released:
                self._release()
            self._clients.serve(Call(raw, self._clients.thread(raw.tid)))
            result = self._result(self._clients.call)
        except OSError as error:
            result = Result(-1, error.errno or errno.EIO)
        except MemoryError:
            result = Result(-1, errno.ENOMEM)
        except Exception as error:
            # The caller must not wait for ever.
            self.failures.append(error)
            result = Result(-1, errno.EIO)
        self._clients.answered(raw.tid)
        if result is None:
            lib.kl_pass_on(self._clients.listener, raw.id)
        else:
            lib.kl_answer(self._clients.listener, raw.id, result.ret, result.errno)

    def _tell(self, call: uapi.Call) -> None:
        """Tell the watcher of a call, until it fails, which is no matter of the client's."""
        with self._telling:
            try:
                if self._watcher is not None:
                    self._watcher(call)
            except Exception as error:
                self._watcher = None
                self.failures.append(error)

    def _result(self, call: Call) -> Result | None:
        """What a call gives; None where this machine's kernel has to answer."""
        if call.path:
            return self._by_path(call)
        if not self._fds.has(call.inode):
            return None
        fd, second, third, fourth = call.args[:4]
        if call.nr == lib.KL_NR_ioctl:
            return self._platform.ioctl(fd & _U32, second & _U32, third)
        if call.nr == lib.KL_NR_fallocate:
            return self._platform.fallocate(
                fd & _U32, second & _U32, _signed(third), _signed(fourth)
            )
        if fourth & mmap.MAP_ANONYMOUS:
            return None
        # mmap: a vCPU's pages are in the memfd, no other file has any.
        if isinstance(self._fds.get(call.args[4] & _U32), VcpuFile):
            return None
        return Result(-1, errno.ENODEV)

    def _by_path(self, call: Call) -> Result | None:
        path = device_path(call)
        content = parameter(call.path)
        if content == "":
            return Result(-1, errno.ENOENT)
        if call.nr in _ACCESS_CALLS:
            return None if path is None and content is None else _access(call)
        flags = _open_flags(call)
        if flags & os.O_PATH:
            return None
        call.cloexec = bool(flags & os.O_CLOEXEC)
        if content is not None:
            return self._parameter_file(content, flags)
        if path is None:
            file = self._reopened(call)
            if file is None:
                return None
            if not isinstance(file, (KvmDevice, SevDevice)):
                return Result(-1, errno.ENXIO)  # there is nothing to open behind an anon_inode
            path = file.name
        if flags & os.O_DIRECTORY:
            return Result(-1, errno.ENOTDIR)
        if flags & os.O_CREAT and flags & os.O_EXCL:
            return Result(-1, errno.EEXIST)
        return self._platform.open(path, flags)

    def _parameter_file(self, content: str, flags: int) -> Result:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            return Result(-1, errno.EACCES)
        return Result(self._fds.give_text(content), 0)

    def _reopened(self, call: Call) -> File | None:
        """The simulated file that is opened by way of a descriptor."""
        place = descriptor_path(call)
        if place is None:
            return None
        try:
            return self._fds.find(*place)
        except OSError:
            return None


def _access(call: Call) -> Result:
    mode = call.args[1 if call.nr == lib.KL_NR_access else 2] & _U32
    if mode & ~(os.R_OK | os.W_OK | os.X_OK):
        return Result(-1, errno.EINVAL)
    return Result(-1, errno.EACCES) if mode & os.X_OK else _DONE


def _open_flags(call: Call) -> int:
    if call.nr == lib.KL_NR_openat2:
        # struct open_how: flags, mode, resolve.
        if call.args[3] < _OPEN_HOW_SIZE:
            refuse(errno.EINVAL)
        return int.from_bytes(call.read(call.args[2], _OPEN_HOW_SIZE)[:8], "little")
    return int(call.args[1 if call.nr == lib.KL_NR_open else 2])


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
