"""Private and shared memory of a running SNP guest, devices, and who may do what."""

from __future__ import annotations

import struct

import pytest

from kvmlaunch.softcpu import Access, FaultReason, Halt, NestedFault
from tests.softcpu.model import FLAT_CODE64, PAGE, Entry, Guest, Memory
from tests.softcpu.tables import (
    ALL,
    GDTR,
    HANDLER,
    LONG,
    PT,
    entry,
    frame64,
    gate64,
    identity_map,
    put_gdt,
    start_long,
)

GPA = 0x5000
VIEW = 0x100000  # a second linear page for GPA


class BothSides(Memory):
    """Gives both sides of a page, which a hypervisor would not do at one time."""

    def resolve(self, gpa: int, private: bool, write: bool = False) -> int:
        return self.bases[private] + gpa


def shared_view(guest: Guest, flags: int = ALL) -> None:
    """Map VIEW to GPA without the C-bit."""
    entry(guest, PT, VIEW // PAGE, GPA | flags)


def test_memory_when_c_bit_differs_holds_different_data() -> None:
    guest = Guest(snp=True, memory=BothSides(snp=True))
    # mov dword [0x5000],0x11111111; mov dword [0x100000],0x22222222; mov eax,[0x5000]; hlt
    start_long(
        guest,
        bytes.fromhex("c7042500500000 11111111 c7042500001000 22222222 8b042500500000 f4"),
    )
    shared_view(guest)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rax") == 0x11111111
    assert guest.memory.private[GPA : GPA + 4] == b"\x11" * 4
    assert guest.memory.shared[GPA : GPA + 4] == b"\x22" * 4


@pytest.mark.parametrize(
    ("code", "access"),
    [("8b042504001000", Access.READ), ("89042504001000", Access.WRITE)],
)
def test_access_when_side_is_wrong_is_a_nested_fault(code: str, access: Access) -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex(code) + b"\xf4")
    shared_view(guest)
    expected = NestedFault(GPA + 4, access, False, FaultReason.ABSENT)
    assert guest.cpu.run(1000) == expected
    assert guest.cpu.read("rip") == 0x1000
    assert guest.cpu.run(1000) == expected, "nothing has changed"
    guest.memory.make_shared(GPA)
    assert guest.cpu.run(1000) == Halt()


def test_fetch_when_page_is_shared_reads_the_private_side() -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex("b800001000 ffe0"))  # mov eax,VIEW; jmp rax
    shared_view(guest)
    guest.put(GPA, b"\xf4")
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.linear_rip == VIEW + 1


def test_fetch_when_shared_data_is_read_at_the_same_address_takes_the_other_side() -> None:
    guest = Guest(snp=True, memory=BothSides(snp=True))
    start_long(guest, bytes.fromhex("b800001000 ffe0"))
    shared_view(guest)
    # mov rbx,[rip-7]; mov rcx,[rip-7]; hlt: data is what is shared
    guest.put(GPA, bytes.fromhex("488b1df9ffffff 488b0df9ffffff f4"))
    guest.memory.shared[GPA : GPA + 16] = struct.pack("<QQ", 0x1111, 0x2222)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rbx") == 0x1111
    assert guest.cpu.read("rcx") == struct.unpack("<Q", struct.pack("<QQ", 0x1111, 0x2222)[7:15])[0]


def test_access_when_not_validated_is_vc_with_rip_at_the_instruction() -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex("8b042500500000"))
    gate64(guest, 29)
    guest.put(HANDLER, b"\xf4")
    guest.memory.rmp_update(GPA, validated=False)
    assert guest.cpu.run(1000) == Halt()
    assert frame64(guest, 2) == (0x404, 0x1000)


def test_access_when_device_is_vc_0x400() -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex("8b042510001000"))
    shared_view(guest)
    guest.memory.mmio.add(GPA)
    gate64(guest, 29)
    guest.put(HANDLER, b"\xf4")
    assert guest.cpu.run(1000) == Halt()
    assert frame64(guest, 2) == (0x400, 0x1000)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"asid": 9}, FaultReason.ASID),
        ({"gpa": 0x7000}, FaultReason.GPA),
        ({"assigned": False, "asid": 0}, FaultReason.NOT_ASSIGNED),
        ({"immutable": True}, FaultReason.IMMUTABLE),
        ({"perms": (1, 0, 0, 0)}, FaultReason.VMPL),
    ],
)
def test_write_when_rmp_denies_is_a_nested_fault(
    changes: dict[str, object], reason: FaultReason
) -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex("89042508500000"))
    guest.memory.rmp[GPA] = Entry(**{"gpa": GPA, **changes})  # type: ignore[arg-type]
    assert guest.cpu.run(1000) == NestedFault(GPA + 8, Access.WRITE, True, reason)


def test_execute_when_vmpl_lacks_supervisor_execute_is_a_nested_fault() -> None:
    guest = Guest(snp=True)
    for gpa in guest.memory.rmp:
        guest.memory.rmp_update(gpa, perms=(15, 15, 0, 0))
    guest.memory.rmp_update(GPA, perms=(15, 7, 0, 0))
    start_long(guest, bytes.fromhex("b800500000 ffe0"), vmpl=1)
    assert guest.cpu.run(1000) == NestedFault(GPA, Access.FETCH, True, FaultReason.VMPL)


def test_translation_when_tables_change_needs_invlpg() -> None:
    guest = Guest(snp=True)
    # mov eax,[0x5000]; mov qword [PT+5*8] <- rbx; invlpg [0x5000]; mov ecx,[0x5000]; hlt
    start_long(
        guest,
        bytes.fromhex("8b042500500000 48891c2528300100 0f013c2500500000 8b0c2500500000 f4"),
        rbx=0x6000 | ALL | 1 << 51,
    )
    guest.put(0x5000, struct.pack("<I", 0x55))
    guest.put(0x6000, struct.pack("<I", 0x66))
    assert guest.cpu.run(1000) == Halt()
    assert (guest.cpu.read("rax"), guest.cpu.read("rcx")) == (0x55, 0x66)


@pytest.mark.parametrize("c_bit", [51, 47])
def test_guest_when_c_bit_is_elsewhere_works_the_same(c_bit: int) -> None:
    guest = Guest(snp=True, c_bit=c_bit, physical_bits=46)
    cr3 = identity_map(guest, c_bit=c_bit)
    put_gdt(guest)
    event = guest.run(b"\xb0\x07\xf4", cs=FLAT_CODE64, gdtr=GDTR, cr3=cr3, **LONG)
    assert event == Halt()
    assert guest.cpu.read("rax") == 7
