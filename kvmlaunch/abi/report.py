"""Attestation report: what firmware certifies of a guest (1184 bytes).

The fields of `AttestationReport` are the table: each line gives name, offset, size and the
report version that brought the field, in the order of the report. What lies between them is
reserved; so is a field that the report's version doesn't have. Non-zero reserved bytes are
kept in `AttestationReport.reserved`: the signature covers them.

Source: AMD 56860, ATTESTATION_REPORT; compared with virtee/sev, go-sev-guest and two real
reports of version 2.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from kvmlaunch.errors import FormatError

from ._check import exact_size, sized_bytes, uint
from ._layout import Runs, canonical_runs, find_gaps, find_runs, int_at, raw_at
from .page import Buffer
from .signature import SIGNATURE_SIZE
from .tcb import Product, product_of

__all__ = [
    "PLATFORM_INFO",
    "REPORT_FIELDS",
    "REPORT_SIZE",
    "REPORT_VERSIONS",
    "SIGNED_SIZE",
    "AttestationReport",
    "ReportField",
    "SigningKey",
    "fields_of",
    "key_info",
]

REPORT_SIZE = 0x4A0
"""Bytes of a report."""
SIGNED_SIZE = 0x2A0
"""Bytes of a report that the signature covers, from its start."""
REPORT_VERSIONS = frozenset({2, 3, 4, 5})
"""Versions whose layout is known; 4 is read as 3."""

PLATFORM_INFO: Mapping[str, int] = MappingProxyType(
    {
        "smt_en": 0,
        "tsme_en": 1,
        "ecc_en": 2,
        "rapl_dis": 3,
        "ciphertext_hiding_dram_en": 4,
        "alias_check_complete": 5,
        "sev_tio_en": 7,
    }
)
"""Bit numbers of PLATFORM_INFO, by name."""

_AUTHOR_KEY_EN = 1 << 0
_MASK_CHIP_KEY = 1 << 1
_SIGNING_KEY_SHIFT, _SIGNING_KEY_MASK = 2, 7


class SigningKey(enum.IntEnum):
    """SIGNING_KEY: which key signed the report."""

    VCEK = 0
    VLEK = 1
    NONE = 7
    """Not signed: the chip's key is masked."""


def key_info(signing_key: int, *, author_key_en: bool = False, mask_chip_key: bool = False) -> int:
    """Return the KEY_INFO word: bit 0 AUTHOR_KEY_EN, 1 MASK_CHIP_KEY, 4:2 SIGNING_KEY."""
    flags = author_key_en * _AUTHOR_KEY_EN | mask_chip_key * _MASK_CHIP_KEY
    return uint("signing_key", signing_key, 3) << _SIGNING_KEY_SHIFT | flags


class ReportField(NamedTuple):
    """One line of the field table; offset and size in bytes, `since` a report version."""

    name: str
    offset: int
    size: int
    since: int


