"""Checking reports against certificates that are right, and wrong in one thing."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding

from kvmlaunch.abi.report import AttestationReport
from kvmlaunch.attestation.certificates import read_certificates, read_crls
from kvmlaunch.attestation.result import Verdict
from kvmlaunch.attestation.verify import Expected, parse_min_tcb, verify_report
from kvmlaunch.errors import FormatError

from . import ca
from .ca import DAY, MILAN, NOW, Made

VLEK = 1 << 2
NO_CHIP = bytes(64)


def chain(product: str = "Milan", kind: str = "VCEK") -> list[Made]:
    """ARK, ASK (or ASVK), VCEK (or VLEK)."""
    middle = "VLEK-" if kind == "VLEK" else ""
    return [ca.ark(product), ca.ask(product, middle), ca.vcek(product, kind)]


def verify(
    raw: bytes,
    certificates: Sequence[Made],
    expected: Expected | None = None,
    *,
    crls: Sequence[bytes] = (),
    trust: bool = True,
    now: datetime.datetime = NOW,
    allow_simulated: bool = False,
) -> Verdict:
    loaded = [c for made in certificates for c in read_certificates(made.der)]
    roots = [c.key_digest for c in loaded if c.name.startswith("ARK")]
    return verify_report(
        AttestationReport.decode(raw),
        loaded,
        expected,
        now=now,
        crls=[crl for data in crls for crl in read_crls(data)],
        trusted=roots if trust else (),
        allow_simulated=allow_simulated,
    )


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.failed]


@pytest.mark.parametrize(
    ("raw", "certificates"),
    [
        (ca.report(), chain()),
        (ca.report(), chain()[::-1]),
        (ca.report(version=2, cpuid_fam_id=0, cpuid_mod_id=0, cpuid_step=0), chain()),
        (ca.turin_report(), chain("Turin")),
        (ca.report(cpuid_mod_id=0x11), chain("Genoa")),
        (ca.report(key_info=VLEK, chip_id=NO_CHIP), chain(kind="VLEK")),
        (ca.report(chip_id=NO_CHIP), chain()),
    ],
)
def test_report_when_right_passes_every_check(raw, certificates):
    verdict = verify(raw, certificates)
    assert failed(verdict) == []
    assert verdict.ok
    assert not verdict.is_simulated


def test_certificates_when_others_are_among_them_are_left_alone():
    others = [*chain("Genoa")[:2], replace(ca.ask(), subject="SEV-Milan", key=ca.rsa_key("x"))]
    assert failed(verify(ca.report(), [*others, *chain(), *chain()])) == []


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_chain_when_a_part_is_missing_is_bad_input(missing):
    certificates = chain()
    what = ("ARK", "ASK", "VCEK")[missing]
    del certificates[missing]
    with pytest.raises(FormatError, match=f"there is no certificate of the {what}"):
        verify(ca.report(), certificates)


def test_chain_when_there_are_two_vceks_is_bad_input():
    with pytest.raises(FormatError, match="there are 2 certificates of the VCEK"):
        verify(ca.report(), [*chain(), replace(ca.vcek(), key=ca.chip_key("other"))])


def test_chain_when_the_report_wants_a_vlek_does_not_take_the_vcek():
    with pytest.raises(FormatError, match="VLEK"):
        verify(ca.report(key_info=VLEK), chain())


@pytest.mark.parametrize(
    ("at", "wrong", "names"),
    [
        (0, {"signer": ca.rsa_key("x")}, ["ark_signature"]),
        (1, {"signer": ca.rsa_key("x")}, ["ask_signature"]),
        (2, {"signer": ca.rsa_key("x")}, ["vcek_signature"]),
        (0, {"issuer": "ARK-Other"}, ["ark_signature"]),
        (0, {"ca": False}, ["ark_signature", "ask_signature"]),
        (1, {"ca": False}, ["vcek_signature"]),
        (1, {"digest": hashes.SHA256()}, ["ask_signature"]),
        (2, {"pss": None}, ["vcek_signature"]),
        (2, {"pss": padding.PSS(padding.MGF1(hashes.SHA384()), 20)}, ["vcek_signature"]),
        (0, {"end": NOW - DAY / 2}, ["ark_validity"]),
        (1, {"end": NOW - DAY / 2}, ["ask_validity"]),
        (2, {"end": NOW - DAY / 2}, ["vcek_validity"]),
        (2, {"start": NOW + DAY / 2}, ["vcek_validity"]),
        (2, {"key": ca.chip_key("other")}, ["signature"]),
        (2, {"key": ec.generate_private_key(ec.SECP256R1())}, ["signature"]),
        (2, {"key": ca.rsa_key("x")}, ["signature"]),
        (2, {"extensions": MILAN | ca.spls({"3.1": 4})}, ["reported_tcb"]),
        (2, {"extensions": MILAN | ca.spls({"3.2": 1})}, ["reported_tcb"]),
        (2, {"extensions": MILAN | ca.spls({"3.3": 9})}, ["reported_tcb"]),
        (2, {"extensions": MILAN | ca.spls({"3.8": 255})}, ["reported_tcb"]),
        (2, {"extensions": MILAN | ca.spls({"3.9": 1})}, ["reported_tcb"]),
        (2, {"extensions": MILAN | {"3.8": b"\x02\x01\x80"}}, ["reported_tcb"]),
        (2, {"extensions": {**MILAN, "4": bytes(64)}}, ["chip_id"]),
        (2, {"extensions": {**MILAN, "4": ca.HWID[:8]}}, ["chip_id"]),
        (2, {"extensions": {**MILAN, "4": ca.HWID[:63]}}, ["chip_id"]),
        (2, {"extensions": {**MILAN, "4": b"\x05\x40" + ca.HWID}}, ["chip_id"]),
        (2, {"extensions": {}}, ["reported_tcb", "chip_id"]),
    ],
)
def test_chain_when_one_thing_is_wrong_fails_that_check(at, wrong, names):
    certificates = chain()
    certificates[at] = replace(certificates[at], **wrong)
    assert failed(verify(ca.report(), certificates)) == names


def test_chain_when_an_rsa_key_is_too_short_fails():
    small = ca.rsa_key("small", 2048)
    certificates = [ca.ark(), replace(ca.ask(), key=small), replace(ca.vcek(), signer=small)]
    assert failed(verify(ca.report(), certificates)) == ["vcek_signature"]


@pytest.mark.parametrize(
    ("der", "names"), [(b"\x02\x02\x00\x80", []), (b"\x02\x01\x80", ["reported_tcb"])]
)
def test_spl_when_its_top_bit_is_set_has_a_zero_before_it(der, names):
    leaf = replace(ca.vcek(), extensions={**MILAN, "3.8": der})
    assert failed(verify(ca.report(reported_tcb=0x80_08 << 48 | 3), [*chain()[:2], leaf])) == names


def test_signature_when_of_a_key_of_another_curve_fails():
    key = ec.generate_private_key(ec.SECP256R1())
    raw = ca.signed(ca.unsigned_report(), key)
    assert failed(verify(raw, [*chain()[:2], replace(ca.vcek(), key=key)])) == ["signature"]


def test_hwid_when_in_an_octet_string_is_taken():
    # 8.3: some certificates wrap it
    wrapped = replace(ca.vcek(), extensions={**MILAN, "4": b"\x04\x40" + ca.HWID})
    assert failed(verify(ca.report(), [*chain()[:2], wrapped])) == []


def test_root_when_nobody_knows_it_fails_and_shows_its_key():
    verdict = verify(ca.report(), chain(), trust=False)
    assert failed(verdict) == ["root"]
    assert read_certificates(ca.ark().der)[0].key_digest in verdict.failed[0].got


@pytest.mark.parametrize("trust", [False, True])
def test_chain_when_simulated_is_refused_unless_allowed(trust):
    made = [
        replace(c, subject=f"{c.subject} SIMULATED", issuer=f"{c.issuer} SIMULATED")
        for c in chain()
    ]
    refused = verify(ca.report(), made, trust=trust)
    assert failed(refused) == ["root"]
    assert refused.is_simulated
    taken = verify(ca.report(), made, trust=trust, allow_simulated=True)
    assert failed(taken) == []
    assert taken.is_simulated
    assert taken.notes[0].startswith("SIMULATED")


def test_chain_when_only_its_root_is_simulated_is_refused():
    made = [replace(ca.ark(), subject="ARK-SIMULATED", issuer="ARK-SIMULATED")]
    made += [replace(ca.ask(), issuer="ARK-SIMULATED"), ca.vcek()]
    assert failed(verify(ca.report(), made)) == ["root"]


# Every field

SPANS = ca.WORDS | ca.BYTES


@pytest.mark.parametrize("name", SPANS)
def test_signature_when_a_bit_of_a_field_flips_fails(name):
    offset, size = SPANS[name]
    for at in (offset, offset + size - 1):
        raw = bytearray(ca.turin_report())
        raw[at] ^= 0x80
        try:
            verdict = verify(bytes(raw), chain("Turin"))
        except FormatError:
            assert name == "key_info"  # another key, whose certificate isn't there
            continue
        assert failed(verdict)
        if name != "key_info":
            assert "signature" in failed(verdict)


@pytest.mark.parametrize("at", [0x4C, 0x18B, 0x1EB, 0x208, 0x29F])
def test_signature_when_a_reserved_bit_flips_fails(at):
    raw = bytearray(ca.report())
    raw[at] ^= 1
    assert failed(verify(bytes(raw), chain())) == ["signature"]


@pytest.mark.parametrize("at", [0x2A0, 0x2CF, 0x2E7, 0x2E8, 0x317, 0x330, 0x49F])
def test_signature_when_a_bit_of_itself_flips_fails(at):
    raw = bytearray(ca.report())
    raw[at] ^= 1
    assert failed(verify(bytes(raw), chain())) == ["signature"]


def test_signature_when_zero_fails():
    assert failed(verify(bytes(ca.unsigned_report()), chain())) == ["signature"]


def test_signature_when_of_another_algorithm_fails():
    verdict = verify(ca.report(signature_algo=2), chain())
    assert [(c.name, c.got) for c in verdict.failed] == [("signature", "algorithm 2")]


@pytest.mark.parametrize("key_info", [7 << 2, 3 << 2])
def test_report_when_no_known_key_signed_it_fails(key_info):
    assert failed(verify(ca.report(key_info=key_info), chain())) == ["signing_key"]


def test_product_when_the_chain_is_anothers_fails():
    verdict = verify(ca.report(cpuid_mod_id=0x11), chain())
    assert [str(c) for c in verdict.failed] == ["FAIL  product: got Genoa, expected Milan"]


def test_product_when_the_model_is_not_known_is_that_of_the_chain():
    verdict = verify(
        ca.turin_report(cpuid_mod_id=0x3F), chain("Turin"), Expected(min_tcb={"fmc": 2})
    )
    assert failed(verdict) == []
    assert "product" not in [check.name for check in verdict.checks]


# Expectations

WANTED = {
    "measurement": b"\1" * 48,
    "host_data": b"\2" * 32,
    "report_data": b"\3" * 64,
    "policy": 0xB0000,
    "id_key_digest": b"\4" * 48,
    "author_key_digest": b"\5" * 48,
    "family_id": b"\6" * 16,
    "image_id": b"\7" * 16,
    "guest_svn": 8,
    "vmpl": 3,
}


def test_fields_when_as_expected_pass():
    raw = ca.report(**WANTED)
    names = [check.name for check in verify(raw, chain(), Expected(**WANTED)).checks]
    assert names[-len(WANTED) :] == list(WANTED) or set(names) >= set(WANTED)
    assert verify(raw, chain(), Expected(**WANTED)).ok


@pytest.mark.parametrize("name", WANTED)
def test_field_when_not_as_expected_fails_with_both_values(name):
    verdict = verify(ca.report(), chain(), Expected(**{name: WANTED[name]}))
    value = WANTED[name]
    assert failed(verdict) == [name]
    text = value.hex() if isinstance(value, bytes) else hex(value)
    assert verdict.failed[0].expected == text


def test_field_when_nothing_was_measured_against_says_so():
    note = "no launch digest was given: this says nothing about what was launched"
    assert note in verify(ca.report(), chain()).notes
    digest = Expected(measurement=bytes(48))
    assert note not in verify(ca.report(), chain(), digest).notes


@pytest.mark.parametrize(("policy", "names"), [(0x30000, []), (0xB0000, ["policy_debug"])])
def test_no_debug_when_the_policy_allows_it_fails(policy, names):
    assert failed(verify(ca.report(policy=policy), chain(), Expected(no_debug=True))) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("bootloader=3,tee=0,snp=8,microcode=115", []),
        ("snp=8", []),
        ("bootloader=4", ["min_reported_tcb", "min_committed_tcb", "min_current_tcb"]),
        ("tee=1", ["min_reported_tcb", "min_committed_tcb", "min_current_tcb"]),
        ("snp=9", ["min_reported_tcb", "min_committed_tcb"]),
        ("microcode=116", ["min_reported_tcb"]),
        ("fmc=1", ["min_reported_tcb", "min_committed_tcb", "min_current_tcb"]),
        ("fmc=0", []),
    ],
)
def test_min_tcb_when_a_part_is_lower_fails(text, names):
    raw = ca.report(current_tcb=0x74_09 << 48 | 3, committed_tcb=0x74_08 << 48 | 3)
    verdict = verify(raw, chain(), Expected(min_tcb=parse_min_tcb(text)))
    assert failed(verdict) == names


@pytest.mark.parametrize(("text", "ok"), [("fmc=2", True), ("fmc=3", False), ("snp=5", False)])
def test_min_tcb_when_of_a_turin_knows_its_parts(text, ok):
    expected = Expected(min_tcb=parse_min_tcb(text))
    assert verify(ca.turin_report(), chain("Turin"), expected).ok is ok


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no part"),
        ("snp", "must be a number"),
        ("snp=", "must be a number"),
        ("snp=256", "must be a number"),
        ("snp=-1", "must be a number"),
        ("snp=0x8", "must be a number"),
        ("snp=\u0663", "must be a number"),
        ("snp=1,snp=1", "given twice"),
        ("ucode=1", "known are bootloader, fmc, microcode, snp, tee"),
    ],
)
def test_min_tcb_when_nonsense_is_format_error(text, why):
    with pytest.raises(FormatError, match=why):
        parse_min_tcb(text)


# Revocation


@pytest.mark.parametrize(
    ("crl", "names"),
    [
        (ca.crl(), []),
        (ca.crl(encoding=Encoding.PEM), []),
        (ca.crl((0x30001,)), []),
        (ca.crl((0x10001,)), ["ask_revocation"]),
        (ca.crl((0x10000, 0x10001)), ["ark_revocation", "ask_revocation"]),
        (ca.crl((1,)), []),  # the VCEK's number, but of another issuer
        (ca.crl(signer="x"), ["crl_signature"]),
        (ca.crl(end=NOW - DAY / 2), ["crl_validity"]),
        (ca.crl(start=NOW + DAY / 2), ["crl_validity"]),
        (ca.crl(issuer="ARK-Genoa"), ["revocation"]),
    ],
)
def test_revocation_when_a_list_is_given_is_checked(crl, names):
    assert failed(verify(ca.report(), chain(), crls=[crl])) == names


def test_verdict_when_written_as_json_has_every_check():
    written = verify(ca.report(), chain(), Expected(vmpl=1)).as_json()
    assert written["ok"] is False
    assert written["checks"][-1] == {
        "name": "vmpl",
        "ok": False,
        "got": "0x0",
        "expected": "0x1",
    }
