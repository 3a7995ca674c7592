"""The certificate table for guests, from certificates in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmlaunch.attestation.certificates import read_certificates
from kvmlaunch.attestation.table import certificate_table
from kvmlaunch.errors import FormatError

from . import ca

# snp-firmware-abi 8.3
VCEK, VLEK = "63da758de6644564adc5f4b93be8accd", "a8074bc2a25a483eaae639c045a0b8a1"
ASK, ARK = "4ab7b379bbac4fe4a02f05aef327c782", "c0b406a4a803495297433fb6014cd0ae"


def by_hand(*entries: tuple[str, bytes]) -> bytes:
    at, head = 24 * (len(entries) + 1), b""
    for guid, blob in entries:
        head += bytes.fromhex(guid) + at.to_bytes(4, "little") + len(blob).to_bytes(4, "little")
        at += len(blob)
    return head + bytes(24) + b"".join(blob for _, blob in entries)


@pytest.mark.parametrize(
    ("made", "guids"),
    [
        ([ca.ark(), ca.ask(), ca.vcek()], [ARK, ASK, VCEK]),
        ([ca.vcek(kind="VLEK"), ca.ask("Milan", "VLEK-")], [VLEK, ASK]),
        ([replace(ca.vcek(), subject="SEV-VCEK SIMULATED")], [VCEK]),
    ],
)
def test_table_has_each_certificate_under_its_guid(made, guids):
    ders = [each.der for each in made]
    certificates = [c for der in ders for c in read_certificates(der)]
    assert certificate_table([*certificates, certificates[0]]) == by_hand(
        *zip(guids, ders, strict=True)
    )


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ([ca.vcek(), replace(ca.vcek(), serial=2)], "two certificates of the VCEK"),
        ([ca.ask(), ca.ask("Genoa")], "two certificates of the ASK"),
        ([replace(ca.vcek(), subject="server")], "server is no VCEK, VLEK, ASK or ARK"),
    ],
)
def test_table_when_certificates_dont_fit_is_format_error(made, why):
    with pytest.raises(FormatError, match=why):
        certificate_table(c for each in made for c in read_certificates(each.der))
