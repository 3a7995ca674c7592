"""PVALIDATE, RMPADJUST and RMPQUERY: return codes, flags, and what they change."""

from __future__ import annotations

import dataclasses

import pytest

from kvmlaunch.softcpu import FaultReason, Halt, NestedFault
from tests.softcpu.model import Entry, Guest, Memory, vmsa
from tests.softcpu.tables import (
    ALL,
    HANDLER,
    PD,
    PS,
    TR,
    TSS_AT,
    USER64,
    entry,
    frame32,
    frame64,
    gate32,
    gate64,
    start_long,
    start_protected,
)

PVALIDATE, RMPADJUST, RMPQUERY = "f20f01ff", "f30f01fe", "f30f01fd"
GPA = 0x5000
CF, ZF = 1, 0x40
VMSA = 1 << 16
OK, FAIL_INPUT, FAIL_PERMISSION, FAIL_SIZEMISMATCH = 0, 1, 2, 6


def execute(
    code: str,
    *,
    rcx: int = 0,
    rdx: int = 0,
    rax: int = GPA,
    guest: Guest | None = None,
    **more: int,
) -> tuple[int, int]:
    """Return EAX and RFLAGS after one instruction in 64-bit mode."""
    guest = guest or Guest(snp=True)
    start_long(guest, bytes.fromhex(code) + b"\xf4", rax=rax, rcx=rcx, rdx=rdx, **more)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rip") == 0x1005
    return guest.cpu.read("rax"), guest.cpu.read("rflags")


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_pvalidate_when_state_differs_changes_it_else_sets_carry(start: bool, wanted: bool) -> None:
    guest = Guest(snp=True)
    guest.memory.rmp_update(GPA, validated=start)
    code, flags = execute(PVALIDATE, rdx=wanted, guest=guest)
    assert code == OK
    assert flags & CF == (start == wanted)
    assert flags & ZF
    assert guest.memory.rmp[GPA].validated is wanted


def test_pvalidate_when_32_bit_code_works() -> None:
    guest = Guest(snp=True)
    start_protected(guest, bytes.fromhex(PVALIDATE) + b"\xf4", rax=GPA, rcx=0, rdx=0)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rax") == OK
    assert not guest.memory.rmp[GPA].validated


@pytest.mark.parametrize(
    ("rax", "rcx", "code"),
    [
        (GPA, 2, FAIL_INPUT),
        (GPA, 1, FAIL_INPUT),
        (0x200000, 1, FAIL_SIZEMISMATCH),
    ],
)
def test_pvalidate_when_size_is_wrong_fails(rax: int, rcx: int, code: int) -> None:
    guest = Guest(snp=True, memory=Memory(0x400000, snp=True))
    start_long(guest, bytes.fromhex(PVALIDATE) + b"\xf4", rax=rax, rcx=rcx, rdx=1)
    entry(guest, PD, 1, 0x200000 | ALL | PS | 1 << 51)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rax") == code


def test_pvalidate_when_2_mib_page_and_4_kib_operand_is_a_mismatch() -> None:
    guest = Guest(snp=True)
    guest.memory.rmp[GPA] = Entry(gpa=0, page_size=1)
    assert execute(PVALIDATE, rdx=0, guest=guest)[0] == FAIL_SIZEMISMATCH


def test_pvalidate_when_page_is_shared_is_a_nested_fault() -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex(PVALIDATE), rax=GPA, rcx=0, rdx=1)
    guest.memory.make_shared(GPA)
    event = guest.cpu.run(1000)
    assert isinstance(event, NestedFault)
    assert (event.gpa, event.private, event.reason) == (GPA, True, FaultReason.ABSENT)
    guest.memory.make_private(GPA)
    guest.put(0x1004, b"\xf4")
    assert guest.cpu.run(100) == Halt()
    assert guest.memory.rmp[GPA].validated


def test_pvalidate_when_in_ring_3_is_general_protection() -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex(PVALIDATE), tr=TR, rax=GPA, rcx=0, **USER64)
    gate64(guest, 13)
    guest.put(TSS_AT + 4, (0x9000).to_bytes(8, "little"))
    guest.put(HANDLER, b"\xf4")
    assert guest.cpu.run(1000) == Halt()
    assert frame64(guest, 2) == (0, 0x1000)


def test_pvalidate_when_rescinded_access_is_vc() -> None:
    guest = Guest(snp=True)
    # pvalidate; mov [eax],ebx
    start_protected(guest, bytes.fromhex(PVALIDATE + "a100500000"), rax=GPA, rcx=0, rdx=0)
    gate32(guest, 29)
    guest.put(HANDLER, b"\xf4")
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 2) == (0x404, 0x1004)


