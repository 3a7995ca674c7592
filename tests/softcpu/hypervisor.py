"""The least of a hypervisor that the example guests need: console, GHCB, page states."""

from __future__ import annotations

import struct
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection

from kvmlaunch.softcpu import Event, IoRead, IoWrite, Shutdown, VmgExit
from tests.softcpu.model import PAGE, Guest, Memory, vmsa

CONSOLE, EXIT = 0x3F8, 0xF4
PVH_ENTRY = 18
# GHCB MSR protocol (AMD 56421): requests; the answer has the next number.
SEV_INFO, CPUID, REGISTER, STATE_CHANGE, FEATURES, TERMINATE = 2, 4, 0x12, 0x14, 0x80, 0x100
# Fields of the GHCB page.
RAX, EXIT_CODE, INFO1, INFO2, SCRATCH, VALID = 0x1F8, 0x390, 0x398, 0x3A0, 0x3A8, 0x3F0
IOIO, MSR, CPUID_EXIT, MMIO_READ, MMIO_WRITE = 0x7B, 0x7C, 0x72, 0x80000001, 0x80000002


def pvh_entry(path: Path) -> int | None:
    """The 32-bit entry that an ELF file's PVH note names."""
    with path.open("rb") as file:
        for section in ELFFile(file).iter_sections():
            if isinstance(section, NoteSection):
                for note in section.iter_notes():
                    if note["n_name"] == "Xen" and note["n_type"] == PVH_ENTRY:
                        return int.from_bytes(bytes(note["n_descdata"])[:4], "little")
    return None


class Hypervisor:
    """Loads an ELF file, runs it to its end."""

    def __init__(self, path: Path, *, snp: bool, c_bit: int = 51) -> None:
        self.memory = Memory(snp=snp)
        self.guest = Guest(snp=snp, memory=self.memory, c_bit=c_bit)
        self.c_bit = c_bit
        self.console = b""
        self.end: object = None
        launched: set[int] = set()
        with path.open("rb") as file:
            for segment in ELFFile(file).iter_segments("PT_LOAD"):
                start, data = segment["p_paddr"], segment.data()
                self.guest.put(start, data)
                launched.update(range(start & -PAGE, start + segment["p_memsz"], PAGE))
        if snp:
            self.memory.rmp = {gpa: self.memory.rmp[gpa] for gpa in launched}
        entry = pvh_entry(path)
        assert entry is not None
        assert self.guest.cpu.load(vmsa(snp=snp, rip=entry)) is None

    def run(self, events: int = 10_000) -> object:
        """Run until the guest's end: its exit code, or the GHCB MSR of a termination."""
        for _ in range(events):
            self._handle(self.guest.cpu.run(1_000_000))
            if self.end is not None:
                return self.end
        raise AssertionError("the guest doesn't end")

    def _handle(self, event: Event) -> None:
        if isinstance(event, VmgExit):
            if event.ghcb & 0xFFF:
                self._msr_protocol(event.ghcb)
            else:
                self._page_protocol(event.ghcb)
        elif isinstance(event, IoWrite):
            self._out(event.port, event.value)
        elif isinstance(event, IoRead):
            self.guest.cpu.complete(0xFF)
        elif isinstance(event, Shutdown):
            self.end = event
        else:
            raise AssertionError(event)

    def _out(self, port: int, value: int) -> None:
        if port == CONSOLE:
            self.console += bytes([value & 0xFF])
        elif port == EXIT:
            self.end = value

    def _msr_protocol(self, request: int) -> None:
        cpu, kind = self.guest.cpu, request & 0xFFF
        page = request & 0xFFFFFFFFFF000
        if kind == SEV_INFO:
            cpu.ghcb = 2 << 48 | 1 << 32 | self.c_bit << 24 | 1
        elif kind == CPUID:
            cpu.ghcb = (request & 3 << 30) | CPUID + 1
        elif kind == FEATURES:
            cpu.ghcb = 1 << 12 | FEATURES + 1
        elif kind == REGISTER:
            cpu.ghcb = page | REGISTER + 1
        elif kind == STATE_CHANGE:
            if request >> 52 & 0xF == 1:
                self.memory.make_private(page)
            else:
                self.memory.make_shared(page)
            cpu.ghcb = STATE_CHANGE + 1
        else:
            assert kind == TERMINATE, hex(request)
            self.end = request

    def _page_protocol(self, ghcb: int) -> None:
        assert ghcb not in self.memory.rmp, "the GHCB is shared"
        code, info1 = self._get(ghcb, EXIT_CODE), self._get(ghcb, INFO1)
        self._set(ghcb, INFO1, 0)
        self._set(ghcb, INFO2, 0)
        if code == IOIO:
            port, size = info1 >> 16, info1 >> 4 & 7
            if info1 & 1:
                self._set(ghcb, RAX, (1 << 8 * size) - 1)
            else:
                self._out(port, self._get(ghcb, RAX))
        elif code == CPUID_EXIT:
            for field in (RAX, 0x318, 0x308, 0x310):
                self._set(ghcb, field, 0)
        elif code == MSR:
            self._set(ghcb, RAX, 0)
            self._set(ghcb, 0x310, 0)
        elif code == MMIO_READ:
            scratch = self._get(ghcb, SCRATCH)
            self.memory.shared[scratch : scratch + 8] = b"\xff" * 8
        else:
            assert code == MMIO_WRITE, hex(code)

    def _get(self, ghcb: int, field: int) -> int:
        (value,) = struct.unpack_from("<Q", self.memory.shared, ghcb + field)
        return int(value)

    def _set(self, ghcb: int, field: int, value: int) -> None:
        struct.pack_into("<Q", self.memory.shared, ghcb + field, value)
        self.memory.shared[ghcb + VALID + field // 64] |= 1 << field // 8 % 8
