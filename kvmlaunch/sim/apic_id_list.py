"""The GHCB event APIC_ID_LIST: which vCPUs there are, for guests that start them all themselves.

Not in mainline. Source: patch 56/60 of the series "planes" of June 2026 (sev_get_apic_ids); the
selftest that is posted with the VMSA proposal holds the same answers against it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmlaunch.abi.ghcb import GhcbError
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim.ghcb import Ghcb

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["write"]

_U64 = (1 << 64) - 1


def write(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """Count and IDs, 32 bits each, into the guest's RAX pages; if they are too few: how many."""
    ids = [other.id for other in vcpu.vm.vcpus]
    answer = struct.pack(f"<{1 + len(ids)}I", len(ids), *ids)
    gpa, room = ghcb.info_1, ghcb.registers["rax"] * PAGE_SIZE & _U64
    if len(answer) > room:
        ghcb.registers["rax"] = -(-len(answer) // PAGE_SIZE)
        return 1
    if not vcpu.state.is_page_address(gpa):
        return ghcb.refuse(GhcbError.INVALID_INPUT)
    try:
        vcpu.vm.memory.write(gpa, answer)
    except OSError:
        return ghcb.refuse(GhcbError.INVALID_INPUT)
    return 1
