"""Payloads of guest messages: attestation report, derived key, TSC information.

| message          | bytes  | fields (offset: name)                                            |
|------------------|--------|------------------------------------------------------------------|
| REPORT_REQ       | 0x60   | 00 REPORT_DATA[64], 40 VMPL u32, 44 KEY_SEL 1:0                  |
| REPORT_RSP       | 0x4C0  | 00 STATUS u32, 04 REPORT_SIZE u32, 20 report[0x4A0]              |
| KEY_REQ          | 0x20   | 00 ROOT_KEY_SELECT 0, KEY_SEL 2:1; 08 GUEST_FIELD_SELECT u64,    |
|                  |        | 10 VMPL u32, 14 GUEST_SVN u32, 18 TCB_VERSION u64                |
| KEY_REQ, v2      | 0x30   | the same, 20 LAUNCH_MIT_VECTOR u64                               |
| KEY_RSP          | 0x40   | 00 STATUS u32, 20 DERIVED_KEY[32]                                |
| TSC_INFO_REQ     | 0x80   | all zero                                                         |
| TSC_INFO_RSP     | 0x80   | 00 STATUS u32, 08 GUEST_TSC_SCALE u64, 10 GUEST_TSC_OFFSET u64,  |
|                  |        | 18 TSC_FACTOR u32                                                |

Everything else is reserved, 0. STATUS is a firmware status.

Source: AMD 56860, guest messages; compared with Linux sev-guest, virtee/sev and
go-sev-guest. GEN: TSC_INFO, and the size of KEY_REQ v2, whose last field ends at 0x28 while a
payload is a multiple of 16.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import ClassVar

from kvmlaunch.errors import FormatError

from ._check import exact_size, sized_bytes, uint, zeros
from .guest_message import KEY_SIZE, MessageType, SecretKey
from .page import Buffer
from .report import REPORT_SIZE

__all__ = [
    "KeyRequest",
    "KeyResponse",
    "KeySelect",
    "ReportRequest",
    "ReportResponse",
    "TscInfoRequest",
    "TscInfoResponse",
]

_REPORT_REQ = struct.Struct("<64sII24x")
_REPORT_RSP = struct.Struct(f"<II24x{REPORT_SIZE}s")
_KEY_REQ = struct.Struct("<I4xQIIQ")
_KEY_REQ_V2 = struct.Struct("<I4xQIIQQ8x")
_KEY_RSP = struct.Struct(f"<I28x{KEY_SIZE}s")
_TSC_INFO_RSP = struct.Struct("<I4xQQI100x")
_TSC_INFO_SIZE = 0x80


def _no_key() -> SecretKey:
    return SecretKey(bytes(KEY_SIZE))


class KeySelect(enum.IntEnum):
    """KEY_SEL: which key of the chip signs, or is the root of a derived key."""

    AUTO = 0
    """VLEK if one is loaded, else VCEK."""
    VCEK = 1
    VLEK = 2
    RESERVED = 3


@dataclasses.dataclass(frozen=True)
class ReportRequest:
    """REPORT_REQ: `report_data` is 64 bytes, `vmpl` enters the report."""

    TYPE: ClassVar = MessageType.REPORT_REQ
    report_data: bytes = bytes(64)
    vmpl: int = 0
    key_sel: int = KeySelect.AUTO

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        sized_bytes("report_data", self.report_data, 64)
        uint("vmpl", self.vmpl, 32)
        uint("key_sel", self.key_sel, 2)

    def encode(self) -> bytes:
        """Return the 96 bytes."""
        return _REPORT_REQ.pack(self.report_data, self.vmpl, self.key_sel)

    @classmethod
    def decode(cls, buf: Buffer) -> ReportRequest:
        """Read a payload.

        Raises:
            FormatError: not 96 bytes, or a reserved bit is set.
        """
        raw = exact_size("REPORT_REQ", buf, _REPORT_REQ.size)
        zeros("REPORT_REQ", raw, 0x48, _REPORT_REQ.size)
        return cls(*_REPORT_REQ.unpack(raw))


@dataclasses.dataclass(frozen=True)
class ReportResponse:
    """REPORT_RSP: `report` is 1184 bytes (see `report`), zero unless `status` is 0."""

    TYPE: ClassVar = MessageType.REPORT_RSP
    status: int = 0
    report: bytes = bytes(REPORT_SIZE)
    report_size: int = REPORT_SIZE

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        uint("status", self.status, 32)
        sized_bytes("report", self.report, REPORT_SIZE)
        uint("report_size", self.report_size, 32)

    def encode(self) -> bytes:
        """Return the 1216 bytes."""
        return _REPORT_RSP.pack(self.status, self.report_size, self.report)

    @classmethod
    def decode(cls, buf: Buffer) -> ReportResponse:
        """Read a payload.

        Raises:
            FormatError: not 1216 bytes, or a reserved byte isn't zero.
        """
        raw = exact_size("REPORT_RSP", buf, _REPORT_RSP.size)
        zeros("REPORT_RSP", raw, 0x08, 0x20)
        status, size, report = _REPORT_RSP.unpack(raw)
        return cls(status, report, size)


@dataclasses.dataclass(frozen=True)
class KeyRequest:
    """KEY_REQ: what a derived key shall depend on.

    `use_vmrk` takes the guest's VMRK as root instead of the chip's key (`key_sel`). The bits of
    `fields` choose what is mixed in: 0 policy, 1 image id, 2 family id, 3 measurement,
    4 `guest_svn`, 5 `tcb_version`, 6 `launch_mit_vector` (version 2 only).
    """

    TYPE: ClassVar = MessageType.KEY_REQ
    use_vmrk: bool = False
    key_sel: int = KeySelect.AUTO
    fields: int = 0
    vmpl: int = 0
    guest_svn: int = 0
    tcb_version: int = 0
    launch_mit_vector: int = 0

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        uint("key_sel", self.key_sel, 2)
        uint("vmpl", self.vmpl, 32)
        uint("guest_svn", self.guest_svn, 32)
        for name in ("fields", "tcb_version", "launch_mit_vector"):
            uint(name, getattr(self, name), 64)

    def encode(self, version: int = 1) -> bytes:
        """Return the payload of message version 1 (32 bytes) or 2 (48 bytes)."""
        select = self.use_vmrk | self.key_sel << 1
        head = (select, self.fields, self.vmpl, self.guest_svn, self.tcb_version)
        if version == 1:
            if self.launch_mit_vector:
                raise FormatError("launch_mit_vector needs KEY_REQ version 2")
            return _KEY_REQ.pack(*head)
        return _KEY_REQ_V2.pack(*head, self.launch_mit_vector)

    @classmethod
    def decode(cls, buf: Buffer) -> KeyRequest:
        """Read a payload of either version; the size tells which.

        Raises:
            FormatError: another size, or a reserved bit is set.
        """
        is_v1 = len(buf) == _KEY_REQ.size
        layout = _KEY_REQ if is_v1 else _KEY_REQ_V2
        raw = exact_size("KEY_REQ", buf, layout.size)
        zeros("KEY_REQ", raw, 0x04, 0x08)
        zeros("KEY_REQ", raw, 0x28, len(raw))
        select, *values = layout.unpack(raw)
        uint("root key select", select, 3)
        return cls(bool(select & 1), select >> 1, *values)


@dataclasses.dataclass(frozen=True)
class KeyResponse:
    """KEY_RSP: the key is zero unless `status` is 0. `repr` doesn't show it."""

    TYPE: ClassVar = MessageType.KEY_RSP
    status: int = 0
    derived_key: SecretKey = dataclasses.field(default_factory=_no_key)

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        uint("status", self.status, 32)

    def encode(self) -> bytes:
        """Return the 64 bytes, the key among them."""
        return _KEY_RSP.pack(self.status, self.derived_key.reveal())

    @classmethod
    def decode(cls, buf: Buffer) -> KeyResponse:
        """Read a payload.

        Raises:
            FormatError: not 64 bytes, or a reserved byte isn't zero.
        """
        if len(buf) == _KEY_RSP.size and not any(buf[0x04:0x20]):
            return cls(int.from_bytes(buf[:4], "little"), SecretKey(buf[0x20:]))
        size = len(buf)
        del buf  # a traceback may show locals
        raise FormatError(f"KEY_RSP is {_KEY_RSP.size} bytes, 28 of them zero; these {size} aren't")


