"""The cases, a module per command; importing this registers them in the order in which they run."""

from __future__ import annotations

from kvmlaunch.selftest.cases import (  # isort: skip
    command,
    init2,
    start,
    update,
    finish,
    golden,
    vmsa_pages,
    vcpu_state,
    requirements,
)

__all__ = [
    "command",
    "finish",
    "golden",
    "init2",
    "requirements",
    "start",
    "update",
    "vcpu_state",
    "vmsa_pages",
]
