"""--explain's answer: nothing found, the limit, its words, one VMSA, and what is hashed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch import PlanOptions, explain_digest, explain_vmsa, load_image, load_vmm, measure
from kvmlaunch.errors import FormatError
from kvmlaunch.hashing import backends, hasher
from kvmlaunch.hashing.plain import PlainHasher
from kvmlaunch.images import VmsaChoice
from kvmlaunch.launch import variants
from tests.images.builders import AMDSEV_SECTIONS, metadata_bytes
from tests.images.builders import ovmf as ovmf_image
from tests.launch.launched import (
    AMDSEV,
    CAA,
    HASHES,
    MILAN,
    NO_FCW,
    NO_FPU,
    NORMAL,
    PAGE,
    SEC_MEM,
    TYPES,
    UNMEASURED,
    VMSA_GPA,
    VMSA_GPA_52,
    VMSA_TYPE,
    ZERO,
    Page,
    chain,
    firmware,
    flat,
    igvm_file,
    kernel_options,
    metadata,
    names,
    pages_of,
    patched,
    state_pages,
    vmsas,
)

# Nothing to find, and the limit


def test_predicted_digest_when_asked_for_is_called_that() -> None:
    found = explain_digest(load_image(AMDSEV), chain([*firmware(), *metadata(), *vmsas()]))
    assert found.causes == ()
    assert str(found) == "that is the predicted digest"


def test_digest_when_nothing_explains_it_counts_and_names_suspects(tmp_path: Path) -> None:
    plan, options = flat(tmp_path)
    found = explain_digest(plan, bytes(48), options)
    assert not found
    assert found.complete
    assert str(found.tried) in str(found).splitlines()[0]
    assert "limit" not in str(found)
    assert any("image's bytes" in suspect for suspect in found.suspects)
    assert any("--load-addr" in suspect for suspect in found.suspects)


@pytest.mark.parametrize(
    ("options", "suspect"),
    [
        (PlanOptions(), "a kernel, initrd and command line whose hashes were launched (--kernel)"),
        (kernel_options(), "the bytes of --kernel and --initrd, and --append"),
        (PlanOptions(firmware_digest=bytes(47) + b"\1"), "the firmware's digest"),
    ],
)
def test_suspects_when_nothing_is_found_are_those_of_the_launch(
    options: PlanOptions, suspect: str
) -> None:
    found = explain_digest(load_image(AMDSEV, options), bytes(48), options, most=100)
    assert suspect in found.suspects


def test_suspects_when_the_image_is_an_igvm_file_are_its_own() -> None:
    plan, _ = igvm_file(PlanOptions(), early=True)
    found = explain_digest(plan, bytes(48))
    assert found.complete
    assert "--order, in which a loader takes the file's directives" in found.suspects
    assert not any("--load-addr" in text or "--vmm-type" in text for text in found.suspects)


def test_search_when_it_meets_its_limit_says_so() -> None:
    found = explain_digest(load_image(AMDSEV), bytes(48), most=1000)
    assert 1000 <= found.tried < 2000
    assert not found.complete
    assert "the limit" in str(found)


def test_search_when_its_last_candidate_is_beyond_the_limit_does_not_find_it() -> None:
    digest = chain([*firmware(), *metadata(), *vmsas(features=0x21, fields=NO_FPU)])
    assert not explain_digest(load_image(AMDSEV), digest, most=1000)
    assert explain_digest(load_image(AMDSEV), digest)


@pytest.mark.parametrize("size", [0, 32, 47, 49])
def test_digest_when_it_has_another_size_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match=f"a launch digest is 48 bytes, not {size}"):
        explain_digest(load_image(AMDSEV), bytes(size))


def test_plan_when_kvm_would_refuse_a_state_is_refused() -> None:
    plan = load_image(AMDSEV)
    plan = dataclasses.replace(plan, vcpus=(plan.vcpus[0].replace(dr7=0x401),))
    with pytest.raises(FormatError, match="dr7"):
        explain_digest(plan, bytes(48), most=100)


def test_progress_when_wanted_counts_up_to_the_total(tmp_path: Path) -> None:
    plan, options = flat(tmp_path)
    seen: list[tuple[int, int]] = []
    explain_digest(
        plan,
        bytes(48),
        options,
        most=60_000,
        progress=lambda tried, total: seen.append((tried, total)),
    )
    assert [tried for tried, _ in seen] == sorted(tried for tried, _ in seen)
    assert len(seen) >= 100
    assert all(tried <= total + 600 for tried, total in seen)


# Words


def test_words_when_all_can_be_typed_are_the_options() -> None:
    digest = chain([*firmware(), *metadata(), *vmsas(4, features=0x21)])
    lines = str(explain_digest(load_image(AMDSEV), digest)).splitlines()
    assert lines[0] == "--vcpus 4 --guest-features 0x21 gives this digest:"
    assert lines[1] == "  vCPUs: 4, not 1"
    assert "Linux 6.6 and 6.7" in lines[2]


PROFILES: dict[str, tuple[Callable[[], list[Page]], str]] = {
    "pages-and-gpa": (
        lambda: [*firmware(), *metadata({SEC_MEM: UNMEASURED}), *vmsas(gpa=VMSA_GPA_52)],
        "QEMU",
    ),
    "order": (lambda: [*metadata(), *firmware(), *vmsas()], "QEMU"),
    "all-zero-pages": (
        lambda: [
            *firmware(),
            *metadata({SEC_MEM: NORMAL, CAA: NORMAL, HASHES: NORMAL}),
            *vmsas(),
        ],
        "QEMU",
    ),
    "no-fcw": (lambda: [*firmware(), *metadata(), *vmsas(fields=NO_FCW)], "QEMU"),
    "vmm-and-type": (
        lambda: [*firmware(), *metadata({CAA: NORMAL}, cpuid_last=True), *vmsas(vmm="ec2")],
        "ec2",
    ),
    "no-fpu-and-type": (
        lambda: [*firmware(), *metadata({CAA: UNMEASURED}), *vmsas(fields=NO_FPU)],
        "QEMU",
    ),
}


@pytest.mark.parametrize("planted", PROFILES)
def test_profile_when_shown_gives_the_digest_as_a_file(tmp_path: Path, planted: str) -> None:
    pages, base = PROFILES[planted]
    digest = chain(pages())
    lines = str(explain_digest(load_image(AMDSEV), digest)).splitlines()
    assert lines[-2] == "as far as it can be typed: --vmm-type FILE.json"
    text = lines[-1].removeprefix("FILE.json: ")
    assert json.loads(text)["base"] == base
    path = tmp_path / "FILE.json"
    path.write_text(text)
    assert measure(load_image(AMDSEV, PlanOptions(vmm=load_vmm(str(path))))).digest == digest


def test_profile_when_a_section_has_no_name_says_other(tmp_path: Path) -> None:
    sections = [(0x800000, 0x1000, 1), (0x801000, 0x1000, 0x77)]
    image = ovmf_image(metadata=metadata_bytes(sections))
    plan = load_image(image)
    pages = [
        (UNMEASURED if gpa == 0x801000 else kind, gpa, data) for kind, gpa, data in pages_of(plan)
    ]
    found = explain_digest(plan, chain([*pages, *state_pages(plan)]))
    path = tmp_path / "FILE.json"
    path.write_text(str(found).splitlines()[-1].removeprefix("FILE.json: "))
    assert measure(load_image(image, PlanOptions(vmm=load_vmm(str(path))))).digest == chain(
        [*pages, *state_pages(plan)]
    )


def test_profile_when_that_was_a_users_has_no_base(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"format": "kvmlaunch.vmm/1", "name": "own", "base": "ec2", "svsm": false}')
    options = PlanOptions(vmm=load_vmm(str(path)))
    digest = chain([*firmware(), *metadata(cpuid_last=True), *vmsas(vmm="ec2", gpa=VMSA_GPA_52)])
    found = explain_digest(load_image(AMDSEV, options), digest, options)
    assert (
        str(found).splitlines()[-1]
        == 'to change in the VMM profile: {"vmsa_gpa": "0xffffffffff000"}'
    )


def test_words_when_two_options_are_the_same_one_are_a_profile(tmp_path: Path) -> None:
    alioth = load_image(AMDSEV, PlanOptions(vmm=load_vmm("alioth")))
    page = patched(alioth.vcpus[0].encode(), NO_FPU)
    digest = chain([*pages_of(alioth), (VMSA_TYPE, VMSA_GPA, page)])
    *_, typed, text = str(explain_digest(load_image(AMDSEV), digest)).splitlines()
    assert typed == "as far as it can be typed: --vmm-type FILE.json"
    path = tmp_path / "FILE.json"
    path.write_text(text.removeprefix("FILE.json: "))
    assert measure(load_image(AMDSEV, PlanOptions(vmm=load_vmm(str(path))))).digest == digest


def test_option_when_typed_gives_the_digest() -> None:
    digest = chain([*firmware(), *metadata(cpuid_last=True), *vmsas(4, vmm="ec2", features=0x21)])
    found = explain_digest(load_image(AMDSEV), digest)
    assert found.causes is not None
    assert [cause.option for cause in found.causes] == (
        ["--vcpus 4", "--guest-features 0x21", "--vmm-type ec2"]
    )
    options = PlanOptions(vcpus=4, sev_features=0x21, vmm=load_vmm("ec2"))
    assert explain_digest(load_image(AMDSEV, options), digest, options).causes == ()


# One VMSA


def fits(page: bytes) -> Callable[[bytes], bool]:
    return lambda other: other == page


@pytest.mark.parametrize(
    ("vcpu", "page", "expected"),
    [
        (0, vmsas(features=0x21)[0][2], {("SEV_FEATURES", "0x21")}),
        (1, vmsas(2, signature=MILAN)[1][2], {("CPU signature", "0xa00f11 (EPYC-Milan)")}),
        (1, vmsas(2, vmm="ec2")[1][2], {("VMM", "ec2")}),
        (
            0,
            vmsas(features=0x21, fields=NO_FPU)[0][2],
            {("SEV_FEATURES", "0x21"), ("MXCSR and X87_FCW", "0x0, 0x0")},
        ),
        (0, vmsas()[0][2], set()),
    ],
)
def test_vmsa_when_another_page_fits_is_explained(
    vcpu: int, page: bytes, expected: set[tuple[str, str]]
) -> None:
    options = PlanOptions(vcpus=2)
    assert names(explain_vmsa(load_image(AMDSEV, options), vcpu, fits(page), options)) == expected


def test_vmsa_when_pages_are_in_another_order_is_that_of_the_vcpu() -> None:
    choices = (VmsaChoice(vcpu=None), VmsaChoice(vcpu=1), VmsaChoice(vcpu=0))
    options = PlanOptions(vcpus=2, vmsas=choices)
    page = vmsas(2, features=0x21)[1][2]
    assert page is not None
    plan = load_image(AMDSEV, options)
    assert names(explain_vmsa(plan, 1, fits(page), options)) == {("SEV_FEATURES", "0x21")}
    assert not explain_vmsa(plan, 0, fits(page), options)


def test_vmsa_when_the_vcpu_has_none_is_not_explained() -> None:
    options = PlanOptions(vcpus=2, vmsas=(VmsaChoice(),))
    found = explain_vmsa(load_image(AMDSEV, options), 1, lambda page: True, options)
    assert (bool(found), found.tried) == (False, 0)


def test_vmsa_when_no_page_fits_is_not_explained() -> None:
    found = explain_vmsa(load_image(AMDSEV), 0, lambda page: False)
    assert not found
    assert found.tried > 1000


# Speed: what is hashed


class Counting(PlainHasher):
    """Counts the pages whose contents are hashed."""

    def __init__(self) -> None:
        self.pages = 0

    def _contents(self, data: memoryview, out: memoryview, threads: int) -> None:
        self.pages += data.nbytes // PAGE
        super()._contents(data, out, threads)


def test_pages_when_many_launches_are_tried_are_hashed_once() -> None:
    counted = []
    for most in (20_000, 80_000):
        counting = Counting()
        explain_digest(load_image(AMDSEV), bytes(48), most=most, hasher=counting)
        counted.append(counting.pages)
    zero = sum(size // PAGE for _, size, section in AMDSEV_SECTIONS if TYPES[section] == ZERO)
    # Those that can be NORMAL zeros are hashed as such.
    assert counted == [len(firmware()) + zero] * 2


def test_vmsas_when_many_launches_are_tried_are_hashed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bytes] = []
    plain = variants.page_contents

    def counting(kind: Any, page: bytes) -> bytes:
        seen.append(page)
        return plain(kind, page)

    monkeypatch.setattr(variants, "page_contents", counting)
    found = explain_digest(load_image(AMDSEV), bytes(48), most=80_000)
    assert len(seen) == len(set(seen))
    assert len(seen) < found.tried / 20


@pytest.mark.parametrize("name", backends())
def test_backend_when_chosen_finds_the_same(name: str) -> None:
    digest = chain([*metadata(), *firmware(), *vmsas(5)])
    found = explain_digest(load_image(AMDSEV), digest, hasher=hasher(name))
    assert names(found) == {("vCPUs", "5"), ("order of pages", "metadata, firmware")}
