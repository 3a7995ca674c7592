"""Plain guests: port accesses, MSRs, CPUID, hypercalls."""

from __future__ import annotations

import dataclasses

import pytest

from kvmlaunch.softcpu import (
    Access,
    FaultReason,
    Halt,
    IoRead,
    IoWrite,
    MsrRead,
    MsrWrite,
    NestedFault,
    SoftCpu,
    Vmmcall,
)
from tests.softcpu.model import Guest
from tests.softcpu.tables import HANDLER, frame32, gate32, start_protected


def plain(code: str, **changes: object) -> SoftCpu:
    guest = Guest(snp=False)
    return guest.start(bytes.fromhex(code) + b"\xf4", **changes)


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("e610", IoWrite(0x10, 1, 0xDD)),
        ("e710", IoWrite(0x10, 4, 0xAABBCCDD)),
        ("66e710", IoWrite(0x10, 2, 0xCCDD)),
        ("ee", IoWrite(0x3F8, 1, 0xDD)),
        ("66ef", IoWrite(0x3F8, 2, 0xCCDD)),
        ("ef", IoWrite(0x3F8, 4, 0xAABBCCDD)),
    ],
)
def test_out_when_executed_is_done_at_once(code: str, event: IoWrite) -> None:
    cpu = plain(code, rax=0xAABBCCDD, rdx=0x3F8)
    assert cpu.run(1000) == event
    assert cpu.read("rip") == 0x1000 + len(bytes.fromhex(code))
    assert cpu.run(1000) == Halt()


@pytest.mark.parametrize(
    ("code", "event", "rax"),
    [
        ("e410", IoRead(0x10, 1), 0xFFFFFFFFFFFFFF78),
        ("66e510", IoRead(0x10, 2), 0xFFFFFFFFFFFF5678),
        ("ed", IoRead(0x3F8, 4), 0x12345678),
    ],
)
def test_in_when_completed_writes_as_much_as_it_should(code: str, event: IoRead, rax: int) -> None:
    cpu = plain(code, rax=2**64 - 1, rdx=0x3F8)
    assert cpu.run(1000) == event
    assert cpu.read("rip") == 0x1000
    with pytest.raises(RuntimeError, match="wants an answer"):
        cpu.run(1000)
    cpu.complete(0x12345678)
    assert cpu.run(1000) == Halt()
    assert cpu.read("rax") == rax
    with pytest.raises(RuntimeError, match="nothing waits"):
        cpu.complete()


def test_outs_when_repeated_gives_one_event_per_element() -> None:
    guest = Guest(snp=False)
    cpu = guest.start(b"\xf3\x6e\xf4", rcx=3, rsi=0x5000, rdx=0x10)
    guest.put(0x5000, b"abc")
    events = [cpu.run(1000) for _ in range(4)]
    assert events == [*(IoWrite(0x10, 1, ord(c)) for c in "abc"), Halt()]
    assert (cpu.read("rcx"), cpu.read("rsi")) == (0, 0x5003)


def test_ins_when_direction_is_down_stores_backwards() -> None:
    guest = Guest(snp=False)
    cpu = guest.start(b"\xf3\x66\x6d\xf4", rcx=2, rdi=0x5002, rdx=0x10, rflags=0x402)
    assert cpu.run(1000) == IoRead(0x10, 2, 2)
    cpu.complete(0x2222_1111)
    assert cpu.run(1000) == Halt()
    assert guest.memory.main[0x5000:0x5004] == b"\x22\x22\x11\x11"
    assert cpu.read("rdi") == 0x5000 - 2


def test_ins_when_the_next_page_is_not_there_ends_before_it() -> None:
    guest = Guest(snp=False)
    guest.memory.size = 0x5000
    cpu = guest.start(b"\xf3\x66\x6d\xf4", rcx=5, rdi=0x4FFE, rdx=0x10)
    assert cpu.run(1000) == IoRead(0x10, 2, 2)
    cpu.complete(0x2222_1111)
    event = cpu.run(1000)
    assert isinstance(event, NestedFault)
    assert event.gpa == 0x5000
    assert guest.memory.main[0x4FFE:0x5002] == b"\x11\x11\0\0"
    assert (cpu.read("rcx"), cpu.read("rdi")) == (4, 0x5000)


