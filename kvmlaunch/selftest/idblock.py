"""ID blocks that carry a digest, signed with keys made for the run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from kvmlaunch.abi.idblock import ALGO_ECDSA_P384_SHA384, PUBLIC_KEY_SIZE, IdAuth, IdBlock
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.abi.signature import SIGNATURE_SIZE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = ["flipped", "id_auth", "id_block"]

# Encodings of AMD 56860, ID authentication information.
_CURVE_P384 = 2
_NUMBER_SIZE = 72


def id_block(digest: bytes, *, policy: int = DEFAULT_POLICY) -> IdBlock:
    """An ID block that expects this launch digest (48 bytes)."""
    return IdBlock(ld=digest, family_id=b"kvmlaunch".ljust(16), guest_svn=7, policy=policy)


def id_auth(block: IdBlock, *, author: bool = False) -> IdAuth:
    """Its authentication, with an author key or without."""
    key = _public(_key("id"))
    auth = IdAuth(
        id_key_algo=ALGO_ECDSA_P384_SHA384,
        id_block_sig=_sign(_key("id"), block.encode()),
        id_key=key,
    )
    if not author:
        return auth
    return replace(
        auth,
        auth_key_algo=ALGO_ECDSA_P384_SHA384,
        id_key_sig=_sign(_key("author"), key),
        author_key=_public(_key("author")),
    )


def flipped(data: bytes, bit: int = 0) -> bytes:
    """``data`` with one bit turned round."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@cache
def _key(name: str) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _public(private: EllipticCurvePrivateKey) -> bytes:
    numbers = private.public_key().public_numbers()
    key = _CURVE_P384.to_bytes(4, "little") + _number(numbers.x) + _number(numbers.y)
    return key.ljust(PUBLIC_KEY_SIZE, b"\0")


def _sign(private: EllipticCurvePrivateKey, message: bytes) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    r, s = decode_dss_signature(private.sign(message, ec.ECDSA(hashes.SHA384())))
    return (_number(r) + _number(s)).ljust(SIGNATURE_SIZE, b"\0")


def _number(value: int) -> bytes:
    return value.to_bytes(_NUMBER_SIZE, "little")
