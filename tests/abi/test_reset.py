from __future__ import annotations

import hashlib

import pytest

from kvmlaunch.abi.reset import (
    BSP_EIP,
    VCPU_TYPES,
    kvm_untouched,
    qemu_reset,
    vcpu_signature,
    vcpu_type_signature,
)
from kvmlaunch.abi.vmsa import Segment, Vmsa
from kvmlaunch.errors import FormatError

from . import vectors

AP_EIP = 0x80B004


@pytest.mark.parametrize("name", vectors.QEMU_VMSAS)
def test_qemu_reset_page_has_published_hash(name: str) -> None:
    eip, signature, features, expected = vectors.QEMU_VMSAS[name]
    page = qemu_reset(eip, signature=signature, sev_features=features).encode()
    assert hashlib.sha384(page).hexdigest() == expected


@pytest.mark.parametrize("eip", [BSP_EIP, AP_EIP, 0x12345678])
@pytest.mark.parametrize("features", [0x0, 0x1, 0x21, 0x201])
@pytest.mark.parametrize("vcpu_type", ["EPYC-v4", "EPYC-Rome", "EPYC-Milan", "EPYC-Turin"])
def test_qemu_reset_page_equals_sev_snp_measure(vcpu_type: str, features: int, eip: int) -> None:
    pytest.importorskip("sevsnpmeasure")
    from sevsnpmeasure import vcpu_types, vmm_types, vmsa  # type: ignore[import-untyped]

    signature = vcpu_types.CPU_SIGS[vcpu_type]
    theirs = vmsa.VMSA.build_save_area(eip, features, signature, vmm_types.VMMType.QEMU)
    ours = qemu_reset(eip, signature=VCPU_TYPES[vcpu_type], sev_features=features)
    assert ours.encode() == bytes(theirs)


def test_vcpu_types_have_those_of_sev_snp_measure() -> None:
    pytest.importorskip("sevsnpmeasure")
    from sevsnpmeasure.vcpu_types import CPU_SIGS  # type: ignore[import-untyped]

    assert {name: VCPU_TYPES.get(name) for name in CPU_SIGS} == CPU_SIGS


# The EPYC models in `qemu-system-x86_64 -device help` of a QEMU that has EPYC-Turin.
QEMU_MODELS = """
EPYC EPYC-IBPB EPYC-v1 EPYC-v2 EPYC-v3 EPYC-v4 EPYC-v5
EPYC-Rome EPYC-Rome-v1 EPYC-Rome-v2 EPYC-Rome-v3 EPYC-Rome-v4 EPYC-Rome-v5
EPYC-Milan EPYC-Milan-v1 EPYC-Milan-v2 EPYC-Milan-v3
EPYC-Genoa EPYC-Genoa-v1 EPYC-Genoa-v2 EPYC-Turin EPYC-Turin-v1
"""


def test_vcpu_types_are_all_epyc_models_of_qemu() -> None:
    assert sorted(VCPU_TYPES) == sorted(QEMU_MODELS.split())


def test_vcpu_types_when_only_their_version_differs_have_one_signature() -> None:
    for name, signature in VCPU_TYPES.items():
        family = name.split("-v")[0].removesuffix("-IBPB")
        assert signature == VCPU_TYPES[family]


@pytest.mark.parametrize(
    ("name", "near"),
    [("epyc-milan", "EPYC-Milan, "), ("EPYC-Turin-v2", "EPYC-Turin-v1, "), ("Genoa", "EPYC-Genoa")],
)
def test_vcpu_type_when_unknown_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(FormatError, match=f"unknown CPU type '{name}'; near to it: {near}"):
        vcpu_type_signature(name)


def test_vcpu_type_when_like_none_names_all() -> None:
    with pytest.raises(FormatError, match="unknown CPU type 'i486'; known are EPYC, EPYC-v1, "):
        vcpu_type_signature("i486")


