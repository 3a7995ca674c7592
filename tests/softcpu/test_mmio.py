"""MMIO of plain guests: accesses where no memory is."""

from __future__ import annotations

import pytest

from kvmlaunch.softcpu import Event, Halt, MmioRead, MmioWrite, NestedFault
from tests.softcpu.model import Guest
from tests.softcpu.tables import gate32, start_long

DEVICE = 0x100000


def device(code: str, **changes: object) -> Guest:
    guest = Guest(snp=False)
    guest.memory.mmio.add(DEVICE)
    guest.start(bytes.fromhex(code) + b"\xf4", **{"rbx": DEVICE + 8, **changes})
    return guest


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("8803", MmioWrite(DEVICE + 8, 1, 0xDD)),
        ("668903", MmioWrite(DEVICE + 8, 2, 0xCCDD)),
        ("8903", MmioWrite(DEVICE + 8, 4, 0xAABBCCDD)),
        ("c7431078563412", MmioWrite(DEVICE + 0x18, 4, 0x12345678)),
        ("ab", MmioWrite(DEVICE + 0x20, 4, 0xAABBCCDD)),
        ("a320001000", MmioWrite(DEVICE + 0x20, 4, 0xAABBCCDD)),
    ],
)
def test_mmio_when_written_is_done_at_once(code: str, event: MmioWrite) -> None:
    guest = device(code, rax=0xAABBCCDD, rdi=DEVICE + 0x20)
    assert guest.cpu.run(1000) == event
    assert guest.cpu.read("rip") == 0x1000 + len(bytes.fromhex(code))
    assert guest.cpu.run(1000) == Halt()


@pytest.mark.parametrize(
    ("code", "size", "register", "value"),
    [
        ("8a03", 1, "rax", 0xFFFFFFFFFFFFFF88),
        ("668b03", 2, "rax", 0xFFFFFFFFFFFF7788),
        ("8b0b", 4, "rcx", 0x55667788),
        ("0fb603", 1, "rax", 0x88),
        ("0fbe0b", 1, "rcx", 0xFFFFFF88),
        ("0fb70b", 2, "rcx", 0x7788),
        ("330b", 4, "rcx", 0xAA998877),
    ],
)
def test_mmio_when_read_lands_where_the_instruction_says(
    code: str, size: int, register: str, value: int
) -> None:
    guest = device(code, rax=2**64 - 1, rcx=2**64 - 1)
    cpu = guest.cpu
    assert cpu.run(1000) == MmioRead(DEVICE + 8, size)
    cpu.complete(0x11223344_55667788)
    assert cpu.run(1000) == Halt()
    assert cpu.read(register) == value


def test_mmio_when_64_bits_wide_is_one_access() -> None:
    guest = Guest(snp=False)
    guest.memory.mmio.add(DEVICE)
    start_long(guest, bytes.fromhex("488b03 48894308 f4"), rbx=DEVICE)
    assert guest.cpu.run(1000) == MmioRead(DEVICE, 8)
    guest.cpu.complete(0x1122334455667788)
    assert guest.cpu.run(1000) == MmioWrite(DEVICE + 8, 8, 0x1122334455667788)
    assert guest.cpu.run(1000) == Halt()


def test_mmio_when_changed_in_place_is_a_read_and_a_write() -> None:
    guest = device("830305")  # add dword [ebx],5
    cpu = guest.cpu
    assert cpu.run(1000) == MmioRead(DEVICE + 8, 4)
    cpu.complete(0xFFFFFFFF)
    assert cpu.run(1000) == MmioWrite(DEVICE + 8, 4, 4)
    assert cpu.read("rflags") & 1, "the carry of the addition"
    assert not cpu.read("rflags") & 0x100, "TF was borrowed"
    assert cpu.read("dr6") == 0xFFFF0FF0
    assert cpu.run(1000) == Halt()


def test_mmio_when_string_is_copied_goes_step_by_step() -> None:
    guest = device("f3a4", rcx=2, rsi=DEVICE, rdi=0x5000)
    cpu = guest.cpu
    for n, value in enumerate((0x41, 0x42)):
        assert cpu.run(1000) == MmioRead(DEVICE + n, 1)
        cpu.complete(value)
    assert cpu.run(1000) == Halt()
    assert guest.memory.main[0x5000:0x5002] == b"AB"


