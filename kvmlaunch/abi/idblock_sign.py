"""Sign ID blocks, and check the signatures of others.

A `Signer` holds one P-384 key without knowing where its private half is: in this process, in
a smart card, behind a network. Public keys and signatures are encoded as 56860 has them
(chapter 10); ID_BLOCK_SIG is over the 96 bytes of the ID block by the ID key, ID_KEY_SIG
over the 1028 bytes of the encoded ID key by the author key.

Only what does cryptography imports `cryptography`, and no error text holds key material.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from kvmlaunch.errors import FormatError

from ._check import exact_size, zeros
from .digest import sha384
from .idblock import ALGO_ECDSA_P384_SHA384, PUBLIC_KEY_SIZE, IdAuth, IdBlock
from .page import Buffer
from .signature import decode_signature, encode_signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = [
    "CURVE_P384",
    "PassphraseNeeded",
    "Sign",
    "Signer",
    "check_signatures",
    "decode_public_key",
    "encode_public_key",
    "key_digest",
    "private_pem",
    "sign_id_block",
    "verify_signature",
]

CURVE_P384 = 2
"""Number of the curve in an encoded public key."""

Sign: TypeAlias = Callable[[bytes], "bytes | tuple[int, int]"]
"""Message -> ECDSA P-384 signature with SHA-384, as (R, S) or in DER."""

_NUMBER_SIZE = 72
_KEY_END = 4 + 2 * _NUMBER_SIZE


class PassphraseNeeded(FormatError):
    """A private key is encrypted, and the passphrase is missing or wrong."""


class Signer:
    """A P-384 key that signs: ``public_key`` (1028 bytes) and the callable that has the rest.

    Each signature is verified before it is handed out. Raises FormatError for a public key
    that is none.
    """

    def __init__(self, sign: Sign, public_key: Buffer) -> None:
        """``public_key``: 1028 bytes as 56860 encodes it, or SubjectPublicKeyInfo (PEM, DER)."""
        encoded = bytes(public_key)
        if len(encoded) != PUBLIC_KEY_SIZE:
            encoded = _read_public_key(encoded)
        _public(encoded)
        self._sign = sign
        self.public_key = encoded

    @classmethod
    def from_pem(cls, data: bytes, passphrase: bytes | None = None) -> Signer:
        """Take a private key (SEC1 or PKCS#8, PEM or DER).

        Raises:
            PassphraseNeeded: it is encrypted, and `passphrase` is missing or wrong.
            FormatError: no private key, or none of P-384.
        """
        return cls.from_private_key(_read_private_key(data, passphrase))

    @classmethod
    def from_private_key(cls, key: EllipticCurvePrivateKey) -> Signer:
        """Take a key of `cryptography`. Raises FormatError if it isn't one of P-384."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls(
            lambda message: key.sign(message, ec.ECDSA(hashes.SHA384())),
            _encode(key.public_key()),
        )

    @classmethod
    def generate(cls) -> Signer:
        """Make a key that nobody else will ever see."""
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls.from_private_key(ec.generate_private_key(ec.SECP384R1()))

    @property
    def digest(self) -> bytes:
        """What reports name the key by (48 bytes)."""
        return key_digest(self.public_key)

    def sign(self, message: bytes) -> bytes:
        """Return the encoded signature, 512 bytes.

        Raises:
            FormatError: what the callable gave is no signature of `message` by this key.
        """
        given = self._sign(message)
        r, s = given if isinstance(given, tuple) else _from_der(given)
        signature = encode_signature(r, s)
        if not verify_signature(self.public_key, signature, message):
            raise FormatError("the signer's signature doesn't fit its public key")
        return signature

    def __repr__(self) -> str:
        """Identify the key by the digest of its public half."""
        return f"<Signer {self.digest.hex()[:16]}>"


def sign_id_block(block: IdBlock, id_key: Signer, author_key: Signer | None = None) -> IdAuth:
    """Return the ID authentication information of `block`, with an author key or without."""
    auth = IdAuth(
        id_key_algo=ALGO_ECDSA_P384_SHA384,
        id_block_sig=id_key.sign(block.encode()),
        id_key=id_key.public_key,
    )
    if author_key is None:
        return auth
    return dataclasses.replace(
        auth,
        auth_key_algo=ALGO_ECDSA_P384_SHA384,
        id_key_sig=author_key.sign(id_key.public_key),
        author_key=author_key.public_key,
    )


def check_signatures(block: IdBlock, auth: IdAuth, *, author: bool | None = None) -> list[str]:
    """Return what firmware would refuse of keys and signatures, a sentence each.

    Args:
        block: the ID block.
        auth: its authentication.
        author: whether the author key counts (AUTH_KEY_EN); None: if there is one.
    """
    wrong = _check_one("ID key", auth.id_key_algo, auth.id_key, auth.id_block_sig, block.encode())
    if auth.has_author_key if author is None else author:
        wrong += _check_one(
            "author key", auth.auth_key_algo, auth.author_key, auth.id_key_sig, auth.id_key
        )
    return wrong


