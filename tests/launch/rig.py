"""Plans made by hand, and platforms between the launcher and its host."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images import LaunchPlan, MemoryRegion, PageRange, Piece
from kvmlaunch.launch.guest import Guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Platform, Result, RunResult, ffi, lib

PAGE = 4096
EIO = errno.EIO


def reset_state(signature: int = 0x800F12, eip: int = 0xFFFFFFF0) -> Vmsa:
    """QEMU's reset state, from the table of snp-firmware-abi 3.2."""
    data = Segment(0, 0x93, 0xFFFF, 0)
    table = Segment(0, 0, 0xFFFF, 0)
    return Vmsa(
        es=data,
        cs=Segment(0xF000, 0x9B, 0xFFFF, eip & 0xFFFF0000),
        ss=data,
        ds=data,
        fs=data,
        gs=data,
        gdtr=table,
        ldtr=Segment(0, 0x82, 0xFFFF, 0),
        idtr=table,
        tr=Segment(0, 0x8B, 0xFFFF, 0),
        efer=0x1000,
        cr4=0x40,
        cr0=0x10,
        dr7=0x400,
        dr6=0xFFFF0FF0,
        rflags=2,
        rip=eip & 0xFFFF,
        g_pat=0x0007040600070406,
        rdx=signature,
        sev_features=1,
        xcr0=1,
        mxcsr=0x1F80,
        x87_fcw=0x37F,
    )


def step(
    gpa: int, pages: Sequence[bytes | None], type_: int = 1, *, label: str = "test"
) -> PageRange:
    """Successive pages; None is a page without bytes."""
    pieces = tuple(
        Piece(n * PAGE, memoryview(page), f"{label}.bin", n * PAGE)
        for n, page in enumerate(pages)
        if page is not None
    )
    origin = f"kvmlaunch:{label}"
    return PageRange(gpa, len(pages) * PAGE, PageType(type_), label, origin, pieces)


def plan(
    steps: Sequence[PageRange],
    *,
    vcpus: int = 1,
    state: Vmsa | None = None,
    memory: Sequence[tuple[int, int]] = ((0, 64 * PAGE),),
    **more: Any,
) -> LaunchPlan:
    """A confidential plan of these steps; ``memory`` is (gpa, size)."""
    regions = tuple(MemoryRegion(gpa, size, f"ram{gpa:x}") for gpa, size in memory)
    states = (state or reset_state(),) * vcpus
    return LaunchPlan(
        image="test.bin",
        image_type="flat",
        data=memoryview(b"test"),
        memory=regions,
        steps=tuple(steps),
        vcpus=states,
        **more,
    )


def small_plan(**more: Any) -> LaunchPlan:
    """Every page type; four pages and a gap."""
    steps = [
        step(0x1000, [b"a" * PAGE, b"b" * PAGE], label="image"),
        step(0x4000, [None], 3, label="zero"),
        step(0x5000, [None], 5, label="secrets"),
        step(0x6000, [None], 6, label="cpuid"),
        step(0x7000, [b"u" * PAGE], 4, label="unmeasured"),
    ]
    return plan(steps, **more)


class Wrapped:
    """A platform that passes every call on; subclasses change some."""

    def __init__(self, inner: Platform) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def profile(self) -> str:
        return self.inner.profile

    def open(self, path: str, flags: int) -> Result:
        return self.inner.open(path, flags)

    def close(self, fd: int) -> Result:
        return self.inner.close(fd)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        return self.inner.ioctl(fd, request, arg)

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> Result:
        return self.inner.mmap(fd, length, prot, flags, offset)

    def munmap(self, addr: int, length: int) -> Result:
        return self.inner.munmap(addr, length)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Result:
        return self.inner.fallocate(fd, mode, offset, length)

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        return self.inner.run(fd, run, uart)

    def measured_pages(self, vm_fd: int) -> Any:
        return self.inner.measured_pages(vm_fd)

    def inspector(self, vm_fd: int) -> Any:
        return self.inner.inspector(vm_fd)


class Accounting(Wrapped):
    """Knows which descriptors and mappings its user has not given back."""

    def __init__(self, inner: Platform) -> None:
        super().__init__(inner)
        self.fds: set[int] = set()
        self.mappings: list[tuple[int, int]] = []

    def open(self, path: str, flags: int) -> Result:
        return self._opened(super().open(path, flags))

    def close(self, fd: int) -> Result:
        self.fds.discard(fd)
        return super().close(fd)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        result = super().ioctl(fd, request, arg)
        makers = (lib.KVM_CREATE_VM, lib.KVM_CREATE_VCPU, lib.KVM_CREATE_GUEST_MEMFD)
        return self._opened(result) if request in makers else result

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> Result:
        result = super().mmap(fd, length, prot, flags, offset)
        if result.ret >= 0:
            self.mappings.append((result.ret, length))
        return result

    def munmap(self, addr: int, length: int) -> Result:
        self.mappings.remove((addr, length))
        return super().munmap(addr, length)

    def _opened(self, result: Result) -> Result:
        if result.ret >= 0:
            self.fds.add(result.ret)
        return result

    @property
    def left(self) -> tuple[set[int], list[tuple[int, int]]]:
        """What is open and mapped now."""
        return self.fds, self.mappings


Script = Generator[RunResult, None, None]
Scripted = Callable[[Any], Script]


def exited() -> RunResult:
    """KVM_RUN came back with 0."""
    return RunResult(0, 0, False, 1)


def failed(number: int) -> RunResult:
    """KVM_RUN gave -1 and this errno."""
    return RunResult(-1, number, False, 1)


