"""ID block and ID authentication information: layouts only, no signing.

ID block, 96 bytes (AMD 56860, ID block):

| offset | size | field                               |
|--------|------|-------------------------------------|
| 0x00   | 48   | LD, the expected launch digest      |
| 0x30   | 16   | FAMILY_ID, opaque                   |
| 0x40   | 16   | IMAGE_ID, opaque                    |
| 0x50   | 4    | VERSION, 1                          |
| 0x54   | 4    | GUEST_SVN                           |
| 0x58   | 8    | POLICY, must be the launch's policy |

ID authentication information, 4096 bytes (AMD 56860, ID authentication information):

| offset | size | field                                             |
|--------|------|---------------------------------------------------|
| 0x000  | 4    | ID_KEY_ALGO, 1 = ECDSA P-384 with SHA-384         |
| 0x004  | 4    | AUTH_KEY_ALGO, the same, 0 without author key     |
| 0x008  | 56   | reserved                                          |
| 0x040  | 512  | ID_BLOCK_SIG, over the 96 bytes of the ID block   |
| 0x240  | 1028 | ID_KEY, public                                    |
| 0x644  | 60   | reserved                                          |
| 0x680  | 512  | ID_KEY_SIG, over the 1028 bytes of ID_KEY         |
| 0x880  | 1028 | AUTHOR_KEY, public                                |
| 0xC84  | 892  | reserved                                          |
"""

from __future__ import annotations

import dataclasses
import struct

from ._check import exact_size, sized_bytes, uint, zeros
from .digest import DIGEST_SIZE
from .page import PAGE_SIZE, Buffer
from .policy import DEFAULT_POLICY
from .signature import ALGO_ECDSA_P384_SHA384, SIGNATURE_SIZE

__all__ = [
    "ALGO_ECDSA_P384_SHA384",
    "ID_AUTH_SIZE",
    "ID_BLOCK_SIZE",
    "PUBLIC_KEY_SIZE",
    "SIGNATURE_SIZE",
    "IdAuth",
    "IdBlock",
]

ID_BLOCK_SIZE = 96
"""Bytes of an ID block."""
ID_AUTH_SIZE = PAGE_SIZE
"""Bytes of the ID authentication information."""
PUBLIC_KEY_SIZE = 1028
"""Bytes of an encoded public key: curve u32, QX and QY, 72 each, little-endian, then zeros."""

_ID_BLOCK = struct.Struct("<48s16s16sIIQ")
_ID_AUTH = struct.Struct("<II56x512s1028s60x512s1028s892x")
_AUTH_RESERVED = ((0x008, 0x040), (0x644, 0x680), (0xC84, ID_AUTH_SIZE))


@dataclasses.dataclass(frozen=True)
class IdBlock:
    """What the guest's owner expects: launch digest (48 bytes), ids (16 each), policy (u64)."""

    ld: bytes
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    version: int = 1
    guest_svn: int = 0
    policy: int = DEFAULT_POLICY

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        sized_bytes("ld", self.ld, DIGEST_SIZE)
        sized_bytes("family_id", self.family_id, 16)
        sized_bytes("image_id", self.image_id, 16)
        uint("version", self.version, 32)
        uint("guest_svn", self.guest_svn, 32)
        uint("policy", self.policy, 64)

    def encode(self) -> bytes:
        """Return the 96 bytes."""
        return _ID_BLOCK.pack(*dataclasses.astuple(self))

    @classmethod
    def decode(cls, buf: Buffer) -> IdBlock:
        """Read 96 bytes; values that firmware would refuse are taken.

        Raises:
            FormatError: not 96 bytes.
        """
        return cls(*_ID_BLOCK.unpack(exact_size("an ID block", buf, ID_BLOCK_SIZE)))

    def __str__(self) -> str:
        """Return every field on one line."""
        return (
            f"ld={self.ld.hex()} family_id={self.family_id.hex()} "
            f"image_id={self.image_id.hex()} version={self.version} "
            f"guest_svn={self.guest_svn} policy={self.policy:#x}"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class IdAuth:
    """Keys (1028 bytes each) and signatures (512 bytes each) for an ID block, as encoded.

    Without an author key, `auth_key_algo`, `id_key_sig` and `author_key` are zero. All
    zero, the default, is what firmware refuses with INVALID_PARAM.
    """

    id_key_algo: int = 0
    auth_key_algo: int = 0
    id_block_sig: bytes = bytes(SIGNATURE_SIZE)
    id_key: bytes = bytes(PUBLIC_KEY_SIZE)
    id_key_sig: bytes = bytes(SIGNATURE_SIZE)
    author_key: bytes = bytes(PUBLIC_KEY_SIZE)

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        uint("id_key_algo", self.id_key_algo, 32)
        uint("auth_key_algo", self.auth_key_algo, 32)
        sized_bytes("id_block_sig", self.id_block_sig, SIGNATURE_SIZE)
        sized_bytes("id_key", self.id_key, PUBLIC_KEY_SIZE)
        sized_bytes("id_key_sig", self.id_key_sig, SIGNATURE_SIZE)
        sized_bytes("author_key", self.author_key, PUBLIC_KEY_SIZE)

    @property
    def has_author_key(self) -> bool:
        """Whether any part of the author key is there."""
        return self.auth_key_algo != 0 or any(self.id_key_sig) or any(self.author_key)

    def encode(self) -> bytes:
        """Return the 4096 bytes."""
        return _ID_AUTH.pack(*dataclasses.astuple(self))

    @classmethod
    def decode(cls, buf: Buffer) -> IdAuth:
        """Read 4096 bytes; values that firmware would refuse are taken.

        Raises:
            FormatError: not 4096 bytes, or a reserved byte isn't zero.
        """
        page = exact_size("ID authentication information", buf, ID_AUTH_SIZE)
        for start, end in _AUTH_RESERVED:
            zeros("ID authentication information", page, start, end)
        return cls(*_ID_AUTH.unpack(page))

    def __repr__(self) -> str:
        """Identify the page without its keys and signatures."""
        author = f"auth_key_algo={self.auth_key_algo}" if self.has_author_key else "no author key"
        return f"<IdAuth id_key_algo={self.id_key_algo}, {author}>"
