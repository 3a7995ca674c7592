"""Kept cases: each refusal that KVM knows on the way to a launch, and what was found by chance.

A name says what happens; what the kernel answers stands nowhere here: the kernel is asked.
"""

from __future__ import annotations

from tests.mainline.kept.commands import entry, init2_cases, sev_cases, start_cases
from tests.mainline.kept.common import Case
from tests.mainline.kept.devices import devices
from tests.mainline.kept.faults import faults
from tests.mainline.kept.found import FOUND
from tests.mainline.kept.launch import finish_cases, update_cases
from tests.mainline.kept.memory import logs_and_zones, memory, slots
from tests.mainline.kept.registers import control_registers, msrs
from tests.mainline.kept.vcpus import vcpus

__all__ = ["CASES", "Case"]

_GROUPS = (
    *(devices, entry, init2_cases, sev_cases, start_cases, update_cases, finish_cases),
    *(slots, logs_and_zones, memory, vcpus, control_registers, msrs),
)

CASES: dict[str, Case] = {
    **{name: Case(script) for group in _GROUPS for name, script in group().items()},
    **faults(),
    **{name: Case(script, orders) for name, (script, orders) in FOUND.items()},
}
"""Every kept case by name."""
