"""Events through the guest's IDT: frames byte by byte, rings, nesting, return."""

from __future__ import annotations

import struct

import pytest

from kvmlaunch.abi.segment import Segment
from kvmlaunch.softcpu import Budget, FaultReason, Halt, InterruptWindow, NestedFault, Shutdown
from tests.softcpu.model import Guest
from tests.softcpu.tables import (
    CODE32,
    CODE64,
    DATA,
    HANDLER,
    IDT_AT,
    TR,
    TSS_AT,
    USER,
    USER64,
    USER_CODE32,
    USER_CODE64,
    USER_DATA,
    frame32,
    frame64,
    gate32,
    gate64,
    start_long,
    start_protected,
)

HLT = b"\xf4"
UD2 = b"\x0f\x0b"
INT_80 = b"\xcd\x80"
RF, IF, TF = 1 << 16, 1 << 9, 1 << 8


def protected(code: bytes, *vectors: int, kind: int = 0x8E, **changes: object) -> Guest:
    """32-bit code; the handler of these vectors is HLT."""
    guest = Guest(snp=False)
    start_protected(guest, code, **changes)
    for vector in vectors:
        gate32(guest, vector, kind=kind)
    guest.put(HANDLER, HLT)
    return guest


def long_mode(code: bytes, *vectors: int, kind: int = 0x8E, **changes: object) -> Guest:
    """64-bit code; the handler of these vectors is HLT."""
    guest = Guest(snp=False)
    start_long(guest, code, **changes)
    for vector in vectors:
        gate64(guest, vector, kind=kind)
    guest.put(HANDLER, HLT)
    return guest


# Frames


def test_exception_when_protected_pushes_flags_cs_eip() -> None:
    guest = protected(UD2, 6, rflags=IF | 2)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rsp") == 0x8000 - 12
    assert frame32(guest, 3) == (0x1000, CODE32, RF | IF | 2)
    assert guest.cpu.read("rflags") == 2, "an interrupt gate clears IF"


def test_exception_when_protected_has_error_code() -> None:
    guest = protected(bytes.fromhex("66b80001 8ed8"), 13)  # mov ds, a selector out of range
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 4) == (0x100, 0x1004, CODE32, RF | 2)


def test_exception_when_trap_gate_keeps_if() -> None:
    guest = protected(UD2, 6, kind=0x8F, rflags=IF | 2)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rflags") == IF | 2


def test_exception_when_16_bit_gate_pushes_words() -> None:
    guest = protected(UD2, 6, kind=0x86)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rsp") == 0x8000 - 6
    assert guest.memory.main[0x8000 - 6 : 0x8000] == struct.pack("<3H", 0x1000, CODE32, 2)


def test_exception_when_long_mode_pushes_five_words_aligned() -> None:
    guest = long_mode(UD2, 6, rsp=0x7FFB)
    ss = guest.cpu.save().ss.selector
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rsp") == 0x7FF0 - 40
    assert frame64(guest, 5) == (0x1000, CODE64, RF | 2, 0x7FFB, ss)


def test_exception_when_long_mode_page_fault_has_address_and_code() -> None:
    # mov eax,[0x7fff12345678] by moffs
    guest = long_mode(bytes.fromhex("a178563412ff7f0000"), 14)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("cr2") == 0x7FFF12345678
    assert frame64(guest, 6)[:2] == (0, 0x1000)


@pytest.mark.parametrize(
    ("code", "error", "address"),
    [
        ("88042534120004", 2, 0x4001234),  # mov [0x4001234],al
        ("00042534120004", 2, 0x4001234),  # add [0x4001234],al: a write although it reads first
        ("f00fb10c2534120004", 2, 0x4001234),  # lock cmpxchg
        ("02042534120004", 0, 0x4001234),  # add al,[0x4001234]
        ("8b0425fdff1f00", 0, 0x200000),  # mov eax,[0x1ffffd]: the second page is missing
        ("ff242534120000", 0x10, 0),  # jmp [0x1234], which holds 0x4000000
    ],
)
def test_exception_when_page_fault_tells_the_access(code: str, error: int, address: int) -> None:
    guest = long_mode(bytes.fromhex(code), 14)
    guest.put(0x1234, struct.pack("<Q", 0x4000000))
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("cr2") == (address or 0x4000000)
    assert frame64(guest, 1)[0] == error


