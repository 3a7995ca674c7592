"""VMSA pages in a plan: where they come from, where they go, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError
from kvmlaunch.images import (
    LaunchPlan,
    MemoryRegion,
    PageRange,
    Piece,
    PlanOptions,
    VmsaChoice,
    VmsaMode,
    load_image,
    to_sync,
)
from kvmlaunch.launch.measure import measure, page_records

HALT = b"\xf4"
PAGE = 4096
# A VMSA by hand: sev_features (0x3B0) 1, efer (0xD0) SVME, rip (0x178).
RAW = bytearray(PAGE)
struct.pack_into("<Q", RAW, 0x3B0, 1)
struct.pack_into("<Q", RAW, 0xD0, 0x1000)
struct.pack_into("<Q", RAW, 0x178, 0x1234)
RAW = bytes(RAW)


def load(*vmsas: VmsaChoice, **options: Any) -> LaunchPlan:
    options.setdefault("vmsa_mode", "direct")
    return load_image(HALT, PlanOptions(vmsas=vmsas, **options))


def vmsas(plan: LaunchPlan) -> list[tuple[int, int | None, str]]:
    """(GPA, vCPU, origin) of each VMSA step."""
    return [
        (step.gpa, plan.vcpu_at(step), step.origin_of(0))
        for step in plan.steps
        if step.type is PageType.VMSA
    ]


def chain(*pages: tuple[int, int, bytes]) -> bytes:
    """Launch digest of (type, GPA, contents): PAGE_INFO of AMD 56860, table 67."""
    digest = bytes(48)
    for kind, gpa, page in pages:
        contents = hashlib.sha384(page).digest()
        info = digest + contents + struct.pack("<HBBIQ", 0x70, kind, 0, 0, gpa)
        digest = hashlib.sha384(info).digest()
    return digest


# Where they come from


def test_vmsa_when_mode_is_direct_is_built_for_vcpu_0_only() -> None:
    plan = load(vcpus=3)
    assert vmsas(plan) == [(0x2000, 0, "kvmlaunch:vmsa")]
    assert [plan.starts(vcpu) for vcpu in range(3)] == [True, False, False]
    assert plan.vmsa_mode is VmsaMode.DIRECT


def test_vmsa_when_built_is_the_page_that_kvm_would_make() -> None:
    """sync measures at its own GPA; the contents are the same."""
    (kvm,) = [r for r in page_records(load_image(HALT)) if r.type is PageType.VMSA]
    (ours,) = [r for r in page_records(load()) if r.type is PageType.VMSA]
    assert (ours.contents, ours.gpa, ours.vcpu) == (kvm.contents, 0x2000, 0)
    assert kvm.gpa == 0xFFFFFFFFF000


def test_vmsa_when_it_is_a_file_is_measured_byte_by_byte() -> None:
    image = HALT.ljust(PAGE, b"\0")
    plan = load(VmsaChoice(page=RAW, gpa=0x7000, origin="x.vmsa"))
    assert measure(plan).digest == chain((1, 0x1000, image), (2, 0x7000, RAW))
    assert vmsas(plan) == [(0x7000, 0, "x.vmsa+0x0")]


def test_vmsa_when_edited_differs_in_that_field_only() -> None:
    edits = (("rip", 0x5678), ("cs.base", 0x9000))
    plan = load(VmsaChoice(page=RAW, gpa=0x7000, edits=edits))
    want = bytearray(RAW)
    struct.pack_into("<Q", want, 0x178, 0x5678)
    struct.pack_into("<Q", want, 0x10 + 8, 0x9000)
    assert plan.steps[-1].page(0) == want


def test_vmsas_when_there_are_several_keep_their_order_and_vcpus() -> None:
    plan = load(
        VmsaChoice(vcpu=None, gpa=0x9000, page=RAW, origin="a"),
        VmsaChoice(vcpu=1, gpa=0x8000, page=RAW, origin="b"),
        VmsaChoice(vcpu=0, page=RAW, origin="c"),
        vcpus=2,
    )
    assert vmsas(plan) == [(0x9000, None, "a+0x0"), (0x8000, 1, "b+0x0"), (0x2000, 0, "c+0x0")]
    records = [r for r in page_records(plan) if r.type is PageType.VMSA]
    assert [record.to_event()["vcpu"] for record in records] == [None, 1, 0]
    assert {record.to_event()["event"] for record in records} == {"vmsa"}
    assert "label" not in records[0].to_event()


def test_vmsa_when_no_gpa_is_named_avoids_what_is_taken() -> None:
    plan = load(VmsaChoice(), VmsaChoice(vcpu=1, gpa=0x2000, page=RAW), vcpus=2)
    assert [gpa for gpa, *_ in vmsas(plan)] == [0x3000, 0x2000]


def test_vmsa_when_the_lowest_free_page_is_at_2_mib_takes_the_next() -> None:
    image = bytes(0x1FF000)
    plan = load_image(image, PlanOptions(vmsa_mode="direct", memory=0x203000))
    assert vmsas(plan)[0][0] == 0x201000


def test_vmsa_when_memory_is_full_is_refused() -> None:
    with pytest.raises(FormatError, match="no free page for a VMSA"):
        load_image(bytes(0x1FF000), PlanOptions(vmsa_mode="direct", memory=0x201000))


def test_mode_when_a_vmsa_is_given_is_direct() -> None:
    assert load(VmsaChoice(), vmsa_mode=None).vmsa_mode is VmsaMode.DIRECT
    assert load(vmsa_mode=None).vmsa_mode is VmsaMode.SYNC


@pytest.mark.parametrize("mode", ["page", "direct"])
def test_digest_when_the_mode_has_vmsas_is_the_same_for_any_number_of_vcpus(mode: str) -> None:
    digests = {measure(load(vcpus=n, vmsa_mode=mode)).digest for n in (1, 2, 4, 8)}
    assert len(digests) == 1
    assert len({measure(load(vcpus=n, vmsa_mode="sync")).digest for n in (1, 2, 4, 8)}) == 4


def test_digest_when_the_vmsa_is_elsewhere_is_another() -> None:
    one, other = (load(VmsaChoice(gpa=gpa, page=RAW)) for gpa in (0x7000, 0x8000))
    image = HALT.ljust(PAGE, b"\0")
    assert measure(one).digest == chain((1, 0x1000, image), (2, 0x7000, RAW))
    assert measure(other).digest == chain((1, 0x1000, image), (2, 0x8000, RAW))


# What is refused


BAD = {
    "vmpl": (VmsaChoice(edits=(("vmpl", 1),)), r"vmsa 0 \(kvmlaunch:vmsa\): vmpl is 1, but a"),
    "sev_features": (
        VmsaChoice(edits=(("sev_features", 0),)),
        r"sev_features is 0x0, but the VM's are 0x1 \(--guest-features\)",
    ),
    "2 MiB": (VmsaChoice(gpa=0x200000), r"GPA 0x200000 is aligned to 2 MiB, .* \(SNP erratum\)"),
    "unaligned": (VmsaChoice(gpa=0x7001), "vmsa 0: GPA 0x7001 is not aligned to 4 KiB"),
    "outside": (
        VmsaChoice(gpa=0x40000000),
        r"vmsa 0 \(0x40000000\.\.0x40001000, kvmlaunch:vmsa\) is outside the guest's memory",
    ),
}


@pytest.mark.parametrize("rule", BAD)
def test_vmsa_when_the_kernel_would_refuse_it_is_refused_before(rule: str) -> None:
    choice, sentence = BAD[rule]
    with pytest.raises(FormatError, match=sentence):
        load(choice)


@pytest.mark.parametrize("rule", BAD)
def test_vmsa_when_forced_is_planned_all_the_same(rule: str) -> None:
    choice, _ = BAD[rule]
    plan = load(choice, forced=True)
    want = 0x2000 if choice.gpa is None else choice.gpa
    assert plan.bindings == {0: want}
    assert plan.steps[-1].gpa == want & -PAGE


def test_vmsa_at_2_mib_when_no_vcpu_starts_there_is_measured() -> None:
    plan = load(VmsaChoice(), VmsaChoice(vcpu=None, gpa=0x200000))
    assert [gpa for gpa, *_ in vmsas(plan)] == [0x2000, 0x200000]


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ((VmsaChoice(vcpu=2),), "a VMSA is for vCPU 2, but the guest has 2"),
        ((VmsaChoice(), VmsaChoice()), "vCPU 0 has two VMSAs"),
        ((VmsaChoice(gpa=0x1000),), r"overlaps"),
        (
            (VmsaChoice(gpa=0x5000), VmsaChoice(vcpu=1, gpa=0x5000)),
            r"vmsa 0 .* overlaps vmsa 1 ",
        ),
        ((VmsaChoice(edits=(("no_such", 1),)),), "a VMSA has no field 'no_such'"),
        ((VmsaChoice(edits=(("cpl", 256),)),), "cpl 0x100 does not fit in 8 bits"),
    ],
)
def test_vmsas_when_they_make_no_sense_are_refused_also_forced(
    choices: tuple[VmsaChoice, ...], sentence: str
) -> None:
    for forced in (False, True):
        with pytest.raises(FormatError, match=sentence):
            load(*choices, vcpus=2, forced=forced)


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_vmsa_when_it_is_no_page_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match=f"x: a VMSA page is 4096 bytes, not {size}"):
        VmsaChoice(page=bytes(size), origin="x")


@pytest.mark.parametrize(
    "choices",
    [
        (VmsaChoice(vcpu=1),),
        (VmsaChoice(), VmsaChoice(vcpu=1)),
        (VmsaChoice(), VmsaChoice(vcpu=None)),
    ],
)
def test_mode_page_when_it_is_not_one_vmsa_for_vcpu_0_is_refused(
    choices: tuple[VmsaChoice, ...],
) -> None:
    with pytest.raises(FormatError, match="VMSA mode page takes one VMSA, which is for vCPU 0"):
        load(*choices, vcpus=2, vmsa_mode="page")
    assert load(*choices, vcpus=2, vmsa_mode="page", forced=True).vmsa_mode is VmsaMode.PAGE


def test_mode_when_it_is_unknown_or_for_a_plain_vm_is_refused() -> None:
    with pytest.raises(FormatError, match=r"unknown VMSA mode 'both', known are sync, page, direc"):
        PlanOptions(vmsa_mode="both")
    with pytest.raises(FormatError, match="VMSA mode direct is for SNP guests"):
        load(confidential=False)
    with pytest.raises(FormatError, match="in mode sync KVM makes the VMSAs"):
        PlanOptions(vmsa_mode="sync", vmsas=(VmsaChoice(),))


def vmsa_step(gpa: int, pages: int = 1) -> PageRange:
    piece = Piece(0, memoryview(RAW), "x")
    return PageRange(gpa, pages * PAGE, PageType.VMSA, "vmsa", "x", (piece,))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vmsa_mode": VmsaMode.SYNC}, "VMSA pages are for modes page and direct"),
        ({"bindings": {0: 0x6000}}, "vCPU 0 starts at GPA 0x6000, where no VMSA is"),
        ({"bindings": {0: 0x1000}}, "vCPU 0 starts at GPA 0x1000, where no VMSA is"),
        ({"bindings": {2: 0x5000}}, "a VMSA is for vCPU 2, but there are 2 vCPUs"),
        ({"bindings": {0: 0x5000, 1: 0x5000}}, "two vCPUs start from one VMSA"),
        ({"steps": (vmsa_step(0x5000, 2),)}, "vmsa has 2 pages, a VMSA is one"),
    ],
)
def test_plan_when_its_vmsas_do_not_fit_is_refused(changes: dict[str, Any], sentence: str) -> None:
    plan = load(VmsaChoice(gpa=0x5000), vcpus=2)
    with pytest.raises(FormatError, match=sentence):
        replace(plan, **changes)


# What KVM makes of them


def test_to_sync_when_kvm_carries_all_loses_nothing() -> None:
    plan = load(VmsaChoice(), vcpus=2)
    fallback = to_sync(plan)
    assert (fallback.lost, fallback.dropped) == ((), ())
    assert measure(fallback.plan) == measure(load_image(HALT, PlanOptions(vcpus=2)))


def test_to_sync_when_fields_have_no_ioctl_names_them_with_both_values() -> None:
    edits = (("cr2", 5), ("rbx", 7), ("virtual_tom", 1 << 40))
    fallback = to_sync(load(VmsaChoice(edits=edits)))
    assert [(vcpu, str(field)) for vcpu, field in fallback.lost] == [
        (0, "cr2 (offset 0x240): 0x5 != 0x0"),
        (0, "virtual_tom (offset 0x3c8): 0x10000000000 != 0x0"),
    ]
    assert fallback.plan.vcpus[0].rbx == 7
    assert fallback.plan.vmsa_mode is VmsaMode.SYNC


def test_to_sync_when_a_vmsa_is_measured_only_drops_it() -> None:
    plan = load(VmsaChoice(vcpu=1, page=RAW), VmsaChoice(vcpu=None, gpa=0x9000), vcpus=2)
    fallback = to_sync(plan)
    assert [step.gpa for step in fallback.dropped] == [0x9000]
    assert [state.rip for state in fallback.plan.vcpus] == [load_image(HALT).vcpus[0].rip, 0x1234]
    assert {step.type for step in fallback.plan.steps} == {PageType.NORMAL}


@pytest.mark.parametrize(("pages", "kept"), [(1, False), (2, True)])
def test_to_sync_when_memory_is_there_for_a_vmsa_alone_leaves_it_out(
    pages: int, kept: bool
) -> None:
    plan, own = load(VmsaChoice(gpa=0x5000)), MemoryRegion(1 << 32, pages * PAGE, "vmsa")
    *others, vmsa = plan.steps
    memory, steps = (*plan.memory, own), (*others, replace(vmsa, gpa=own.gpa))
    apart = replace(plan, memory=memory, steps=steps, bindings={0: own.gpa})
    assert to_sync(apart).plan.memory == (memory if kept else plan.memory)


def test_to_sync_when_kvm_would_refuse_the_state_says_so() -> None:
    with pytest.raises(FormatError, match="dr7 0x401 has bits besides 0x400"):
        to_sync(load(VmsaChoice(edits=(("dr7", 0x401),))))


@given(st.dictionaries(st.integers(0, PAGE - 1), st.integers(0, 255), max_size=40), st.booleans())
def test_vmsa_when_it_is_any_bytes_is_planned_or_refused_in_a_sentence(
    changes: dict[int, int], forced: bool
) -> None:
    page = bytearray(RAW)
    for offset, byte in changes.items():
        page[offset] = byte
    choice = VmsaChoice(page=bytes(page), gpa=0x5000)
    broken = page[0xCA] != 0 or page[0x3B0:0x3B8] != (1).to_bytes(8, "little")
    if broken and not forced:
        with pytest.raises(FormatError, match=r"vmsa 0 .* (vmpl|sev_features) is"):
            load(choice)
        return
    plan = load(choice, forced=forced)
    assert plan.steps[-1].page(0) == page
    with contextlib.suppress(FormatError):  # what KVM refuses, tests of kvm_sync say
        assert Vmsa.decode(page).rip == to_sync(plan).plan.vcpus[0].rip
