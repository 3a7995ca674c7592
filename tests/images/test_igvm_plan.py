"""IGVM files as plans: what each directive launches, in whose order, and what is refused."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import Any

import pytest
from sevsnpmeasure.gctx import GCTX

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images import LaunchPlan, PlanOptions, VmsaChoice, VmsaMode, load_image, to_sync
from kvmlaunch.launch.measure import measure
from tests.images import igvm_files as f

A, B, C = (f.pattern(n) for n in range(3))
VMSA = f.vmsa()
DATA = A + B + VMSA
AT_A, AT_B, AT_VMSA = 0, 0x1000, 0x2000


def plan(*headers: f.Header, data: bytes = DATA, **options: Any) -> LaunchPlan:
    return load_image(f.igvm([f.platform(), *headers], data), PlanOptions(**options))


def refused(*headers: f.Header, data: bytes = DATA, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        plan(*headers, data=data, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def steps(of: LaunchPlan) -> list[tuple[int, int, str]]:
    return [(step.gpa, step.npages, step.type.name) for step in of.steps]


# PAGE_DATA flags and data types: the format's.
UNMEASURED, SHARED, LARGE = 2, 4, 1


def test_plan_when_pages_follow_each_other_makes_one_range_of_them() -> None:
    made = plan(f.page(0x1000, AT_A), f.page(0x2000, AT_B), f.page(0x3000), f.page(0x5000, AT_A))
    assert steps(made) == [(0x1000, 3, "NORMAL"), (0x5000, 1, "NORMAL")]
    assert [bytes(made.steps[0].page(n)) for n in range(3)] == [A, B, bytes(4096)]
    assert bytes(made.steps[1].page(0)) == A
    # Headers of 24, 4 * 32 behind 24: data at 0xb0.
    assert made.steps[0].origin_of(1) == "<bytes>+0x10b0"
    assert made.steps[0].origin_of(2) == "<bytes> header[1]"


def test_plan_when_pages_share_data_gives_it_to_each() -> None:
    made = plan(*(f.page(0x1000 * n, AT_B) for n in range(1, 4)))
    assert [bytes(made.steps[0].page(n)) for n in range(3)] == [B, B, B]


def test_plan_when_data_is_not_aligned_takes_it_as_it_is() -> None:
    made = plan(f.page(0x1000, 5), data=b"x" * 5 + A)
    assert bytes(made.steps[0].page(0)) == A


@pytest.mark.parametrize(
    ("flags", "kind", "type_"),
    [
        (0, 0, "NORMAL"),
        (UNMEASURED, 0, "UNMEASURED"),
        (UNMEASURED | SHARED, 0, "UNMEASURED"),
        (0, 1, "SECRETS"),
        (0, 2, "CPUID"),
        (0, 3, "CPUID"),
    ],
)
@pytest.mark.parametrize("data", [None, AT_A])
def test_plan_when_a_page_has_a_type_launches_it_as_that(
    flags: int, kind: int, type_: str, data: int | None
) -> None:
    made = plan(f.page(0x3000, data, flags=flags, kind=kind))
    assert steps(made) == [(0x3000, 1, type_)]
    has_data = data is not None and kind == 0
    assert bytes(made.steps[0].page(0)) == (A if has_data else bytes(4096))


def test_plan_when_pages_without_data_are_native_makes_them_zero_pages() -> None:
    headers = (f.page(0x1000, AT_A), f.page(0x2000), f.page(0x3000, flags=UNMEASURED))
    assert steps(plan(*headers, native_zero=True)) == [
        *((0x1000, 1, "NORMAL"), (0x2000, 1, "ZERO"), (0x3000, 1, "UNMEASURED"))
    ]


def test_plan_when_a_page_is_large_takes_512_pages() -> None:
    data = b"".join(struct.pack("<I", n) * 1024 for n in range(512))
    made = plan(f.page(0x200000, 0, flags=LARGE), f.page(0x400000, flags=LARGE), data=data)
    assert steps(made) == [(0x200000, 1024, "NORMAL")]
    assert bytes(made.steps[0].page(511)) == struct.pack("<I", 511) * 1024
    assert bytes(made.steps[0].page(512)) == bytes(4096)


def test_plan_when_pages_are_shared_launches_nothing_there() -> None:
    made = plan(
        f.page(0x1000, AT_A, flags=SHARED), f.page(0x2000, AT_B), f.error_range(0x8000, 0x2000)
    )
    assert steps(made) == [(0x2000, 1, "NORMAL")]
    assert [(part.gpa, part.size, bytes(part.page(0))) for part in made.shared] == [
        (0x1000, 0x1000, A),
        (0x8000, 0x2000, bytes(4096)),
    ]


def test_plan_when_an_area_is_inserted_has_its_values() -> None:
    made = plan(
        *(f.area(4, 0x2000), f.parameter(0x307, 4, 8), f.parameter(0x313, 4, 12)),
        *(f.parameter(0x30C, 4, 0x1000), f.insert(0x6000, 4)),
        vcpus=3,
        memory=4 << 30,
    )
    assert steps(made) == [(0x6000, 2, "UNMEASURED")]
    first, second = (bytes(made.steps[0].page(n)) for n in range(2))
    assert first == bytes(8) + struct.pack("<II", 3, 0) + bytes(0xFF0)
    # 3 GiB below the hole, the rest at 4 GiB, and an entry without pages as the end.
    entries = [(0, 0xC0000, 0, 0, 0), (0x100000, 0x40000, 0, 0, 0), (0, 0, 0, 0, 0)]
    wanted = b"".join(struct.pack("<QQHHI", *entry) for entry in entries)
    assert second == wanted.ljust(0x1000, b"\0")


def test_plan_when_an_area_has_bytes_of_the_file_writes_values_over_them() -> None:
    made = plan(f.area(0, 0x1000, AT_B), f.parameter(0x307, 0, 16), f.insert(0x1000, 0), vcpus=2)
    assert bytes(made.steps[0].page(0)) == B[:16] + struct.pack("<I", 2) + B[20:]


def test_plan_when_a_context_is_there_starts_that_vcpu_from_it_in_file_order() -> None:
    headers = (f.page(0x1000, AT_A), f.context(0x9000, AT_VMSA, 1), f.page(0x2000, AT_B))
    made = plan(*headers, vcpus=2)
    assert steps(made) == [(0x1000, 1, "NORMAL"), (0x9000, 1, "VMSA"), (0x2000, 1, "NORMAL")]
    assert (made.vmsa_mode, dict(made.bindings)) == (VmsaMode.DIRECT, {1: 0x9000})
    assert bytes(made.steps[1].page(0)) == VMSA


def test_plan_when_there_is_no_context_lets_kvm_make_the_vmsas() -> None:
    made = plan(f.page(0x1000, AT_A), vcpus=2)
    assert (made.vmsa_mode, len(made.vcpus)) == (VmsaMode.SYNC, 2)


def test_plan_when_pages_are_above_the_hole_adds_memory_for_them() -> None:
    made = plan(
        *(f.page(0xFFFFE000, AT_A), f.page(0xFFFFF000, AT_B), f.page(0x80_0000_0000, AT_A)),
        f.context(f.KVM_GPA, AT_VMSA),
        memory=1 << 20,
    )
    assert [(m.gpa, m.size) for m in made.memory] == [
        *((0, 1 << 20), (0xFFFFE000, 0x2000), (0x80_0000_0000, 0x1000), (f.KVM_GPA, 0x1000))
    ]


def test_plan_when_the_file_has_policy_and_features_takes_them() -> None:
    vmsa = f.vmsa(sev_features=0x21)
    made = plan(f.policy(0xB0000), f.context(f.KVM_GPA, 0), data=vmsa)
    assert (made.policy, made.sev_features) == (0xB0000, 0x21)


def test_plan_when_the_file_has_no_policy_takes_the_one_asked_for() -> None:
    assert plan(f.page(0x1000), policy=0x70000).policy == 0x70000
    assert plan(f.page(0x1000)).policy == 0x30000


def test_plan_when_the_command_line_agrees_is_no_conflict() -> None:
    assert plan(f.policy(0xB0000), f.page(0x1000), policy=0xB0000).policy == 0xB0000


def id_block(**fields: bytes) -> bytes:
    """SNP_ID_BLOCK, 696 bytes, each part recognisable."""
    parts = {
        **{"mask": struct.pack("<I", 1), "enabled": b"\1", "reserved": bytes(3)},
        **{"ld": b"L" * 48, "family": b"F" * 16, "image": b"I" * 16},
        **{"version": struct.pack("<I", 1), "svn": struct.pack("<I", 9)},
        **{"algo": struct.pack("<I", 1), "author_algo": struct.pack("<I", 1)},
        "signature": b"r" * 72 + b"s" * 72,
        "key": struct.pack("<II", 2, 0) + b"x" * 72 + b"y" * 72,
        "author_signature": b"R" * 72 + b"S" * 72,
        "author_key": struct.pack("<II", 2, 0) + b"X" * 72 + b"Y" * 72,
        **fields,
    }
    raw = b"".join(parts.values())
    assert len(raw) == 696
    return raw


def test_plan_when_the_file_has_an_id_block_passes_it_as_firmware_takes_it() -> None:
    made = plan(f.policy(0xB0000), f.page(0x1000), (0x30B, id_block()))
    # AMD 56860, ID block and ID authentication information.
    assert made.id_block == b"L" * 48 + b"F" * 16 + b"I" * 16 + struct.pack("<IIQ", 1, 9, 0xB0000)
    auth = bytearray(4096)
    auth[0:8] = struct.pack("<II", 1, 1)
    auth[0x40 : 0x40 + 144] = b"r" * 72 + b"s" * 72
    auth[0x240 : 0x240 + 148] = struct.pack("<I", 2) + b"x" * 72 + b"y" * 72
    auth[0x680 : 0x680 + 144] = b"R" * 72 + b"S" * 72
    auth[0x880 : 0x880 + 148] = struct.pack("<I", 2) + b"X" * 72 + b"Y" * 72
    assert made.id_auth == bytes(auth)
    assert made.author_key_enabled


def test_plan_when_firmware_starts_at_reset_it_wants_apics() -> None:
    vmsa = bytearray(VMSA)
    struct.pack_into("<Q", vmsa, 0x18, 0xFFFF0000)  # cs.base
    struct.pack_into("<Q", vmsa, 0x178, 0xFFF0)  # rip
    assert plan(f.context(f.KVM_GPA, 0), data=bytes(vmsa)).apic
    assert plan(f.area(0), f.parameter(0x307, 0), f.insert(0x1000, 0)).apic
    assert not plan(f.context(f.KVM_GPA, AT_VMSA)).apic


REFUSED: dict[str, tuple[tuple[f.Header, ...], dict[str, Any], str]] = {
    "platform": ((f.page(0x1000),), {"confidential": False}, "can't be launched in a plain VM"),
    "load-address": ((f.page(0x1000),), {"load_addr": 0}, "says itself where it goes"),
    "overlap": (
        (f.page(0x1000, AT_A), f.page(0x5000), f.page(0x1000, AT_B)),
        {},
        "header 3 (PAGE_DATA): GPA 0x1000 is taken by header 1 (PAGE_DATA) already",
    ),
    "overlap-inside-runs": (
        (*(f.page(0x1000 * n) for n in range(1, 6)), f.error_range(0x3000, 0x1000)),
        {},
        "header 6 (ERROR_RANGE): GPA 0x3000 is taken by header 3 (PAGE_DATA) already",
    ),
    "overlap-area": (
        (f.area(0, 0x3000), f.insert(0x4000, 0), f.page(0x6000)),
        {},
        "header 3 (PAGE_DATA): GPA 0x6000 is taken by header 2 (PARAMETER_INSERT) already",
    ),
    "overlap-large": (
        (f.page(0x200000, flags=1), f.page(0x2FF000)),
        {},
        "header 2 (PAGE_DATA): GPA 0x2ff000 is taken by header 1 (PAGE_DATA) already",
    ),
    "overlap-contexts": (
        (f.context(0x9000, AT_VMSA, 0), f.context(0x9000, AT_VMSA, 1)),
        {"vcpus": 2},
        "header 2 (VP_CONTEXT): GPA 0x9000 is taken by header 1 (VP_CONTEXT) already",
    ),
    "two-contexts": (
        (f.context(0x9000, AT_VMSA), f.context(0xA000, AT_VMSA)),
        {},
        "header 2 (VP_CONTEXT): vCPU 0 has a VP_CONTEXT already, header 1 (VP_CONTEXT)",
    ),
    "context-for-nobody": (
        (f.context(0x9000, AT_VMSA, 2),),
        {"vcpus": 2},
        "header 1 (VP_CONTEXT): it is for vCPU 2, but the guest has 2 (--vcpus)",
    ),
    "context-without-data": (
        (f.context(0x9000, None),),
        {},
        "header 1 (VP_CONTEXT): a VP_CONTEXT of SEV-SNP needs a VMSA in the file's data",
    ),
    "outside-memory": (
        (f.page(0x1000), f.page(0x2000000)),
        {"memory": 16 << 20},
        "header 2 (PAGE_DATA): normal (0x2000000..0x2001000) is outside the guest's memory "
        "(0x0..0x1000000)",
    ),
    "across-the-end-of-memory": (
        (f.page(0xFFF000), f.page(0x1000000)),
        {"memory": 16 << 20},
        "header 2 (PAGE_DATA): normal (0xfff000..0x1001000) is outside the guest's memory",
    ),
    "beyond-52-bits": ((f.page(1 << 52),), {}, "ends beyond the 52 physical address bits"),
    "area-outside": (
        (f.area(0, 1 << 40), f.insert(0, 0)),
        {},
        "header 2 (PARAMETER_INSERT): parameter area 0 of 0x10000000000 bytes is outside",
    ),
    "required-outside": (
        (f.page(0x1000), f.required(0xFFF000, 0x2000)),
        {"memory": 16 << 20},
        "header 2 (REQUIRED_MEMORY): required memory 0xfff000..0x1001000 is outside the guest's",
    ),
    "too-many-regions": (
        tuple(f.page(0x1_0000_0000 + 0x2000 * n) for n in range(65)),
        {},
        "take more than 64 memory regions",
    ),
    "policy-twice": (
        (f.policy(), f.policy(0x70000)),
        {},
        "header 2 (GUEST_POLICY): the platform has one already, header 1",
    ),
    "policy-conflict": (
        (f.policy(0xB0000),),
        {"policy": 0x30000},
        "header 1 (GUEST_POLICY): the policy is 0xb0000, but --policy says 0x30000",
    ),
    "features-conflict": (
        (f.context(0x9000, AT_VMSA),),
        {"sev_features": 0x21},
        "header 1 (VP_CONTEXT): the VMSA has SEV features 0x1, but --guest-features says 0x21",
    ),
    "id-block-conflict": (
        (f.page(0x1000), (0x30B, id_block())),
        {"id_block": b"Q" * 96, "id_auth": bytes(4096)},
        f"the ID block is {'4c' * 48}",
    ),
    "id-block-twice": (
        ((0x30B, id_block()), (0x30B, id_block())),
        {},
        "header 2 (SNP_ID_BLOCK): the platform has one already, header 1",
    ),
    "relocation": (
        ((0x102, struct.pack("<IHBBQQQQQ", 1, 0, 0, 0, 0, 0, 0, 0, 0)),),
        {},
        "header 1 (RELOCATABLE_REGION): is nothing that SEV-SNP on KVM has",
    ),
    "parameters-overlap": (
        (f.area(0), f.parameter(0x307, 0, 8), f.parameter(0x30C, 0, 0)),
        {},
        "header 3 (MEMORY_MAP): its value overlaps that of header 2 (VP_COUNT_PARAMETER)",
    ),
    "parameter-too-large": (
        (f.area(0), f.parameter(0x309, 0, 0xFD0)),
        {},
        "header 2 (MADT): 52 bytes at offset 0xfd0 end beyond parameter area 0 of 0x1000 bytes",
    ),
    "command-line": (
        (f.area(0), f.parameter(0x30E, 0)),
        {"append": "gr\u00fc\u00df", "image_type": "igvm"},
        "header 2 (COMMAND_LINE): a command line for IGVM is ASCII",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plan_when_a_launch_is_impossible_names_header_and_rule(name: str) -> None:
    headers, options, rule = REFUSED[name]
    assert rule in refused(*headers, **options)


def test_plan_when_id_block_conflicts_shows_both() -> None:
    headers, options, _ = REFUSED["id-block-conflict"]
    assert f"--id-block says {'51' * 96}" in refused(*headers, **options)


def test_plan_when_vmsas_have_different_features_is_refused() -> None:
    data = VMSA + f.vmsa(sev_features=0x21)
    sentence = refused(f.context(0x9000, 0), f.context(0xA000, 0x1000, 1), data=data, vcpus=2)
    assert "header 2 (VP_CONTEXT): SEV features 0x21 are not those of header 1" in sentence


def test_plan_when_the_kernel_would_refuse_the_vmsa_is_refused_unless_forced() -> None:
    context = f.context(0x9000, 0)
    assert "vmpl is 1, but a guest starts at VMPL 0" in refused(context, data=f.vmsa(vmpl=1))
    assert plan(context, data=f.vmsa(vmpl=1), forced=True).forced


def test_plan_when_a_range_is_for_another_platform_leaves_it_out() -> None:
    headers = [f.platform(2, f.TDX), f.page(0x1000, AT_B, mask=2), f.page(0x1000, AT_A)]
    made = plan(*headers)
    assert steps(made) == [(0x1000, 1, "NORMAL")]
    assert bytes(made.steps[0].page(0)) == A


def test_plan_when_another_vmsa_is_asked_for_adds_it() -> None:
    context = f.context(0x9000, AT_VMSA)
    made = plan(context, vcpus=2, vmsas=(VmsaChoice(vcpu=1, gpa=0xA000),))
    assert dict(made.bindings) == {0: 0x9000, 1: 0xA000}
    assert plan(context, vmsa_mode="page").vmsa_mode is VmsaMode.PAGE


# Orders.


def gctx(*pages: tuple[int, int, bytes | None]) -> bytes:
    """The launch digest by sev-snp-measure (PyPI), from (type, GPA, contents)."""
    chain = GCTX()
    for type_, gpa, data in pages:
        hashed = hashlib.sha384(data).digest() if data is not None else bytes(48)
        chain._update(type_, gpa, hashed)
    return bytes(chain.ld())


def test_measure_when_a_file_has_everything_is_the_chain_of_its_directives() -> None:
    made = plan(
        *(f.page(0x2000, AT_B), f.page(0x3000), f.page(0x4000, AT_A, flags=UNMEASURED)),
        *(f.page(0x5000, AT_A, flags=SHARED), f.page(0x6000, kind=1), f.page(0x7000, kind=2)),
        *(
            f.area(0, 0x2000),
            f.insert(0x20000, 0),
            f.context(0x9000, AT_VMSA),
            f.page(0x1000, AT_A),
        ),
        f.required(0, 0x100000),
    )
    # image-formats 1.10; the hash of a page of zeros is published in igvm-tooling's tests.
    zeros = hashlib.sha384(bytes(4096)).hexdigest()
    assert (zeros[:16], zeros[-4:]) == ("c0e59a3e3ffbd3b5", "d774")
    assert measure(made).digest == gctx(
        *((1, 0x2000, B), (1, 0x3000, bytes(4096)), (4, 0x4000, None), (5, 0x6000, None)),
        *((6, 0x7000, None), (4, 0x20000, None), (4, 0x21000, None), (2, 0x9000, VMSA)),
        (1, 0x1000, A),
    )


INTERLEAVED = (
    *(f.area(0), f.area(1), f.page(0x1000, AT_A), f.page(0x2000, AT_B), f.page(0x3000)),
    *(f.context(0x9000, AT_VMSA), f.insert(0x10000, 0), f.insert(0x11000, 1)),
    *(f.page(0x4000), f.page(0x5000, AT_A), f.required(0, 0x1000), f.page(0x6000, AT_B)),
)
KVM_VMSA = (2, f.KVM_GPA, VMSA)  # what KVM makes of it is what it is already


def test_plan_when_order_is_kvms_has_the_vmsas_last_at_its_gpa() -> None:
    made = plan(*INTERLEAVED, order="kvm")
    assert made.vmsa_mode is VmsaMode.SYNC
    assert measure(made).digest == gctx(
        *((1, 0x1000, A), (1, 0x2000, B), (1, 0x3000, bytes(4096)), (4, 0x10000, None)),
        *((4, 0x11000, None), (1, 0x4000, bytes(4096)), (1, 0x5000, A), (1, 0x6000, B), KVM_VMSA),
    )


def test_plan_when_order_is_qemus_inserts_before_the_pages_kept_back() -> None:
    made = plan(*INTERLEAVED, order="qemu")
    # Kept back: 0x3000, since it has no data and 0x2000 has; then the page after each.
    assert steps(made) == [
        *((0x1000, 2, "NORMAL"), (0x10000, 1, "UNMEASURED"), (0x11000, 1, "UNMEASURED")),
        *((0x3000, 1, "NORMAL"), (0x4000, 1, "NORMAL"), (0x5000, 1, "NORMAL")),
        (0x6000, 1, "NORMAL"),
    ]
    assert measure(made).digest == gctx(
        *((1, 0x1000, A), (1, 0x2000, B), (4, 0x10000, None), (4, 0x11000, None)),
        *((1, 0x3000, bytes(4096)), (1, 0x4000, bytes(4096)), (1, 0x5000, A), (1, 0x6000, B)),
        KVM_VMSA,
    )


def test_plan_when_inserts_come_first_has_one_digest_in_all_orders() -> None:
    headers = (
        *(f.area(0), f.insert(0x10000, 0), f.page(0x1000, AT_A), f.page(0x2000)),
        f.context(f.KVM_GPA, AT_VMSA),
    )
    digests = {
        measure(plan(*headers, order=order)).digest for order in (None, "file", "kvm", "qemu")
    }
    assert digests == {gctx((4, 0x10000, None), (1, 0x1000, A), (1, 0x2000, bytes(4096)), KVM_VMSA)}


def test_plan_when_all_contexts_are_at_kvms_gpa_leaves_them_to_kvm() -> None:
    data = A + VMSA + f.vmsa(rbx=7)
    headers = (f.page(0x1000, 0), f.context(f.KVM_GPA, 0x1000, 0), f.context(f.KVM_GPA, 0x2000, 1))
    made = plan(*headers, data=data, vcpus=2)
    assert (made.vmsa_mode, made.vcpus[1].rbx) == (VmsaMode.SYNC, 7)
    assert measure(made).digest == gctx((1, 0x1000, A), KVM_VMSA, (2, f.KVM_GPA, f.vmsa(rbx=7)))
    assert "but not one for each of 3 vCPUs in order" in refused(*headers, data=data, vcpus=3)
    elsewhere = f.context(0x9000, 0x1000, 2)
    assert "header 4 (VP_CONTEXT): several VP_CONTEXTs are at GPA 0xfffffffff000" in refused(
        *headers, elsewhere, data=data, vcpus=3
    )
    assert "but directives with pages follow" in refused(
        *headers, f.page(0x5000), data=data, vcpus=2
    )
    lost = bytearray(data)
    lost[0x2000 + 0xCB] = 3  # cpl, which KVM takes from SS
    sentence = refused(*headers, data=bytes(lost), vcpus=2)
    assert "header 3 (VP_CONTEXT)" in sentence
    assert "KVM can't carry cpl (offset 0xcb): 0x3 != 0x0" in sentence
    assert plan(*headers, data=bytes(lost), vcpus=2, order="kvm").vmsa_mode is VmsaMode.SYNC


def test_to_sync_when_memory_is_for_a_vmsa_alone_leaves_it_out() -> None:
    headers = (f.page(0xFFFFF000, AT_A), f.context(f.KVM_GPA, AT_VMSA))
    made = plan(*headers, memory=1 << 20)
    regions = [(0, 1 << 20), (0xFFFFF000, 0x1000)]
    assert [(m.gpa, m.size) for m in made.memory] == [*regions, (f.KVM_GPA, 0x1000)]
    assert [(m.gpa, m.size) for m in to_sync(made).plan.memory] == regions


def test_to_sync_when_a_plan_has_shared_pages_keeps_them() -> None:
    made = plan(f.page(0x1000, AT_A, flags=SHARED), f.context(0x9000, AT_VMSA))
    assert to_sync(made).plan.shared == made.shared


def test_plan_when_shared_pages_overlap_steps_is_refused() -> None:
    made = plan(f.page(0x1000, AT_A, flags=SHARED), f.page(0x2000, AT_A))
    moved = replace(made.shared[0], gpa=0x2000)
    with pytest.raises(FormatError, match="overlaps"):
        replace(made, shared=(moved,))
    with pytest.raises(FormatError, match="outside the guest's memory"):
        replace(made, shared=(replace(moved, gpa=1 << 40),))


def test_page_types_are_named_in_the_test() -> None:
    assert {t.name: int(t) for t in PageType} == {
        **{"NORMAL": 1, "VMSA": 2, "ZERO": 3, "UNMEASURED": 4, "SECRETS": 5, "CPUID": 6}
    }
