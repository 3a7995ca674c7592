"""SEV hashes table: what a measured OVMF checks kernel, initrd and command line against.

| offset | size | content                                          |
|--------|------|--------------------------------------------------|
| 0x00   | 16   | GUID of the table                                |
| 0x10   | 2    | length of what has been said, 168                |
| 0x12   | 50   | command line: GUID, u16 50, SHA-256              |
| 0x44   | 50   | initrd, likewise                                 |
| 0x76   | 50   | kernel, likewise                                 |
| 0xA8   | 8    | zeros, up to a multiple of 16                    |

GUIDs are in mixed-endian form. Sources: QEMU target/i386/sev.c (PaddedSevHashTable), edk2
OvmfPkg/AmdSev/BlobVerifierLibSevHashes.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass

from kvmlaunch.errors import FormatError

from ._check import exact_size, sized_bytes, zeros
from .page import PAGE_SIZE, Buffer

__all__ = ["HASHES_SIZE", "KernelHashes", "hash_cmdline"]

HASHES_SIZE = 176
"""Bytes of a table with its padding."""

_TABLE = uuid.UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le
_ENTRIES = (
    ("cmdline", uuid.UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a").bytes_le),
    ("initrd", uuid.UUID("44baf731-3a2f-4bd7-9af1-41e29169781d").bytes_le),
    ("kernel", uuid.UUID("4de79437-abd2-427f-b835-d5b172d2045b").bytes_le),
)
_HEADER = struct.Struct("<16sH")
_ENTRY = struct.Struct("<16sH32s")
_LENGTH = _HEADER.size + len(_ENTRIES) * _ENTRY.size
_DIGEST_SIZE = 32


def hash_cmdline(text: str | bytes) -> bytes:
    """SHA-256 of a kernel command line with its terminating NUL, as QEMU hashes it.

    Raises FormatError if there is a NUL in it.
    """
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    if b"\0" in raw:
        raise FormatError("a kernel command line ends at its first NUL, this one has one inside")
    return hashlib.sha256(raw + b"\0").digest()


@dataclass(frozen=True)
class KernelHashes:
    """SHA-256 of what QEMU hands to the guest, 32 bytes each; without an initrd that of nothing.

    Raises FormatError for another length.
    """

    kernel: bytes
    initrd: bytes = hashlib.sha256().digest()
    cmdline: bytes = hash_cmdline("")

    def __post_init__(self) -> None:
        """Refuse what is no SHA-256."""
        for name, _ in _ENTRIES:
            sized_bytes(f"the hash of the {name}", getattr(self, name), _DIGEST_SIZE)

    def encode(self) -> bytes:
        """Return the table, 176 bytes with its padding."""
        entries = (_ENTRY.pack(guid, _ENTRY.size, getattr(self, name)) for name, guid in _ENTRIES)
        return (_HEADER.pack(_TABLE, _LENGTH) + b"".join(entries)).ljust(HASHES_SIZE, b"\0")

    @classmethod
    def decode(cls, buf: Buffer) -> KernelHashes:
        """Read a table, 176 bytes. Raises FormatError if it isn't one that `encode` makes."""
        raw = exact_size("a hashes table", buf, HASHES_SIZE)
        if _HEADER.unpack_from(raw) != (_TABLE, _LENGTH):
            raise FormatError("a hashes table begins with its GUID and length 168", offset=0)
        hashes = {}
        for index, (name, guid) in enumerate(_ENTRIES):
            at = _HEADER.size + index * _ENTRY.size
            found, length, hashes[name] = _ENTRY.unpack_from(raw, at)
            if (found, length) != (guid, _ENTRY.size):
                raise FormatError(f"not the {name} entry of a hashes table", offset=at)
        zeros("a hashes table", raw, _LENGTH, HASHES_SIZE)
        return cls(**hashes)

    def page(self, offset: int) -> bytes:
        """Return a page of zeros with the table at ``offset``.

        Raises FormatError if it doesn't fit.
        """
        if not 0 <= offset <= PAGE_SIZE - HASHES_SIZE:
            raise FormatError(
                f"a hashes table of {HASHES_SIZE} bytes at offset {offset:#x} leaves its page"
            )
        return (bytes(offset) + self.encode()).ljust(PAGE_SIZE, b"\0")
