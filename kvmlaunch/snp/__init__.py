"""The SNP launch: New -> Started -> Finished."""

from __future__ import annotations

from kvmlaunch.snp.launch import CpuidRejected, Finished, New, Started

__all__ = ["CpuidRejected", "Finished", "New", "Started"]
