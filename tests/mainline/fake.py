"""The real kernel over the fake secure processor: the real platform, and firmware that tells."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmlaunch.uapi import MeasuredPage, RealPlatform, Result, ffi, lib, peek

__all__ = ["DEBUGFS", "FakeHost"]

DEBUGFS = Path("/sys/kernel/debug/fake_psp")
"""Where the fake secure processor writes what it measured and did, and takes orders."""

_PAGE = 4096


class FakeHost(RealPlatform):
    """RealPlatform with ``measured_pages``; orders and witness for the differential test."""

    def __init__(self, debugfs: Path = DEBUGFS) -> None:
        self._folder = os.fspath(debugfs)
        self._guest_of: dict[int, int] = {}
        self.phys_bits = _phys_bits()
        self.vcpu_ids = self._vcpu_ids()

    def __repr__(self) -> str:
        return f"FakeHost({self._folder!r})"

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        """ioctl(2); START ties the VM's descriptor to the newest guest context."""
        result = super().ioctl(fd, request, arg)
        if request == lib.KVM_MEMORY_ENCRYPT_OP and result.ret == 0 and arg:
            command = ffi.new("struct kvm_sev_cmd *")
            ffi.buffer(command)[:] = peek(arg, ffi.sizeof("struct kvm_sev_cmd"))
            if command.id == lib.KVM_SEV_SNP_LAUNCH_START:
                self._guest_of[fd] = self._contexts()
        return result

    def measured_pages(self, vm_fd: int) -> list[MeasuredPage]:  # type: ignore[override]
        """What the fake measured for the VM, in order."""
        guest = self._guest_of.get(vm_fd)
        return [
            MeasuredPage(kind, gpa, bytes.fromhex(contents), bytes.fromhex(digest))
            for number, kind, gpa, contents, digest in self._measured()
            if number == guest
        ]

    def order(self, faults: Sequence[str]) -> None:
        """Replace the ordered failures (grammar of kvmlaunch.sim.faults) and their counters."""
        self._write("orders", "".join(f"{fault}\n" for fault in faults) or "\n")

    def begin(self, orders: Sequence[str]) -> None:
        self._write("measured", "reset\n")
        self.order(orders)

    def end(self) -> dict[str, Any]:
        guests: dict[int, list[Any]] = {}
        for number, kind, gpa, contents, digest in self._measured():
            guests.setdefault(number, []).append([kind, f"{gpa:x}", contents, digest])
        by_number = [guests[number] for number in sorted(guests)]
        return {"guests": by_number, "vmsas": self._vmsas(), "log": self.log()}

    def log(self) -> list[list[Any]]:
        """[command, status] of each firmware command since the last reset."""
        lines = (line.split() for line in self._read("log").decode().splitlines())
        return [[name, int(status, 0)] for name, status in lines]

    def _vcpu_ids(self) -> int:
        kvm = self.open("/dev/kvm", os.O_RDWR).ret
        answer = self.ioctl(kvm, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_MAX_VCPU_ID).ret
        self.close(kvm)
        return answer

    def _vmsas(self) -> list[str]:
        pages = self._read("vmsa")
        starts = range(0, len(pages), _PAGE)
        return [pages[at : at + _PAGE].rstrip(b"\0").hex() for at in starts]

    def _measured(self) -> list[tuple[int, int, int, str, str]]:
        lines = (line.split() for line in self._read("measured").decode().splitlines())
        return [(int(n), int(kind), int(gpa, 16), c, d) for n, kind, gpa, c, d in lines]

    def _contexts(self) -> int:
        return sum(call == ["SNP_GCTX_CREATE", 0] for call in self.log())

    # Without Python's own layers: in emulation they cost more than the call.

    def _read(self, name: str) -> bytes:
        fd = os.open(f"{self._folder}/{name}", os.O_RDONLY)
        try:
            parts = []
            while part := os.read(fd, 1 << 16):
                parts.append(part)
            return b"".join(parts)
        finally:
            os.close(fd)

    def _write(self, name: str, text: str) -> None:
        fd = os.open(f"{self._folder}/{name}", os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _phys_bits() -> int:
    found = re.search(r"(\d+) bits physical", Path("/proc/cpuinfo").read_text())
    return int(found[1]) if found else 48
