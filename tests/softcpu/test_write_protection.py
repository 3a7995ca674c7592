"""Shared pages that the hypervisor wants to know the writes of, or keeps read-only."""

from __future__ import annotations

import pytest

from kvmlaunch.softcpu import Halt, Missing, MmioWrite

from .model import PAGE, Guest, Memory

DATA, OTHER = 0x3000, 0x4000


class ReadOnly(Memory):
    """DATA is memory to read and a device to write."""

    def resolve(self, gpa: int, private: bool, write: bool = False) -> int | Missing:
        if write and gpa == DATA:
            return Missing.MMIO
        return super().resolve(gpa, private, write)

    def write_protected(self, gpa: int) -> bool:
        return gpa == DATA


@pytest.mark.parametrize("times", [1, 3])
def test_write_when_the_page_was_read_before_is_asked_for_once(times: int) -> None:
    guest = Guest(snp=False)
    guest.memory.protected = {DATA, OTHER}
    # mov eax,[0x3000]; mov eax,[0x4000]; mov [0x3000],al; mov [0x3ffc],eax; hlt
    code = bytes.fromhex("a100300000 a100400000 a200300000 a3fc3f0000 f4")
    for _ in range(times):
        assert guest.run(code) == Halt()
    assert guest.memory.writes.count(DATA) == 1
    assert guest.memory.protected == {OTHER}


def test_write_when_the_page_is_protected_again_and_flushed_is_asked_for_again() -> None:
    guest = Guest(snp=False)
    code = bytes.fromhex("a200300000 f4")  # mov [0x3000],al; hlt
    for expected in (1, 2):
        guest.memory.protected.add(DATA)
        guest.machine.flush()
        assert guest.run(code) == Halt()
        assert guest.memory.writes.count(DATA) == expected


def test_read_and_write_of_one_instruction_when_the_page_is_read_only_part() -> None:
    guest = Guest(snp=False, memory=ReadOnly(snp=False))
    guest.put(DATA + 8, b"\x05")
    # add byte [0x3008],2; mov al,[0x3008]; hlt
    guest.start(bytes.fromhex("80050830000002 a008300000 f4"))
    assert guest.cpu.run(1000) == MmioWrite(DATA + 8, 1, 7)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rax") & 0xFF == 5
    assert guest.read(DATA, PAGE) == 5 << 64


def test_copy_when_its_target_is_read_only_reads_the_same_page() -> None:
    guest = Guest(snp=False, memory=ReadOnly(snp=False))
    guest.put(DATA + 8, b"\x05")
    # mov esi,0x3008; mov edi,0x3020; movsb; hlt
    guest.start(bytes.fromhex("be08300000 bf20300000 a4 f4"))
    assert guest.cpu.run(1000) == MmioWrite(DATA + 0x20, 1, 5)
