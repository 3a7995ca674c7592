"""What a launch has where nobody chose it; alone here, since every launch imports it."""

from __future__ import annotations

__all__ = ["DEFAULT_POLICY"]

DEFAULT_POLICY = 0x30000
"""SMT and the reserved bit: the default of QEMU, sev-snp-measure and virtee/sev."""
