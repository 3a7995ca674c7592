"""ID block and ID authentication, as SNP_LAUNCH_FINISH checks them.

Order (obs; AMD 56860, SNP_LAUNCH_FINISH): launch digest BAD_MEASUREMENT, policy
POLICY_FAILURE, key algorithms INVALID_PARAM, ID key and its signature BAD_SIGNATURE, then
author key and its signature BAD_SIGNATURE. The status alone thus tells how far it got.
"""

from __future__ import annotations

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.idblock import (
    ALGO_ECDSA_P384_SHA384,
    ID_AUTH_SIZE,
    ID_BLOCK_SIZE,
    PUBLIC_KEY_SIZE,
    SIGNATURE_SIZE,
    IdBlock,
)

__all__ = ["AUTHOR_KEY", "ID_KEY", "check_id_block", "verify"]

# ID authentication information, offsets of 56860. Reserved bytes aren't looked at.
_ID_BLOCK_SIG = slice(0x040, 0x040 + SIGNATURE_SIZE)
ID_KEY = slice(0x240, 0x240 + PUBLIC_KEY_SIZE)
"""Bytes of the ID key in the ID authentication information."""
_ID_KEY_SIG = slice(0x680, 0x680 + SIGNATURE_SIZE)
AUTHOR_KEY = slice(0x880, 0x880 + PUBLIC_KEY_SIZE)
"""Bytes of the author key in the ID authentication information."""

_CURVE_P384 = 2
_NUMBER_SIZE = 72
_P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffff"
    "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)
_ID_BLOCK_VERSION = 1


def check_id_block(
    id_block: bytes,
    id_auth: bytes,
    *,
    digest: bytes,
    policy: int,
    auth_key_en: bool,
    check_version: bool,
) -> FwStatus:
    """Return SUCCESS or the first failure."""
    if len(id_block) != ID_BLOCK_SIZE or len(id_auth) != ID_AUTH_SIZE:
        raise ValueError("an ID block is 96 bytes and its authentication 4096")
    block = IdBlock.decode(id_block)
    if block.ld != digest:
        return FwStatus.BAD_MEASUREMENT
    if block.policy != policy:
        return FwStatus.POLICY_FAILURE
    if check_version and block.version != _ID_BLOCK_VERSION:
        return FwStatus.INVALID_PARAM
    algorithms = [id_auth[0:4], id_auth[4:8]] if auth_key_en else [id_auth[0:4]]
    if any(int.from_bytes(a, "little") != ALGO_ECDSA_P384_SHA384 for a in algorithms):
        return FwStatus.INVALID_PARAM
    if not verify(id_auth[ID_KEY], id_auth[_ID_BLOCK_SIG], id_block):
        return FwStatus.BAD_SIGNATURE
    if auth_key_en and not verify(id_auth[AUTHOR_KEY], id_auth[_ID_KEY_SIG], id_auth[ID_KEY]):
        return FwStatus.BAD_SIGNATURE
    return FwStatus.SUCCESS


def verify(key: bytes, signature: bytes, message: bytes) -> bool:
    """Verify an ECDSA P-384 / SHA-384 signature; key and signature as 56860 encodes them."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    if int.from_bytes(key[:4], "little") != _CURVE_P384:
        return False
    x, y = _number(key, 4), _number(key, 4 + _NUMBER_SIZE)
    r, s = _number(signature, 0), _number(signature, _NUMBER_SIZE)
    if not (0 < r < _P384_ORDER and 0 < s < _P384_ORDER):
        return False
    try:
        public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError:  # not a point of the curve
        return False
    try:
        public.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def _number(buf: bytes, at: int) -> int:
    return int.from_bytes(buf[at : at + _NUMBER_SIZE], "little")