def test_exception_when_real_mode_uses_the_vector_table() -> None:
    guest = Guest(snp=False)
    data = Segment(0, 0x93, 0xFFFF, 0)
    guest.put(4 * 0x21, struct.pack("<HH", 0x123, 0x400))
    guest.put(0x4123, HLT)
    guest.start(
        b"\xcd\x21",
        cs=Segment(0, 0x9B, 0xFFFF, 0),
        ss=data,
        ds=data,
        cr0=0x10,
        rflags=IF | TF * 0 | 2,
        idtr=Segment(0, 0, 0x3FF, 0),
    )
    assert guest.cpu.run(1000) == Halt()
    assert guest.memory.main[0x7FFA:0x8000] == struct.pack("<3H", 0x1002, 0, IF | 2)
    assert guest.cpu.save().cs == Segment(0x400, 0x9B, 0xFFFF, 0x4000)
    assert guest.cpu.read("rflags") == 2


# Software interrupts


@pytest.mark.parametrize(("code", "vector"), [("cd80", 0x80), ("cc", 3), ("f1", 6)])
def test_software_interrupt_when_taken_returns_behind(code: str, vector: int) -> None:
    guest = protected(bytes.fromhex(code), vector)
    assert guest.cpu.run(1000) == Halt()
    behind = 0 if vector == 6 else len(code) // 2  # INT1 isn't known
    assert frame32(guest, 2) == (0x1000 + behind, CODE32)


def test_software_interrupt_when_into_depends_on_overflow() -> None:
    guest = protected(bytes.fromhex("ce b07f fec0 ce"), 4)  # into; mov al,0x7f; inc al; into
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 1) == (0x1006,)


def test_software_interrupt_when_gate_forbids_user_is_general_protection() -> None:
    guest = protected(INT_80, 13, 0x80, tr=TR, **USER)
    guest.put(TSS_AT + 4, struct.pack("<II", 0x9000, DATA))
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 2) == (0x80 * 8 + 2, 0x1000)


# Rings


def test_exception_when_from_ring_3_switches_the_stack_in_protected_mode() -> None:
    guest = protected(INT_80, kind=0xEE, tr=TR, rsp=0x7000, **USER)
    gate32(guest, 0x80, kind=0xEE)
    guest.put(TSS_AT + 4, struct.pack("<II", 0x9000, DATA))
    assert guest.cpu.run(1000) == Halt()
    expected = (0x1002, USER_CODE32 | 3, 2, 0x7000, USER_DATA | 3)
    assert frame32(guest, 5) == expected
    assert guest.cpu.read("rsp") == 0x9000 - 20
    assert guest.cpu.read("cpl") == 0
    assert guest.cpu.save().ss == Segment(DATA, 0xC93, 0xFFFFFFFF, 0)


def test_exception_when_from_ring_3_switches_the_stack_in_long_mode() -> None:
    guest = long_mode(INT_80, tr=TR, rsp=0x7000, **USER64)
    gate64(guest, 0x80, kind=0xEE)
    guest.put(TSS_AT + 4, struct.pack("<Q", 0x9000))
    assert guest.cpu.run(1000) == Halt()
    assert frame64(guest, 5) == (0x1002, USER_CODE64 | 3, 2, 0x7000, USER_DATA | 3)
    assert guest.cpu.read("cpl") == 0
    assert guest.cpu.save().ss.selector == 0


def test_exception_when_gate_has_ist_takes_that_stack() -> None:
    guest = long_mode(UD2, tr=TR)
    gate64(guest, 6, ist=3)
    guest.put(TSS_AT + 0x1C + 8 * 3, struct.pack("<Q", 0xA008))
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rsp") == 0xA000 - 40


def test_iret_when_to_ring_3_and_int_back_keeps_all() -> None:
    # push USER_DATA|3; push 0x7000; push IF|2; push USER_CODE64|3; push 0x1100; iretq
    code = bytes.fromhex("6a2b 6800700000 6802020000 6a33 6800110000 48cf")
    guest = long_mode(code, tr=TR)
    gate64(guest, 0x80, kind=0xEE)
    guest.put(TSS_AT + 4, struct.pack("<Q", 0x9000))
    guest.put(0x1100, bytes.fromhex("48c7c044000000 cd80"))  # mov rax,0x44; int 0x80
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rax") == 0x44
    assert frame64(guest, 5) == (0x1109, USER_CODE64 | 3, IF | 2, 0x7000, USER_DATA | 3)


