"""Page size and the page types of SNP_LAUNCH_UPDATE.

Source: AMD 56860, SNP_LAUNCH_UPDATE, encodings of PAGE_TYPE; the same numbers are in
Linux uapi as KVM_SEV_SNP_PAGE_TYPE_*. 0 and 7 are invalid (INVALID_PARAM).
"""

from __future__ import annotations

from .enums import IntEnum

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from typing import TypeAlias

__all__ = ["PAGE_SIZE", "Buffer", "PageType"]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes to read; a memoryview has format ``B`` and one dimension."""

PAGE_SIZE = 4096
"""Bytes of one measured page. A 2 MiB update is measured as 512 of these."""


class PageType(IntEnum):
    """How firmware measures and fills one launch page."""

    NORMAL = 1
    """Host's plaintext, hashed and encrypted (KVM_SEV_SNP_PAGE_TYPE_NORMAL)."""
    VMSA = 2
    """Register state of one vCPU, hashed and encrypted; the RMP entry gets the VMSA bit.

    Mainline KVM takes this type from nobody: it makes the pages itself at FINISH.
    """
    ZERO = 3
    """Zeros, whatever the host's page holds; not hashed (KVM_SEV_SNP_PAGE_TYPE_ZERO)."""
    UNMEASURED = 4
    """Host's plaintext, encrypted but not hashed (KVM_SEV_SNP_PAGE_TYPE_UNMEASURED).

    Type and GPA still enter the digest.
    """
    SECRETS = 5
    """Filled by firmware, see `secrets_page` (KVM_SEV_SNP_PAGE_TYPE_SECRETS)."""
    CPUID = 6
    """Host's CPUID table after firmware's check, see `cpuid_page` (KVM_SEV_SNP_PAGE_TYPE_CPUID)."""

    @property
    def measures_contents(self) -> bool:
        """Whether the page's bytes enter the digest; else CONTENTS is 48 zero bytes."""
        return self in (PageType.NORMAL, PageType.VMSA)
