"""Secrets page: what firmware tells the guest, with its message keys (4096 bytes).

| offset | size | field                                                    |
|--------|------|----------------------------------------------------------|
| 0x000  | 4    | VERSION                                                  |
| 0x004  | 4    | bit 0 IMI_EN                                             |
| 0x008  | 4    | FMS, family/model/stepping as EAX of CPUID leaf 1        |
| 0x010  | 16   | GOSVW                                                    |
| 0x020  | 128  | VMPCK0..VMPCK3, 32 each                                  |
| 0x0A0  | 96   | for the guest's OS                                       |
| 0x100  | 64   | VMSA tweak bitmap                                        |
| 0x140  | 8    | SVSM base GPA (these five are filled in by the SVSM)     |
| 0x148  | 8    | SVSM size, bytes                                         |
| 0x150  | 8    | SVSM calling area GPA                                    |
| 0x158  | 4    | SVSM highest protocol version                            |
| 0x15C  | 1    | SVSM guest VMPL                                          |
| 0x160  | 4    | TSC_FACTOR, 0.001 % (VERSION >= 3)                       |

Source: AMD 56860, secrets page format; Linux `struct snp_secrets_page`, coconut-svsm.
"""

from __future__ import annotations

import dataclasses
import struct

from kvmlaunch.errors import FormatError

from ._check import exact_size, sized_bytes, uint, zeros
from .page import PAGE_SIZE, Buffer

__all__ = ["VMPCK_SIZE", "SecretsPage"]

VMPCK_SIZE = 32
"""Bytes of one message key (AES-256)."""

_WHAT = "the secrets page"
_VMPCKS = 4
_LAYOUT = struct.Struct("<IIIxxxx16s32s32s32s32s96s64sQQQIBxxxI")
_RESERVED = ((0x00C, 0x010), (0x15D, 0x160), (0x164, PAGE_SIZE))
_IMI_EN = 1
_SIZES = {"version": 32, "fms": 32, "svsm_base": 64, "svsm_size": 64, "svsm_caa": 64}
_SIZES |= {"svsm_max_version": 32, "svsm_guest_vmpl": 8, "tsc_factor": 32}
_NO_KEY = bytes(VMPCK_SIZE)


@dataclasses.dataclass(frozen=True, repr=False)
class SecretsPage:
    """A secrets page. `repr` and `str` never show a key or the OS area."""

    version: int = 3
    imi_en: bool = False
    fms: int = 0
    gosvw: bytes = bytes(16)
    vmpck: tuple[bytes, bytes, bytes, bytes] = (_NO_KEY, _NO_KEY, _NO_KEY, _NO_KEY)
    os_area: bytes = bytes(96)
    vmsa_tweak_bitmap: bytes = bytes(64)
    svsm_base: int = 0
    svsm_size: int = 0
    svsm_caa: int = 0
    svsm_max_version: int = 0
    svsm_guest_vmpl: int = 0
    tsc_factor: int = 0

    def __post_init__(self) -> None:
        """Refuse a value that does not fit its field."""
        for name, bits in _SIZES.items():
            uint(name, getattr(self, name), bits)
        sized_bytes("gosvw", self.gosvw, 16)
        sized_bytes("os_area", self.os_area, 96)
        sized_bytes("vmsa_tweak_bitmap", self.vmsa_tweak_bitmap, 64)
        if len(self.vmpck) != _VMPCKS:
            raise FormatError(f"a secrets page has {_VMPCKS} VMPCKs, not {len(self.vmpck)}")
        for number, key in enumerate(self.vmpck):
            sized_bytes(f"vmpck{number}", key, VMPCK_SIZE)

    def encode(self) -> bytes:
        """Return the page, 4096 bytes."""
        return _LAYOUT.pack(
            self.version,
            self.imi_en,
            self.fms,
            self.gosvw,
            *self.vmpck,
            self.os_area,
            self.vmsa_tweak_bitmap,
            self.svsm_base,
            self.svsm_size,
            self.svsm_caa,
            self.svsm_max_version,
            self.svsm_guest_vmpl,
            self.tsc_factor,
        ).ljust(PAGE_SIZE, b"\0")

    @classmethod
    def decode(cls, buf: Buffer, *, strict: bool = True) -> SecretsPage:
        """Read a page.

        Args:
            buf: 4096 bytes.
            strict: refuse reserved bits that aren't zero; else skip them, as for a page of
                firmware newer than this code.

        Raises:
            FormatError: not 4096 bytes, or (strict) a reserved bit is set.
        """
        page = exact_size(_WHAT, buf, PAGE_SIZE)
        version, flags, fms, gosvw, *rest = _LAYOUT.unpack_from(page)
        if strict:
            uint("flags of the secrets page", flags, 1)
            for start, end in _RESERVED:
                zeros(_WHAT, page, start, end)
        keys, others = rest[:_VMPCKS], rest[_VMPCKS:]
        return cls(version, bool(flags & _IMI_EN), fms, gosvw, tuple(keys), *others)

    def __repr__(self) -> str:
        """Identify the page without its keys."""
        svsm = f" svsm_base={self.svsm_base:#x}" if self.svsm_size else ""
        return (
            f"<SecretsPage version={self.version} fms={self.fms:#x} "
            f"imi_en={self.imi_en} tsc_factor={self.tsc_factor}{svsm} keys hidden>"
        )
