"""Every operating mode, and the ways between them."""

from __future__ import annotations

import struct

import pytest

from kvmlaunch.abi.reset import qemu_reset
from kvmlaunch.abi.segment import Segment
from kvmlaunch.softcpu import Halt, Missing, Shutdown
from tests.softcpu.model import FLAT_CODE64, FLAT_DATA, Entry, Guest, Memory
from tests.softcpu.tables import (
    ALL,
    CODE32,
    CODE64,
    DATA,
    GDTR,
    LONG,
    PD,
    PDPT,
    PML4,
    PT,
    USER,
    frame32,
    gate32,
    identity_map,
    put_gdt,
    start_long,
    start_protected,
)

REAL_DATA = Segment(0, 0x93, 0xFFFF, 0)
REAL = {
    **dict.fromkeys(("es", "ss", "ds", "fs", "gs"), REAL_DATA),
    "cs": Segment(0, 0x9B, 0xFFFF, 0),
    "cr0": 0x10,
}


class TopOf4GiB(Memory):
    """The last page below 4 GiB is backed by the last one of this memory."""

    def resolve(self, gpa: int, private: bool, write: bool = False) -> int | Missing:
        return super().resolve(gpa & self.size - 1 if gpa == 0xFFFFF000 else gpa, private, write)

    def rmp_lookup(self, gpa: int) -> Entry:
        return Entry(gpa=gpa)


both = pytest.mark.parametrize("snp", [False, True], ids=["plain", "snp"])


@both
def test_run_when_real_mode_uses_segments(snp: bool) -> None:
    guest = Guest(snp=snp)
    # mov ax,0x123; mov ds,ax; mov word [4],0xbeef; hlt
    code = bytes.fromhex("b82301 8ed8 c7060400efbe f4")
    assert guest.run(code, **REAL) == Halt()
    assert guest.read(0x1234, 2) == 0xBEEF
    assert guest.cpu.code_bits == 16
    assert guest.cpu.save().ds == Segment(0x123, 0x93, 0xFFFF, 0x1230)


def test_run_when_reset_vector_starts_at_the_top_of_4_gib() -> None:
    """F000:FFF0 with CS base FFFF0000: the last 16 bytes below 4 GiB."""
    guest = Guest(snp=True, memory=TopOf4GiB(snp=True))
    guest.put(0x1FFFF0, bytes.fromhex("ea00100000"))  # jmp 0:0x1000
    guest.put(0x1000, bytes.fromhex("8cc8 f4"))  # mov ax,cs; hlt
    vmsa = qemu_reset(0xFFFFFFF0, signature=0x800F12, sev_features=1)
    assert guest.cpu.load(vmsa) is None
    assert (guest.cpu.read("rip"), guest.cpu.linear_rip) == (0xFFF0, 0xFFFFFFF0)
    assert guest.cpu.read("rdx") == 0x800F12
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.save().cs == Segment(0, 0x9B, 0xFFFF, 0)
    assert guest.cpu.read("rip") == 0x1003


@both
def test_run_when_real_mode_goes_to_protected_mode(snp: bool) -> None:
    guest = Guest(snp=snp)
    put_gdt(guest)
    guest.put(0x800, struct.pack("<HI", 0x3F, 0x2000))
    # lgdt [0x800]; mov eax,cr0; or al,1; mov cr0,eax; jmp CODE32:0x1100
    code = bytes.fromhex("0f01160008 0f20c0 0c01 0f22c0 ea0011") + struct.pack("<H", CODE32)
    # mov eax,DATA; mov ds,eax; mov dword [0x100000],0x12345678; hlt
    guest.put(0x1100, bytes.fromhex("b810000000 8ed8 c7050000100078563412 f4"))
    assert guest.run(code, **REAL) == Halt()
    assert guest.read(0x100000, 4) == 0x12345678
    assert guest.cpu.code_bits == 32
    assert guest.cpu.save().ds == Segment(DATA, 0xC93, 0xFFFFFFFF, 0)
    assert guest.cpu.save().gdtr == Segment(0, 0, 0x3F, 0x2000)