def all_vmpls(guest: Guest, perms: tuple[int, int, int, int]) -> None:
    for gpa in guest.memory.rmp:
        guest.memory.rmp_update(gpa, perms=perms)


@pytest.mark.parametrize(
    ("rdx", "rcx", "code"),
    [
        (1 | 0xF00, 0, OK),
        (2 | 0x100, 0, OK),
        (1 | VMSA, 0, OK),
        (0 | 0xF00, 0, FAIL_PERMISSION),
        (4, 0, FAIL_INPUT),
        (1 | 0x2000, 0, FAIL_INPUT),
        (1 | 1 << 17, 0, FAIL_INPUT),
        (1, 2, FAIL_INPUT),
        (1, 1, FAIL_INPUT),
    ],
)
def test_rmpadjust_when_at_vmpl0_has_its_codes(rdx: int, rcx: int, code: int) -> None:
    guest = Guest(snp=True)
    before = guest.memory.rmp[GPA]
    assert execute(RMPADJUST, rdx=rdx, rcx=rcx, guest=guest)[0] == code
    after = guest.memory.rmp[GPA]
    if code:
        assert after == before
    else:
        perms = list(before.perms)
        perms[rdx & 0xFF] = rdx >> 8 & 0xFF
        assert after == dataclasses.replace(before, perms=tuple(perms), vmsa=bool(rdx & VMSA))


@pytest.mark.parametrize(
    ("rdx", "code"),
    [
        (2 | 0x300, OK),
        (2 | 0xF00, FAIL_PERMISSION),
        (1 | 0x100, FAIL_PERMISSION),
        (2 | 0x100 | VMSA, FAIL_PERMISSION),
    ],
    ids=["subset", "more than its own", "itself", "VMSA"],
)
def test_rmpadjust_when_at_vmpl1_can_give_what_it_has(rdx: int, code: int) -> None:
    guest = Guest(snp=True)
    all_vmpls(guest, (15, 15, 0, 0))
    guest.memory.rmp_update(GPA, perms=(15, 3, 0, 0))
    assert execute(RMPADJUST, rdx=rdx, guest=guest, vmpl=1)[0] == code
    assert guest.memory.rmp[GPA].perms == (15, 3, 0 if code else rdx >> 8 & 0xFF, 0)


def test_rmpadjust_when_32_bit_code_is_undefined() -> None:
    guest = Guest(snp=True)
    start_protected(guest, bytes.fromhex(RMPADJUST), rax=GPA, rcx=0, rdx=1)
    gate32(guest, 6)
    guest.put(HANDLER, b"\xf4")
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 1) == (0x1000,)


def test_rmpadjust_when_rights_are_taken_the_other_vmpl_exits() -> None:
    guest = Guest(snp=True)
    all_vmpls(guest, (15, 15, 0, 0))
    guest.put(0x1800, bytes.fromhex("a100500000 f4"))  # mov eax,[0x5000]; hlt
    other = guest.machine.new_cpu()
    assert other.load(vmsa(snp=True, vmpl=1, rip=0x1800)) is None
    assert other.run(1000) == Halt()
    assert execute(RMPADJUST, rdx=1 | 0x200, guest=guest)[0] == OK
    assert other.load(vmsa(snp=True, vmpl=1, rip=0x1800)) is None
    event = other.run(1000)
    assert isinstance(event, NestedFault)
    assert (event.gpa, event.reason) == (GPA, FaultReason.VMPL)


def test_rmpquery_when_asked_tells_permissions_and_size() -> None:
    guest = Guest(snp=True)
    guest.memory.rmp_update(GPA, perms=(15, 3, 5, 0), vmsa=True)
    assert execute(RMPQUERY, rdx=2, rcx=77, guest=guest)[0] == OK
    assert guest.cpu.read("rdx") == 2 | 5 << 8 | VMSA
    assert guest.cpu.read("rcx") == 0
    assert execute(RMPQUERY, rdx=0)[0] == FAIL_PERMISSION
    assert execute(RMPQUERY, rdx=9)[0] == FAIL_INPUT


@pytest.mark.parametrize("code", [PVALIDATE, RMPADJUST, RMPQUERY])
def test_instruction_when_guest_is_plain_is_undefined(code: str) -> None:
    guest = Guest(snp=False)
    start_long(guest, bytes.fromhex(code))
    gate64(guest, 6)
    guest.put(HANDLER, b"\xf4")
    assert guest.cpu.run(1000) == Halt()
    assert frame64(guest, 1) == (0x1000,)
