"""Guest message: what guest and firmware say to each other under a VMPCK.

Header, 96 bytes; the payload follows, encrypted, all of it in one page:

| offset | size | field                                                          |
|--------|------|----------------------------------------------------------------|
| 0x00   | 32   | AUTHTAG, the first 16 are used                                 |
| 0x20   | 8    | MSG_SEQNO                                                      |
| 0x28   | 8    | reserved                                                       |
| 0x30   | 1    | ALGO, 1 = AES-256-GCM                                          |
| 0x31   | 1    | HDR_VERSION, 1                                                 |
| 0x32   | 2    | HDR_SIZE, 0x60                                                 |
| 0x34   | 1    | MSG_TYPE                                                       |
| 0x35   | 1    | MSG_VERSION                                                    |
| 0x36   | 2    | MSG_SIZE, bytes of the payload                                 |
| 0x38   | 4    | reserved                                                       |
| 0x3C   | 1    | MSG_VMPCK, 0..3                                                |
| 0x3D   | 35   | reserved                                                       |

IV: MSG_SEQNO and 4 zero bytes. Additional authenticated data: header bytes 0x30..0x5F. So the
tag covers neither 0x28..0x2F nor the second half of AUTHTAG.

A key lives in a `SecretKey`, which shows it to nobody who doesn't ask.

Source: AMD 56860, guest messages; compared with Linux drivers/virt/coco/sev-guest and
coconut-svsm. `guest_payload` has the payloads.
"""

from __future__ import annotations

import dataclasses
import enum
import hmac
import struct
from typing import NoReturn

from kvmlaunch.errors import FormatError

from ._check import sized_bytes, uint
from .page import PAGE_SIZE, Buffer

__all__ = [
    "ALGO_AES_256_GCM",
    "AUTHTAG_SIZE",
    "HEADER_SIZE",
    "KEY_SIZE",
    "MAX_PAYLOAD_SIZE",
    "AuthTagError",
    "MessageHeader",
    "MessageType",
    "SecretKey",
    "seal",
    "unseal",
]

HEADER_SIZE = 0x60
"""Bytes of the header."""
MAX_PAYLOAD_SIZE = PAGE_SIZE - HEADER_SIZE
"""Bytes that fit behind the header in a page."""
AUTHTAG_SIZE = 16
"""Bytes of AUTHTAG that are used."""
ALGO_AES_256_GCM = 1
"""ALGO."""
KEY_SIZE = 32
"""Bytes of a VMPCK and of a derived key."""

_HDR_VERSION = 1
_VMPCKS = 4
_PAYLOAD_UNIT = 16
_HEADER = struct.Struct("<16s16xQ8xBBHBBH4xB35x")
_AAD = slice(0x30, HEADER_SIZE)


class MessageType(enum.IntEnum):
    """MSG_TYPE."""

    CPUID_REQ = 1
    CPUID_RSP = 2
    KEY_REQ = 3
    KEY_RSP = 4
    REPORT_REQ = 5
    REPORT_RSP = 6
    EXPORT_REQ = 7
    EXPORT_RSP = 8
    IMPORT_REQ = 9
    IMPORT_RSP = 10
    ABSORB_REQ = 11
    ABSORB_RSP = 12
    VMRK_REQ = 13
    VMRK_RSP = 14
    ABSORB_NOMA_REQ = 15
    ABSORB_NOMA_RSP = 16
    TSC_INFO_REQ = 17
    TSC_INFO_RSP = 18


class AuthTagError(FormatError):
    """The tag doesn't fit: another key, or something was changed on the way."""

    def __init__(self) -> None:
        super().__init__("the guest message's authentication tag doesn't fit")


class SecretKey:
    """32 secret bytes. `repr` and `str` don't show them, and it can't be pickled or copied."""

    __slots__ = ("_raw",)

    def __init__(self, raw: Buffer) -> None:
        if (size := len(raw)) != KEY_SIZE:
            del raw  # a traceback may show locals
            raise FormatError(f"a key is {size} bytes, must be {KEY_SIZE}")
        self._raw = bytes(raw)

    def reveal(self) -> bytes:
        """Return the bytes."""
        return self._raw

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecretKey):
            return NotImplemented
        return hmac.compare_digest(self._raw, other._raw)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretKey can't be pickled or copied")

    def __repr__(self) -> str:
        return "<SecretKey hidden>"


