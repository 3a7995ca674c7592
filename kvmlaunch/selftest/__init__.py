"""Conformance cases for the kernel's SNP launch ABI, on a real host or the simulated one.

with Host(platform) as host:
    for result in run(select(["update.*"]), host): ...
"""

from __future__ import annotations

from kvmlaunch.selftest.case import Spec
from kvmlaunch.selftest.host import Host
from kvmlaunch.selftest.report import Json, Ktap, list_cases
from kvmlaunch.selftest.result import Report, Result, Verdict
from kvmlaunch.selftest.runner import conduct, run, run_one, select

__all__ = [
    "Host",
    "Json",
    "Ktap",
    "Report",
    "Result",
    "Spec",
    "Verdict",
    "conduct",
    "list_cases",
    "run",
    "run_one",
    "select",
]