class Playback(Wrapped):
    """KVM_RUN of vCPU n plays ``scripts[n]``, then blocks until it is told to stop.

    A script is a generator function: it gets ``struct kvm_run *``, fills it and yields
    what KVM_RUN gave; when it goes on, the launcher has answered that exit.
    """

    def __init__(self, inner: Platform, scripts: Mapping[int, Scripted]) -> None:
        super().__init__(inner)
        self.scripts = scripts
        self.running = threading.Semaphore(0)
        self.told = threading.Event()
        self._vcpus: dict[int, int] = {}
        self._playing: dict[int, Script] = {}

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        result = super().ioctl(fd, request, arg)
        if request == lib.KVM_CREATE_VCPU and result.ret >= 0:
            self._vcpus[result.ret] = arg
        return result

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        if run.immediate_exit:
            return failed(errno.EINTR)
        vcpu = self._vcpus[fd]
        if vcpu not in self._playing:
            self._playing[vcpu] = self.scripts.get(vcpu, spin)(run)
        return next(self._playing[vcpu], None) or self.block(run)

    def block(self, run: Any) -> RunResult:
        """A guest that does nothing that shows."""
        self.running.release()
        while not run.immediate_exit:
            time.sleep(0.001)
        return failed(errno.EINTR)


def spin(run: Any) -> Script:
    """A script without an exit."""
    yield from ()


# Exits: each fills the run page as the kernel would (kernel-snp-abi 1.5).

IO_DATA = 0x1000


def io_out(run: Any, port: int, data: bytes, size: int = 1) -> RunResult:
    """OUT of ``data``, in items of ``size`` bytes."""
    run.exit_reason = lib.KVM_EXIT_IO
    run.io.direction, run.io.size, run.io.port = lib.KVM_EXIT_IO_OUT, size, port
    run.io.count, run.io.data_offset = len(data) // size, IO_DATA
    ffi.buffer(ffi.cast("char *", run) + IO_DATA, len(data))[:] = data
    return exited()


def io_in(run: Any, port: int, size: int = 1, count: int = 1) -> RunResult:
    """IN; see io_data()."""
    run.exit_reason = lib.KVM_EXIT_IO
    run.io.direction, run.io.size, run.io.port = lib.KVM_EXIT_IO_IN, size, port
    run.io.count, run.io.data_offset = count, IO_DATA
    ffi.buffer(ffi.cast("char *", run) + IO_DATA, size * count)[:] = bytes(size * count)
    return exited()


def io_data(run: Any, size: int = 1) -> bytes:
    """What the launcher answered an IN."""
    return bytes(ffi.buffer(ffi.cast("char *", run) + IO_DATA, size))


def plain_exit(run: Any, reason: int) -> RunResult:
    """An exit without data."""
    run.exit_reason = reason
    return exited()


def hypercall(run: Any, nr: int, *args: int) -> RunResult:
    """KVM_EXIT_HYPERCALL; ``ret`` holds garbage, as kernels before 6.14 leave it."""
    run.exit_reason = lib.KVM_EXIT_HYPERCALL
    run.hypercall.nr, run.hypercall.ret = nr, 0xDEAD
    for number, arg in enumerate(args):
        run.hypercall.args[number] = arg
    return exited()


def map_gpa(run: Any, gpa: int, npages: int, *, private: bool) -> RunResult:
    """MAP_GPA_RANGE: hypercall 12, bit 4 of the attributes is "private"."""
    return hypercall(run, 12, gpa, npages, 0x10 if private else 0)


def system_event(run: Any, kind: int, *data: int) -> RunResult:
    """KVM_EXIT_SYSTEM_EVENT."""
    run.exit_reason = lib.KVM_EXIT_SYSTEM_EVENT
    run.system_event.type, run.system_event.ndata = kind, len(data)
    for number, word in enumerate(data):
        run.system_event.data[number] = word
    return exited()


def memory_fault(run: Any, gpa: int, *, private: bool, number: int = errno.EFAULT) -> RunResult:
    """KVM_EXIT_MEMORY_FAULT: KVM_RUN itself fails."""
    run.exit_reason = lib.KVM_EXIT_MEMORY_FAULT
    run.memory_fault.flags = 8 if private else 0
    run.memory_fault.gpa, run.memory_fault.size = gpa, PAGE
    return failed(number)


def out_and_exit(text: bytes, code: int = 0) -> Scripted:
    """A guest that prints and ends."""

    def script(run: Any) -> Script:
        for byte in text:
            yield io_out(run, 0x3F8, bytes([byte]))
        yield io_out(run, 0xF4, bytes([code]))

    return script


@contextmanager
def playing(
    *scripts: Scripted, launch_plan: LaunchPlan | None = None, launch: bool = True
) -> Iterator[tuple[Guest, Playback]]:
    """A launched guest on a simulated host whose vCPUs play scripts."""
    host = SimPlatform()
    platform = Playback(host, dict(enumerate(scripts)))
    with Guest(launch_plan or small_plan(vcpus=len(scripts) or 1), platform) as guest:
        if launch:
            guest.launch()
        yield guest, platform
    assert host.open_fds == ()


# Code for the real /dev/kvm here, which emulates: tiny and integer only.


def prints(text: bytes, code: int | None = 0) -> bytes:
    """Real-mode code: OUT each byte to 0x3f8, then ``code`` to 0xf4 (None: HLT)."""
    body = b"\xba\xf8\x03" + b"".join(b"\xb0" + bytes([byte]) + b"\xee" for byte in text)
    end = b"" if code is None else b"\xb0" + bytes([code]) + b"\xe6\xf4"
    return body + end + b"\xf4"


SPIN = b"\xeb\xfe"


def prints64(text: bytes, code: int | None = 0) -> bytes:
    """The same for 64-bit mode: only ``mov dx, imm16`` needs a prefix there."""
    return b"\x66" + prints(text, code)
