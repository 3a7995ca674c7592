"""Small binary structures as files and tools hold them: raw, hex or base64."""

from __future__ import annotations

import base64
import binascii
import re

from kvmlaunch.errors import FormatError

__all__ = ["parse_blob"]

_HEX = re.compile(rb"(?:0[xX])?((?:[0-9a-fA-F]{2})+)")


def parse_blob(data: bytes, size: int, what: str) -> bytes:
    """Return the `size` bytes that `data` holds.

    Taken are the bytes themselves, hex (any case, with or without 0x) and base64, both with
    white space anywhere.

    Raises:
        FormatError: anything else, naming `what`.
    """
    text = b"".join(data.split())
    digits = _HEX.fullmatch(text)
    # 96 hex digits are a launch digest, although an ID block has 96 bytes.
    if len(data) == size and not digits:
        return data
    if digits and len(digits[1]) == 2 * size:
        return bytes.fromhex(digits[1].decode("ascii"))
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if len(decoded) == size:
        return decoded
    if digits:
        found = f"{len(digits[1])} hex digits"
    elif decoded:
        found = f"base64 of {len(decoded)} bytes"
    else:
        found = f"{len(data)} bytes"
    raise FormatError(f"{what} is {size} bytes, raw, hex or base64; this is {found}")
