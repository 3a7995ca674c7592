"""Launch digest as the simulated firmware computes it.

Written apart from `kvmlaunch.abi.digest`, which predicts it: the two are witnesses for one
another and share no code. Here PAGE_INFO is one template of 0x70 bytes, filled in byte by
byte (AMD 56860, PAGE_INFO structure).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["Measurement"]

# Where each field of PAGE_INFO starts.
_DIGEST_CUR = 0x00
_CONTENTS = 0x30
_LENGTH = 0x60
_PAGE_TYPE = 0x62
_IMI_PAGE = 0x63
_VMPL1_PERMS = 0x65
_VMPL2_PERMS = 0x66
_VMPL3_PERMS = 0x67
_GPA = 0x68
_END = 0x70

_NORMAL = 1
_VMSA = 2
# GUEST_TSC_SCALE and GUEST_TSC_OFFSET of a VMSA count as zero (obs).
_TSC_START = 0x2F0
_TSC_END = 0x300


class Measurement:
    """A running digest, LD or IMD."""

    def __init__(self) -> None:
        self._info = bytearray(_END)
        self._info[_LENGTH] = _END

    @property
    def value(self) -> bytes:
        """The digest after the pages so far."""
        return bytes(self._info[_DIGEST_CUR:_CONTENTS])

    def extend(
        self,
        page_type: int,
        gpa: int,
        page: memoryview | bytes,
        *,
        imi_page: bool = False,
        vmpl_perms: Iterable[int] = (0, 0, 0),
    ) -> bytes:
        """Take one 4 KiB page in; return its CONTENTS."""
        contents = hash_contents(page_type, page)
        info = self._info
        info[_CONTENTS:_LENGTH] = contents
        info[_PAGE_TYPE] = page_type
        info[_IMI_PAGE] = 1 if imi_page else 0
        info[_VMPL1_PERMS], info[_VMPL2_PERMS], info[_VMPL3_PERMS] = vmpl_perms
        for at in range(_GPA, _END):
            info[at] = gpa & 0xFF
            gpa >>= 8
        info[_DIGEST_CUR:_CONTENTS] = hashlib.sha384(info).digest()
        return contents

    def __repr__(self) -> str:
        return f"<Measurement {self.value.hex()}>"


def hash_contents(page_type: int, page: memoryview | bytes) -> bytes:
    """Return CONTENTS: a hash for NORMAL and VMSA pages, 48 zero bytes for all others."""
    if page_type == _NORMAL:
        return hashlib.sha384(page).digest()
    if page_type == _VMSA:
        parts = hashlib.sha384(page[:_TSC_START])
        parts.update(bytearray(_TSC_END - _TSC_START))
        parts.update(page[_TSC_END:])
        return parts.digest()
    return bytes(_CONTENTS - _DIGEST_CUR)
