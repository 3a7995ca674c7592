"""VMM profiles: those of the package, files of a user's own, and each refusal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.reset import kvm_untouched, qemu_reset
from kvmlaunch.abi.vmsa import VMSA_FIELDS, diff
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images import VmmProfile, load_image, load_vmm
from kvmlaunch.images.options import PlanOptions
from kvmlaunch.images.vmm import BUILT_IN, default_vmm
from kvmlaunch.images.vmm_file import parse_vmm
from kvmlaunch.launch.measure import measure
from tests.images.builders import ovmf

FOLDER = Path(load_vmm.__code__.co_filename).parent / "vmms"
AP_EIP = 0x80B004
SIGNATURE = 0xA00F11

SMALL: dict[str, Any] = {
    "format": "kvmlaunch.vmm/1",
    "name": "mine",
    "pages": ["firmware", "metadata"],
    "sections": {
        "sec-mem": "ZERO",
        "secrets": "SECRETS",
        "cpuid": "CPUID",
        "svsm-caa": "ZERO",
        "kernel-hashes": "ZERO",
        "other": "ZERO",
    },
    "registers": {"cs.selector": "0xf000", "rdx": "signature", "rflags": 2},
    "bsp": {},
    "ap": {},
}
MINE: dict[str, Any] = {"format": "kvmlaunch.vmm/1", "name": "mine", "base": "QEMU"}


def profile(data: dict[str, Any], **changes: Any) -> VmmProfile:
    """A profile of a file; a change to None takes a key away."""
    merged = {**copy.deepcopy(data), **changes}
    return parse_vmm(json.dumps(merged).encode())


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != key}


def states(vmm: VmmProfile, count: int = 2, features: int = 1) -> Any:
    return vmm.states(count, signature=SIGNATURE, sev_features=features, reset_eip=AP_EIP)


# The package's


def test_default_profile_is_that_of_its_file_but_for_texts() -> None:
    usual = default_vmm()
    texts = {"description": usual.description, "sources": usual.sources}
    assert usual == load_vmm("QEMU").replace(**texts)


def test_profiles_when_listed_are_those_of_the_folder() -> None:
    assert sorted(BUILT_IN) == sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_profile_when_loaded_has_the_name_of_its_file(name: str) -> None:
    vmm = load_vmm(name)
    assert vmm.name == name
    assert vmm.description


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("change", [str.lower, str.upper])
def test_profile_when_named_in_another_case_is_the_same(name: str, change: Any) -> None:
    assert load_vmm(change(name)) == load_vmm(name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_profile_when_it_gives_a_value_gives_its_source(name: str) -> None:
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    sources = load_vmm(name).sources
    for key in raw.keys() - {"format", "name", "description", "base", "sources"}:
        parts = raw[key] if isinstance(raw[key], dict) and key != "registers" else {"": None}
        for part in raw["registers"] if key == "registers" else parts:
            assert {key, f"{key}.{part}"} & sources.keys(), f"{key}.{part}"


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "QEMU"])
def test_profile_when_it_differs_from_its_base_says_why_itself(name: str) -> None:
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    for key in raw.keys() - {"format", "name", "description", "base", "sources"}:
        own = raw["sources"]
        assert any(source.split(".")[0] == key for source in own), key


def test_qemu_when_on_mainline_is_the_reset_state_of_the_fact_sheet() -> None:
    first, other = states(load_vmm("QEMU"), features=0x21)
    assert first == qemu_reset(0xFFFFFFF0, signature=SIGNATURE, sev_features=0x21)
    assert other == qemu_reset(AP_EIP, signature=SIGNATURE, sev_features=0x21)


def test_qemu_when_on_an_older_kernel_differs_in_the_fpu_only() -> None:
    pairs = zip(states(load_vmm("QEMU")), states(load_vmm("QEMU-before-6.10")), strict=True)
    for new, old in pairs:
        assert [(d.name, d.a, d.b) for d in diff(new, old)] == [
            ("mxcsr", 0x1F80, 0),
            ("x87_fcw", 0x37F, 0),
        ]


def test_kvm_when_nobody_touched_a_vcpu_is_its_reset_state_everywhere() -> None:
    vmm = load_vmm("kvm")
    found = vmm.states(3, signature=SIGNATURE, sev_features=1, reset_eip=None)
    assert found == (kvm_untouched(sev_features=1),) * 3


def test_ec2_when_compared_with_its_variant_differs_in_rdx_only() -> None:
    for new, old in zip(states(load_vmm("ec2")), states(load_vmm("ec2-rdx0")), strict=True):
        assert [(d.name, d.a, d.b) for d in diff(new, old)] == [("rdx", 0x600, 0)]


def test_alioth_when_its_vcpus_are_made_has_what_its_source_sets() -> None:
    """google/alioth c78f8bd: firmware_amd64.rs, and sev_init_ap's round trip through KVM."""
    first, other = states(load_vmm("alioth"))
    for state, code in ((first, 0x9A), (other, 0x9B)):
        attribs = [getattr(state, name).attrib for name in ("cs", "ds", "ss", "tr", "ldtr")]
        assert attribs == [code, 0x93, 0x92, 0x83, 0x82]
        assert (state.rdx, state.cr0, state.mxcsr) == (0x600, 0x10, 0x1F80)
    assert (other.cs.base, other.rip) == (0x800000, 0xB004)


