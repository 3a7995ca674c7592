"""Stops before chosen instructions, and the host's view of linear addresses."""

from __future__ import annotations

from kvmlaunch.softcpu import DebugStop, Halt, IoWrite
from tests.softcpu.model import Guest


def test_watch_when_place_is_reached_stops_before_it() -> None:
    guest = Guest(snp=True)
    cpu = guest.start(bytes.fromhex("40 40 40 f4"), rax=0)
    guest.machine.watch(lambda address, size: True, {0x1002})
    assert cpu.run(1000) == DebugStop()
    assert (cpu.read("rip"), cpu.read("rax")) == (0x1002, 2)
    assert cpu.run(1000) == DebugStop(), "it is asked again"
    guest.machine.watch(None, None)
    assert cpu.run(1000) == Halt()
    assert cpu.read("rax") == 3


def test_watch_when_places_are_all_sees_each_instruction_with_its_size() -> None:
    guest = Guest(snp=True)
    cpu = guest.start(bytes.fromhex("40 b805000000 f4"))
    seen: list[tuple[int, int]] = []

    def note(address: int, size: int) -> bool:
        seen.append((address, size))
        return False

    guest.machine.watch(note, None)
    assert cpu.run(1000) == Halt()
    assert seen == [(0x1000, 1), (0x1001, 5), (0x1006, 1)]


def test_watch_when_port_is_accessed_there_stops_first_then_does_it() -> None:
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("b041 e680 f4"))
    answers = [True, False]
    guest.machine.watch(lambda address, size: answers.pop(0), {0x1002})
    assert cpu.run(1000) == DebugStop()
    assert cpu.run(1000) == IoWrite(0x80, 1, 0x41)
    assert cpu.run(1000) == Halt()


def test_watch_when_asking_fails_raises_from_run() -> None:
    guest = Guest(snp=True)
    cpu = guest.start(b"\x40\xf4")
    guest.machine.watch(lambda address, size: bool(1 // 0), None)
    try:
        cpu.run(1000)
    except ZeroDivisionError:
        return
    raise AssertionError("the error is lost")


def test_translate_when_paging_is_off_is_the_same_address() -> None:
    snp, plain = Guest(snp=True), Guest(snp=False)
    assert snp.start(b"\xf4").translate(0x1234) == (0x1234, True)
    assert plain.start(b"\xf4").translate(0x1234) == (0x1234, False)
