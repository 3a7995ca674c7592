"""The ioctl boundary: what a real kernel and the simulated host both answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from kvmlaunch.uapi.inspection import Inspector

__all__ = ["MeasuredPage", "Platform", "Result", "RunResult"]


class Result(NamedTuple):
    """What a system call gave: ``ret``, and ``errno`` (0 unless ret is -1)."""

    ret: int
    errno: int


class RunResult(NamedTuple):
    """What KVM_RUN gave.

    ``handled`` is true when the last exit was console output that has been dealt
    with already; ``runs`` counts the KVM_RUN calls.
    """

    ret: int
    errno: int
    handled: bool
    runs: int


class MeasuredPage(NamedTuple):
    """A page as the firmware took it: ``contents`` and ``digest`` are 48 bytes each."""

    type: int
    gpa: int
    contents: bytes
    digest: bytes


class Platform(Protocol):
    """System calls on /dev/kvm and /dev/sev. No method raises: errno is a value.

    Addresses are integers in this process. ``name`` is ``kvm`` or ``sim``;
    ``profile`` says which kernel is simulated and is empty for a real one.
    """

    @property
    def name(self) -> str:
        """``kvm`` for a real kernel, ``sim`` for a simulated host."""

    @property
    def profile(self) -> str:
        """Name of what is simulated, else empty."""

    def open(self, path: str, flags: int) -> Result:
        """open(2)."""

    def close(self, fd: int) -> Result:
        """close(2)."""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        """ioctl(2); ``arg`` is a value or the address of a struct. EINTR is not hidden."""

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> Result:
        """mmap(2) at an address of the kernel's choice; ``ret`` is the address."""

    def munmap(self, addr: int, length: int) -> Result:
        """munmap(2)."""

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Result:
        """fallocate(2), for guest_memfd."""

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        """KVM_RUN until an exit needs Python.

        ``run`` is the ``struct kvm_run *`` of the vCPU ``fd``, ``uart`` a
        ``struct kl_uart *`` whose port accesses need no Python, or NULL.
        """

    def measured_pages(self, vm_fd: int) -> Sequence[MeasuredPage] | None:
        """What the firmware measured for a VM, in order; None where it can't be asked.

        A real kernel has no call for it: there the firmware only confirms a digest.
        """

    def inspector(self, vm_fd: int) -> Inspector | None:
        """What looks inside a VM; None where only the system calls do."""
