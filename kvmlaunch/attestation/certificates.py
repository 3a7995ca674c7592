"""Certificates of reports: read from files, and as plain values.

A file may be PEM (any number of certificates and revocation lists, in any order), DER, several
DER behind one another, or the certificate table of an extended guest request, also in hex on a
guest's console (as the example guest ``certs`` prints it).

Source: AMD 57230 (VCEK certificate and KDS), compared with real certificates. Those have serial
number 0, which RFC 5280 doesn't allow and cryptography warns of.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from kvmlaunch.abi import cert_table
from kvmlaunch.abi.page import Buffer
from kvmlaunch.abi.tcb import Tcb
from kvmlaunch.errors import FormatError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

__all__ = ["Certificate", "RevocationList", "read_certificates", "read_crls"]

_MOST_CERTIFICATES = 64
_BEGIN, _DASHES, _MOST_LABEL = b"-----BEGIN ", b"-----", 64
_CERTIFICATE, _CRL, _TABLE = b"CERTIFICATE", b"X509 CRL", b"CERTIFICATE TABLE"
_SEQUENCE = 0x30

# 1.3.6.1.4.1.3704.1 is AMD's arc (AMD 57230).
_OID = "1.3.6.1.4.1.3704.1."
_PRODUCT, _HWID, _CSP_ID = _OID + "2", _OID + "4", _OID + "5"
_SPLS = {
    "bootloader": _OID + "3.1",
    "tee": _OID + "3.2",
    "snp": _OID + "3.3",
    "microcode": _OID + "3.8",
    "fmc": _OID + "3.9",
}
_INTEGER, _OCTET_STRING, _IA5_STRING = 0x02, 0x04, 0x16
_HWID_SIZES = (64, 8)


@dataclass(frozen=True)
class Certificate:
    """One certificate. ``key_digest`` is the SHA-256 of its SubjectPublicKeyInfo.

    ``extensions`` has AMD's own by dotted OID, as they are; `tcb`, `hwid`, `product` and
    `csp_id` read them.
    """

    der: bytes
    subject: str
    issuer: str
    serial: int
    not_before: datetime.datetime
    not_after: datetime.datetime
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    key_digest: str
    is_ca: bool
    signature: bytes
    signed: bytes
    extensions: dict[str, bytes]

    @classmethod
    def decode(cls, der: bytes) -> Certificate:
        """Read one DER certificate.

        Raises:
            FormatError: no certificate, or one with a key that AMD doesn't use.
        """
        from cryptography import x509

        with _only_format_errors("a certificate"):
            return _taken_apart(x509.load_der_x509_certificate(der), der)

    @property
    def name(self) -> str:
        """The subject's common name."""
        return _common_name(self.subject)

    @property
    def is_simulated(self) -> bool:
        """Whether its subject says SIMULATED, as those of a simulated host do."""
        return "SIMULATED" in self.subject

    @property
    def tcb(self) -> Tcb:
        """The TCB that a VCEK or VLEK stands for.

        Raises:
            FormatError: a part is missing, or no byte.
        """
        parts = {}
        for part, oid in _SPLS.items():
            if part != "fmc" or oid in self.extensions:
                parts[part] = _integer(part, self._extension(oid))
        return Tcb(**parts)

    @property
    def hwid(self) -> bytes:
        """The chip that a VCEK belongs to: 64 bytes, or 8. Raises FormatError."""
        raw = self._extension(_HWID)
        for size in _HWID_SIZES:
            if len(raw) == size:
                return raw
            if len(raw) == size + 2 and raw[:2] == bytes([_OCTET_STRING, size]):
                return raw[2:]
        raise FormatError(f"the HWID of {self.name} has {len(raw)} bytes, must be 64 or 8")

    @property
    def product(self) -> str:
        """AMD's name of the product, as ``Milan-B0`` or ``Turin``. Raises FormatError."""
        return _string(self._extension(_PRODUCT))

    @property
    def csp_id(self) -> str:
        """The cloud that a VLEK belongs to. Raises FormatError."""
        return _string(self._extension(_CSP_ID))

    def _extension(self, oid: str) -> bytes:
        if oid not in self.extensions:
            raise FormatError(f"the certificate {self.name} lacks the extension {oid}")
        return self.extensions[oid]


@dataclass(frozen=True)
class RevocationList:
    """A CRL: ``revoked`` are serial numbers of certificates of ``issuer``."""

    issuer: str
    last_update: datetime.datetime
    next_update: datetime.datetime | None
    revoked: frozenset[int]
    signature: bytes
    signed: bytes

    @classmethod
    def decode(cls, der: bytes) -> RevocationList:
        """Read one DER revocation list. Raises FormatError."""
        from cryptography import x509

        with _only_format_errors("a revocation list"):
            crl = x509.load_der_x509_crl(der)
            return cls(
                issuer=crl.issuer.rfc4514_string(),
                last_update=crl.last_update_utc,
                next_update=crl.next_update_utc,
                revoked=frozenset(entry.serial_number for entry in crl),
                signature=crl.signature,
                signed=crl.tbs_certlist_bytes,
            )


def read_certificates(data: Buffer) -> list[Certificate]:
    """Return the certificates of a file, in its order.

    Raises:
        FormatError: there is none, or one can't be read.
    """
    found = [Certificate.decode(der) for der in _items(bytes(data), _CERTIFICATE)]
    if not found:
        raise FormatError("no certificate: expected is PEM, DER or a certificate table")
    return found


