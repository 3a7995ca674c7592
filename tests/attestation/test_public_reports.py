"""Real reports of Milan, Genoa and Turin verify against their chains (snp-firmware-abi 8.6)."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvmlaunch.abi.report import AttestationReport
from kvmlaunch.attestation.certificates import Certificate, read_certificates
from kvmlaunch.attestation.chain import AMD_ROOTS
from kvmlaunch.attestation.result import Verdict
from kvmlaunch.attestation.source import find_report
from kvmlaunch.attestation.verify import Expected, verify_report
from tests.cli.command import Cli

from .public import Public

_VS = "virtee/sev"
_GSG = "google/go-sev-guest"
_COCO = "confidential-containers/trustee"
_OAK = "project-oak/oak"

VS_REPORT = Public(
    _VS,
    "tests/certs_data/report_milan.hex",
    "3d956e9104969a038031a6b63dd6c4b60000619d37702065994f7da76f88ae7d",
)
VS_VCEK = Public(
    _VS,
    "tests/certs_data/vcek_milan.der",
    "3bbfb6ee259f75a95d13168cfdf2e034181bb93c7c016825731cbe8ea16c95e1",
)
VS_MILAN = Public(
    _VS,
    "tests/certs_data/cert_chain_milan",
    "22e62f8d2c21a156470145fc75f7b5a377cb053ced3e97f0bd3f8d8ca5941ce6",
)
VS_TURIN_VCEK = Public(
    _VS,
    "tests/certs_data/vcek_turin.der",
    "a4a6abff1c435f214cfbc35e4dadae55e467454d53dc417251b3ff1a169fd7fb",
)
GSG_REPORT = Public(
    _GSG,
    "verify/testdata/attestation.bin",
    "377e6241d3b373ab1df80c0f96978594e7e21f4797dd6ea95e2957e1c1e26060",
)
GSG_VCEK = Public(
    _GSG,
    "verify/testdata/vcek.testcer",
    "0d057f9b6e29a69eda9c0154b259567d291c1c08d73a11e9d31ace07c435b6d8",
)
GSG_MILAN = Public(
    _GSG,
    "verify/testdata/milan.testcer",
    "22e62f8d2c21a156470145fc75f7b5a377cb053ced3e97f0bd3f8d8ca5941ce6",
)
GSG_GENOA = Public(
    _GSG,
    "verify/trust/ask_ark_genoa.pem",
    "e6ecc853fa56d3170a624d40851f98a1036f974b50204ea69e6aec91d777aca3",
)
GSG_TURIN = Public(
    _GSG,
    "verify/trust/ask_ark_turin_vcek.pem",
    "cc9a52fbed3fbc6e4a0a50149a541a75938f975658909c2a6084767829b36e85",
)
GSG_MILAN_VLEK = Public(
    _GSG,
    "verify/trust/ask_ark_milan_vlek.pem",
    "3098f7e90ee7049b8cf116448d1bdf33b08847b4250bd99507cf73b5c49d3467",
)
COCO_REPORT = Public(
    _COCO,
    "deps/verifier/test_data/snp/test-report.bin",
    "7c614616feb65823351fa42620ea260fb84fd22b2337a480ca0d5f04f363ca38",
)
COCO_VCEK = Public(
    _COCO,
    "deps/verifier/test_data/snp/test-vcek.der",
    "3430987528a9feebc90c1ba5cfac5849926ace82ae652a1bbf464d33bdc36d45",
)
COCO_VLEK_REPORT = Public(
    _COCO,
    "deps/verifier/test_data/snp/test-vlek-report.bin",
    "decdab949afc590668e45869b20f23e4afc7ac03c61201ab20208c6668a58a2d",
)
COCO_VLEK = Public(
    _COCO,
    "deps/verifier/test_data/snp/test-vlek.der",
    "296a7c99053efe4b1e480bb76d421fd24633d245f3e34708399a18a7713b7a7c",
)
COCO_AZURE_MILAN = Public(
    _COCO,
    "deps/verifier/test_data/az-snp-vtpm/evidence-v0.json",
    "e4ac29fca03236f00d862c28f3c614c11959163b241c5b0dc0633de2d589bf09",
)
COCO_AZURE_GENOA = Public(
    _COCO,
    "deps/verifier/test_data/az-snp-vtpm/evidence-genoa.json",
    "81c1fd5491d1523a25ee6cb6d5385b7e2eb99777533f359492cffa6596451990",
)
COCO_MILAN = Public(
    _COCO,
    "deps/verifier/src/snp/milan_ask_ark_asvk.pem",
    "cc871f0d2294176386175d9b5b962e18556b15ec13f55f8698b5f7a07aebf0c7",
)
OAK_TURIN = Public(
    _OAK,
    "oak_attestation_verification/testdata/turin_oc_evidence.binarypb",
    "c0edcb33cfdae31473834c4723d1c7630cacc257cbf9edb3ce17c63b6d6c0da8",
)
OAK_TURIN_VCEK = Public(
    _OAK,
    "oak_attestation_verification/testdata/turin_oc_endorsements.binarypb",
    "586b4c4f96f777d713697f13b1572ce530c552f818edae87f0a1ba90f3cf1f38",
)
OAK_GENOA = Public(
    _OAK,
    "oak_attestation_verification/testdata/genoa_oc_evidence.binarypb",
    "cb3d5288dfbf6a82a2206167de725f52df7d2032bfc0c860bd982387c7473127",
)
OAK_GENOA_VCEK = Public(
    _OAK,
    "oak_attestation_verification/testdata/genoa_oc_endorsements.binarypb",
    "397218ba887a1ad95c97b97529a2194a739e6e80b213f46e357cb35d11515640",
)

# What these reports are inside of: Azure's HCL report (32 bytes before it) in JSON, and Oak's
# protocol buffers (a field of 1184 bytes at 6, the VCEK at 9 of the endorsements).
_HCL, _OAK_REPORT, _OAK_VCEK = 32, 8, 9
_SIZE = 1184


@dataclass(frozen=True)
class Real:
    """A report, its certificates, and what was said of it elsewhere."""

    report: Public
    leaf: Public
    chain: Public
    version: int
    product: str | None
    tcb: str
    measurement: str = ""
    day: datetime.date = datetime.date(2025, 6, 1)

    @property
    def raw(self) -> bytes:
        data = self.report.read()
        if self.report.path.endswith(".json"):
            return bytes(json.loads(data)["report"])[_HCL : _HCL + _SIZE]
        if self.report.path.endswith(".binarypb"):
            return data[_OAK_REPORT : _OAK_REPORT + _SIZE]
        return find_report(data)

    @property
    def leaf_file(self) -> bytes:
        data = self.leaf.read()
        if self.leaf.path.endswith(".json"):
            text: str = json.loads(data)["vcek"]
            return text.encode()
        if self.leaf.path.endswith(".binarypb"):
            size = int.from_bytes(data[_OAK_VCEK + 2 : _OAK_VCEK + 4], "big") + 4
            return data[_OAK_VCEK : _OAK_VCEK + size]
        return data

    @property
    def certificates(self) -> list[Certificate]:
        return read_certificates(self.leaf_file) + read_certificates(self.chain.read())

    def verify(self, raw: bytes | None = None, expected: Expected | None = None) -> Verdict:
        return verify_report(
            AttestationReport.decode(self.raw if raw is None else raw),
            self.certificates,
            expected,
            now=datetime.datetime.combine(self.day, datetime.time(), datetime.timezone.utc),
        )


REAL = {
    "milan-v2-virtee": Real(
        VS_REPORT,
        VS_VCEK,
        VS_MILAN,
        2,
        None,
        "bootloader=3,tee=0,snp=8,microcode=115",
        "7a1e5c266c0108dbc9bb94fa926951320940915d0aafb42464bd88b579ea158d"
        "3e1a0dc39b2c60bd95b9c480cd81841f",
    ),
    "milan-v2-google": Real(
        GSG_REPORT,
        GSG_VCEK,
        GSG_MILAN,
        2,
        None,
        "bootloader=2,tee=0,snp=5,microcode=68",
        "b07af9620f3b839b47996422ddec6058338951d984e312115131ea82705eaf5b"
        "6bdf8a9ece31a5a608eb0cf2e4872b01",
    ),
    "milan-v2-coco": Real(
        COCO_REPORT, COCO_VCEK, COCO_MILAN, 2, None, "bootloader=3,tee=0,snp=8,microcode=115"
    ),
    "milan-v3-vlek": Real(
        COCO_VLEK_REPORT,
        COCO_VLEK,
        GSG_MILAN_VLEK,
        3,
        "Milan",
        "bootloader=4,tee=0,snp=24,microcode=217",
    ),
    "milan-v3-azure": Real(
        COCO_AZURE_MILAN,
        COCO_AZURE_MILAN,
        GSG_MILAN,
        3,
        "Milan",
        "bootloader=4,tee=0,snp=24,microcode=219",
    ),
    "genoa-v3-azure": Real(
        COCO_AZURE_GENOA,
        COCO_AZURE_GENOA,
        GSG_GENOA,
        3,
        "Genoa",
        "bootloader=10,tee=0,snp=23,microcode=84",
    ),
    "genoa-v5-oak": Real(
        OAK_GENOA,
        OAK_GENOA_VCEK,
        GSG_GENOA,
        5,
        "Genoa",
        "bootloader=10,tee=0,snp=25,microcode=84",
        day=datetime.date(2026, 6, 1),
    ),
    "turin-v5-oak": Real(
        OAK_TURIN,
        OAK_TURIN_VCEK,
        GSG_TURIN,
        5,
        "Turin",
        "fmc=0,bootloader=1,tee=0,snp=2,microcode=71",
        day=datetime.date(2026, 6, 1),
    ),
}


@pytest.fixture(params=REAL)
def real(request: pytest.FixtureRequest) -> Real:
    return REAL[request.param]


def test_report_when_real_verifies(real: Real) -> None:
    raw = real.raw
    verdict = real.verify(expected=Expected(measurement=raw[0x90:0xC0], report_data=raw[0x50:0x90]))
    assert [str(check) for check in verdict.failed] == []
    assert not verdict.is_simulated
    assert raw[0] == real.version
    assert real.measurement in raw[0x90:0xC0].hex()
    found = {check.name: check.got for check in verdict.checks}
    assert found["root"].startswith("AMD's ARK-")
    assert found.get("product") == real.product
    assert found["reported_tcb"] == real.tcb


def test_report_when_a_bit_flips_anywhere_does_not_verify(real: Real) -> None:
    raw = real.raw
    for at in range(0, _SIZE, 16):
        if at // 4 == 0x48 // 4:
            continue
        flipped = bytearray(raw)
        flipped[at] ^= 0x10
        assert "signature" in [check.name for check in real.verify(bytes(flipped)).failed], at


def test_report_when_its_vcek_is_another_chips_does_not_verify() -> None:
    other = replace(REAL["milan-v2-virtee"], leaf=GSG_VCEK)
    names = {check.name for check in other.verify().failed}
    assert names == {"signature", "reported_tcb", "chip_id"}


def test_report_when_its_vlek_has_expired_fails_by_that_alone() -> None:
    late = replace(REAL["milan-v3-vlek"], day=datetime.date(2026, 6, 1))
    assert [check.name for check in late.verify().failed] == ["vlek_validity"]


def test_turins_vcek_when_read_has_a_hwid_of_8_bytes() -> None:
    (found,) = read_certificates(VS_TURIN_VCEK.read())
    assert (len(found.hwid), found.product, found.tcb.microcode) == (8, "Turin", 9)


@pytest.mark.parametrize(
    ("chain", "product"), [(COCO_MILAN, "Milan"), (GSG_GENOA, "Genoa"), (GSG_TURIN, "Turin")]
)
def test_amds_root_when_published_is_known(chain: Public, product: str) -> None:
    roots = [c for c in read_certificates(chain.read()) if c.name == f"ARK-{product}"]
    assert [AMD_ROOTS[root.key_digest] for root in roots] == [product]


def test_command_when_given_real_files_verifies(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli = Cli(capfd)
    paths = {}
    for name, public in (("report", VS_REPORT), ("vcek", VS_VCEK), ("chain", VS_MILAN)):
        paths[name] = tmp_path / name
        paths[name].write_bytes(public.read())
    certs = ("--certs", paths["vcek"], "--certs", paths["chain"], "--at", "2025-06-01")
    digest = REAL["milan-v2-virtee"].measurement
    done = cli("report", "verify", paths["report"], *certs, "--digest", digest, "--no-debug")
    assert (done.code, done.err) == (0, "")
    done = cli("report", "verify", paths["report"], *certs, "--digest", "0" * 96)
    assert done.code == 1
    assert f"FAIL  measurement: got {digest}, expected {'0' * 96}" in done.out
    assert done.errors == ["kvmlaunch: not verified: measurement"]
