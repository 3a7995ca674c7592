"""The simulated kernel's door to the secure processor (drivers/crypto/ccp/sev-dev.c)."""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable

from kvmlaunch.sim.faults import CpuidCorrection, Faults
from kvmlaunch.sim.firmware import SecureProcessor
from kvmlaunch.sim.memory import PhysicalMemory
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

__all__ = ["Psp"]

# The CPUID page as firmware reads it (AMD 56860, CPUID page): header, then entries of
# eax_in, ecx_in, xcr0_in, xss_in, eax, ebx, ecx, edx, reserved.
_CPUID_HEADER = 16
_CPUID_ENTRY = struct.Struct("<IIQQIIIIQ")
_CPUID_MAX = 64
_REGISTERS = {"eax": 24, "ebx": 28, "ecx": 32, "edx": 36}


class Psp:
    """Issues firmware commands, one at a time, and lets ordered faults answer instead."""

    def __init__(self, processor: SecureProcessor, memory: PhysicalMemory, faults: Faults) -> None:
        self.processor = processor
        self._memory = memory
        self._faults = faults
        self._lock = threading.Lock()

    def status(self, name: str, command: Callable[[], int]) -> int:
        """Run a firmware command; its status word."""
        with self._lock:
            ordered = self._faults.status_of(name)
            return command() if ordered is None else ordered

    def must(self, name: str, command: Callable[[], int]) -> None:
        """Run a firmware command whose status nobody reads: EIO unless it succeeds."""
        if self.status(name, command):
            refuse(errno.EIO)

    def launch_update(self, gctx: int, spa: int, page_type: int) -> int:
        """SNP_LAUNCH_UPDATE of one 4 KiB page; its status word."""
        return self.status("SNP_LAUNCH_UPDATE", lambda: self._update(gctx, spa, page_type))

    def page_reclaim(self, spa: int) -> int:
        """SNP_PAGE_RECLAIM; its status word."""
        return self.status("SNP_PAGE_RECLAIM", lambda: self.processor.page_reclaim(spa))

    def guest_request(self, gctx: int, request: int, response: int) -> int:
        """SNP_GUEST_REQUEST from one page to another; its status word."""
        return self.status(
            "SNP_GUEST_REQUEST", lambda: self.processor.guest_request(gctx, request, response)
        )

    def _update(self, gctx: int, spa: int, page_type: int) -> int:
        if page_type == lib.KVM_SEV_SNP_PAGE_TYPE_CPUID:
            correction = self._faults.cpuid_correction()
            if correction is not None:
                _correct(self._memory.page(spa), correction)
                return int(lib.SEV_RET_INVALID_PARAM)
        return self.processor.launch_update(gctx, spa, page_type)


def _correct(page: memoryview, correction: CpuidCorrection) -> None:
    """Change the named register in the page; a page without that leaf stays as it is."""
    (count,) = struct.unpack_from("<I", page)
    for at in range(min(count, _CPUID_MAX)):
        offset = _CPUID_HEADER + at * _CPUID_ENTRY.size
        leaf, index = struct.unpack_from("<II", page, offset)
        if (leaf, index) == (correction.leaf, correction.index):
            place = offset + _REGISTERS[correction.register]
            (old,) = struct.unpack_from("<I", page, place)
            new = old ^ 1 if correction.value is None else correction.value
            struct.pack_into("<I", page, place, new & 0xFFFFFFFF)
