"""Certificates of the simulated chip's keys: ARK signs ASK, ASK signs VCEK (or VLEK).

Formats, algorithms and extensions are those of AMD's certificates (AMD 57230, VCEK
certificate), the names are not: each says SIMULATED. Serial numbers are AMD's for Milan, except
that those of VCEK and VLEK are 1 and not 0, which X.509 (RFC 5280) doesn't allow. There is no
revocation list.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from kvmlaunch.abi import cert_table
from kvmlaunch.abi.report import SigningKey
from kvmlaunch.abi.tcb import Product, Tcb

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

__all__ = ["CertificateAuthority", "CertificateChain"]

_OID = "1.3.6.1.4.1.3704.1"
_PUBLIC_EXPONENT = 65537
_RSA_BITS = 4096
_SALT_SIZE = 48
_CA_DAYS, _LEAF_DAYS = 25 * 365, 7 * 365
# A revocation list names certificates of one issuer by these.
_ARK_SERIAL, _LEAF_SERIAL = 0x10000, 1
_INTERMEDIATE_SERIALS = {SigningKey.VCEK: 0x10001, SigningKey.VLEK: 0x10101}
_CSP_ID = "SIMULATED"
# Parts whose security version has an extension; the rest are reserved parts, always 0.
_SPL = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 8}
_SPL_RESERVED = {"Milan": (4, 5, 6, 7), "Genoa": (4, 5, 6, 7), "Turin": (5, 6, 7)}
_SPL_FMC = 9
_INTEGER, _IA5_STRING = 0x02, 0x16


class CertificateChain(NamedTuple):
    """DER certificates from the key that signs reports up to the root.

    `leaf` is the VCEK's, or the VLEK's; then `ask` is the VLEK's own intermediate (ASVK).
    """

    signing_key: SigningKey
    leaf: bytes
    ask: bytes
    ark: bytes

    def pem(self) -> str:
        """Return the three certificates as PEM, the leaf first."""
        import ssl

        return "".join(ssl.DER_cert_to_PEM_cert(der) for der in (self.leaf, self.ask, self.ark))

    def table(self) -> bytes:
        """Return the certificate table of an extended guest request, not padded."""
        guids = cert_table.CERT_GUIDS
        return cert_table.encode(
            {
                guids[self.signing_key.name]: self.leaf,
                guids["ASK"]: self.ask,
                guids["ARK"]: self.ark,
            }
        )


class CertificateAuthority:
    """ARK and intermediates of one host, made when first needed: RSA keys take a second."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._ark: _Issuer | None = None
        self._intermediates: dict[SigningKey, _Issuer] = {}
        self._chains: dict[tuple[SigningKey, bytes], CertificateChain] = {}
        self._lock = threading.Lock()

    def chain(
        self, kind: SigningKey, key: ec.EllipticCurvePublicKey, tcb: Tcb, hwid: bytes
    ) -> CertificateChain:
        """Return the chain of the VCEK or VLEK `key`; the same again for the same key."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        name = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        with self._lock:
            if (kind, name) not in self._chains:
                ark, ask = self._root(), self._intermediate(kind)
                leaf = _certificate(
                    _name(f"SEV-{kind.name}"),
                    key,
                    ask.certificate.subject,
                    ask.key,
                    _LEAF_DAYS,
                    _LEAF_SERIAL,
                    self._extensions(kind, tcb, hwid),
                )
                self._chains[kind, name] = CertificateChain(
                    kind, _der(leaf), _der(ask.certificate), _der(ark.certificate)
                )
            return self._chains[kind, name]

    def _root(self) -> _Issuer:
        if self._ark is None:
            self._ark = _issuer(f"ARK-{self._product}", None, _ARK_SERIAL, path_length=1)
        return self._ark

    def _intermediate(self, kind: SigningKey) -> _Issuer:
        if kind not in self._intermediates:
            middle = "VLEK-" if kind is SigningKey.VLEK else ""
            name = f"SEV-{middle}{self._product}"
            serial = _INTERMEDIATE_SERIALS[kind]
            self._intermediates[kind] = _issuer(name, self._root(), serial, path_length=0)
        return self._intermediates[kind]

    def _extensions(
        self, kind: SigningKey, tcb: Tcb, hwid: bytes
    ) -> Iterable[x509.UnrecognizedExtension]:
        is_turin = self._product == "Turin"
        product = self._product if is_turin else f"{self._product}-B0"
        yield _extension("1", _der_integer(int(is_turin)))
        yield _extension("2", _der_string(product))
        spls = {number: getattr(tcb, part) for part, number in _SPL.items()}
        spls |= dict.fromkeys(_SPL_RESERVED[self._product], 0)
        if is_turin:
            spls[_SPL_FMC] = tcb.fmc
        for number, spl in sorted(spls.items()):
            yield _extension(f"3.{number}", _der_integer(spl))
        if kind is SigningKey.VLEK:
            yield _extension("5", _der_string(_CSP_ID))
        else:
            yield _extension("4", hwid)  # raw, not wrapped in an OCTET STRING

    def __repr__(self) -> str:
        return f"<CertificateAuthority SIMULATED {self._product}>"


class _Issuer(NamedTuple):
    key: rsa.RSAPrivateKey
    certificate: x509.Certificate


def _issuer(name: str, parent: _Issuer | None, serial: int, *, path_length: int) -> _Issuer:
    """Make a key and its certificate, signed by `parent` or by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(_PUBLIC_EXPONENT, _RSA_BITS)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = _certificate(
        _name(name),
        key.public_key(),
        parent.certificate.subject if parent else _name(name),
        parent.key if parent else key,
        _CA_DAYS,
        serial,
        (x509.BasicConstraints(ca=True, path_length=path_length), usage),
        critical=True,
    )
    return _Issuer(key, certificate)


def _certificate(
    name: x509.Name,
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    issuer: x509.Name,
    issuer_key: rsa.RSAPrivateKey,
    days: int,
    serial: int,
    extensions: Iterable[x509.ExtensionType],
    *,
    critical: bool = False,
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    # A day back, for verifiers whose clock is a little behind.
    start = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=critical)
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=_SALT_SIZE)
    return builder.sign(issuer_key, hashes.SHA384(), rsa_padding=pss)


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "kvmlaunch SIMULATED"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{common_name} SIMULATED"),
        ]
    )


def _extension(number: str, value: bytes) -> x509.UnrecognizedExtension:
    from cryptography import x509

    return x509.UnrecognizedExtension(x509.ObjectIdentifier(f"{_OID}.{number}"), value)


def _der(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)


def _der_integer(value: int) -> bytes:
    """A byte as DER: one with the top bit set needs a zero before it."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes([_INTEGER, len(raw)]) + raw


def _der_string(text: str) -> bytes:
    return bytes([_IA5_STRING, len(text)]) + text.encode("ascii")