def read_crls(data: Buffer) -> list[RevocationList]:
    """Return the revocation lists of a PEM or DER file.

    Raises:
        FormatError: there is none, or one can't be read.
    """
    found = [RevocationList.decode(der) for der in _items(bytes(data), _CRL)]
    if not found:
        raise FormatError("no revocation list: expected is PEM or DER")
    return found


def _items(data: bytes, label: bytes) -> Iterator[bytes]:
    """Yield the DER structures of one kind; not more than anyone has."""
    for number, der in enumerate(_structures(data, label)):
        if number == _MOST_CERTIFICATES:
            raise FormatError(f"more than {_MOST_CERTIFICATES} certificates")
        yield der


def _structures(data: bytes, label: bytes) -> Iterator[bytes]:
    if _BEGIN in data:
        yield from _from_pem(data, label)
    elif data[:1] == bytes([_SEQUENCE]):
        yield from _from_der(data)
    elif label == _CERTIFICATE and data:
        try:
            table = cert_table.decode(data)
        except FormatError:
            raise FormatError(
                "no certificate: neither PEM nor DER nor a certificate table"
            ) from None
        yield from _from_table(table)


def _from_table(table: Mapping[UUID, bytes]) -> Iterator[bytes]:
    for guid, blob in table.items():
        if guid in cert_table.CERT_GUIDS.values():
            yield from _from_pem(blob, _CERTIFICATE) if _BEGIN in blob else _from_der(blob)


def _from_pem(data: bytes, label: bytes) -> Iterator[bytes]:
    for found, text in _pem_blocks(data):
        if found == label:
            yield _decoded(text)
        elif found == _TABLE and label == _CERTIFICATE:
            yield from _from_table(cert_table.decode(_from_hex(text)))


def _pem_blocks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Label and text of each block. Nothing is looked at twice, however many BEGINs there are."""
    at = 0
    while (begin := data.find(_BEGIN, at)) >= 0:
        start = begin + len(_BEGIN)
        end = data.find(_DASHES, start, start + _MOST_LABEL)
        label = data[start:end] if end >= 0 else b""
        last = b"-----END " + label + _DASHES
        at = data.find(last, start) if label else -1
        if at < 0:
            raise FormatError("a PEM block has no END line of its label", offset=begin)
        yield label, data[end + len(_DASHES) : at]
        at += len(last)


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("a PEM block is not base64") from None


def _from_hex(text: bytes) -> bytes:
    try:
        return binascii.unhexlify(b"".join(text.split()))
    except ValueError:
        raise FormatError("a certificate table is not hex") from None


def _from_der(data: bytes) -> Iterator[bytes]:
    """Take DER structures that follow one another apart; zeros at the end are padding."""
    at, end = 0, len(data.rstrip(b"\0"))
    while at < end:
        size = _der_size(data, at)
        yield data[at : at + size]
        at += size


def _der_size(data: bytes, at: int) -> int:
    head = data[at : at + 5]
    if len(head) < 2 or head[0] != _SEQUENCE:
        raise FormatError("not DER: no sequence", offset=at)
    more = head[1] - 0x80  # bytes of a length from 128 up
    if more == 0 or more > 3:
        raise FormatError("not DER: a length that no certificate has", offset=at)
    size = 2 + head[1] if more < 0 else 2 + more + int.from_bytes(head[2 : 2 + more], "big")
    if at + size > len(data):
        raise FormatError(f"the input ends {at + size - len(data)} bytes too early", offset=at)
    return size


@contextmanager
def _only_format_errors(what: str) -> Iterator[None]:
    """Turn what cryptography raises at bad input into FormatError, and keep it quiet."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        with warnings.catch_warnings():
            # Of serial number 0, and of names that break a rule.
            warnings.simplefilter("ignore")
            yield
    except FormatError:
        raise
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.InvalidVersion,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as error:
        why = str(error).strip("'").splitlines() or [type(error).__name__]
        raise FormatError(f"{what} can't be read: {why[0]}") from None


def _taken_apart(found: x509.Certificate, der: bytes) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = found.public_key()
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise FormatError("a certificate has a key that is neither RSA nor EC")
    info = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    extensions, is_ca = {}, False
    for extension in found.extensions:
        if isinstance(extension.value, x509.UnrecognizedExtension):
            extensions[extension.oid.dotted_string] = extension.value.value
        elif isinstance(extension.value, x509.BasicConstraints):
            is_ca = extension.value.ca
    return Certificate(
        der=der,
        subject=found.subject.rfc4514_string(),
        issuer=found.issuer.rfc4514_string(),
        serial=found.serial_number,
        not_before=found.not_valid_before_utc,
        not_after=found.not_valid_after_utc,
        key=key,
        key_digest=hashlib.sha256(info).hexdigest(),
        is_ca=is_ca,
        signature=found.signature,
        signed=found.tbs_certificate_bytes,
        extensions=extensions,
    )


def _common_name(subject: str) -> str:
    found = re.search(r"(?:^|,)CN=((?:[^,\\]|\\.)*)", subject)
    return found[1] if found else subject


def _integer(what: str, raw: bytes) -> int:
    """A DER INTEGER of 1 or 2 bytes: a byte with the top bit set has a zero first."""
    content = raw[2:]
    if raw[:2] != bytes([_INTEGER, len(content)]) or not 1 <= len(content) <= 2:
        raise FormatError(f"the certificate's {what} version is no small integer: {raw.hex()}")
    return int.from_bytes(content, "big", signed=True)


def _string(raw: bytes) -> str:
    if raw[:2] != bytes([_IA5_STRING, len(raw) - 2]) or not raw.isascii():
        raise FormatError(f"no IA5String in the certificate: {raw[:64].hex()}")
    return raw[2:].decode("ascii")