@dataclasses.dataclass(frozen=True)
class TscInfoRequest:
    """TSC_INFO_REQ: nothing to say."""

    TYPE: ClassVar = MessageType.TSC_INFO_REQ

    def encode(self) -> bytes:
        """Return the 128 bytes."""
        return bytes(_TSC_INFO_SIZE)

    @classmethod
    def decode(cls, buf: Buffer) -> TscInfoRequest:
        """Read a payload.

        Raises:
            FormatError: not 128 bytes, or not zero.
        """
        raw = exact_size("TSC_INFO_REQ", buf, _TSC_INFO_SIZE)
        zeros("TSC_INFO_REQ", raw, 0, _TSC_INFO_SIZE)
        return cls()


@dataclasses.dataclass(frozen=True)
class TscInfoResponse:
    """TSC_INFO_RSP: scale is 8.32 fixed point, factor in units of 0.001 %."""

    TYPE: ClassVar = MessageType.TSC_INFO_RSP
    status: int = 0
    guest_tsc_scale: int = 0
    guest_tsc_offset: int = 0
    tsc_factor: int = 0

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        uint("status", self.status, 32)
        uint("guest_tsc_scale", self.guest_tsc_scale, 64)
        uint("guest_tsc_offset", self.guest_tsc_offset, 64)
        uint("tsc_factor", self.tsc_factor, 32)

    def encode(self) -> bytes:
        """Return the 128 bytes."""
        return _TSC_INFO_RSP.pack(*dataclasses.astuple(self))

    @classmethod
    def decode(cls, buf: Buffer) -> TscInfoResponse:
        """Read a payload.

        Raises:
            FormatError: not 128 bytes, or a reserved byte isn't zero.
        """
        raw = exact_size("TSC_INFO_RSP", buf, _TSC_INFO_SIZE)
        zeros("TSC_INFO_RSP", raw, 0x04, 0x08)
        zeros("TSC_INFO_RSP", raw, 0x1C, _TSC_INFO_SIZE)
        return cls(*_TSC_INFO_RSP.unpack(raw))