@both
def test_run_when_protected_mode_enters_and_leaves_long_mode(snp: bool) -> None:
    guest = Guest(snp=snp)
    cr3 = identity_map(guest)
    guest.memory.main[0x900:0x904] = struct.pack("<I", cr3 & 0xFFFFFFFF)
    code = bytes.fromhex(
        "0f20e0 0c20 0f22e0"  # cr4 |= PAE
        "b800000100 0f22d8"  # cr3 = 0x10000 (no C-bit: tables are private anyway)
        "b9800000c0 0f32 80cc01 0f30"  # EFER |= LME
        "0f20c0 0d00000080 0f22c0"  # cr0 |= PG
        "ea00110000"
    ) + struct.pack("<H", CODE64)
    guest.put(0x1100, bytes.fromhex("48b8efcdab8967452301 48a30000100000000000 f4"))
    start_protected(guest, code)
    assert guest.cpu.run(10000) == Halt()
    assert guest.cpu.code_bits == 64
    assert guest.read(0x100000, 8) == 0x0123456789ABCDEF
    assert guest.cpu.read("efer") & 0x500 == 0x500
    # Back: jmp far to CODE32 by retf, then clear PG.
    guest.put(
        guest.cpu.read("rip"),
        bytes.fromhex("6a08 6800120000 48cb"),
    )
    guest.put(0x1200, bytes.fromhex("0f20c0 25ffffff7f 0f22c0 f4"))
    assert guest.cpu.run(10000) == Halt()
    assert guest.cpu.code_bits == 32
    assert guest.cpu.read("efer") & 0x500 == 0x100
    assert guest.cpu.read("rip") == 0x120C


@both
def test_run_when_pae_paging_uses_its_own_tables(snp: bool) -> None:
    guest = Guest(snp=snp)
    private = 1 << 51 if snp else 0
    for at, value in (
        (PDPT, PD | 1 | private),
        (PD, PT | ALL | private),
        (PT + 8 * 1, 0x1000 | ALL | private),
        (PT + 8 * 5, 0x6000 | ALL | private),
        (PT + 8 * 7, 0x7000 | ALL | private),
    ):
        guest.put(at, struct.pack("<Q", value))
    guest.put(0x6004, struct.pack("<I", 0xCAFE))
    # mov eax,[0x5004]; mov [0x5008],eax; hlt
    code = bytes.fromhex("a104500000 a308500000 f4")
    assert guest.run(code, cr0=0x80000011, cr4=0x20, cr3=PDPT) == Halt()
    assert guest.read(0x6008, 4) == 0xCAFE
    assert guest.read(PT + 8 * 5, 8) == 0x6000 | ALL | private | 0x60


@both
def test_run_when_legacy_paging_maps_4_mib(snp: bool) -> None:
    guest = Guest(snp=snp)
    guest.put(PD, struct.pack("<II", 0x83, 0x83))  # 4 MiB and 8 MiB both to 0
    code = bytes.fromhex("c7050010500044332211 f4")  # mov dword [0x501000],0x11223344
    assert guest.run(code + b"\xf4", cr0=0x80000011, cr4=0x10, cr3=PD) == Halt()
    assert guest.read(0x101000, 4) == 0x11223344


@both
def test_run_when_compatibility_mode_has_32_bit_code(snp: bool) -> None:
    guest = Guest(snp=snp)
    # jmp far [rip+x] isn't needed: push CODE32; push 0x1100; retfq
    start_long(guest, bytes.fromhex("6a08 6800110000 48cb"))
    guest.put(0x1100, bytes.fromhex("40 f4"))  # inc eax in 32-bit code; a REX prefix in 64-bit
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.code_bits == 32
    assert guest.cpu.read("rax") == 1