def test_alioth_when_planned_launches_metadata_first_and_unmeasured() -> None:
    plan = load_image(ovmf(), PlanOptions(vmm=load_vmm("alioth")))
    assert [(step.label, step.type.name) for step in plan.steps] == [
        ("sec-mem", "UNMEASURED"),
        ("sec-mem", "UNMEASURED"),
        ("secrets", "SECRETS"),
        ("cpuid", "CPUID"),
        ("svsm-caa", "ZERO"),
        ("kernel-hashes", "ZERO"),
        ("sec-mem", "UNMEASURED"),
        ("firmware", "NORMAL"),
    ]


def test_ec2_when_planned_launches_the_cpuid_page_last() -> None:
    plan = load_image(ovmf(), PlanOptions(vmm=load_vmm("ec2")))
    labels = [step.label for step in plan.steps]
    assert (labels[0], labels[-1], labels.count("cpuid")) == ("firmware", "cpuid", 1)


def test_krun_when_several_vcpus_are_asked_for_is_refused() -> None:
    with pytest.raises(ImageError, match="the VMM profile krun knows one vCPU only"):
        load_image(ovmf(), PlanOptions(vmm=load_vmm("krun"), vcpus=2))


def test_gce_when_on_genoa_measures_at_the_52_bit_gpa() -> None:
    plan = load_image(ovmf(), PlanOptions(vmm=load_vmm("gce-genoa")))
    assert plan.vmsa_gpa == 0xFFFFFFFFFF000
    assert load_vmm("gce-genoa").sections == load_vmm("gce").sections


@pytest.mark.parametrize("name", ["alioth", "krun", "kvm"])
def test_kernel_when_the_vmm_has_no_hashes_is_refused(name: str) -> None:
    with pytest.raises(ImageError, match=f"{name} launches no kernel hashes"):
        load_image(ovmf(), PlanOptions(vmm=load_vmm(name), kernel=b""))


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "QEMU"])
def test_digest_when_the_vmm_differs_differs(name: str) -> None:
    other = measure(load_image(ovmf(), PlanOptions(vmm=load_vmm(name))))
    assert other.digest != measure(load_image(ovmf())).digest


# A user's own


def test_profile_when_it_has_no_base_has_only_what_it_says() -> None:
    vmm = profile(SMALL)
    first, other = states(vmm)
    assert (first.cs.selector, first.cs.base, first.rip) == (0xF000, 0xFFFF0000, 0xFFF0)
    assert (other.cs.base, other.rip) == (0x800000, 0xB004)
    assert (first.rdx, first.rflags, first.efer, first.g_pat) == (SIGNATURE, 2, 0, 0)
    assert (vmm.as_given, vmm.vmsa_gpa) == (True, 0xFFFFFFFFF000)
    assert (vmm.kernel_hashes, vmm.svsm) == (False, False)


def test_profile_when_it_has_a_base_differs_only_where_it_says() -> None:
    first, other = states(profile(MINE, registers={"rsi": "0x7000"}, ap={"cs.attrib": 0x9A}))
    qemu = states(load_vmm("QEMU"))
    assert [d.name for d in diff(qemu[0], first)] == ["rsi"]
    assert [d.name for d in diff(qemu[1], other)] == ["cs.attrib", "rsi"]


def test_profile_when_it_says_something_for_all_goes_before_its_bases_bsp() -> None:
    first, other = states(profile({**MINE, "base": "ec2"}, registers={"cs.attrib": 0x93}))
    assert (first.cs.attrib, other.cs.attrib) == (0x93, 0x93)


