"""ARK, ASK, VCEK and reports of a made up chip, by cryptography alone (snp-firmware-abi 8)."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

NOW = datetime.datetime(2025, 6, 1, tzinfo=datetime.timezone.utc)
DAY = datetime.timedelta(days=1)
HWID = bytes(range(64))
PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)


@cache
def rsa_key(name: str, bits: int = 4096) -> rsa.RSAPrivateKey:
    """One key per name for all tests: making one takes a second."""
    return rsa.generate_private_key(65537, bits)


@cache
def chip_key(name: str = "chip") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def name_of(text: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"),
            x509.NameAttribute(NameOID.COMMON_NAME, text),
        ]
    )


def small(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes([2, len(raw)]) + raw


def spls(parts: dict[str, int]) -> dict[str, bytes]:
    """Numbers of the table in 8.3 -> DER."""
    return {number: small(value) for number, value in parts.items()}


MILAN = {
    "1": small(0),
    "2": b"\x16\x08Milan-B0",
    **spls({"3.1": 3, "3.2": 0, "3.3": 8, "3.8": 115}),
    "4": HWID,
}
MILAN_TCB = 0x73_08_00_00_00_00_00_03
TURIN = {
    "1": small(1),
    "2": b"\x16\x05Turin",
    **spls({"3.9": 2, "3.1": 1, "3.2": 1, "3.3": 4, "3.8": 80}),
    "4": HWID[:8],
}
TURIN_TCB = 0x50_00_00_00_04_01_01_02


@dataclass
class Made:
    """One certificate to be made; tests change what they want wrong."""

    subject: str
    issuer: str
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    signer: rsa.RSAPrivateKey
    serial: int = 1
    start: datetime.datetime = NOW - DAY
    end: datetime.datetime = NOW + DAY
    ca: bool = True
    pss: padding.PSS | None = field(default_factory=lambda: PSS)
    digest: hashes.HashAlgorithm = field(default_factory=hashes.SHA384)
    extensions: dict[str, bytes] = field(default_factory=dict)

    def build(self) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name_of(self.subject))
            .issuer_name(name_of(self.issuer))
            .public_key(self.key.public_key())
            .serial_number(self.serial)
            .not_valid_before(self.start)
            .not_valid_after(self.end)
        )
        if self.ca:
            basic = x509.BasicConstraints(ca=True, path_length=None)
            builder = builder.add_extension(basic, critical=True)
        for number, value in self.extensions.items():
            oid = x509.ObjectIdentifier(f"1.3.6.1.4.1.3704.1.{number}")
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
        return builder.sign(self.signer, self.digest, rsa_padding=self.pss)

    @property
    def der(self) -> bytes:
        return self.build().public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.build().public_bytes(Encoding.PEM)


def ark(product: str = "Milan") -> Made:
    name, key = f"ARK-{product}", rsa_key("ark")
    return Made(name, name, key, key, serial=0x10000)


def ask(product: str = "Milan", middle: str = "") -> Made:
    signer = rsa_key("ark")
    name = f"SEV-{middle}{product}"
    return Made(name, f"ARK-{product}", rsa_key("ask"), signer, serial=0x10001)


def vcek(product: str = "Milan", kind: str = "VCEK") -> Made:
    middle = "VLEK-" if kind == "VLEK" else ""
    extensions = dict(TURIN if product == "Turin" else MILAN)
    if kind == "VLEK":
        del extensions["4"]
        extensions["5"] = b"\x16\x05cloud"
    return Made(
        f"SEV-{kind}",
        f"SEV-{middle}{product}",
        chip_key(),
        rsa_key("ask"),
        ca=False,
        extensions=extensions,
    )


def crl(
    revoked: tuple[int, ...] = (),
    issuer: str = "ARK-Milan",
    signer: str = "ark",
    start: datetime.datetime = NOW - DAY,
    end: datetime.datetime = NOW + DAY,
    encoding: Encoding = Encoding.DER,
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name_of(issuer))
        .last_update(start)
        .next_update(end)
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start)
        builder = builder.add_revoked_certificate(entry.build())
    made = builder.sign(rsa_key(signer), hashes.SHA384(), rsa_padding=PSS)
    return made.public_bytes(encoding)


# Offsets of snp-firmware-abi 8.1.
WORDS = {
    "version": (0x000, 4),
    "guest_svn": (0x004, 4),
    "policy": (0x008, 8),
    "vmpl": (0x030, 4),
    "signature_algo": (0x034, 4),
    "current_tcb": (0x038, 8),
    "platform_info": (0x040, 8),
    "key_info": (0x048, 4),
    "reported_tcb": (0x180, 8),
    "cpuid_fam_id": (0x188, 1),
    "cpuid_mod_id": (0x189, 1),
    "cpuid_step": (0x18A, 1),
    "committed_tcb": (0x1E0, 8),
    "current_build": (0x1E8, 1),
    "current_minor": (0x1E9, 1),
    "current_major": (0x1EA, 1),
    "committed_build": (0x1EC, 1),
    "committed_minor": (0x1ED, 1),
    "committed_major": (0x1EE, 1),
    "launch_tcb": (0x1F0, 8),
    "launch_mit_vector": (0x1F8, 8),
    "current_mit_vector": (0x200, 8),
}
BYTES = {
    "family_id": (0x010, 16),
    "image_id": (0x020, 16),
    "report_data": (0x050, 64),
    "measurement": (0x090, 48),
    "host_data": (0x0C0, 32),
    "id_key_digest": (0x0E0, 48),
    "author_key_digest": (0x110, 48),
    "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32),
    "chip_id": (0x1A0, 64),
}
SIGNED = 0x2A0
TCBS = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")


def unsigned_report(**fields: int | bytes) -> bytearray:
    """A version 3 report of a Milan, as `vcek` certifies it; ``fields`` change it."""
    values: dict[str, int | bytes] = {
        "version": 3,
        "policy": 0x30000,
        "signature_algo": 1,
        "cpuid_fam_id": 0x19,
        "cpuid_mod_id": 1,
        "cpuid_step": 1,
        "chip_id": HWID,
        "report_id_ma": b"\xff" * 32,
        **dict.fromkeys(TCBS, MILAN_TCB),
    }
    values.update(fields)
    raw = bytearray(0x4A0)
    for name, value in values.items():
        offset, size = (WORDS | BYTES)[name]
        data = value if isinstance(value, bytes) else value.to_bytes(size, "little")
        assert len(data) == size
        raw[offset : offset + size] = data
    return raw


def signed(raw: bytearray, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """Sign as firmware does: R and S little-endian in 72 bytes each."""
    signature = (key or chip_key()).sign(bytes(raw[:SIGNED]), ec.ECDSA(hashes.SHA384()))
    r, s = decode_dss_signature(signature)
    numbers = r.to_bytes(72, "little") + s.to_bytes(72, "little")
    return bytes(raw[:SIGNED]) + numbers + bytes(512 - 144)


def report(**fields: int | bytes) -> bytes:
    return signed(unsigned_report(**fields))


def turin_report(**fields: int | bytes) -> bytes:
    """A version 5 report of a Turin."""
    chip = HWID[:8].ljust(64, b"\0")
    values: dict[str, int | bytes] = {
        "version": 5,
        "cpuid_fam_id": 0x1A,
        "cpuid_mod_id": 2,
        "chip_id": chip,
        **dict.fromkeys(TCBS, TURIN_TCB),
    }
    return report(**(values | fields))
