"""The real kernel behind the Platform protocol (csrc/syscalls.c, csrc/run.c)."""

from __future__ import annotations

import functools
import os
from typing import Any

from kvmlaunch.uapi._ext import lib
from kvmlaunch.uapi.platform import Result, RunResult

__all__ = ["RealPlatform"]

_SIMULATED_KVM = "simulated:/dev/kvm,"
"""How the file is named that stands in for /dev/kvm; the kernel's profile follows."""


class RealPlatform:
    """System calls of this machine. The GIL is released during each."""

    name = "kvm"

    @functools.cached_property
    def profile(self) -> str:
        """``simulated 6.12`` where /dev/kvm is that of ``kvmlaunch sim``, else empty."""
        try:
            fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            _, is_simulated, kernel = os.readlink(f"/proc/self/fd/{fd}").partition(_SIMULATED_KVM)
        finally:
            os.close(fd)
        return f"simulated {kernel.split()[0]}" if is_simulated else ""

    def __repr__(self) -> str:
        return "RealPlatform()"

    def open(self, path: str, flags: int) -> Result:
        """open(2)."""
        return _result(lib.kl_open(os.fsencode(path), flags))

    def close(self, fd: int) -> Result:
        """close(2)."""
        return _result(lib.kl_close(fd))

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        """ioctl(2)."""
        return _result(lib.kl_ioctl(fd, request, arg))

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> Result:
        """mmap(2)."""
        return _result(lib.kl_mmap(fd, length, prot, flags, offset))

    def munmap(self, addr: int, length: int) -> Result:
        """munmap(2)."""
        return _result(lib.kl_munmap(addr, length))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Result:
        """fallocate(2)."""
        return _result(lib.kl_fallocate(fd, mode, offset, length))

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        """KVM_RUN; console ports of ``uart`` are served in C."""
        out = lib.kl_run(fd, run, uart)
        return RunResult(out.ret, out.err, bool(out.handled), out.runs)

    def measured_pages(self, vm_fd: int) -> None:
        """None: the kernel has no call that tells."""

    def inspector(self, vm_fd: int) -> None:
        """None: there are only the system calls."""


def _result(result: Any) -> Result:
    return Result(result.ret, result.err)
