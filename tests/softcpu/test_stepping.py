"""One instruction at a time."""

from __future__ import annotations

from kvmlaunch.abi.segment import Segment
from kvmlaunch.softcpu import Halt, IoRead, Shutdown
from tests.softcpu.model import Guest
from tests.softcpu.tables import HANDLER, USER64, gate32, start_long, start_protected


def test_step_when_called_executes_one_instruction() -> None:
    guest = Guest(snp=True)
    cpu = guest.start(bytes.fromhex("40 b805000000 83c001 eb00 f4"))
    places = []
    for _ in range(4):
        assert cpu.step() is None
        places.append(cpu.read("rip") - 0x1000)
    assert places == [1, 6, 9, 11]
    assert cpu.read("rax") == 6
    assert cpu.step() == Halt()
    assert cpu.read("dr6") == 0xFFFF0FF0
    assert not cpu.read("rflags") & 0x100


def test_step_when_instruction_pushes_flags_hides_the_trap_flag() -> None:
    guest = Guest(snp=True)
    cpu = guest.start(bytes.fromhex("9c 669c f4"))
    assert cpu.step() is None
    assert cpu.step() is None
    assert guest.read(0x7FFC, 4) == 2
    assert guest.read(0x7FFA, 2) == 2


def test_step_when_user_pushes_flags_smap_does_not_matter() -> None:
    guest = Guest(snp=True)
    start_long(guest, b"\x9c", rsp=0x7000, cr4=0x200620, **USER64)
    assert guest.cpu.step() is None
    assert guest.read(0x6FF8, 8) == 2


def test_step_when_string_is_repeated_takes_one_element() -> None:
    guest = Guest(snp=True)
    cpu = guest.start(bytes.fromhex("f3aa f4"), rcx=3, rdi=0x5000)
    for left in (2, 1, 0):
        assert cpu.read("rip") == 0x1000
        assert cpu.step() is None
        assert cpu.read("rcx") == left


def test_step_when_exception_comes_is_at_the_handler() -> None:
    guest = Guest(snp=True)
    start_protected(guest, bytes.fromhex("0fa2"))
    gate32(guest, 29)
    assert guest.cpu.step() is None
    assert guest.cpu.read("rip") == HANDLER
    assert not guest.read(guest.cpu.read("rsp") + 12, 4) & 0x100, "TF isn't in the frame"


def test_step_when_event_comes_returns_it() -> None:
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("ec 0f0b"), idtr=Segment(0, 0, 0, 0))
    assert cpu.step() == IoRead(0, 1)
    cpu.complete(0x33)
    assert cpu.read("rax") == 0x33
    assert isinstance(cpu.step(), Shutdown)
    assert isinstance(cpu.step(), Shutdown)
