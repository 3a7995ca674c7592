"""RMP rules for pages of an SNP guest. No engine is needed."""

from __future__ import annotations

import dataclasses

import pytest

from kvmlaunch.softcpu import Access, CpuOptions, FaultReason
from kvmlaunch.softcpu.engine import FETCH, READ, WRITE
from kvmlaunch.softcpu.faults import GuestFault, HostFault, MmioFault
from kvmlaunch.softcpu.pages import Pages
from tests.softcpu.model import ASID, Entry, Memory

GPA = 0x5000
VC = 29


def pages(memory: Memory) -> Pages:
    return Pages(memory, CpuOptions(snp=memory.snp, asid=ASID))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry(gpa=GPA, assigned=False, asid=0), FaultReason.NOT_ASSIGNED),
        (Entry(gpa=GPA, asid=ASID + 1), FaultReason.ASID),
        (Entry(gpa=GPA + 0x1000), FaultReason.GPA),
        (Entry(gpa=GPA, immutable=True), FaultReason.IMMUTABLE),
        (Entry(gpa=GPA, perms=(0, 0, 0, 0)), FaultReason.VMPL),
        (Entry(gpa=GPA, validated=False, asid=ASID + 1), FaultReason.ASID),
    ],
)
def test_use_when_rmp_denies_names_the_reason(entry: Entry, reason: FaultReason) -> None:
    memory = Memory(snp=True)
    memory.rmp[GPA] = entry
    with pytest.raises(HostFault) as caught:
        pages(memory).use(GPA, True, WRITE, False, 0)
    event = caught.value.event
    assert event.reason is reason
    assert (event.gpa, event.access, event.private, event.walk) == (GPA, Access.WRITE, True, False)


def test_use_when_page_is_not_validated_is_vc() -> None:
    memory = Memory(snp=True)
    memory.rmp[GPA] = Entry(gpa=GPA, validated=False, perms=(0, 0, 0, 0))
    with pytest.raises(GuestFault) as caught:
        pages(memory).use(GPA, True, READ, False, 0)
    assert (caught.value.vector, caught.value.error_code) == (VC, 0x404)


@pytest.mark.parametrize(
    ("perms", "user", "rights"),
    [
        (0b0001, False, READ),
        (0b0011, False, READ | WRITE),
        (0b1001, False, READ | FETCH),
        (0b1001, True, READ),
        (0b0101, True, READ | FETCH),
        (0b0101, False, READ),
        (0b1111, True, READ | WRITE | FETCH),
    ],
)
def test_use_when_vmpl_has_permissions_gives_just_those(
    perms: int, user: bool, rights: int
) -> None:
    memory = Memory(snp=True)
    memory.rmp[GPA] = Entry(gpa=GPA, perms=(0xF, 0, perms, 0))
    assert pages(memory).use(GPA, True, READ, user, 2) & 0xFFF == rights
    for kind in (READ, WRITE, FETCH):
        if not rights & kind:
            with pytest.raises(HostFault, match="VMPL"):
                pages(memory).use(GPA, True, kind, user, 2)


def test_use_when_sides_differ_has_two_backings() -> None:
    memory = Memory(snp=True)
    private = pages(memory).use(GPA, True, READ, False, 0)
    memory.make_shared(GPA)
    shared = pages(memory).use(GPA, False, READ, False, 0)
    assert private & ~0xFFF != shared & ~0xFFF


@pytest.mark.parametrize("private", [True, False])
def test_use_when_side_is_wrong_is_a_nested_fault(private: bool) -> None:
    memory = Memory(snp=True)
    if private:
        memory.make_shared(GPA)
    with pytest.raises(HostFault) as caught:
        pages(memory).use(GPA, private, READ, False, 0)
    assert caught.value.event.private == private
    assert caught.value.event.reason is FaultReason.ABSENT


def test_use_when_device_depends_on_guest_and_side() -> None:
    snp, plain = Memory(snp=True), Memory(snp=False)
    for memory in (snp, plain):
        memory.mmio.add(GPA)
    with pytest.raises(GuestFault) as caught:
        pages(snp).use(GPA, False, READ, False, 0)
    assert (caught.value.vector, caught.value.error_code) == (VC, 0x400)
    with pytest.raises(HostFault):
        pages(snp).use(GPA, True, READ, False, 0)
    with pytest.raises(MmioFault):
        pages(plain).use(GPA, False, READ, False, 0)
    with pytest.raises(HostFault):
        pages(plain).use(GPA, False, FETCH, False, 0)


def test_entry_when_page_is_2_mib_has_the_gpa_of_its_start() -> None:
    memory = Memory(0x600000, snp=True)
    large = Entry(gpa=0x400000, page_size=1)
    memory.rmp[0x405000] = large
    assert pages(memory).entry(0x405000) is large
    memory.rmp[0x405000] = dataclasses.replace(large, gpa=0x405000)
    with pytest.raises(HostFault):
        pages(memory).entry(0x405000)
