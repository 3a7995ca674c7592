"""Tests of the real path: for SNP hosts, and for the emulated machine of tests/mainline."""

from __future__ import annotations

import pytest

from kvmlaunch.platforms import host_cbitpos
from kvmlaunch.uapi import RealPlatform


@pytest.fixture
def cbitpos(real_snp: RealPlatform) -> int:
    """The host's C-bit."""
    position = host_cbitpos(real_snp)
    assert position is not None
    return position
