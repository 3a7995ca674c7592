"""Certificate table of an extended guest request: certificates by GUID.

| offset in an entry | size | field                                     |
|--------------------|------|-------------------------------------------|
| 0x00               | 16   | GUID, bytes in the order of its text      |
| 0x10               | 4    | offset of the blob from the table's start |
| 0x14               | 4    | length of the blob                        |

Entries end with 24 zero bytes; the blobs (DER) follow. Source: AMD 56421, SNP extended guest
request; GUIDs compared with go-sev-guest and virtee/sev.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

from kvmlaunch.errors import FormatError

from ._check import uint
from .page import Buffer

__all__ = ["CERT_GUIDS", "decode", "encode"]

CERT_GUIDS: Mapping[str, UUID] = MappingProxyType(
    {
        "VCEK": UUID("63da758d-e664-4564-adc5-f4b93be8accd"),
        "VLEK": UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"),
        "ASK": UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"),
        "ARK": UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"),
    }
)
"""GUIDs of the certificates, by name; ASK is also the VLEK's ASVK."""

_ENTRY = struct.Struct("<16sII")
_END = bytes(_ENTRY.size)


def encode(certificates: Mapping[UUID, bytes]) -> bytes:
    """Return the table with its blobs, in the mapping's order; not padded to a page."""
    entries, blobs = b"", b""
    first = _ENTRY.size * (len(certificates) + 1)
    for guid, blob in certificates.items():
        at = uint("the table's size", first + len(blobs), 32)
        entries += _ENTRY.pack(guid.bytes, at, len(blob))
        blobs += blob
    return entries + _END + blobs


def decode(buf: Buffer) -> dict[UUID, bytes]:
    """Read a table; what follows the last blob is skipped.

    Raises:
        FormatError: no end, a blob outside the input, blobs that overlap, or a GUID twice.
    """
    found: dict[UUID, bytes] = {}
    left = len(buf)
    for at in range(0, len(buf) - _ENTRY.size + 1, _ENTRY.size):
        entry = bytes(buf[at : at + _ENTRY.size])
        if entry == _END:
            return found
        raw, offset, length = _ENTRY.unpack(entry)
        guid = UUID(bytes=raw)
        if offset + length > len(buf):
            raise FormatError(f"the blob of {guid} ends behind the certificate table", offset=at)
        left -= length
        if left < 0:
            raise FormatError("the blobs of the certificate table overlap", offset=at)
        if guid in found:
            raise FormatError(f"{guid} is twice in the certificate table", offset=at)
        found[guid] = bytes(buf[offset : offset + length])
    raise FormatError("a certificate table ends with 24 zero bytes, the input doesn't")
