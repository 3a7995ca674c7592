"""The simulated SNP host behind the Platform protocol."""

from __future__ import annotations

import errno
import mmap as _mmap
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from kvmlaunch.abi.report import SigningKey
from kvmlaunch.errors import KvmLaunchError, MissingCapability
from kvmlaunch.sim.certificates import CertificateChain
from kvmlaunch.sim.faults import Faults
from kvmlaunch.sim.fdtable import FdTable, File
from kvmlaunch.sim.host import Host, MachineMaker
from kvmlaunch.sim.inspector import Inspector, inspector_of
from kvmlaunch.sim.profiles import KernelProfile, kernel_profile
from kvmlaunch.sim.sevdev import SevDevice
from kvmlaunch.sim.spec import DEFAULT_PRODUCT
from kvmlaunch.sim.system import KvmDevice
from kvmlaunch.sim.uaccess import UserSpace, refuse
from kvmlaunch.sim.vcpu import Vcpu, VcpuFile
from kvmlaunch.sim.vm import VmFile
from kvmlaunch.softcpu import Machine
from kvmlaunch.uapi import RealPlatform, Result, RunResult, lib
from kvmlaunch.uapi.platform import MeasuredPage

__all__ = ["SimPlatform"]


class SimPlatform:
    """A host with SNP in this process: /dev/kvm and /dev/sev, nothing of it real.

    ``profile`` names the kernel (6.12, 6.18, 7.0) or is one, ``product`` the CPU (Milan,
    Genoa, Turin), ``faults`` what must go wrong (see :mod:`kvmlaunch.sim.faults`); ``random``
    is the firmware's source of keys. ``seed`` chooses how several vCPUs take turns: the
    same seed, the same guest, the same run. ``machine`` makes the CPUs. ``user`` and ``fds``
    are who calls and which descriptors that has, if it isn't this process.

    Synchronization: any thread may call anything; KVM_RUN doesn't hold the others up.
    """

    name = "sim"

    def __init__(
        self,
        profile: str | KernelProfile = "6.12",
        *,
        faults: Faults | Sequence[str] = (),
        product: str = DEFAULT_PRODUCT,
        random: Callable[[int], bytes] = os.urandom,
        user: UserSpace | None = None,
        fds: FdTable | None = None,
        seed: int = 0,
        machine: MachineMaker = Machine,
    ) -> None:
        orders = faults if isinstance(faults, Faults) else Faults.parse(faults)
        kernel = kernel_profile(profile) if isinstance(profile, str) else profile
        self._host = Host(kernel, orders, product, random, user, fds, seed=seed, machine=machine)
        self._lock = self._host.lock
        self._real = RealPlatform()
        self._mappings: dict[int, list[Vcpu]] = {}

    def __repr__(self) -> str:
        return f"SimPlatform({self.profile!r})"

    def __enter__(self) -> SimPlatform:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    @property
    def profile(self) -> str:
        """Name of the kernel profile."""
        return self._host.profile.name

    @property
    def open_fds(self) -> tuple[int, ...]:
        """Descriptors that are open, lowest first."""
        with self._lock:
            return tuple(self._host.fds)

    def shutdown(self) -> None:
        """Close every descriptor and drop every mapping, as the end of a process does."""
        with self._host.gate.stopped(), self._lock:
            for fd in self.open_fds:
                self.close(fd)
            for address in list(self._mappings):
                while address in self._mappings:
                    self._unmap(address)

    def open(self, path: str, flags: int) -> Result:
        """open(2): /dev/kvm and /dev/sev are all there is."""

        def call() -> int:
            if path == "/dev/kvm":
                return self._host.fds.install(KvmDevice(self._host))
            if path == "/dev/sev":
                return self._host.fds.install(SevDevice(self._host, flags))
            refuse(errno.ENOENT)

        return self._call(call)

    def close(self, fd: int) -> Result:
        """close(2)."""

        def call() -> int:
            self._host.fds.close(fd)
            return 0

        return self._call(call)

    def release(self, file: File) -> None:
        """The last descriptor of ``file`` is closed, as the owner of ``fds`` knows."""
        with self._host.gate.stopped(), self._lock:
            file.release()

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        """ioctl(2)."""
        try:
            with self._lock:
                file = self._host.fds.get(fd)
                file.hold()
        except OSError as error:
            return Result(-1, error.errno or errno.EIO)
        try:
            return Result(self._ioctl(file, request, arg), 0)
        except OSError as error:
            return Result(-1, error.errno or errno.EIO)
        finally:
            self._let_go(file)

    def _ioctl(self, file: File, request: int, arg: int) -> int:
        with ExitStack() as held:
            for lock in file.locks(request, arg):
                held.enter_context(lock)
            if isinstance(file, VcpuFile) and request == lib.KVM_RUN:
                return self._run(file, arg)
            with self._host.gate.stopped(), self._lock:
                return self._dispatch(file, request, arg)

    def _let_go(self, file: File) -> None:
        """The call is over; where its file was closed meanwhile, this is the end of it."""
        with self._lock:
            over = file.let_go(last=False)
        if not over:
            with self._host.gate.stopped(), self._lock:
                file.let_go(last=True)

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> Result:
        """mmap(2): a vCPU's run pages, or real anonymous memory with fd -1."""
        if fd == -1 and flags & _mmap.MAP_ANONYMOUS:
            return self._real.mmap(fd, length, prot, flags, offset)

        def call() -> int:
            file = self._host.fds.get(fd)
            address = file.mmap(length, offset)
            if isinstance(file, VcpuFile):
                file.vcpu.vm.get()
                self._mappings.setdefault(address, []).append(file.vcpu)
            return address

        return self._call(call)

    def munmap(self, addr: int, length: int) -> Result:
        """munmap(2)."""
        with self._host.gate.stopped(), self._lock:
            if addr not in self._mappings:
                # It may be memory that a guest runs on.
                self._host.user.forget()
                self._host.memory_changed(code=True)
                return self._real.munmap(addr, length)
            self._unmap(addr)
            return Result(0, 0)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Result:
        """fallocate(2)."""
        return self._call(lambda: self._host.fds.get(fd).fallocate(mode, offset, length))

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        """KVM_RUN until an exit needs Python, as kl_run() of csrc/run.c."""
        runs = 0
        while True:
            result = self.ioctl(fd, lib.KVM_RUN, 0)
            runs += 1
            console = lib.kl_console(run, uart) if uart and result.ret == 0 else -1
            if console:
                return RunResult(result.ret, result.errno, console == 1, runs)

    def launch_digest(self, vm_fd: int) -> bytes | None:
        """What firmware has measured of this VM so far; None before SNP_LAUNCH_START.

        A real host has no such call: the digest is only in the guest's attestation report.
        """
        with self._lock:
            context = self._vm_file(vm_fd).vm.sev.context
            return None if context is None else self._host.processor.launch_digest(context)

    def measured_pages(self, vm_fd: int, first: int = 0) -> list[MeasuredPage]:
        """The pages that firmware has measured of this VM from number ``first`` on, in order.

        There are none before SNP_LAUNCH_START.
        """
        with self._lock:
            context = self._vm_file(vm_fd).vm.sev.context
            if context is None:
                return []
            pages = self._host.processor.measured_pages(context, first)
            return [MeasuredPage(*page) for page in pages]

    def launch_context(self, vm_fd: int) -> int | None:
        """Which guest context firmware has for this VM; None before SNP_LAUNCH_START."""
        with self._lock:
            return self._vm_file(vm_fd).vm.sev.context

    def inspector(self, vm_fd: int) -> Inspector:
        """What looks inside a VM: registers, memory, breakpoints, trace."""
        with self._lock:
            return inspector_of(self._vm_file(vm_fd).vm)

    def certificate_chain(self, *, vlek: bool = False) -> CertificateChain:
        """Certificates of the key that signs this host's reports, as AMD's key server has them.

        The first call takes a second. Raises MissingCapability for a VLEK that isn't loaded.
        """
        kind = SigningKey.VLEK if vlek else SigningKey.VCEK
        chain = self._host.processor.certificate_chain(kind)
        if chain is None:
            raise MissingCapability("a loaded VLEK", "the VLEK's certificate")
        return chain

    def _vm_file(self, fd: int) -> VmFile:
        return self._host.fds.get_kind(fd, VmFile, errno.EINVAL)

    def _call(self, call: Callable[[], int]) -> Result:
        try:
            with self._host.gate.stopped(), self._lock:
                return Result(call(), 0)
        except OSError as error:
            return Result(-1, error.errno or errno.EIO)

    def _dispatch(self, file: File, request: int, arg: int) -> int:
        self._ordered_errno(file, request, arg)
        return file.ioctl(request, arg)

    def _run(self, file: VcpuFile, arg: int) -> int:
        with self._lock:
            self._ordered_errno(file, lib.KVM_RUN, arg)
            file.prepare_run(arg)
        try:
            return file.enter()
        except KvmLaunchError:
            refuse(errno.ENOSYS)  # no engine, or none that fits: see Vcpu.run()
        finally:
            with self._host.gate.stopped(), self._lock:
                file.vcpu.vm.sync_user_memory()

    def _ordered_errno(self, file: File, request: int, arg: int) -> None:
        for name in file.ioctl_names(request, arg):
            ordered = self._host.faults.errno_of(name)
            if ordered:
                refuse(ordered)

    def _unmap(self, address: int) -> None:
        vcpu = self._mappings[address].pop()
        if not self._mappings[address]:
            del self._mappings[address]
        vcpu.vm.put()