@pytest.mark.parametrize(
    ("vcpu_type", "signature"),
    # snp-firmware-abi.md 3.5
    [
        ("EPYC", 0x800F12),
        ("EPYC-v4", 0x800F12),
        ("EPYC-IBPB", 0x800F12),
        ("EPYC-Rome", 0x830F10),
        ("EPYC-Milan-v2", 0xA00F11),
        ("EPYC-Genoa", 0xA10F10),
        ("EPYC-Turin", 0xB00F00),
    ],
)
def test_vcpu_type_has_published_signature(vcpu_type: str, signature: int) -> None:
    assert VCPU_TYPES[vcpu_type] == signature


def test_vcpu_signature_of_family_6_has_no_extended_family() -> None:
    # KVM's fallback 0x600 is family 6, model 0, stepping 0
    assert vcpu_signature(6, 0, 0) == 0x600


@pytest.mark.parametrize("values", [(271, 0, 0), (-1, 0, 0), (23, 256, 0), (23, 0, 16)])
def test_vcpu_signature_out_of_range_is_format_error(values: tuple[int, int, int]) -> None:
    with pytest.raises(FormatError):
        vcpu_signature(*values)


def test_bsp_eip_is_the_reset_vector() -> None:
    assert BSP_EIP == 0xFFFFFFF0


def test_qemu_reset_of_ap_splits_eip_into_base_and_rip() -> None:
    vmsa = qemu_reset(AP_EIP, signature=0, sev_features=1)
    assert (vmsa.cs.base, vmsa.rip) == (0x800000, 0xB004)


@pytest.mark.parametrize("bad", [{"eip": 1 << 32}, {"signature": 1 << 32}])
def test_qemu_reset_out_of_range_names_the_argument(bad: dict[str, int]) -> None:
    arguments = {"eip": 0, "signature": 0, "sev_features": 1} | bad
    with pytest.raises(FormatError, match=next(iter(bad))):
        qemu_reset(
            arguments["eip"],
            signature=arguments["signature"],
            sev_features=arguments["sev_features"],
        )


@pytest.mark.parametrize(
    ("name", "value"),
    # kernel-snp-abi.md 5.3
    [
        ("es", Segment(attrib=0x92, limit=0xFFFF)),
        ("ss", Segment(attrib=0x92, limit=0xFFFF)),
        ("ds", Segment(attrib=0x92, limit=0xFFFF)),
        ("fs", Segment(attrib=0x92, limit=0xFFFF)),
        ("gs", Segment(attrib=0x92, limit=0xFFFF)),
        ("cs", Segment(0xF000, 0x9A, 0xFFFF, 0xFFFF0000)),
        ("ldtr", Segment(attrib=0x82, limit=0xFFFF)),
        ("tr", Segment(attrib=0x83, limit=0xFFFF)),
        ("gdtr", Segment(limit=0xFFFF)),
        ("idtr", Segment(limit=0xFFFF)),
        ("efer", 0x1000),
        ("cr4", 0x40),
        ("cr0", 0x10),
        ("dr6", 0xFFFF0FF0),
        ("dr7", 0x400),
        ("rflags", 0x2),
        ("rip", 0xFFF0),
        ("rdx", 0x600),
        ("g_pat", 0x0007040600070406),
        ("xcr0", 1),
        ("mxcsr", 0x1F80),
        ("x87_fcw", 0x37F),
        ("sev_features", 1),
    ],
)
def test_kvm_untouched_field_is_that_of_the_kernel(name: str, value: int | Segment) -> None:
    assert kvm_untouched(sev_features=0).get(name) == value


def test_kvm_untouched_has_no_other_fields() -> None:
    names = [
        "es",
        "ss",
        "ds",
        "fs",
        "gs",
        "cs",
        "ldtr",
        "tr",
        "gdtr",
        "idtr",
        "efer",
        "cr4",
        "cr0",
        "dr6",
        "dr7",
        "rflags",
        "rip",
        "rdx",
        "g_pat",
        "xcr0",
        "mxcsr",
        "x87_fcw",
        "sev_features",
    ]
    vmsa = kvm_untouched(sev_features=0)
    assert vmsa.replace(**{n: getattr(Vmsa(), n) for n in names}) == Vmsa()


def test_kvm_untouched_adds_snp_active_to_features() -> None:
    assert kvm_untouched(sev_features=0x20).sev_features == 0x21
