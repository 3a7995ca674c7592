"""Reading certificate files of every kind; and what is none."""

from __future__ import annotations

import contextlib
import datetime

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch.attestation.certificates import read_certificates, read_crls
from kvmlaunch.errors import FormatError

from . import ca

LEAF, ASK, ARK = ca.vcek().der, ca.ask().der, ca.ark().der
PEMS = [ca.ask().pem, ca.ark().pem, ca.vcek().pem]
GUIDS = {  # 8.3
    "VCEK": "63da758de6644564adc5f4b93be8accd",
    "ASK": "4ab7b379bbac4fe4a02f05aef327c782",
    "ARK": "c0b406a4a803495297433fb6014cd0ae",
}


def table(**blobs: bytes) -> bytes:
    """A certificate table by hand."""
    at, entries = 24 * (len(blobs) + 1), b""
    for name, blob in blobs.items():
        entries += bytes.fromhex(GUIDS.get(name, name))
        entries += at.to_bytes(4, "little") + len(blob).to_bytes(4, "little")
        at += len(blob)
    return entries + bytes(24) + b"".join(blobs.values())


TABLE = table(VCEK=LEAF, ASK=ASK, ARK=ARK)


def names(data: bytes) -> list[str]:
    return [certificate.name for certificate in read_certificates(data)]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"".join(PEMS), ["SEV-Milan", "ARK-Milan", "SEV-VCEK"]),
        (b"about\n" + PEMS[2] + b"more\r\n" + PEMS[0].replace(b"\n", b"\r\n"),
         ["SEV-VCEK", "SEV-Milan"]),
        (LEAF, ["SEV-VCEK"]),
        (LEAF + ARK, ["SEV-VCEK", "ARK-Milan"]),
        (LEAF + bytes(100), ["SEV-VCEK"]),
        (TABLE, ["SEV-VCEK", "SEV-Milan", "ARK-Milan"]),
        (TABLE.ljust(8192, b"\0"), ["SEV-VCEK", "SEV-Milan", "ARK-Milan"]),
        (table(ASK=PEMS[0], ARK=PEMS[1]), ["SEV-Milan", "ARK-Milan"]),
        (table(**{"00" * 15 + "01": b"no certificate"}, ARK=ARK), ["ARK-Milan"]),
    ],
)  # fmt: skip
def test_certificates_when_in_any_form_are_found_in_order(data, found):
    assert names(data) == found


def test_certificate_when_read_has_its_values():
    (found,) = read_certificates(LEAF)
    assert found.issuer == "CN=SEV-Milan,O=Test"
    assert found.tcb.microcode == 115
    assert found.hwid == ca.HWID
    assert found.product == "Milan-B0"
    assert found.not_before == ca.NOW - datetime.timedelta(days=1)
    assert not found.is_ca
    with pytest.raises(FormatError, match=r"SEV-VCEK lacks the extension 1\.3\.6.*\.5"):
        _ = found.csp_id


def test_serial_when_zero_as_amds_is_read_without_a_warning():
    # builders refuse it: the DER is changed by hand, which no one notices before the signature
    at = LEAF.index(b"\xa0\x03\x02\x01\x02\x02\x01\x01")
    (found,) = read_certificates(LEAF[: at + 7] + b"\0" + LEAF[at + 8 :])
    assert found.serial == 0


def test_name_when_it_breaks_a_rule_is_read_without_a_warning():
    # 2.5.4.10 organizationName -> 2.5.4.6 countryName, which has two letters
    organization = bytes.fromhex("060355040a0c0454657374")
    assert organization in LEAF
    (found,) = read_certificates(LEAF.replace(organization, organization.replace(b"\x0a", b"\x06")))
    assert found.subject == "CN=SEV-VCEK,C=Test"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no certificate"),
        (bytes(100), "no certificate"),
        (b"hello, this is no certificate at all", "neither PEM nor DER nor a certificate table"),
        (PEMS[0][:-30], "no END line"),
        (PEMS[0] + PEMS[1][:100], "no END line"),
        (b"-----BEGIN CERTIFICATE-----\nAA*A\n-----END CERTIFICATE-----", "not base64"),
        (b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----", "can't be read"),
        (b"-----BEGIN CERTIFICATE-----\n-----END X-----", "no END line"),
        (LEAF[:-1], "the input ends 1 bytes too early"),
        (LEAF[:3], "bytes too early"),
        (b"\x30", "not DER"),
        (b"\x30\x80" + LEAF[4:], "a length that no certificate has"),
        (b"\x30\x84\0\0\0\1\0", "a length that no certificate has"),
        (LEAF + b"x" * 10, "not DER"),
        (b"\x30\x03\x02\x01\x01", "a certificate can't be read"),
        (ca.crl(), "a certificate can't be read"),
        (PEMS[0] * 65, "more than 64"),
        (
            b"-----BEGIN CERTIFICATE TABLE-----\n0g\n-----END CERTIFICATE TABLE-----",
            "a certificate table is not hex",
        ),
        (table(VCEK=b"nothing"), "not DER"),
    ],
)
def test_certificates_when_bad_say_what_is_wrong(data, why):
    with pytest.raises(FormatError, match=why):
        read_certificates(data)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "data",
    [
        b"-----BEGIN A-----" * 200_000,
        b"-----BEGIN A-----\n-----END A-----\n" * 100_000,
        b"-----BEGIN " * 300_000,
        b"\x30\x00" * 1_000_000,
        b"\x30" + bytes(4_000_000),
    ],
)
def test_certificates_when_blocks_are_many_are_refused_soon(data):
    with pytest.raises(FormatError):
        read_certificates(data)


