"""ECDSA P-384 signature as firmware encodes it, 512 bytes.

R and S are little-endian integers of 72 bytes each, at 0x00 and 0x48; zeros follow. ID
authentication information and attestation reports hold such signatures. Source: AMD 56860,
signature format (table 141).
"""

from __future__ import annotations

from ._check import exact_size, uint, zeros
from .page import Buffer

__all__ = ["ALGO_ECDSA_P384_SHA384", "SIGNATURE_SIZE", "decode_signature", "encode_signature"]

SIGNATURE_SIZE = 512
"""Bytes of an encoded signature."""
ALGO_ECDSA_P384_SHA384 = 1
"""Number of this algorithm, the only one that firmware knows."""

_NUMBER_SIZE = 72


def encode_signature(r: int, s: int) -> bytes:
    """Return the 512 bytes.

    Raises:
        FormatError: a number does not fit in 72 bytes.
    """
    numbers = uint("R", r, 8 * _NUMBER_SIZE), uint("S", s, 8 * _NUMBER_SIZE)
    raw = b"".join(number.to_bytes(_NUMBER_SIZE, "little") for number in numbers)
    return raw.ljust(SIGNATURE_SIZE, b"\0")


def decode_signature(buf: Buffer) -> tuple[int, int]:
    """Return (R, S), whatever they are.

    Raises:
        FormatError: not 512 bytes, or a byte behind S isn't zero.
    """
    raw = exact_size("a signature", buf, SIGNATURE_SIZE)
    zeros("a signature", raw, 2 * _NUMBER_SIZE, SIGNATURE_SIZE)
    r, s = raw[:_NUMBER_SIZE], raw[_NUMBER_SIZE : 2 * _NUMBER_SIZE]
    return int.from_bytes(r, "little"), int.from_bytes(s, "little")