@pytest.mark.parametrize(
    ("eip", "base", "rip"),
    [
        ("reset-vector", 0xFFFF0000, 0xFFF0),
        ("reset-block", 0x800000, 0xB004),
        ("0x12345678", 0x12340000, 0x5678),
        (0x1000, 0, 0x1000),
    ],
)
def test_eip_when_given_is_split_into_base_and_rip(eip: Any, base: int, rip: int) -> None:
    first = states(profile(SMALL, bsp={"eip": eip}))[0]
    assert (first.cs.base, first.rip) == (base, rip)


def test_signature_when_a_number_takes_its_place_is_gone() -> None:
    assert states(profile(MINE, registers={"rdx": 5}))[0].rdx == 5
    assert states(profile({**MINE, "base": "ec2"}, bsp={"rdx": "signature"}))[0].rdx == SIGNATURE


def test_registers_when_wide_take_hex() -> None:
    text = "00112233445566778899" * 8
    assert states(profile(SMALL, bsp={"fpreg_x87": text}))[0].fpreg_x87 == bytes.fromhex(text)


def test_reset_block_when_the_first_vcpu_needs_one_that_is_missing_is_refused() -> None:
    vmm = profile(SMALL, bsp={"eip": "reset-block"})
    with pytest.raises(FormatError, match="has no SEV-ES reset block to start vCPUs at"):
        vmm.states(1, signature=0, sev_features=1, reset_eip=None)