@pytest.mark.parametrize(
    ("code", "events"),
    [
        ("8903", [MmioWrite(DEVICE + 0xFFE, 2, 0xCCDD), MmioWrite(DEVICE + 0x1000, 2, 0xAABB)]),
        ("8b0b", [MmioRead(DEVICE + 0xFFE, 2), MmioRead(DEVICE + 0x1000, 2)]),
        (
            "0103",  # add [ebx],eax
            [
                MmioRead(DEVICE + 0xFFE, 2),
                MmioRead(DEVICE + 0x1000, 2),
                MmioWrite(DEVICE + 0xFFE, 2, 0x4455),
                MmioWrite(DEVICE + 0x1000, 2, 0x2233),
            ],
        ),
        ("60", [MmioWrite(DEVICE + 0xFE8, 4, 0), MmioWrite(DEVICE + 0x1000, 4, 0xC)]),
    ],
    ids=["write", "read", "change", "pusha"],
)
def test_mmio_when_it_crosses_pages_is_one_event_for_each(code: str, events: list[Event]) -> None:
    guest = device(code, rbx=DEVICE + 0xFFE, rax=0xAABBCCDD, rcx=0xC, rsp=DEVICE + 0x1008)
    guest.memory.mmio.add(DEVICE + 0x1000)
    cpu = guest.cpu
    answers = [0x7778, 0x7777]
    for expected in events:
        assert cpu.run(1000) == expected
        if isinstance(expected, MmioRead):
            assert not cpu.interruptible
            cpu.complete(answers.pop(0))
    assert cpu.run(1000) == Halt()
    if code == "8b0b":
        assert cpu.read("rcx") == 0x77777778


def test_mmio_when_two_writes_are_left_nothing_comes_between() -> None:
    guest = device("8903", rbx=DEVICE + 0xFFE, rflags=0x202)
    guest.memory.mmio.add(DEVICE + 0x1000)
    assert isinstance(guest.cpu.run(1000), MmioWrite)
    assert not guest.cpu.interruptible
    assert guest.cpu.step() == MmioWrite(DEVICE + 0x1000, 2, 0)
    assert guest.cpu.interruptible


@pytest.mark.parametrize("to", [DEVICE + 0x1000, DEVICE + 0x100], ids=["another page", "same page"])
def test_mmio_when_copied_from_device_to_device_reads_then_writes(to: int) -> None:
    guest = device("a5", rsi=DEVICE, rdi=to)  # movsd
    guest.memory.mmio.add(DEVICE + 0x1000)
    cpu = guest.cpu
    assert cpu.run(1000) == MmioRead(DEVICE, 4)
    cpu.complete(0x12345678)
    assert cpu.run(1000) == MmioWrite(to, 4, 0x12345678)
    assert cpu.run(1000) == Halt()


def test_mmio_when_flags_are_pushed_leaves_no_access_behind() -> None:
    """What stands for the device while one instruction runs must not be the guest's later."""
    guest = device("9c a108001000", rsp=DEVICE + 0x800)  # pushfd; mov eax,[DEVICE+8]
    cpu = guest.cpu
    assert cpu.run(1000) == MmioWrite(DEVICE + 0x7FC, 4, 2)
    assert cpu.run(1000) == MmioRead(DEVICE + 8, 4)


def test_mmio_when_new_state_is_loaded_writes_are_dropped() -> None:
    guest = device("8903", rbx=DEVICE + 0xFFE)
    guest.memory.mmio.add(DEVICE + 0x1000)
    assert isinstance(guest.cpu.run(1000), MmioWrite)
    guest.start(b"\xf4")
    assert guest.cpu.run(1000) == Halt()


def test_mmio_when_executed_is_a_nested_fault() -> None:
    guest = device("ffe3")  # jmp ebx
    event: Event = guest.cpu.run(1000)
    assert isinstance(event, NestedFault)
    assert event.gpa == DEVICE + 8


def test_mmio_when_stack_is_there_ends_in_a_shutdown_of_the_guest_only() -> None:
    guest = device("0f0b", rsp=DEVICE + 0x100)
    gate32(guest, 6)
    assert type(guest.cpu.run(1000)).__name__ == "Shutdown"
