"""Guest messages through the GHCB: the seam to the secure processor (sev.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmlaunch.sim.ghcb import Ghcb
from kvmlaunch.sim.uaccess import refuse

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["extended_request", "request"]


def request(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """snp_handle_guest_req()."""
    refuse(errno.EIO)


def extended_request(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """snp_handle_ext_guest_req()."""
    refuse(errno.EIO)
