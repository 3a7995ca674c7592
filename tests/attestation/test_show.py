"""Every field of a report by its name (snp-firmware-abi 8.1, 8.2)."""

from __future__ import annotations

import json

import pytest

from kvmlaunch.abi.report import AttestationReport
from kvmlaunch.attestation.show import as_json, as_text, tcb_layout

from .ca import BYTES, TURIN_TCB, WORDS, report, turin_report, unsigned_report

V3 = {"cpuid_fam_id", "cpuid_mod_id", "cpuid_step"}
V5 = {"launch_mit_vector", "current_mit_vector"}


def decoded(raw: bytes) -> AttestationReport:
    return AttestationReport.decode(raw)


def test_text_when_each_field_has_its_own_value_shows_each():
    values = {name: bytes([n + 1]) * size for n, (name, (_, size)) in enumerate(BYTES.items())}
    numbers = {"guest_svn": 77, "vmpl": 2, "current_build": 41, "current_minor": 55,
               "current_major": 3, "committed_build": 42, "committed_minor": 56,
               "committed_major": 4}  # fmt: skip
    words = {"launch_mit_vector": 0xABC1, "current_mit_vector": 0xABC2, "platform_info": 0xA5}
    text = as_text(decoded(turin_report(**values, **numbers, **words)))
    rows = dict(line.split(None, 1) for line in text.splitlines() if line[0] != " ")
    assert {name: rows[name] for name in values} == {n: v.hex() for n, v in values.items()}
    assert {name: int(rows[name]) for name in numbers} == numbers
    assert {name: int(rows[name], 16) for name in words} == words
    assert rows["version"] == "5"
    assert rows["policy"] == "0x30000"
    assert rows["current_tcb"] == "0x5000000004010102 fmc=2,bootloader=1,tee=1,snp=4,microcode=80"
    assert "bit 2 ecc_en = 1" in text
    assert "bit 19 DEBUG = 0" in text
    assert "product Turin" in text


def test_text_when_version_2_has_no_later_fields():
    raw = report(version=2, cpuid_fam_id=0, cpuid_mod_id=0, cpuid_step=0)
    rows = {line.split()[0] for line in as_text(decoded(raw)).splitlines()}
    assert not rows & (V3 | V5)
    assert rows >= (set(WORDS) | set(BYTES)) - V3 - V5


@pytest.mark.parametrize(
    ("fields", "layout", "parts"),
    [
        # 8.2: byte 0 boot loader, 1 TEE, 6 SNP, 7 microcode
        ({"cpuid_mod_id": 0x01}, "Milan", (None, 1, 2, 7, 8)),
        ({"cpuid_mod_id": 0x11}, "Genoa", (None, 1, 2, 7, 8)),
        ({"cpuid_mod_id": 0xA0}, "Genoa", (None, 1, 2, 7, 8)),
        # 0 FMC, 1 boot loader, 2 TEE, 3 SNP, 7 microcode
        ({"cpuid_fam_id": 0x1A, "cpuid_mod_id": 0x11}, "Turin", (1, 2, 3, 4, 8)),
        ({"version": 2, "chip_id": b"\1" * 64}, "Milan", (None, 1, 2, 7, 8)),
        ({"version": 2, "chip_id": b"\1" * 8 + bytes(56)}, "Turin", (1, 2, 3, 4, 8)),
        ({"version": 2, "chip_id": bytes(64)}, "Milan", (None, 1, 2, 7, 8)),
    ],
)
def test_tcb_when_of_a_product_has_its_layout(fields, layout, parts):
    found = decoded(report(**{"reported_tcb": 0x0807060504030201, **fields}))
    assert tcb_layout(found) == layout
    shown = as_json(found)["fields"]["reported_tcb"]
    assert shown["value"] == "0x0807060504030201"
    names = ("fmc", "bootloader", "tee", "snp", "microcode")
    assert shown["parts"] == {n: v for n, v in zip(names, parts, strict=True) if v is not None}


def test_tcb_when_the_cpu_is_not_known_is_a_number_until_a_product_is_given():
    found = decoded(report(cpuid_fam_id=0x1B, reported_tcb=TURIN_TCB))
    assert as_json(found)["fields"]["reported_tcb"]["parts"] is None
    assert "note: the CPU is not known" in as_text(found)
    assert as_json(found, "Turin")["fields"]["reported_tcb"]["parts"]["fmc"] == 2


def test_notes_when_version_is_not_known_say_how_it_was_read():
    raw = unsigned_report(version=9, launch_mit_vector=5)
    raw[0x29F] = 1
    shown = as_json(decoded(bytes(raw)))
    assert shown["fields"]["launch_mit_vector"] == 5
    assert shown["notes"] == [
        "version 9 is not known: read as version 5, as far as that goes",
        "reserved bytes are not zero at 0x29f",
    ]


def test_notes_when_debugging_is_allowed_say_so():
    assert as_json(decoded(report(policy=0xB0000)))["notes"] == [
        "the policy allows debugging: the host can read this guest's memory"
    ]


def test_signature_when_it_is_none_is_shown_as_it_is():
    raw = report()[:-1] + b"\1"
    assert "bytes behind S are not zero" in as_text(decoded(raw))


@pytest.mark.parametrize(
    ("key_info", "key"), [(0, "VCEK"), (4, "VLEK"), (0x1C, "NONE"), (0x0C, "not known (3)")]
)
def test_key_info_names_the_signing_key(key_info, key):
    assert as_json(decoded(report(key_info=key_info)))["signing_key"] == key


def test_json_when_numbers_are_large_has_them_as_text():
    shown = as_json(decoded(turin_report(launch_mit_vector=1 << 63, guest_svn=1 << 31)))
    assert shown["fields"]["launch_mit_vector"] == "0x8000000000000000"
    assert shown["fields"]["guest_svn"] == 1 << 31
    json.dumps(shown)