@pytest.mark.parametrize("becomes", ["absent", "device"])
def test_ins_when_memory_goes_away_before_the_answer_meets_that(becomes: str) -> None:
    guest = Guest(snp=False)
    start_protected(guest, b"\x6c\xf4", rdi=0x5000, rdx=0x10)
    gate32(guest, 13)
    guest.put(HANDLER, b"\xf4")
    cpu = guest.cpu
    assert cpu.run(1000) == IoRead(0x10, 1)
    if becomes == "device":
        guest.memory.mmio.add(0x5000)
    else:
        guest.memory.size = 0x5000
    guest.memory.flush()
    cpu.complete(0x33)
    event = cpu.run(1000)
    if becomes == "device":
        assert event == Halt()
        assert frame32(guest, 2) == (0, 0x1000)
    else:
        assert event == NestedFault(0x5000, Access.WRITE, False, FaultReason.ABSENT)


def test_string_io_when_count_is_zero_does_nothing() -> None:
    cpu = plain("f36e", rcx=0, rsi=0x5000)
    assert cpu.run(1000) == Halt()
    assert cpu.read("rsi") == 0x5000


def test_io_when_data_was_read_from_its_page_first_still_stops() -> None:
    """The engine can have the code page from a data access."""
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("a100600000 e900500000"))  # mov eax,[0x6000]; jmp 0x600a
    guest.put(0x600A, b"\xe6\x10\xf4")
    assert cpu.run(1000) == IoWrite(0x10, 1, 0)


def test_io_when_another_instruction_takes_its_place_runs_on() -> None:
    guest = Guest(snp=False)
    cpu = guest.start(b"\xe6\x10\xf4")
    assert cpu.run(1000) == IoWrite(0x10, 1, 0)
    guest.put(0x1000, b"\xb0\x07\xf4")  # mov al,7
    guest.machine.flush_code()
    cpu.write("rip", 0x1000)
    assert cpu.run(1000) == Halt()
    assert cpu.read("rax") == 7


def test_io_when_there_are_very_many_places_all_stop() -> None:
    """More than the engine keeps at one time."""
    guest = Guest(snp=False)
    count = 3000
    cpu = guest.start(bytes.fromhex("e9fbef0000"))  # jmp 0x10000
    guest.put(0x10000, bytes.fromhex("e610 eb00") * count + b"\xf4")  # out; jmp behind itself
    seen = 0
    while cpu.run(100_000) == IoWrite(0x10, 1, 0):
        seen += 1
    assert seen == count


@pytest.mark.parametrize("accepted", [True, False])
def test_msr_when_unknown_is_for_the_owner(accepted: bool) -> None:
    guest = Guest(snp=False)
    start_protected(guest, bytes.fromhex("0f32 0f30 f4"), rcx=0x1B, rax=1, rdx=2)
    gate32(guest, 13)
    guest.put(HANDLER, b"\xf4")
    cpu = guest.cpu
    assert cpu.run(1000) == MsrRead(0x1B)
    if not accepted:
        cpu.refuse()
        assert cpu.run(1000) == Halt()
        assert frame32(guest, 2) == (0, 0x1000)
        return
    cpu.complete(0xFEE00900_00000001)
    assert cpu.run(1000) == MsrWrite(0x1B, 0xFEE00900_00000001)
    cpu.complete()
    assert cpu.run(1000) == Halt()
    assert cpu.read("rip") == 0x1005


def test_cpuid_when_plain_asks_the_callback() -> None:
    guest = Guest(snp=False, cpuid=lambda leaf, index: (leaf, index, 3, 0xFFFFFFFF))
    assert guest.run(b"\x0f\xa2\xf4", rax=0x8000001F, rcx=7) == Halt()
    registers = [guest.cpu.read(name) for name in ("rax", "rbx", "rcx", "rdx")]
    assert registers == [0x8000001F, 7, 3, 0xFFFFFFFF]