def test_iret_when_handler_returns_goes_on() -> None:
    guest = protected(bytes.fromhex("0f0b b801000000 f4"))
    gate32(guest, 6)
    guest.put(HANDLER, bytes.fromhex("83042402 cf"))  # add dword [esp],2; iret
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rax") == 1
    assert guest.cpu.read("rsp") == 0x8000
    assert guest.cpu.read("rip") == 0x1008


def test_user_when_page_is_the_supervisors_faults() -> None:
    guest = long_mode(bytes.fromhex("8a042500500000"), 14, tr=TR, **USER64)  # mov al,[0x5000]
    guest.put(TSS_AT + 4, struct.pack("<Q", 0x9000))
    at = 0x13000 + 8 * 5
    guest.put(at, struct.pack("<Q", guest.read(at, 8) & ~4))
    assert guest.cpu.run(1000) == Halt()
    assert (guest.cpu.read("cr2"), frame64(guest, 1)[0]) == (0x5000, 5)


def test_user_when_segment_load_reads_a_supervisors_gdt_works() -> None:
    # mov ax,USER_DATA|3; mov ds,ax; int 0x80; then the GDT directly: #PF
    guest = long_mode(bytes.fromhex("66b82b00 8ed8 a10820000000000000"), 14, tr=TR, **USER64)
    guest.put(TSS_AT + 4, struct.pack("<Q", 0x9000))
    at = 0x13000 + 8 * 2
    guest.put(at, struct.pack("<Q", guest.read(at, 8) & ~4))
    assert guest.cpu.run(1000) == Halt()
    assert frame64(guest, 2) == (5, 0x1006)
    assert guest.cpu.save().ds.selector == 0x2B


def test_syscall_when_long_mode_goes_to_lstar_and_back() -> None:
    guest = long_mode(
        bytes.fromhex("0f05 cd80"),
        tr=TR,
        star=(USER_CODE32 | 3) << 48 | CODE32 << 32,
        lstar=0x1100,
        sfmask=IF,
        rflags=IF | 0x11,
        **USER64,
    )
    gate64(guest, 0x80, kind=0xEE)
    guest.put(TSS_AT + 4, struct.pack("<Q", 0x9000))
    guest.put(0x1100, bytes.fromhex("4889ca 480f07"))  # mov rdx,rcx; sysretq
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rdx") == 0x1002
    assert guest.cpu.read("r11") == IF | 0x13
    assert frame64(guest, 5)[:3] == (0x1004, USER_CODE64 | 3, IF | 0x13)


def test_syscall_when_not_enabled_is_undefined() -> None:
    guest = long_mode(b"\x0f\x05", 6, efer=0x1D00)
    assert guest.cpu.run(1000) == Halt()
    assert frame64(guest, 1) == (0x1000,)


def test_sysenter_when_protected_mode_takes_the_msrs() -> None:
    guest = protected(
        b"\x0f\x34", tr=TR, sysenter_cs=CODE32, sysenter_esp=0x9000, sysenter_eip=HANDLER, **USER
    )
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("cpl") == 0
    assert guest.cpu.read("rsp") == 0x9000
    assert guest.cpu.save().cs.selector == CODE32


def test_io_when_user_lacks_permission_is_general_protection() -> None:
    guest = protected(b"\xe6\x10", 13, tr=TR, **USER)  # out 0x10,al with IOPL 0, no map
    guest.put(TSS_AT + 4, struct.pack("<II", 0x9000, DATA))
    guest.put(TSS_AT + 0x66, struct.pack("<H", 0x68))
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 2) == (0, 0x1000)


# Nesting


def test_fault_when_handler_is_missing_becomes_double_fault() -> None:
    guest = protected(bytes.fromhex("66b80001 8ed8"), 8)
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 2) == (0, 0x1004)


def test_fault_when_benign_first_is_serial() -> None:
    """#UD without a gate is #NP, not #DF."""
    guest = protected(UD2, 11)
    gate32(guest, 6, kind=0x0E)
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 2) == (6 * 8 + 2, 0x1000)