def _check_one(name: str, algo: int, key: bytes, signature: bytes, message: bytes) -> list[str]:
    if algo != ALGO_ECDSA_P384_SHA384:
        return [f"the algorithm of the {name} is {algo}, not 1 (ECDSA P-384 with SHA-384)"]
    try:
        _public(key)
    except FormatError as error:
        return [f"the {name} is no public key: {error}"]
    if verify_signature(key, signature, message):
        return []
    signed = "ID block" if name == "ID key" else "ID key"
    return [f"the signature of the {signed} is not one by the {name}"]


def encode_public_key(x: int, y: int) -> bytes:
    """Return the 1028 bytes of a P-384 public key. Raises FormatError if it isn't on the curve."""
    try:
        numbers = [n.to_bytes(_NUMBER_SIZE, "little") for n in (x, y)]
    except OverflowError:
        raise FormatError("not a point of P-384") from None
    key = CURVE_P384.to_bytes(4, "little") + b"".join(numbers)
    encoded = key.ljust(PUBLIC_KEY_SIZE, b"\0")
    _public(encoded)
    return encoded


def decode_public_key(buf: Buffer) -> tuple[int, int]:
    """Return (QX, QY) of 1028 bytes.

    Raises:
        FormatError: another size, another curve, or a byte behind QY isn't zero.
    """
    key = exact_size("a public key", buf, PUBLIC_KEY_SIZE)
    curve = int.from_bytes(key[:4], "little")
    if curve != CURVE_P384:
        raise FormatError(f"its curve is {curve}, not {CURVE_P384} (P-384)")
    zeros("a public key", key, _KEY_END, PUBLIC_KEY_SIZE)
    x, y = key[4 : 4 + _NUMBER_SIZE], key[4 + _NUMBER_SIZE : _KEY_END]
    return int.from_bytes(x, "little"), int.from_bytes(y, "little")


def key_digest(public_key: bytes) -> bytes:
    """Return ID_KEY_DIGEST or AUTHOR_KEY_DIGEST: SHA-384 of the 1028 bytes."""
    return sha384(exact_size("a public key", public_key, PUBLIC_KEY_SIZE))


def verify_signature(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` (512 bytes) is one of `message` by `public_key` (1028 bytes)."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    try:
        key = _public(public_key)
        der = encode_dss_signature(*decode_signature(signature))
        key.verify(der, message, ec.ECDSA(hashes.SHA384()))
    except (FormatError, InvalidSignature):
        return False
    return True


def private_pem(passphrase: bytes | None = None) -> tuple[bytes, Signer]:
    """Make a P-384 key: its PKCS#8 PEM, encrypted if there is a passphrase, and its signer."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    encryption: Any = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    return pem, Signer.from_private_key(key)


def _read_private_key(data: bytes, passphrase: bytes | None) -> EllipticCurvePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = b"-----BEGIN" in data
    load = serialization.load_pem_private_key if pem else serialization.load_der_private_key
    encrypted = b"ENCRYPTED" in data
    try:
        key = load(data, passphrase if passphrase and (encrypted or not pem) else None)
    except TypeError:  # says of both cases that they are one of type
        if not passphrase:
            raise PassphraseNeeded("the private key is encrypted, give its passphrase") from None
        return _read_private_key(data, None)
    except UnsupportedAlgorithm:
        raise FormatError("the private key is of no kind that is known") from None
    except ValueError:
        if encrypted and passphrase:
            raise PassphraseNeeded(
                "the passphrase is wrong, or the private key is damaged"
            ) from None
        raise FormatError("not a private key in PEM or DER, or a damaged one") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FormatError("the private key is not one of elliptic curve P-384")
    return key


def _read_public_key(data: bytes) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    pem = b"-----BEGIN" in data
    load = serialization.load_pem_public_key if pem else serialization.load_der_public_key
    try:
        return _encode(load(data))
    except (ValueError, UnsupportedAlgorithm):
        raise FormatError("not a public key in PEM or DER, nor 1028 bytes of 56860") from None


def _encode(key: Any) -> bytes:
    """The 1028 bytes of a public key of `cryptography`."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve != "secp384r1":
        found = f"curve {curve}" if curve else "no elliptic curve"
        raise FormatError(f"the key is of {found}; firmware takes P-384 (secp384r1) only")
    numbers = key.public_numbers()
    return encode_public_key(numbers.x, numbers.y)


def _public(encoded: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    x, y = decode_public_key(encoded)
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError:
        raise FormatError("not a point of P-384") from None


def _from_der(signature: bytes) -> tuple[int, int]:
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    try:
        return decode_dss_signature(signature)
    except ValueError:
        raise FormatError("the signer's signature is neither (R, S) nor DER") from None
