"""What the kept cases share: how they begin, and arguments that are wrong."""

from __future__ import annotations

from typing import NamedTuple

from tests.mainline.script import (
    ARENA_PAGES,
    GPA,
    PAGE,
    Script,
    Value,
    init2,
    open_kvm,
    open_sev,
    vm,
)

__all__ = ["ADDRESSES", "BAD_FDS", "BARE", "GFN", "HOST", "PLAIN", "READY", "TOP", "Case"]


class Case(NamedTuple):
    """A script, and orders for the firmware (kvmlaunch.sim.faults)."""

    script: Script
    orders: tuple[str, ...] = ()


HOST: Script = [open_kvm(), open_sev()]
BARE: Script = [*HOST, vm()]
READY: Script = [*BARE, init2()]
PLAIN: Script = [*HOST, vm(vm_type=0)]
TOP = 1 << 64
GFN = GPA // PAGE
_STRADDLING = f"arena+{ARENA_PAGES * PAGE - 8:#x}"
ADDRESSES: dict[str, Value] = {
    "null": 0,
    "low": 8,
    "kernel": "kernel",
    "guard": "guard",
    "straddling": _STRADDLING,
}
BAD_FDS: dict[str, Value] = {
    "none": -1,
    "kvm": "fd:kvm",
    "vm": "fd:vm",
    "gmem": "fd:gmem",
    "high": 1 << 20,
}
