"""Budgets, the same run twice, and several CPUs in turns."""

from __future__ import annotations

import pytest

from kvmlaunch.abi.vmsa import diff
from kvmlaunch.softcpu import Budget, Halt, InterruptWindow, SoftCpu, VmgExit
from tests.softcpu.model import Guest, vmsa
from tests.softcpu.tables import gate32, gate64, start_long, start_protected

SPIN = b"\xeb\xfe"
both = pytest.mark.parametrize("snp", [False, True], ids=["plain", "snp"])


def another(guest: Guest, at: int, code: bytes = b"", **changes: object) -> SoftCpu:
    """One more CPU, at its own code."""
    if code:
        guest.put(at, code)
    cpu = guest.machine.new_cpu()
    assert cpu.load(vmsa(snp=guest.snp, rip=at, **changes)) is None
    return cpu


@pytest.mark.parametrize("ticks", [1, 100, 12345])
def test_budget_when_code_spins_is_kept(ticks: int) -> None:
    guest = Guest(snp=True)
    cpu = guest.start(SPIN)
    assert cpu.run(ticks) == Budget()
    assert ticks <= cpu.ticks <= ticks + 2 + 16, "a block of two bytes, and the stop"
    assert cpu.read("rip") == 0x1000


def test_budget_when_string_never_ends_is_kept() -> None:
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("f3a4"), rcx=0xFFFFFFFF, rsi=0x5000, rdi=0x5000)
    assert cpu.run(10_000) == Budget()
    assert 0 < 0xFFFFFFFF - cpu.read("rcx") < 10_000


def test_budget_when_exceptions_never_end_is_kept() -> None:
    """An exception whose handler is the instruction that raises it."""
    guest = Guest(snp=False)
    start_protected(guest, b"\x0f\x0b", rsp=0x100000)
    gate32(guest, 6, handler=0x1000)
    assert guest.cpu.run(10_000) == Budget()


def test_budget_when_used_in_slices_gives_the_same_end() -> None:
    ends = []
    for slice_ in (10, 1000, 1_000_000):
        guest = Guest(snp=False)
        # mov ecx,1000; 1: add eax,ecx; loop 1b; hlt
        cpu = guest.start(bytes.fromhex("b9e8030000 01c8 e2fc f4"))
        while (event := cpu.run(slice_)) == Budget():
            pass
        assert event == Halt()
        ends.append(cpu.save())
    assert ends[0] == ends[1] == ends[2]
    assert ends[0].rax == sum(range(1001))


def busy_guest() -> tuple[list[object], int, object]:
    """Page faults, #VC-less exits and a loop: what happened, ticks and the state."""
    guest = Guest(snp=True)
    code = bytes.fromhex(
        "b9e8030000"  # mov ecx,1000
        "01c8 e2fc"  # 1: add eax,ecx; loop 1b
        "f30f01d9"  # vmgexit
        "8a042500004000"  # mov al,[0x400000]: #PF
        "0f31 eb e9"  # rdtsc; jmp
    )
    start_long(guest, code)
    gate64(guest, 14)
    guest.put(0x4000, bytes.fromhex("48830424 08 48834424 0807 4883c408 48cf"))
    log: list[object] = []
    for _ in range(20):
        event = guest.cpu.run(5000)
        log.append((event, guest.cpu.read("rip"), guest.cpu.ticks))
        if isinstance(event, VmgExit):
            guest.cpu.ghcb = len(log)
    return log, guest.cpu.ticks, guest.cpu.save()


def test_run_when_repeated_is_the_same_to_the_tick() -> None:
    assert busy_guest() == busy_guest()


# Several CPUs


@both
def test_lock_when_cpus_take_turns_loses_nothing(snp: bool) -> None:
    guest = Guest(snp=snp)
    # mov ecx,1000; 1: lock inc dword [0x5000]; loop 1b; hlt
    code = bytes.fromhex("b9e8030000 f0ff0500500000 e2f7 f4")
    waiting = [another(guest, 0x1000 + 0x100 * n, code) for n in range(4)]
    turns = 0
    while waiting:
        turns += 1
        waiting = [cpu for cpu in waiting if cpu.run(500) == Budget()]
    assert turns > 10
    assert guest.read(0x5000, 4) == 4000


