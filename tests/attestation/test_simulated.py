"""Reports of the simulated secure processor, of every product, key and version, as a verifier sees
them: two witnesses that share no code but the formats."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from kvmlaunch.abi.report import AttestationReport, SigningKey
from kvmlaunch.abi.tcb import Product, Tcb
from kvmlaunch.attestation.certificates import Certificate, read_certificates
from kvmlaunch.attestation.result import Verdict
from kvmlaunch.attestation.verify import verify_report
from kvmlaunch.sim.firmware_profiles import firmware_profile
from tests.messages import opened, report_req, sealed
from tests.sim.rig import Rig

from . import ca

MASK_CHIP_ID, MASK_CHIP_KEY = 1, 2
KINDS = {SigningKey.VCEK: 1, SigningKey.VLEK: 2}  # KEY_SEL, snp-firmware-abi 8.4


@pytest.fixture(autouse=True)
def _few_rsa_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([ca.rsa_key(name) for name in ("ark", "ask", "x")] * 9)
    monkeypatch.setattr(rsa, "generate_private_key", lambda *_: next(keys))


def host(product: Product = "Milan", version: int = 3) -> Rig:
    profile = replace(firmware_profile(product), report_version=version, mit_vector=version)
    rig = Rig(profile)
    rig.psp.vlek_load(b"V" * 432)
    return rig


def report(rig: Rig, kind: SigningKey) -> AttestationReport:
    gctx = rig.finished()
    key = rig.psp.context(gctx).vmpck[0]
    request = sealed(key, report_req(key_sel=KINDS[kind]), seqno=1, msg_vmpck=0)
    _, page = rig.request(gctx, request)
    _, answer = opened(key, page)
    return AttestationReport.decode(answer[0x20:])


def certificates(rig: Rig, kind: SigningKey) -> list[Certificate]:
    chain = rig.psp.certificate_chain(kind)
    assert chain is not None
    return read_certificates(chain.table())


def verify(found: AttestationReport, chain: list[Certificate]) -> Verdict:
    return verify_report(found, chain, allow_simulated=True)


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.failed]


@pytest.mark.parametrize("version", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_report_when_simulated_verifies(product: Product, kind: SigningKey, version: int) -> None:
    rig = host(product, version)
    found = report(rig, kind)
    verdict = verify(found, certificates(rig, kind))
    assert (found.version, failed(verdict)) == (version, [])
    assert verdict.is_simulated
    assert failed(verify_report(found, certificates(rig, kind))) == ["root"]


def test_report_when_of_another_host_does_not_verify() -> None:
    verdict = verify(report(host(), SigningKey.VCEK), certificates(host(), SigningKey.VCEK))
    assert failed(verdict) == ["signature"]


def test_report_when_the_reported_tcb_went_down_needs_that_vcek() -> None:
    rig = host()
    before = certificates(rig, SigningKey.VCEK)
    assert rig.psp.config(Tcb(bootloader=3, snp=7, microcode=115).encode("Milan"), 0) == 0
    found = report(rig, SigningKey.VCEK)
    assert failed(verify(found, before)) == ["signature", "reported_tcb"]
    assert failed(verify(found, certificates(rig, SigningKey.VCEK))) == []


def test_report_when_the_chip_is_masked_verifies_by_its_signature() -> None:
    rig = host()
    assert rig.psp.config(0, MASK_CHIP_ID) == 0
    verdict = verify(report(rig, SigningKey.VCEK), certificates(rig, SigningKey.VCEK))
    assert failed(verdict) == []
    assert any("CHIP_ID is masked" in note for note in verdict.notes)


def test_report_when_the_key_is_masked_is_nobodys() -> None:
    rig = host()
    chain = certificates(rig, SigningKey.VCEK)
    assert rig.psp.config(0, MASK_CHIP_KEY) == 0
    assert failed(verify(report(rig, SigningKey.VCEK), chain)) == ["signing_key"]