@pytest.mark.parametrize("svme", [0, 0x1000])
def test_vmcall_when_it_is_patched_is_a_vmmcall_from_then_on(svme: int) -> None:
    asked = []
    guest = Guest(snp=False, patches_vmcall=lambda: not asked.append(1))
    guest.start(bytes.fromhex("0f01c1 ebfb"), efer=svme)  # and back to it
    assert [guest.cpu.run(1000), guest.cpu.run(1000)] == [Vmmcall(), Vmmcall()]
    assert guest.cpu.read("rip") == 0x1003
    assert guest.read(0x1000, 3) == 0xD9010F
    assert len(asked) == 1


@pytest.mark.parametrize(("cpl", "vector"), [(0, 6), (3, 13)])
def test_vmcall_when_it_is_not_patched_is_a_fault(cpl: int, vector: int) -> None:
    guest = Guest(snp=False, patches_vmcall=lambda: cpl == 3)
    start_protected(guest, bytes.fromhex("0f01c1"), cpl=cpl)
    seen = []
    guest.cpu.on_exception = lambda number, _code: seen.append(number)
    guest.cpu.run(1000)
    assert seen[0] == vector
    assert guest.read(0x1000, 3) == 0xC1010F


@pytest.mark.parametrize("svme", [0, 0x1000])
def test_vmmcall_when_plain_is_an_event(svme: int) -> None:
    cpu = plain("0f01d9", efer=svme)
    assert cpu.run(1000) == Vmmcall()
    cpu.write("rax", 5)
    assert cpu.run(1000) == Halt()
    assert cpu.read("rax") == 5


@pytest.mark.parametrize("code", ["0f09", "0f08", "0f01c8", "0f01c9"])
def test_cache_and_wait_instructions_when_plain_do_nothing(code: str) -> None:
    assert plain(code).run(1000) == Halt()


def test_tsc_when_read_twice_only_grows() -> None:
    guest = Guest(snp=False)
    assert guest.run(bytes.fromhex("0f31 89c3 9090 0f31 f4")) == Halt()
    assert 0 < guest.cpu.read("rbx") < guest.cpu.read("rax") <= guest.machine.ticks


def test_tsc_when_msr_is_read_is_the_same_clock() -> None:
    guest = Guest(snp=False, ticks_per_tsc=2)
    assert guest.run(bytes.fromhex("b910000000 0f32 f4")) == Halt()
    assert 0 < guest.cpu.read("rax") <= guest.machine.ticks // 2


NATIVE_MSRS = {
    0xC0000081: "star",
    0xC0000082: "lstar",
    0xC0000083: "cstar",
    0xC0000084: "sfmask",
    0xC0000102: "kernel_gs_base",
}


@pytest.mark.parametrize("msr", [*NATIVE_MSRS, 0xC0000100, 0xC0000101, 0x10, 0x277])
def test_msr_when_the_owner_wants_it_is_an_event(msr: int) -> None:
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("0f30 0f32 f4"), rcx=msr, rax=0x55, rdx=0)
    guest.machine.intercept_msrs(lambda index, _write: index == msr)
    assert cpu.run(1000) == MsrWrite(msr, 0x55)
    cpu.complete()
    assert cpu.run(1000) == MsrRead(msr)
    cpu.complete(0x66)
    assert cpu.run(1000) == Halt()
    assert cpu.read("rax") == 0x66


@pytest.mark.parametrize(("msr", "name"), NATIVE_MSRS.items())
def test_msr_when_the_owner_wants_another_is_the_guests(msr: int, name: str) -> None:
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("0f30 31c0 0f32 f4"), rcx=msr, rax=0x55, rdx=0)
    guest.machine.intercept_msrs(lambda index, _write: index != msr)
    assert cpu.run(1000) == Halt()
    assert (cpu.read("rax"), getattr(cpu.save(), name)) == (0x55, 0x55)