@pytest.mark.parametrize(
    "code",
    [
        "0f20c0 0d00000080 0f22c0",  # PG with LME, without PAE
        "0f20e0 0d00100000 0f22e0",  # LA57
        "0f20e0 0d00000080 0f22e0",  # a reserved bit of CR4
        "0f20c0 25feffffff 0d00000080 0f22c0",  # PG without PE
        "0f20c0 0d00000020 0f22c0",  # NW without CD
        "b9800000c0 0f32 83c802 0f30",  # a reserved bit of EFER
    ],
)
def test_run_when_control_register_is_impossible_is_general_protection(code: str) -> None:
    guest = Guest(snp=False)
    start_protected(guest, bytes.fromhex(code), efer=0x100)
    before = guest.cpu.save()
    assert guest.cpu.run(1000) == Shutdown((13, 8, 13))
    assert guest.cpu.read("cr0") == before.cr0
    assert guest.cpu.read("cr4") == before.cr4
    assert guest.cpu.read("efer") == before.efer
    assert guest.cpu.read("rip") == 0x1000 + len(bytes.fromhex(code)) - (
        2 if "30" in code[-2:] else 3
    )


def test_run_when_lmsw_and_clts_change_cr0() -> None:
    guest = Guest(snp=True)
    code = bytes.fromhex("b80a000000 0f01f0 0f20c3 0f06 0f20c1 f4")
    assert guest.run(code) == Halt()
    assert guest.cpu.read("rbx") == 0x1B, "PE stays set"
    assert guest.cpu.read("rcx") == 0x13


def test_run_when_guest_loads_tr_the_tss_becomes_busy() -> None:
    guest = Guest(snp=True)
    start_protected(guest, bytes.fromhex("66b83800 0f00d8 0f00cb f4"))  # ltr ax; str ebx; hlt
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.save().tr == Segment(56, 0x8B, 0x67, 0x3800)
    assert guest.read(0x2000 + 56 + 5, 1) == 0x8B
    assert guest.cpu.read("rbx") == 56


@pytest.mark.parametrize(("selector", "error"), [(0, 0), (CODE32, CODE32), (0x100, 0x100), (4, 4)])
def test_run_when_ltr_has_no_tss_is_general_protection(selector: int, error: int) -> None:
    guest = Guest(snp=True)
    start_protected(guest, b"\x66\xb8" + struct.pack("<H", selector) + bytes.fromhex("0f00d8"))
    gate32(guest, 13)
    guest.put(0x4000, b"\xf4")
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 2) == (error, 0x1004)


def test_run_when_tr_is_garbage_inner_call_is_an_exception_not_a_crash() -> None:
    """The engine aborts the process for a TSS that isn't one."""
    guest = Guest(snp=True)
    start_protected(
        guest,
        bytes.fromhex("9a000000004300"),  # call 0x43:0
        tr=Segment(0, 0, 0, 0),
        **USER,
    )
    guest.put(0x2040, struct.pack("<Q", 0x0000EC0000081100))  # call gate, DPL 3, to CODE32
    assert isinstance(guest.cpu.run(1000), Shutdown)
    assert guest.cpu.save().tr == Segment(0, 0, 0, 0)


@both
def test_run_when_sse_and_x87_compute(snp: bool) -> None:
    guest = Guest(snp=snp)
    # fld1; fadd st0,st0; fstp qword [0x5000]; movsd xmm0,[0x5000]; mulsd xmm0,xmm0;
    # movsd [0x5008],xmm0; hlt
    start_long(
        guest,
        bytes.fromhex("d9e8 dcc0 dd1c2500500000 f20f10042500500000 f20f59c0 f20f11042508500000 f4"),
    )
    assert guest.cpu.run(1000) == Halt()
    assert struct.unpack("<2d", guest.memory.main[0x5000:0x5010]) == (2.0, 4.0)
    assert guest.cpu.save().fpreg_xmm[:16] == struct.pack("<dQ", 4.0, 0)


def test_start_when_long_mode_needs_no_help() -> None:
    guest = Guest(snp=False)
    cr3 = identity_map(guest)
    code = bytes.fromhex("4831c0 48ffc8 f4")
    event = guest.run(code, cs=FLAT_CODE64, ds=FLAT_DATA, gdtr=GDTR, cr3=cr3, **LONG)
    assert event == Halt()
    assert guest.cpu.read("rax") == 2**64 - 1
    assert cr3 == PML4
