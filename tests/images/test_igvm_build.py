"""IGVM files that are built: what a plan says survives, and the file is as small as it can be."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import FormatError
from kvmlaunch.images import (
    LaunchPlan,
    PageRange,
    Piece,
    PlanOptions,
    VmsaMode,
    load_image,
    load_vmm,
    to_sync,
)
from kvmlaunch.images.igvm.build import ParameterChoice, build, for_igvm
from kvmlaunch.images.igvm.format import HeaderType
from kvmlaunch.launch.measure import measure
from tests.images import igvm_files as f
from tests.images.builders import Seg, elf64, ovmf
from tests.images.test_igvm_plan import id_block

IMAGES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "flat": (b"\xf4" * 5000, {}),
    "elf": (elf64([Seg(0x100000, f.pattern(1), memsz=0x5000), Seg(0x180010, b"x" * 99)]), {}),
    "ovmf": (ovmf(), {}),
    "ovmf-hashes": (ovmf(), {"kernel": b"k" * 9000, "initrd": b"i", "append": "quiet"}),
}


def built(plan: LaunchPlan, *args: Any, **options: Any) -> bytes:
    return b"".join(bytes(part) for part in build(plan, *args, **options))


def said(plan: LaunchPlan) -> tuple[Any, ...]:
    """What an IGVM file says of a plan: pages, VMSAs, policy, ID block."""
    pages = [(s.gpa + n * 4096, s.type, bytes(s.page(n))) for s, n in plan.pages()]
    shared = [(s.gpa + n * 4096, bytes(s.page(n))) for s in plan.shared for n in range(s.npages)]
    identity = (plan.id_block, plan.id_auth, plan.author_key_enabled)
    start = (plan.policy, plan.sev_features, dict(plan.bindings), plan.vmsa_mode)
    return pages, shared, identity, start


def reloaded(plan: LaunchPlan, *args: Any, native_zero: bool = False, **how: Any) -> LaunchPlan:
    data = built(plan, *args, native_zero=native_zero, **how)
    memory = sum(region.size for region in plan.memory if region.label.startswith("ram"))
    options = PlanOptions(vcpus=len(plan.vcpus), memory=memory, native_zero=native_zero)
    return load_image(data, options)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mode", ["page", "direct"])
def test_build_when_an_image_has_a_vmsa_keeps_all_and_its_digest(
    name: str, version: int, mode: str
) -> None:
    data, options = IMAGES[name]
    image = load_image(data, PlanOptions(vmsa_mode=mode, vcpus=2, policy=0xB0000, **options))
    # Pages of type ZERO are those without data.
    plan = for_igvm(replace(image, vmsa_mode=VmsaMode.DIRECT), native_zero=True)
    again = reloaded(plan, native_zero=True, version=version)
    assert said(again) == said(plan)
    assert measure(again) == measure(image)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("vcpus", [1, 2, 5])
def test_build_when_kvm_makes_the_vmsas_has_them_and_the_same_digest(name: str, vcpus: int) -> None:
    data, options = IMAGES[name]
    image = load_image(data, PlanOptions(vcpus=vcpus, **options))
    again = reloaded(for_igvm(image, native_zero=True), native_zero=True)
    assert measure(again).digest == measure(image).digest
    # One VMSA at KVM's GPA can be a page of ours; several there are for KVM to make.
    assert again.vmsa_mode is (VmsaMode.DIRECT if vcpus == 1 else VmsaMode.SYNC)
    assert measure(to_sync(again).plan).digest == measure(image).digest


def test_build_when_an_image_has_zero_pages_makes_them_normal_as_most_loaders_do() -> None:
    image = load_image(IMAGES["elf"][0], PlanOptions(vmsa_mode="direct"))
    plan = for_igvm(image)
    assert {step.type for step in image.steps} > {PageType.ZERO}
    assert PageType.ZERO not in {step.type for step in plan.steps}
    again = reloaded(plan)
    assert said(again) == said(plan)
    assert measure(again).digest == measure(plan).digest != measure(image).digest


def test_build_when_pages_are_equal_stores_them_once_and_zeros_never() -> None:
    data = f.pattern(1) * 20 + bytes(4096) * 20 + f.pattern(2)
    plan = for_igvm(load_image(data, PlanOptions(vmsa_mode="direct")))
    # 41 PAGE_DATA of 32 bytes, a platform and a policy of 24, a VP_CONTEXT of 32; three pages.
    assert len(built(plan)) == 24 + 41 * 32 + 2 * 24 + 32 + 3 * 4096
    assert said(reloaded(plan)) == said(plan)


def test_build_is_deterministic() -> None:
    plan = for_igvm(load_image(IMAGES["elf"][0], PlanOptions(vmsa_mode="direct")))
    assert built(plan) == built(plan)


def test_build_when_nothing_has_data_has_some_all_the_same() -> None:
    plan = for_igvm(load_image(bytes(4096)))
    file = built(replace(plan, vmsa_mode=VmsaMode.DIRECT, vcpus=plan.vcpus))
    variable_end = sum(struct.unpack_from("<II", file, 8))
    # Microsoft's parser wants the file to go on behind the headers.
    assert variable_end < len(file)


@pytest.mark.parametrize("version", [1, 2])
def test_build_checksum_is_that_of_fixed_and_variable_headers(version: int) -> None:
    file = built(for_igvm(load_image(b"\xf4")), version=version)
    fixed = {1: 24, 2: 32}[version]
    offset, size, total, checksum = struct.unpack_from("<IIII", file, 8)
    assert (offset, total) == (fixed, len(file))
    head = file[:20] + bytes(4) + file[24:fixed]
    assert checksum == zlib.crc32(head + file[fixed : fixed + size])


KINDS = ("VP_COUNT_PARAMETER", "MEMORY_MAP", "MADT", "COMMAND_LINE")
AREA = ParameterChoice(0x80000, tuple(HeaderType[name] for name in KINDS))


def test_build_when_parameters_are_asked_for_inserts_them_first() -> None:
    image = load_image(b"\xf4", PlanOptions(vmsa_mode="direct", vcpus=3))
    plan = for_igvm(image, [AREA], command_line="a=b")
    # Rooms of 0x10, 0x300, 0x2000 and 0x800 bytes, in whole pages.
    assert [(s.gpa, s.size, s.type) for s in plan.steps[:1]] == [
        (0x80000, 0x3000, PageType.UNMEASURED)
    ]
    data = built(plan, [AREA])
    again = load_image(data, PlanOptions(image_type="igvm", vcpus=3, append="a=b"))
    assert said(again) == said(plan)
    # They are the launch's at hand.
    other = load_image(data, PlanOptions(image_type="igvm", vcpus=9, append="c"))
    assert bytes(other.steps[0].page(0))[:4] == b"\x09\0\0\0"
    assert measure(other) == measure(again)


def test_build_when_pages_are_shared_keeps_them() -> None:
    headers = [
        *(
            f.platform(),
            f.page(0x1000, 0),
            f.page(0x2000, 0, flags=4),
            f.error_range(0x8000, 0x2000),
        ),
        f.context(0x9000 + 0x3000, 0x1000),
    ]
    plan = load_image(f.igvm(headers, f.pattern(1) + f.vmsa()))
    assert said(reloaded(for_igvm(plan))) == said(plan)


def test_build_when_there_is_an_id_block_keeps_it() -> None:
    headers = [f.platform(), f.policy(0xB0000), f.page(0x1000, 0), f.context(0x9000, 0x1000)]
    plan = load_image(f.igvm([*headers, (0x30B, id_block())], f.pattern(1) + f.vmsa()))
    assert said(reloaded(for_igvm(plan))) == said(plan)
    assert plan.id_block is not None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"confidential": False}, "is made of an SNP guest's plan"),
    "another-vmm": ({"vmm": load_vmm("ec2")}, "the VMSAs are those of ec2"),
    "firmware-digest": ({"firmware_digest": b"d" * 48}, "needs the firmware, not only its digest"),
    "host-data": ({"host_data": bytes(31) + b"\1"}, "has no host data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_for_igvm_when_a_file_cant_say_it_is_refused(name: str) -> None:
    changes, sentence = REFUSED[name]
    with pytest.raises(FormatError, match=sentence):
        for_igvm(load_image(ovmf(), PlanOptions(**changes)))


def test_for_igvm_when_a_vmsa_is_nobodys_is_refused() -> None:
    plan = load_image(b"\xf4", PlanOptions(vmsa_mode="direct"))
    with pytest.raises(FormatError, match="vmsa 0 at GPA 0x2000: a VP_CONTEXT is some vCPU's"):
        for_igvm(replace(plan, bindings={}))


def test_for_igvm_when_an_area_is_outside_memory_is_refused() -> None:
    with pytest.raises(FormatError, match=r"parameters 0 \(.*\) is outside the guest's memory"):
        for_igvm(load_image(b"\xf4"), [ParameterChoice(1 << 40, (HeaderType.VP_COUNT_PARAMETER,))])


def test_for_igvm_when_an_area_is_where_pages_are_is_refused() -> None:
    with pytest.raises(FormatError, match="overlaps"):
        for_igvm(load_image(b"\xf4"), [ParameterChoice(0x1000, (HeaderType.VP_COUNT_PARAMETER,))])


def test_for_igvm_when_a_value_is_too_large_is_refused() -> None:
    area = ParameterChoice(0x80000, (HeaderType.COMMAND_LINE,))
    with pytest.raises(FormatError, match="COMMAND_LINE needs 0x1001 bytes, there are 0x800"):
        for_igvm(load_image(b"\xf4"), [area], command_line="x" * 0x1000)


def test_for_igvm_when_parameters_come_from_another_file_is_refused() -> None:
    headers = [f.platform(), f.area(0), f.parameter(0x307, 0), f.insert(0x1000, 0)]
    with pytest.raises(FormatError, match="parameters of another IGVM file would become fixed"):
        for_igvm(load_image(f.igvm(headers, bytes(8))))


def test_build_when_the_policies_differ_is_refused() -> None:
    plan = load_image(b"\xf4", PlanOptions(id_block=bytes(96), id_auth=bytes(4096)))
    with pytest.raises(FormatError, match="policy 0x0 is not the launch's, 0x30000"):
        built(for_igvm(plan))


def test_build_when_the_version_is_unknown_is_refused() -> None:
    with pytest.raises(FormatError, match="IGVM format version 3 is neither 1 nor 2"):
        built(for_igvm(load_image(b"\xf4")), version=3)


# Any plan.

PAGE_TYPES = [PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED, PageType.SECRETS, PageType.CPUID]
MEMORY = 1 << 20


@st.composite
def plans(draw: st.DrawFn) -> LaunchPlan:
    """Plans with pages of all types in any order, shared ones, and VMSAs between them."""
    gpas = draw(st.lists(st.integers(0, 63).map(lambda n: n * 0x4000), min_size=1, unique=True))
    vcpus = draw(st.integers(1, 4))
    steps, shared, bindings = [], [], {}
    for gpa in gpas:
        npages = draw(st.integers(1, 3))
        contents = draw(st.lists(st.integers(0, 4), min_size=npages, max_size=npages))
        data = b"".join(f.pattern(n) if n else bytes(4096) for n in contents)
        pieces = (Piece(0, memoryview(data), "made"),)
        what = draw(st.sampled_from([*PAGE_TYPES, "shared", "vmsa"]))
        if what == "shared":
            shared.append(PageRange(gpa, len(data), PageType.NORMAL, "shared", "made", pieces))
        elif what == "vmsa":
            if len(bindings) == vcpus or gpa % (2 << 20) == 0:
                continue
            page = (Piece(0, memoryview(f.vmsa(rbx=gpa)), "made"),)
            bindings[len(bindings)] = gpa
            steps.append(PageRange(gpa, 4096, PageType.VMSA, "vmsa", "made", page))
        else:
            has_data = what in (PageType.NORMAL, PageType.UNMEASURED)
            steps.append(
                PageRange(gpa, len(data), what, "pages", "made", pieces if has_data else ())
            )
    image = load_image(b"\xf4", PlanOptions(vcpus=vcpus, memory=MEMORY))
    mode = VmsaMode.DIRECT if bindings else VmsaMode.SYNC
    policy = 0x30000 | draw(st.integers(0, 0xFFFF)) | draw(st.sampled_from([0, 1 << 19]))
    return replace(
        image,
        steps=tuple(steps),
        shared=tuple(shared),
        bindings=bindings,
        vmsa_mode=mode,
        policy=policy,
    )


@settings(max_examples=150, deadline=None)
@given(plans(), st.sampled_from([1, 2]), st.booleans())
def test_build_when_any_plan_is_built_it_survives(
    plan: LaunchPlan, version: int, native_zero: bool
) -> None:
    wanted = for_igvm(plan, native_zero=native_zero)
    again = reloaded(wanted, version=version, native_zero=native_zero)
    assert measure(again).digest == measure(wanted).digest
    if wanted.vmsa_mode is VmsaMode.DIRECT:
        assert said(again) == said(wanted)
    else:
        # The file has the VMSAs that KVM would make.
        assert said(to_sync(again).plan)[:3] == said(wanted)[:3]