def test_fault_when_nothing_is_there_is_a_triple_fault() -> None:
    guest = protected(UD2, idtr=Segment(0, 0, 0, 0))
    assert guest.cpu.run(1000) == Shutdown((13, 8, 13, 6))
    assert guest.cpu.run(1000) == Shutdown((13, 8, 13, 6)), "it stays down"


def test_fault_when_stack_is_out_of_reach_is_a_double_fault() -> None:
    guest = long_mode(UD2, 6, 14, rsp=0x5000000, tr=TR)
    gate64(guest, 8, ist=1)
    guest.put(TSS_AT + 0x1C + 8, struct.pack("<Q", 0xA000))
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("cr2") == 0x5000000 - 8
    assert guest.cpu.read("rsp") == 0xA000 - 48
    assert frame64(guest, 2) == (0, 0x1000)


# Injection


def test_interrupt_when_if_is_off_waits_for_the_window() -> None:
    guest = protected(bytes.fromhex("90 90 fb 90 90 f4"), 0x40)  # nop nop sti nop nop hlt
    cpu = guest.cpu
    assert not cpu.interruptible
    with pytest.raises(RuntimeError, match="can't take an interrupt"):
        cpu.inject_interrupt(0x40)
    cpu.want_window = True
    assert cpu.run(1000) == InterruptWindow()
    assert cpu.read("rip") == 0x1004, "one instruction after STI is in its shadow"
    cpu.want_window = False
    assert cpu.inject_interrupt(0x40) is None
    assert cpu.run(1000) == Halt()
    assert frame32(guest, 3) == (0x1004, CODE32, IF | 2)


def test_interrupt_when_halted_comes_behind_hlt() -> None:
    guest = protected(bytes.fromhex("fb f4 40 f4"), rsp=0x8000)
    gate32(guest, 0x40)
    guest.put(HANDLER, b"\xcf")
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.interruptible
    assert guest.cpu.inject_interrupt(0x40) is None
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rax") == 1
    assert guest.cpu.read("rip") == 0x1004


def test_nmi_when_handled_blocks_another_until_iret() -> None:
    guest = protected(b"\xf4\xf4")
    gate32(guest, 2)
    guest.put(HANDLER, bytes.fromhex("f4 cf"))
    cpu = guest.cpu
    assert cpu.inject_nmi() is None
    assert cpu.nmi_blocked
    assert cpu.run(1000) == Halt()
    with pytest.raises(RuntimeError, match="can't take an NMI"):
        cpu.inject_nmi()
    assert cpu.run(1000) == Halt()
    assert cpu.read("rip") == 0x1001
    assert not cpu.nmi_blocked
    assert cpu.inject_nmi() is None


def test_exception_when_owner_injects_it_has_its_error_code() -> None:
    guest = protected(b"\xf4", 14)
    assert guest.cpu.inject_exception(14, 2, address=0x1234567) is None
    assert guest.cpu.read("cr2") == 0x1234567
    assert frame32(guest, 2) == (2, 0x1000)


def test_delivery_when_host_must_help_is_repeated() -> None:
    guest = Guest(snp=True)
    start_protected(guest, UD2)
    gate32(guest, 6)
    guest.put(HANDLER, HLT)
    stack = 0x7000
    del guest.memory.rmp[stack]
    event = guest.cpu.run(1000)
    assert isinstance(event, NestedFault)
    assert (event.gpa, event.private, event.reason) == (stack, True, FaultReason.ABSENT)
    assert guest.cpu.run(1000) == event
    guest.memory.make_private(stack)
    guest.memory.rmp_update(stack, validated=True)
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 3) == (0x1000, CODE32, RF | 2)


def test_single_step_when_tf_is_set_traps_after_each_instruction() -> None:
    guest = protected(bytes.fromhex("40 40 40"), 1, rflags=TF | 2)
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 3) == (0x1001, CODE32, TF | 2)
    assert guest.cpu.read("dr6") & 1 << 14
    assert guest.cpu.read("rax") == 1


def test_idt_when_gate_crosses_a_page_is_read_whole() -> None:
    guest = protected(UD2, idtr=Segment(0, 0, 0x7FF, 0x4FFC - 8 * 6))
    raw = (HANDLER & 0xFFFF) | CODE32 << 16 | 0x8E << 40
    guest.put(0x4FFC, struct.pack("<Q", raw))
    assert guest.cpu.run(1000) == Halt()
    assert IDT_AT != 0x4FFC
    assert guest.cpu.run(0) == Budget()