@dataclasses.dataclass(frozen=True, repr=False)
class AttestationReport:
    """One report. Fields are unsigned integers or bytes; default 0.

    TCBs are TCB_VERSION words (see `tcb`).

    Raises:
        FormatError: a value doesn't fit its field, or the report's version hasn't that field.
    """

    version: int = int_at(0x000, 4, default=3)
    guest_svn: int = int_at(0x004, 4)
    policy: int = int_at(0x008, 8)
    family_id: bytes = raw_at(0x010, 16)
    image_id: bytes = raw_at(0x020, 16)
    vmpl: int = int_at(0x030, 4)
    signature_algo: int = int_at(0x034, 4)
    """`signature.ALGO_ECDSA_P384_SHA384`."""
    current_tcb: int = int_at(0x038, 8)
    platform_info: int = int_at(0x040, 8)
    key_info: int = int_at(0x048, 4)
    report_data: bytes = raw_at(0x050, 64)
    measurement: bytes = raw_at(0x090, 48)
    host_data: bytes = raw_at(0x0C0, 32)
    id_key_digest: bytes = raw_at(0x0E0, 48)
    author_key_digest: bytes = raw_at(0x110, 48)
    report_id: bytes = raw_at(0x140, 32)
    report_id_ma: bytes = raw_at(0x160, 32)
    reported_tcb: int = int_at(0x180, 8)
    cpuid_fam_id: int = int_at(0x188, 1, since=3)
    cpuid_mod_id: int = int_at(0x189, 1, since=3)
    cpuid_step: int = int_at(0x18A, 1, since=3)
    chip_id: bytes = raw_at(0x1A0, 64)
    committed_tcb: int = int_at(0x1E0, 8)
    current_build: int = int_at(0x1E8, 1)
    current_minor: int = int_at(0x1E9, 1)
    current_major: int = int_at(0x1EA, 1)
    committed_build: int = int_at(0x1EC, 1)
    committed_minor: int = int_at(0x1ED, 1)
    committed_major: int = int_at(0x1EE, 1)
    launch_tcb: int = int_at(0x1F0, 8)
    launch_mit_vector: int = int_at(0x1F8, 8, since=5)
    current_mit_vector: int = int_at(0x200, 8, since=5)
    signature: bytes = raw_at(SIGNED_SIZE, SIGNATURE_SIZE)
    """R and S, see `signature`."""
    reserved: Runs = ()
    """(offset, bytes) of what is not zero outside the fields; at most one run per gap."""

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        uint("version", self.version, 32)
        known = fields_of(self.version)
        for field in REPORT_FIELDS:
            name, _, size, since = field
            value = getattr(self, name)
            if isinstance(_DEFAULTS[name], bytes):
                object.__setattr__(self, name, sized_bytes(name, value, size))
            else:
                uint(name, value, size * 8)
            if value != _DEFAULTS[name] and field not in known:
                raise FormatError(f"{name} needs report version {since}, not {self.version}")
        if self.reserved:
            object.__setattr__(self, "reserved", canonical_runs(self.reserved, _gaps(self.version)))

    def encode(self) -> bytes:
        """Return the 1184 bytes."""
        buf = bytearray(REPORT_SIZE)
        for name, offset, size, _ in fields_of(self.version):
            value = getattr(self, name)
            raw = value if isinstance(value, bytes) else value.to_bytes(size, "little")
            buf[offset : offset + size] = raw
        for offset, data in self.reserved:
            buf[offset : offset + len(data)] = data
        return bytes(buf)

    @classmethod
    def decode(cls, buf: Buffer) -> AttestationReport:
        """Read a report; a version that isn't known is read as the nearest one that is.

        Raises:
            FormatError: not 1184 bytes.
        """
        raw = exact_size("an attestation report", buf, REPORT_SIZE)
        version = int.from_bytes(raw[:4], "little")
        fields: dict[str, Any] = {}
        for name, offset, size, _ in fields_of(version):
            value = raw[offset : offset + size]
            is_bytes = isinstance(_DEFAULTS[name], bytes)
            fields[name] = value if is_bytes else int.from_bytes(value, "little")
        return cls(**fields, reserved=tuple(find_runs(raw, _gaps(version))))

    @property
    def signed_bytes(self) -> bytes:
        """What the signature covers."""
        return self.encode()[:SIGNED_SIZE]

    @property
    def author_key_en(self) -> bool:
        """KEY_INFO: the ID key is signed by an author key."""
        return bool(self.key_info & _AUTHOR_KEY_EN)

    @property
    def mask_chip_key(self) -> bool:
        """KEY_INFO: the chip's key may not sign."""
        return bool(self.key_info & _MASK_CHIP_KEY)

    @property
    def signing_key(self) -> int:
        """KEY_INFO: a `SigningKey`, or a number that has no name."""
        number = self.key_info >> _SIGNING_KEY_SHIFT & _SIGNING_KEY_MASK
        return SigningKey(number) if number in SigningKey.__members__.values() else number

    @property
    def product(self) -> Product | None:
        """The CPU, which gives the layout of the TCBs; None in version 2 or if unknown."""
        return product_of(self.cpuid_fam_id, self.cpuid_mod_id)

    def __repr__(self) -> str:
        """Return an expression with the fields that are not the default."""
        shown = [
            f"{f.name}={hex(v) if isinstance(v, int) else repr(v)}"
            for f in REPORT_FIELDS
            if (v := getattr(self, f.name)) != _DEFAULTS[f.name]
        ]
        if self.reserved:
            shown.append(f"reserved={self.reserved!r}")
        return f"AttestationReport({', '.join(shown)})"


_EVERY_VERSION = 2


def _table() -> tuple[ReportField, ...]:
    table = []
    for field in dataclasses.fields(AttestationReport):
        if "at" in field.metadata:
            offset, size = field.metadata["at"]
            since = field.metadata.get("since", _EVERY_VERSION)
            table.append(ReportField(field.name, offset, size, since))
    return tuple(table)


REPORT_FIELDS = _table()
"""Every named field, in the order of the report."""

_DEFAULTS: dict[str, int | bytes] = {
    field.name: getattr(AttestationReport, field.name) for field in REPORT_FIELDS
}


def fields_of(version: int) -> tuple[ReportField, ...]:
    """Return the fields of a report of this version."""
    known = max(version, _EVERY_VERSION)
    return tuple(field for field in REPORT_FIELDS if field.since <= known)


def _gaps(version: int) -> tuple[tuple[int, int], ...]:
    return find_gaps(((f.offset, f.size) for f in fields_of(version)), REPORT_SIZE)
