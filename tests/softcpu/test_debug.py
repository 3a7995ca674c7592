"""Debug registers of the owner: breakpoints, watched data, and what the guest sees of it."""

from __future__ import annotations

import pytest

from kvmlaunch.softcpu import DebugControl, DebugTrap, Halt, MmioRead, MmioWrite, SoftCpu
from tests.softcpu.model import Guest

DB, BP = 1, 3
DATA = 0x5004
NOP_NOP_HLT = bytes.fromhex("9090f4")
STORE = bytes.fromhex("a304500000 90 f4")  # mov [0x5004], eax; nop; hlt
LOAD = bytes.fromhex("a104500000 90 f4")  # mov eax, [0x5004]
DEVICE = 0x50000
PUSH_DEVICE = bytes.fromhex("ff3500000500 f4")  # push dword [0x50000]; hlt
COPY = bytes.fromhex("a4 f4")  # movsb; hlt


def control(address: int, kind: int = 0, length: int = 0, number: int = 0) -> DebugControl:
    """One breakpoint, of a kind and length as DR7 has them."""
    addresses = [0, 0, 0, 0]
    addresses[number] = address
    dr7 = 0x400 | 1 << 2 * number + 1 | (length << 2 | kind) << 16 + 4 * number
    first, second, third, fourth = addresses
    return DebugControl((first, second, third, fourth), dr7)


def start(code: bytes, wanted: DebugControl, **changes: object) -> tuple[Guest, SoftCpu]:
    guest = Guest(snp=False)
    cpu = guest.start(code, **changes)
    cpu.set_debug(wanted)
    return guest, cpu


@pytest.mark.parametrize("number", range(4))
def test_instruction_breakpoint_when_reached_stops_before(number: int) -> None:
    _, cpu = start(NOP_NOP_HLT, control(0x1001, number=number))
    assert cpu.run(1000) == DebugTrap(DB, 1 << number)
    assert cpu.read("rip") == 0x1001
    assert cpu.run(1000) == DebugTrap(DB, 1 << number), "it is asked again"
    cpu.set_debug()
    assert cpu.run(1000) == Halt()


def test_breakpoint_when_not_enabled_does_nothing() -> None:
    _, cpu = start(NOP_NOP_HLT, DebugControl((0x1001, 0, 0, 0), 0x400))
    assert cpu.run(1000) == Halt()


@pytest.mark.parametrize(
    ("code", "kind", "stops"),
    [(STORE, 1, True), (STORE, 3, True), (LOAD, 3, True), (LOAD, 1, False)],
)
def test_watched_data_when_accessed_stops_behind(code: bytes, kind: int, stops: bool) -> None:
    guest, cpu = start(code, control(DATA, kind, 3, 2), rax=0x11223344)
    guest.put(DATA, b"\x44\x33\x22\x11")
    if stops:
        assert cpu.run(1000) == DebugTrap(DB, 1 << 2)
        assert cpu.read("rip") == 0x1005
        assert guest.read(DATA, 4) == cpu.read("rax") == 0x11223344
    assert cpu.run(1000) == Halt()


@pytest.mark.parametrize(
    ("at", "length", "stops"),
    [
        *((DATA, 0, True), (DATA + 3, 0, True), (DATA + 4, 0, False), (DATA - 1, 0, False)),
        *((DATA, 1, True), (DATA, 2, True), (DATA + 8, 2, False)),
    ],
)
def test_watched_data_when_only_near_goes_on(at: int, length: int, stops: bool) -> None:
    _, cpu = start(STORE, control(at, 1, length))
    assert cpu.run(1000) == (DebugTrap(DB, 1) if stops else Halt())


def test_watched_write_when_its_page_was_read_before_stops() -> None:
    _, cpu = start(LOAD[:5] + STORE, control(DATA, 1, 3))
    assert cpu.run(1000) == DebugTrap(DB, 1)
    assert cpu.read("rip") == 0x100A


def test_watched_data_when_its_page_was_written_before_stops() -> None:
    guest = Guest(snp=False)
    cpu = guest.start(STORE + STORE)
    assert cpu.run(1000) == Halt()
    cpu.set_debug(control(DATA, 1, 3))
    assert cpu.run(1000) == DebugTrap(DB, 1)


def test_watched_page_when_it_is_not_there_is_still_a_fault() -> None:
    guest, cpu = start(STORE, control(DATA, 1, 3))
    guest.memory.size = 0x5000
    event = cpu.run(1000)
    assert (type(event).__name__, cpu.read("rip")) == ("NestedFault", 0x1000)


def test_int3_when_wanted_stops_at_it() -> None:
    _, cpu = start(b"\x90\xcc\xf4", DebugControl(breakpoints=True))
    assert cpu.run(1000) == DebugTrap(BP, 0)
    assert cpu.read("rip") == 0x1001


@pytest.mark.parametrize("code", ["0f21c0", "0f23c0", "0f21f8", "0f23f8"])
def test_debug_register_when_general_detect_is_set_stops(code: str) -> None:
    guest, cpu = start(bytes.fromhex(code) + b"\xf4", DebugControl(dr7=1 << 13 | 0x400))
    assert cpu.run(1000) == DebugTrap(DB, 1 << 13)
    assert cpu.read("rip") == 0x1000
    cpu.set_debug()
    assert cpu.run(1000) == Halt()
    assert guest.machine.ticks


def test_watch_of_a_debugger_when_there_are_breakpoints_still_counts() -> None:
    guest, cpu = start(NOP_NOP_HLT, control(0x1001))
    seen: list[int] = []

    def ask(address: int, _size: int) -> bool:
        seen.append(address)
        return False

    guest.machine.watch(ask, None)
    assert cpu.run(1000) == DebugTrap(DB, 1)
    assert seen == [0x1000]


def test_breakpoint_when_it_is_another_cpus_does_nothing() -> None:
    guest = Guest(snp=False)
    other = guest.machine.new_cpu()
    other.set_debug(control(0x1001))
    assert guest.run(NOP_NOP_HLT) == Halt()


@pytest.mark.parametrize("watched", [0x7FF0, 0x7FFC])
def test_device_when_read_beside_watched_data_is_read_once(watched: int) -> None:
    """As in KVM, whose emulator accesses devices, data breakpoints don't count then."""
    guest, cpu = start(PUSH_DEVICE, control(watched, 3, 3), rsp=0x8000)
    guest.memory.mmio.add(DEVICE)
    assert cpu.run(1000) == MmioRead(DEVICE, 4)
    cpu.complete(0x1234)
    assert cpu.run(1000) == Halt()
    assert guest.read(0x7FFC, 4) == 0x1234


def test_device_when_watched_data_is_copied_there_is_written_once() -> None:
    guest, cpu = start(COPY, control(DATA, 3), rsi=DATA, rdi=DEVICE)
    guest.memory.mmio.add(DEVICE)
    guest.put(DATA, b"\x5a")
    assert cpu.run(1000) == MmioWrite(DEVICE, 1, 0x5A)
    assert cpu.run(1000) == Halt()