def test_cpus_when_they_wait_for_each_other_see_the_writes() -> None:
    guest = Guest(snp=True)
    # 1: cmp dword [0x5000],7; jne 1b; mov dword [0x5004],9; hlt
    waiter = another(guest, 0x1000, bytes.fromhex("833d0050000007 75f7 c7050450000009000000 f4"))
    writer = another(guest, 0x1100, bytes.fromhex("c7050050000007000000 f4"))
    assert waiter.run(1000) == Budget()
    assert writer.run(1000) == Halt()
    assert waiter.run(1000) == Halt()
    assert guest.read(0x5004, 4) == 9


def test_code_when_changed_by_itself_is_seen() -> None:
    guest = Guest(snp=True)
    # mov byte [0x1008],0x43 (inc ebx); at 0x1007: nop; at 0x1008: inc eax -> inc ebx; hlt
    assert guest.run(bytes.fromhex("c6050810000043 90 40 f4")) == Halt()
    assert (guest.cpu.read("rax"), guest.cpu.read("rbx")) == (0, 1)


# The engine begins a block anew for each store into it, which must not use up the budget.
# mov byte [0x1008],5; mov eax,1 -> 5; sti; nop; hlt
CHANGES_ITSELF = bytes.fromhex("c6050810000005 b801000000 fb 90 f4")


def test_code_when_changed_by_itself_while_a_window_is_wanted_goes_on() -> None:
    cpu = Guest(snp=True).start(CHANGES_ITSELF)
    cpu.want_window = True
    assert cpu.run(100_000) == InterruptWindow()
    assert (cpu.read("rax"), cpu.read("rip")) == (5, 0x100E)


def test_code_when_changed_by_itself_in_the_smallest_slices_goes_on() -> None:
    cpu = Guest(snp=True).start(CHANGES_ITSELF)
    events = [cpu.run(1) for _ in range(4)]
    assert events[-1] == Halt()
    assert cpu.read("rax") == 5


def test_code_when_changed_by_another_cpu_is_seen() -> None:
    guest = Guest(snp=True)
    # 1: mov eax,1; jmp 1b
    runner = another(guest, 0x1000, bytes.fromhex("b801000000 ebf9"))
    # mov byte [0x1001],2; hlt
    writer = another(guest, 0x3000, bytes.fromhex("c6050110000002 f4"))
    assert runner.run(1000) == Budget()
    assert runner.read("rax") == 1
    assert writer.run(1000) == Halt()
    assert runner.run(1000) == Budget()
    assert runner.read("rax") == 2
    for value in (3, 4, 5):
        guest.put(0x3006, bytes([value]))
        guest.machine.flush_code()
        writer.write("rip", 0x3000)
        assert writer.run(1000) == Halt()
        assert runner.run(1000) == Budget()
        assert runner.read("rax") == value


def test_code_when_written_by_event_delivery_is_seen() -> None:
    """The frame that the CPU pushes goes over code that ran before."""
    guest = Guest(snp=False)
    # call 0x4008; jmp 0x1000f4
    start_protected(guest, bytes.fromhex("e803300000 e9eaf00f00"), rsp=0x4014)
    guest.put(0x4008, b"\xc3")  # ret
    guest.put(0x1000F4, b"\x0f\x0b")
    gate32(guest, 6, handler=0x3000)
    guest.put(0x3000, bytes.fromhex("e903100000"))  # jmp 0x4008
    assert guest.cpu.run(1000) == Halt(), "the low byte of the pushed EIP is HLT"
    assert guest.cpu.read("rip") == 0x4009


def test_machine_when_many_cpus_is_cheap() -> None:
    guest = Guest(snp=True)
    guest.put(0x1000, b"\xf4")
    cpus = [another(guest, 0x1000, rax=n) for n in range(64)]
    assert [cpu.run(100) for cpu in cpus] == [Halt()] * 64
    assert [cpu.read("rax") for cpu in cpus] == list(range(64))


def test_vmpls_when_one_cpu_has_two_contexts_keep_apart() -> None:
    guest = Guest(snp=True)
    for gpa in guest.memory.rmp:
        guest.memory.rmp_update(gpa, perms=(15, 15, 0, 0))
    guest.put(0x1000, bytes.fromhex("40 f4"))
    contexts = [another(guest, 0x1000, rax=10 * n, vmpl=n) for n in range(2)]
    for context in contexts:
        assert context.run(100) == Halt()
    assert [context.read("rax") for context in contexts] == [1, 11]
    assert [context.vmpl for context in contexts] == [0, 1]
    assert diff(contexts[0].save(), contexts[1].save())[0].name == "vmpl"