def test_file_when_named_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SMALL))
    assert load_vmm(str(path)) == profile(SMALL)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "not JSON: line 1: Expecting value"),
        (b"{", "not JSON: line 1: Expecting property name enclosed in double quotes"),
        (b"\xff", "not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "not JSON: "),
        (b'{"name": ' + b"9" * 5000 + b"}", "not JSON: "),
        (b"[]", "the file: not a JSON object"),
        (b'{"format": "kvmlaunch.vmm/1", "format": 1}', "format: it is there twice"),
        (b'{"registers": {"rdx": 1, "rdx": 2}}', "rdx: it is there twice"),
        (bytes(1 << 20 | 1), "a VMM profile has at most 1 MiB"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_file_when_it_is_no_object_of_json_is_refused(
    tmp_path: Path, text: bytes, sentence: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text)
    with pytest.raises(ImageError) as caught:
        load_vmm(str(path))
    assert str(caught.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(caught.value)


def test_file_when_it_has_a_key_twice_among_very_many_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    keys = [f'"{n:x}":0' for n in range(100_000)]
    path.write_text("{" + ",".join([*keys, keys[-1]]) + "}")
    with pytest.raises(ImageError, match="1869f: it is there twice"):
        load_vmm(str(path))


@pytest.mark.parametrize("name", ["/nosuch.json", "nosuch.json", "/", "a\0.json"])
def test_file_when_it_cannot_be_read_is_refused_by_name(name: str) -> None:
    with pytest.raises(ImageError, match="can't be read: "):
        load_vmm(name)


@pytest.mark.parametrize(
    ("name", "near"), [("qemu-before-6.1", "near to it: QEMU-before-6.10"), ("xen", "'xen'; known")]
)
def test_name_when_unknown_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(FormatError, match=f"unknown VMM {name!r}|") as caught:
        load_vmm(name)
    assert near in str(caught.value)
    assert "known are QEMU, " in str(caught.value)


BAD = [
    ({"format": "kvmlaunch.vmm/2"}, "format: 'kvmlaunch.vmm/2' is not 'kvmlaunch.vmm/1'"),
    ({"format": None}, "format: None is not 'kvmlaunch.vmm/1'"),
    ({"name": ""}, "name: '' is not a text"),
    ({"name": None}, "name: missing"),
    ({"description": 1}, "description: 1 is not a text"),
    ({"colour": 1}, "colour: unknown key, known are format, name, "),
    ({"base": "mine"}, "base: 'mine' is none of QEMU, "),
    ({"base": 1}, "base: 1 is not a text"),
    ({"pages": ["firmware"]}, "pages: not a list of 'firmware', 'metadata' and perhaps 'cpuid'"),
    ({"pages": "firmware"}, "pages: not a list of"),
    ({"pages": ["firmware", "metadata", "cpuid", "cpuid"]}, "pages: not a list of"),
    ({"pages": [["firmware"], "metadata"]}, "pages: not a list of"),
    ({"sections": []}, "sections: not a JSON object"),
    ({"sections": {"sec-mem": "ZEROES"}}, "sections.sec-mem: 'ZEROES' is none of NORMAL, ZERO, "),
    ({"sections": {"sec-mem": "VMSA"}}, "sections.sec-mem: 'VMSA' is none of NORMAL, ZERO, "),
    ({"sections": {"sec-mem": 3}}, "sections.sec-mem: 3 is none of NORMAL, ZERO, "),
    ({"sections": {"sec_mem": "ZERO"}}, "sections.sec_mem: unknown key, known are sec-mem, "),
    ({"registers": 1}, "registers: not a JSON object"),
    ({"registers": {"rsy": 1}}, "registers.rsy: a VMSA has no field 'rsy'; close are "),
    ({"registers": {"cs.atrib": 1}}, "registers.cs.atrib: a VMSA has no field 'cs.atrib'; close"),
    (
        {"registers": {"cs.attrib": "0x10000"}},
        "registers.cs.attrib: 0x10000 does not fit in 16 bits",
    ),
    ({"registers": {"rsi": 1 << 64}}, "registers.rsi: 0x10000000000000000 does not fit in 64 bits"),
    ({"registers": {"rsi": -1}}, "registers.rsi: -0x1 does not fit in 64 bits"),
    ({"registers": {"rsi": 1.0}}, "registers.rsi: 1.0 is not a number"),
    ({"registers": {"rsi": True}}, "registers.rsi: True is not a number"),
    ({"registers": {"rsi": None}}, "registers.rsi: None is not a number"),
    ({"registers": {"rsi": "1_0"}}, "registers.rsi: '1_0' is not a number"),
    ({"registers": {"rsi": "0b1"}}, "registers.rsi: '0b1' is not a number"),
    ({"registers": {"rsi": "signature"}}, "registers.rsi: 'signature' is not a number"),
    ({"registers": {"cs": "0x9b"}}, "registers.cs: can't be given, name its parts, as cs.attrib"),
    ({"registers": {"ds": 1}}, "registers.ds: can't be given, name its parts, as cs.attrib"),
    ({"registers": {"cs.base": 0}}, "registers.cs.base: can't be given, it follows from eip"),
    ({"registers": {"rip": 0}}, "registers.rip: can't be given, it follows from eip"),
    ({"registers": {"sev_features": 1}}, "sev_features: can't be given, it is the guest's"),
    ({"registers": {"eip": 1}}, "registers.eip: a VMSA has no field 'eip'"),
    ({"registers": {"fpreg_xmm": "00"}}, "registers.fpreg_xmm: 1 bytes, must be 256"),
    ({"registers": {"fpreg_xmm": "zz"}}, "registers.fpreg_xmm: 'zz' is not hex"),
    ({"registers": {"fpreg_xmm": 5}}, "registers.fpreg_xmm: 5 is not hex"),
    ({"bsp": None}, "bsp: null, but every guest has a first vCPU"),
    ({"bsp": {"eip": "reset"}}, "bsp.eip: 'reset' is not a number"),
    ({"bsp": {"eip": 1 << 32}}, "bsp.eip: 0x100000000 does not fit in 32 bits"),
    ({"ap": {"cs.attrib": -1}}, "ap.cs.attrib: -0x1 does not fit in 16 bits"),
    ({"ap": []}, "ap: not a JSON object"),
    ({"kernel_hashes": 1}, "kernel_hashes: 1 is not true or false"),
    ({"svsm": "yes"}, "svsm: 'yes' is not true or false"),
    ({"vmsa_gpa": 1}, "vmsa_gpa: 0x1 is not aligned to 4 KiB"),
    ({"vmsa_gpa": "0x10000000000000"}, "vmsa_gpa: 0x10000000000000 does not fit in 52 bits"),
    ({"vmsa_gpa": "top"}, "vmsa_gpa: 'top' is not a number"),
    ({"measured": "exactly"}, "measured: 'exactly' is not 'as-given' or 'kvm'"),
    ({"measured": ["kvm"]}, "measured: ['kvm'] is not 'as-given' or 'kvm'"),
    ({"a\nb": 1}, r"'a\nb': unknown key, known are format, "),
    ({"registers": {"a\nb": 1}}, r"registers.'a\nb': no name of a VMSA field"),
    (
        {"registers": {"rsi": "1" * 99}},
        "registers.rsi: '111111111111...1111111111111' is not a num",
    ),
    ({"sources": {"rdx": "here"}}, "sources.rdx: a profile has no such value"),
    ({"sources": {"registers": 1}}, "sources.registers: 1 is not a text"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("base", ["alone", "on QEMU"])
def test_profile_when_a_value_breaks_its_rule_is_refused_by_key(
    base: str, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(FormatError) as caught:
        profile(SMALL if base == "alone" else MINE, **change)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("key", ["pages", "sections", "registers", "bsp", "ap"])
def test_profile_when_a_key_is_missing_and_there_is_no_base_is_refused(key: str) -> None:
    with pytest.raises(FormatError, match=f"{key}: missing, and there is no base that has it"):
        profile(without(SMALL, key))


def test_section_when_missing_and_there_is_no_base_is_refused() -> None:
    sections = without(SMALL["sections"], "svsm-caa")
    with pytest.raises(
        FormatError, match=r"sections\.svsm-caa: missing, and there is no base that"
    ):
        profile(SMALL, sections=sections)


def test_ap_when_the_base_does_not_know_it_cannot_be_changed() -> None:
    krun = {**MINE, "base": "krun"}
    assert profile(krun).ap is None
    with pytest.raises(FormatError, match="ap: the base doesn't know it, so it can't be changed"):
        profile(krun, ap={"rdx": 1})


# Property tests

SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        inner
        | st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    )


JSON = nested(nested(SCALAR))
KEYS = st.sampled_from(
    [*SMALL, "base", "description", "kernel_hashes", "svsm", "vmsa_gpa", "measured", "sources"]
)
NUMBERS = {field.name: field.size * 8 for field in VMSA_FIELDS if field.size <= 8}.items() - {
    ("rip", 64),
    ("sev_features", 64),
}


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_bytes_when_arbitrary_are_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_vmm(raw)


@settings(max_examples=200, deadline=None)
@given(KEYS, JSON, st.sampled_from([SMALL, MINE]))
def test_profile_when_a_value_is_arbitrary_is_read_or_refused(
    key: str, value: Any, data: dict[str, Any]
) -> None:
    try:
        vmm = profile(data, **{key: value})
    except FormatError as error:
        sentence = str(error)
    else:
        sentence = repr(states(vmm, 1) and "read")
    assert "\n" not in sentence
    assert len(sentence) < 400


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["registers", "bsp", "ap"]),
    st.dictionaries(st.text(max_size=8) | st.sampled_from(["rdx", "cs.attrib", "eip"]), JSON),
)
def test_registers_when_arbitrary_are_read_or_refused(key: str, value: dict[str, Any]) -> None:
    try:
        profile(MINE, **{key: value})
    except FormatError as error:
        sentence = str(error)
    else:
        sentence = ""
    assert "\n" not in sentence
    assert len(sentence) < 400


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(NUMBERS)).flatmap(
        lambda row: st.tuples(st.just(row[0]), st.integers(0, (1 << row[1]) - 1))
    ),
    st.booleans(),
)
def test_register_when_it_fits_is_taken_as_number_and_as_text(
    register: tuple[str, int], as_text: bool
) -> None:
    name, value = register
    state = states(profile(SMALL, bsp={name: hex(value) if as_text else value}))[0]
    assert state.get(name) == value


@settings(max_examples=100, deadline=None)
@given(
    st.permutations(["firmware", "metadata", "cpuid"]),
    st.dictionaries(
        st.sampled_from(list(SMALL["sections"])),
        st.sampled_from([kind.name for kind in PageType if kind is not PageType.VMSA]),
    ),
)
def test_plan_when_pages_and_types_are_any_has_every_page_once(
    pages: list[str], sections: dict[str, str]
) -> None:
    vmm = profile(MINE, pages=pages, sections=sections)
    plan = load_image(ovmf(), PlanOptions(vmm=vmm))
    usual = load_image(ovmf())
    assert sorted((s.gpa, s.size) for s in plan.steps) == sorted(
        (s.gpa, s.size) for s in usual.steps
    )
    kinds = [
        "firmware" if s.label == "firmware" else "cpuid" if s.label == "cpuid" else "metadata"
        for s in plan.steps
    ]
    assert [kind for kind in pages if kind in kinds] == list(dict.fromkeys(kinds))
    assert all(
        s.type.name == sections.get(s.label, usual.step_at(s.gpa).type.name)  # type: ignore[union-attr]
        for s in plan.steps
    )
