"""ID blocks and their authentication, laid out and signed by hand (snp-firmware-abi 6.1-6.3)."""

from __future__ import annotations

import struct
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.abi import vectors

POLICY = 0x30000
V1 = bytes.fromhex(vectors.SINGLE_PAGE["V1"][3])

# Fixed keys, so that key digests are too; signatures are random and only ever verified.
ID_PRIVATE = ec.derive_private_key(0x1234567, ec.SECP384R1())
AUTHOR_PRIVATE = ec.derive_private_key(0x7654321, ec.SECP384R1())


def number(value: int) -> bytes:
    return value.to_bytes(72, "little")


def public_key(private: ec.EllipticCurvePrivateKey, curve: int = 2) -> bytes:
    """0x404 bytes: CURVE, QX, QY, zeros (6.3)."""
    numbers = private.public_key().public_numbers()
    key = struct.pack("<I", curve) + number(numbers.x) + number(numbers.y)
    return key.ljust(0x404, b"\0")


def sec1(private: ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> bytes:
    """A private key as PEM of SEC 1."""
    encryption: Any = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, encryption
    )


def sign(private: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """512 bytes: R, S, zeros (6.3)."""
    r, s = decode_dss_signature(private.sign(message, ec.ECDSA(hashes.SHA384())))
    return (number(r) + number(s)).ljust(512, b"\0")


ID_KEY = public_key(ID_PRIVATE)
AUTHOR_KEY = public_key(AUTHOR_PRIVATE)


def id_block(ld: bytes = V1, policy: int = POLICY, version: int = 1) -> bytes:
    return ld + b"F" * 16 + b"I" * 16 + struct.pack("<IIQ", version, 7, policy)


def id_auth(block: bytes, *, author: bool = False, **fields: bytes) -> bytes:
    """Layout of 6.2; `fields` replace parts by name."""
    parts = {
        "algo": struct.pack("<II", 1, int(author)),
        "id_block_sig": sign(ID_PRIVATE, block),
        "id_key": ID_KEY,
        "id_key_sig": sign(AUTHOR_PRIVATE, ID_KEY) if author else bytes(512),
        "author_key": AUTHOR_KEY if author else bytes(0x404),
        **fields,
    }
    page = bytearray(4096)
    places = {"algo": 0, "id_block_sig": 0x40, "id_key": 0x240, "id_key_sig": 0x680}
    places["author_key"] = 0x880
    for name, at in places.items():
        page[at : at + len(parts[name])] = parts[name]
    return bytes(page)
