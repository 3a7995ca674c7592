"""ID blocks signed and verified, with ECDSA P-384 keys (AMD 56860, ID authentication)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmlaunch.abi.idblock import ALGO_ECDSA_P384_SHA384, PUBLIC_KEY_SIZE, IdAuth, IdBlock
from kvmlaunch.abi.signature import decode_signature, encode_signature
from kvmlaunch.errors import FormatError, ImageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

__all__ = ["load_key", "public_key", "sign_id_block", "why_unsigned"]

_CURVE_P384 = 2
_NUMBER_SIZE = 72
_KEY_FILE_MOST = 1 << 16


def load_key(path: str) -> EllipticCurvePrivateKey:
    """The private P-384 key of a PEM file. Raises ImageError."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with Path(path).open("rb") as file:
            pem = file.read(_KEY_FILE_MOST)
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise ImageError(path, "is no PEM file with an unencrypted private key") from None
    except Exception as error:  # cryptography's own, for algorithms that it lacks
        raise ImageError(path, f"has a key that can't be used: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ImageError(path, "has no key on curve P-384 (secp384r1), the only one firmware takes")
    return key


def public_key(key: EllipticCurvePrivateKey) -> bytes:
    """The public key as firmware encodes it, 1028 bytes."""
    numbers = key.public_key().public_numbers()
    parts = (number.to_bytes(_NUMBER_SIZE, "little") for number in (numbers.x, numbers.y))
    raw = _CURVE_P384.to_bytes(4, "little") + b"".join(parts)
    return raw.ljust(PUBLIC_KEY_SIZE, b"\0")


def sign_id_block(
    block: IdBlock, id_key: EllipticCurvePrivateKey, author: EllipticCurvePrivateKey | None = None
) -> IdAuth:
    """The ID authentication of a block: signed by the ID key, and that by an author's, if any.

    Equal input gives equal signatures where `cryptography` can (RFC 6979).
    """
    key = public_key(id_key)
    auth = IdAuth(
        id_key_algo=ALGO_ECDSA_P384_SHA384,
        id_block_sig=_sign(id_key, block.encode()),
        id_key=key,
    )
    if author is None:
        return auth
    return IdAuth(
        id_key_algo=ALGO_ECDSA_P384_SHA384,
        auth_key_algo=ALGO_ECDSA_P384_SHA384,
        id_block_sig=auth.id_block_sig,
        id_key=key,
        id_key_sig=_sign(author, key),
        author_key=public_key(author),
    )


def why_unsigned(block: IdBlock, auth: IdAuth, *, author_key_enabled: bool) -> str | None:
    """None if the signatures are right, else what firmware would refuse (BAD_SIGNATURE)."""
    if not _verifies(auth.id_key, auth.id_block_sig, block.encode()):
        return "the ID block's signature isn't one by the ID key"
    if author_key_enabled and not _verifies(auth.author_key, auth.id_key_sig, auth.id_key):
        return "the ID key's signature isn't one by the author key"
    return None


def _sign(key: EllipticCurvePrivateKey, message: bytes) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    try:
        # An argument of cryptography 43, and it needs OpenSSL 3.2 or newer.
        how = ec.ECDSA(hashes.SHA384(), deterministic_signing=True)
        signature = key.sign(message, how)
    except (TypeError, UnsupportedAlgorithm):
        signature = key.sign(message, ec.ECDSA(hashes.SHA384()))
    return encode_signature(*decode_dss_signature(signature))


def _verifies(key: bytes, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    try:
        public = _decoded(key)
        encoded = encode_dss_signature(*decode_signature(signature))
        public.verify(encoded, message, ec.ECDSA(hashes.SHA384()))
    except (FormatError, ValueError, InvalidSignature):
        return False
    return True


def _decoded(key: bytes) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    curve, x, y = (
        int.from_bytes(key[start:end], "little") for start, end in ((0, 4), (4, 76), (76, 148))
    )
    if curve != _CURVE_P384 or any(key[148:]):
        raise FormatError(f"curve {curve} is not P-384 ({_CURVE_P384})")
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
