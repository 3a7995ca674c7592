"""A guest's memory and the least of a hypervisor, for tests of the CPU alone."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from collections.abc import Callable

import pytest

from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.softcpu import CpuOptions, Event, Machine, Missing, SoftCpu

PAGE = 0x1000
ASID = 7
PERMS_ALL = 0xF


@dataclasses.dataclass(frozen=True)
class Entry:
    """An RMP entry with the names of `RmpEntry`."""

    assigned: bool = True
    asid: int = ASID
    gpa: int = 0
    immutable: bool = False
    validated: bool = True
    vmsa: bool = False
    page_size: int = 0
    perms: tuple[int, int, int, int] = (PERMS_ALL, 0, 0, 0)


class Memory:
    """`GuestMemory` of one size. All of it is private and validated to begin with."""

    def __init__(self, size: int = 0x200000, *, snp: bool) -> None:
        self.size = size
        self.snp = snp
        self.private = mmap.mmap(-1, size)
        self.shared = mmap.mmap(-1, size)
        self.bases = [
            ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for memory in (self.shared, self.private)
        ]
        self.rmp = {gpa: Entry(gpa=gpa) for gpa in range(0, size, PAGE)} if snp else {}
        self.mmio: set[int] = set()
        self.protected: set[int] = set()
        self.writes: list[int] = []
        self.flush: Callable[[], None] = lambda: None

    @property
    def main(self) -> mmap.mmap:
        """What a guest uses that knows nothing of shared memory."""
        return self.private if self.snp else self.shared

    def resolve(self, gpa: int, private: bool, write: bool = False) -> int | Missing:
        if gpa in self.mmio:
            return Missing.MMIO
        if write:
            self.protected.discard(gpa)
            self.writes.append(gpa)
        if gpa >= self.size or (self.snp and private != (gpa in self.rmp)):
            return Missing.ABSENT
        return self.bases[private] + gpa

    def write_protected(self, gpa: int) -> bool:
        return gpa in self.protected

    def rmp_lookup(self, gpa: int) -> Entry:
        return self.rmp[gpa]

    def rmp_update(
        self,
        gpa: int,
        *,
        validated: bool | None = None,
        vmsa: bool | None = None,
        perms: tuple[int, int, int, int] | None = None,
    ) -> None:
        changes = {"validated": validated, "vmsa": vmsa, "perms": perms}
        given = {name: value for name, value in changes.items() if value is not None}
        self.rmp[gpa] = dataclasses.replace(self.rmp[gpa], **given)

    def make_shared(self, gpa: int) -> None:
        """Page state change to shared."""
        self.rmp.pop(gpa, None)
        self.flush()

    def make_private(self, gpa: int) -> None:
        """Page state change to private: a page of zeros that isn't validated."""
        self.private[gpa : gpa + PAGE] = bytes(PAGE)
        self.rmp[gpa] = Entry(gpa=gpa, validated=False)
        self.flush()


FLAT_CODE32 = Segment(8, 0xC9B, 0xFFFFFFFF, 0)
FLAT_DATA = Segment(16, 0xC93, 0xFFFFFFFF, 0)
FLAT_CODE64 = Segment(24, 0xA9B, 0xFFFFFFFF, 0)
NO_TABLE = Segment(0, 0, 0xFFFF, 0)
BUSY_TSS = Segment(0, 0x8B, 0xFFFF, 0)
LDT = Segment(0, 0x82, 0xFFFF, 0)


def vmsa(*, snp: bool, **changes: object) -> Vmsa:
    """A CPU in flat 32-bit protected mode at 0x1000, stack below 0x8000."""
    data = dict.fromkeys(("es", "ss", "ds", "fs", "gs"), FLAT_DATA)
    fields: dict[str, object] = {
        **data,
        "cs": FLAT_CODE32,
        "gdtr": NO_TABLE,
        "idtr": NO_TABLE,
        "ldtr": LDT,
        "tr": BUSY_TSS,
        "efer": 0x1000 if snp else 0,
        "cr0": 0x11,
        "rflags": 2,
        "rip": 0x1000,
        "rsp": 0x8000,
        "dr6": 0xFFFF0FF0,
        "dr7": 0x400,
        "g_pat": 0x0007040600070406,
        "mxcsr": 0x1F80,
        "x87_fcw": 0x37F,
        "xcr0": 1,
        "sev_features": 1 if snp else 0,
        **changes,
    }
    return Vmsa(**fields)  # type: ignore[arg-type]


class Guest:
    """A machine with one CPU, and code in its memory."""

    def __init__(self, *, snp: bool, memory: Memory | None = None, **options: object) -> None:
        pytest.importorskip("unicorn", reason="unicorn, the software CPU's engine, isn't there")
        self.memory = memory or Memory(snp=snp)
        self.snp = snp
        self.machine = Machine(
            self.memory,
            CpuOptions(snp=snp, asid=ASID if snp else 0, **options),  # type: ignore[arg-type]
        )
        self.memory.flush = self.machine.flush
        self.cpu = self.machine.new_cpu()

    def put(self, gpa: int, data: bytes) -> None:
        self.memory.main[gpa : gpa + len(data)] = data

    def start(self, code: bytes = b"", **changes: object) -> SoftCpu:
        """Load flat 32-bit state with changes, and code where it starts."""
        state = vmsa(snp=self.snp, **changes)
        self.put(0x1000, code)
        invalid = self.cpu.load(state)
        assert invalid is None, invalid
        return self.cpu

    def run(self, code: bytes = b"", ticks: int = 100_000, **changes: object) -> Event:
        return self.start(code, **changes).run(ticks)

    def read(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.memory.main[gpa : gpa + size], "little")