@pytest.mark.parametrize(("msr", "name"), [(0xC0000100, "fs"), (0xC0000101, "gs")])
def test_segment_base_when_written_by_msr_leaves_the_rest(msr: int, name: str) -> None:
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("0f30 31c0 0f32 f4"), rcx=msr, rax=0x5000, rdx=0)
    before = getattr(cpu.save(), name)
    guest.machine.intercept_msrs(lambda _index, _write: False)
    assert cpu.run(1000) == Halt()
    after = getattr(cpu.save(), name)
    assert (cpu.read("rax"), after.base) == (0x5000, 0x5000)
    assert dataclasses.replace(after, base=0) == dataclasses.replace(before, base=0)


@pytest.mark.parametrize("msr", [0xC0000100, 0xC0000101, 0xC0000082, 0xC0000083, 0xC0000102])
def test_base_when_not_canonical_is_a_fault_though_the_owner_wants_msrs(msr: int) -> None:
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("0f30 f4"), rcx=msr, rax=0, rdx=1 << 15)
    guest.machine.intercept_msrs(lambda _index, _write: False)
    seen: list[tuple[int, int | None]] = []
    cpu.on_exception = lambda vector, code: seen.append((vector, code))
    cpu.run(1000)
    assert seen[0] == (13, 0)


def test_tsc_when_ahead_shows_in_rdtsc() -> None:
    cpu = plain("0f31")
    cpu.tsc_offset = 7 << 32
    assert cpu.run(1000) == Halt()
    assert cpu.read("rdx") == 7


XSETBV = bytes.fromhex("0f01d1 f4")


@pytest.mark.parametrize("value", [1, 3, 7, 0x207, 0x2E7])
def test_xcr0_when_cpuid_has_the_components_takes_them(value: int) -> None:
    guest = Guest(snp=False, cpuid=lambda leaf, _i: (0x2E7 if leaf == 0xD else 0, 0, 0, 0))
    cpu = guest.start(XSETBV, cr4=1 << 18, rax=value, rcx=0, rdx=0)
    assert cpu.run(1000) == Halt()
    assert (cpu.read("xcr0"), cpu.save().xcr0) == (value, value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rax": 6}, 0),  # without x87
        ({"rax": 0x205}, 0),  # AVX without SSE
        ({"rax": 0xE3}, 0),  # AVX-512 without AVX
        ({"rax": 0x27}, 0),  # a part of AVX-512
        ({"rax": 0x407}, 0),  # not in CPUID
        ({"rax": 0xB}, 0),  # a part of MPX
        ({"rax": 0x20007}, 0),  # a part of AMX
        ({"rax": 7, "rdx": 1}, 0),
        ({"rax": 7, "rcx": 1}, 0),
        ({"rax": 7, "cr4": 0}, None),  # #UD
    ],
)
def test_xcr0_when_the_value_cannot_be_is_a_fault(
    changes: dict[str, int], error: int | None
) -> None:
    guest = Guest(snp=False, cpuid=lambda leaf, _i: (0x602FF if leaf == 0xD else 0, 0, 0, 0))
    seen: list[tuple[int, int | None]] = []
    state = {"cr4": 1 << 18, "rcx": 0, "rdx": 0, **changes}
    cpu = guest.start(XSETBV, **state)
    cpu.on_exception = lambda vector, code: seen.append((vector, code))
    cpu.run(1000)
    assert seen[0] == ((13, 0) if error == 0 else (6, None))
    assert cpu.read("xcr0") == 1


def test_xcr0_when_user_code_writes_it_is_a_fault() -> None:
    guest = Guest(snp=False, cpuid=lambda leaf, _i: (0x2E7 if leaf == 0xD else 0, 0, 0, 0))
    start_protected(guest, XSETBV, cpl=3, cr4=1 << 18, rax=0x207, rcx=0, rdx=0)
    seen: list[tuple[int, int | None]] = []
    guest.cpu.on_exception = lambda vector, code: seen.append((vector, code))
    guest.cpu.run(1000)
    assert seen[0] == (13, 0)
    assert guest.cpu.read("xcr0") == 1