def test_crl_when_larger_than_64_kib_is_read():
    (found,) = read_crls(ca.crl(tuple(range(1 << 16, (1 << 16) + 3000))))
    assert len(found.revoked) == 3000


def test_private_key_when_beside_a_certificate_is_left_alone():
    key = ca.chip_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert names(key + PEMS[0]) == ["SEV-Milan"]
    with pytest.raises(FormatError, match="no certificate") as caught:
        read_certificates(key)
    assert key.split(b"\n")[1].decode() not in str(caught.value)


@pytest.mark.parametrize("data", [ca.crl((5, 7)), ca.crl((5, 7), encoding=Encoding.PEM)])
def test_crl_when_read_has_its_values(data):
    (found,) = read_crls(data)
    assert found.issuer == "CN=ARK-Milan,O=Test"
    assert found.revoked == {5, 7}
    assert found.next_update == ca.NOW + ca.DAY


@pytest.mark.parametrize("data", [b"", LEAF, PEMS[0], TABLE, b"text"])
def test_crl_when_there_is_none_is_format_error(data):
    with pytest.raises(FormatError, match="revocation list"):
        read_crls(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_certificates_when_bytes_change_raise_format_error_only(data):
    source = bytearray(data.draw(st.sampled_from([LEAF, TABLE, b"".join(PEMS), ca.crl()])))
    for _ in range(data.draw(st.integers(1, 4))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(source[: data.draw(st.integers(0, len(source)))])
    for read in (read_certificates, read_crls):
        for raw in (bytes(source), cut):
            with contextlib.suppress(FormatError):
                for found in read(raw):
                    assert found.issuer is not None
                    for name in ("tcb", "hwid", "product", "csp_id"):
                        with contextlib.suppress(FormatError, AttributeError):
                            getattr(found, name)


@given(st.binary(max_size=400))
def test_certificates_when_anything_raise_format_error_only(data):
    for read in (read_certificates, read_crls):
        for raw in (data, b"\x30" + data):
            with contextlib.suppress(FormatError):
                read(raw)


def printed(data: bytes) -> bytes:
    """As examples/guests/certs prints it, whole lines of 32 bytes."""
    lines = [data[at : at + 32].ljust(32, b"\0").hex().encode() for at in range(0, len(data), 32)]
    block = b"\r\n".join([b"-----BEGIN CERTIFICATE TABLE-----", *lines])
    return b"hello\r\n" + block + b"\r\n-----END CERTIFICATE TABLE-----\r\n"


def test_certificates_when_a_guest_printed_their_table_are_found():
    other = b"-----BEGIN ATTESTATION REPORT-----\n00\n-----END ATTESTATION REPORT-----\n"
    assert names(other + printed(TABLE)) == ["SEV-VCEK", "SEV-Milan", "ARK-Milan"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (printed(TABLE).replace(b"0", b"x"), "not hex"),
        (printed(TABLE[:100]), "ends behind the certificate table"),
        (printed(bytes(24)), "no certificate"),
        (printed(printed(TABLE)), "ends behind the certificate table|no certificate"),
        (printed(table(ASK=printed(table(ASK=b"x")))), "not DER"),
    ],
)
def test_certificates_when_a_printed_table_is_bad_say_what_is_wrong(text, why):
    with pytest.raises(FormatError, match=why):
        read_certificates(text)