@dataclasses.dataclass(frozen=True)
class MessageHeader:
    """A header; any values that fit are taken, `check` says what firmware and guest refuse.

    `seal` fills in `msg_size` and `authtag` (16 bytes).
    """

    msg_type: int
    seqno: int
    msg_vmpck: int = 0
    msg_version: int = 1
    msg_size: int = 0
    algo: int = ALGO_AES_256_GCM
    hdr_version: int = _HDR_VERSION
    hdr_size: int = HEADER_SIZE
    authtag: bytes = bytes(AUTHTAG_SIZE)

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        for name in ("msg_type", "msg_vmpck", "msg_version", "algo", "hdr_version"):
            uint(name, getattr(self, name), 8)
        uint("msg_size", self.msg_size, 16)
        uint("hdr_size", self.hdr_size, 16)
        uint("seqno", self.seqno, 64)
        sized_bytes("authtag", self.authtag, AUTHTAG_SIZE)

    def encode(self) -> bytes:
        """Return the 96 bytes."""
        return _HEADER.pack(
            self.authtag,
            self.seqno,
            self.algo,
            self.hdr_version,
            self.hdr_size,
            self.msg_type,
            self.msg_version,
            self.msg_size,
            self.msg_vmpck,
        )

    @classmethod
    def decode(cls, message: Buffer) -> MessageHeader:
        """Read the header that `message` begins with; reserved bytes are skipped.

        Raises:
            FormatError: shorter than a header.
        """
        if len(message) < HEADER_SIZE:
            raise FormatError(f"a guest message has {HEADER_SIZE} bytes of header")
        authtag, seqno, algo, hdr_version, hdr_size, *rest = _HEADER.unpack_from(message)
        msg_type, msg_version, msg_size, msg_vmpck = rest
        return cls(
            msg_type=msg_type,
            seqno=seqno,
            msg_vmpck=msg_vmpck,
            msg_version=msg_version,
            msg_size=msg_size,
            algo=algo,
            hdr_version=hdr_version,
            hdr_size=hdr_size,
            authtag=authtag,
        )

    def check(self) -> None:
        """Refuse a header under which nothing can be decrypted.

        Raises:
            FormatError: the first field that is wrong.
        """
        wanted = (
            ("HDR_VERSION", self.hdr_version, _HDR_VERSION),
            ("HDR_SIZE", self.hdr_size, HEADER_SIZE),
            ("ALGO", self.algo, ALGO_AES_256_GCM),
        )
        for name, value, must in wanted:
            if value != must:
                raise FormatError(f"{name} of a guest message is {value}, must be {must}")
        if not self.msg_size or self.msg_size % _PAYLOAD_UNIT:
            raise FormatError(f"MSG_SIZE {self.msg_size} is 0 or no multiple of {_PAYLOAD_UNIT}")
        if self.msg_size > MAX_PAYLOAD_SIZE:
            raise FormatError(f"MSG_SIZE {self.msg_size} is above {MAX_PAYLOAD_SIZE}")
        if self.msg_vmpck >= _VMPCKS:
            raise FormatError(f"MSG_VMPCK {self.msg_vmpck} is above {_VMPCKS - 1}")


def seal(key: SecretKey, header: MessageHeader, payload: Buffer) -> bytes:
    """Return the message: `header` with size and tag filled in, then `payload` encrypted.

    Never twice with the same key and seqno: that breaks the cipher.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    plain = dataclasses.replace(header, msg_size=len(payload))
    sealed = AESGCM(key.reveal()).encrypt(_iv(plain), bytes(payload), plain.encode()[_AAD])
    tagged = dataclasses.replace(plain, authtag=sealed[-AUTHTAG_SIZE:])
    return tagged.encode() + sealed[:-AUTHTAG_SIZE]


def unseal(key: SecretKey, message: Buffer) -> bytes:
    """Return the payload of a message; what follows it in its page is skipped.

    Raises:
        AuthTagError: the tag doesn't fit.
        FormatError: the header can't be (`MessageHeader.check`), or the payload is cut off.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    header = MessageHeader.decode(message)
    header.check()
    payload = bytes(message[HEADER_SIZE : HEADER_SIZE + header.msg_size])
    if len(payload) < header.msg_size:
        raise FormatError(f"the payload has {len(payload)} bytes, MSG_SIZE says {header.msg_size}")
    try:
        return AESGCM(key.reveal()).decrypt(
            _iv(header), payload + header.authtag, bytes(message[_AAD])
        )
    except InvalidTag:
        raise AuthTagError from None


def _iv(header: MessageHeader) -> bytes:
    return header.seqno.to_bytes(8, "little") + bytes(4)
