"""Launch, measure, debug and test AMD SEV-SNP guests on Linux/KVM.

    plan = kvmlaunch.load_image("hello.elf")        # what a launch will do
    print(kvmlaunch.measure(plan))                  # its launch digest
    platform = kvmlaunch.open_platform().platform   # this machine, or a simulated host
    with kvmlaunch.Guest(plan, platform) as guest:
        guest.launch()                              # or start(), update(), finish()
        print(guest.witness())
        print(guest.vcpus[0].run())

Names are imported when first used, so that predicting a digest needs no host,
no device and no compiled extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvmlaunch.version import __version__

if TYPE_CHECKING:
    from kvmlaunch.errors import KvmLaunchError
    from kvmlaunch.images import LaunchPlan, PlanOptions, load_image
    from kvmlaunch.launch.gdb import serve_gdb
    from kvmlaunch.launch.guest import Guest
    from kvmlaunch.launch.measure import Measurement, measure, page_records
    from kvmlaunch.launch.records import PageRecord
    from kvmlaunch.launch.run import Outcome, run_guest
    from kvmlaunch.launch.trace import Trace
    from kvmlaunch.platforms import host_cbitpos, open_platform
    from kvmlaunch.sim import SimPlatform
    from kvmlaunch.uapi import RealPlatform, Recorder

__all__ = [
    "Guest",
    "KvmLaunchError",
    "LaunchPlan",
    "Measurement",
    "Outcome",
    "PageRecord",
    "PlanOptions",
    "RealPlatform",
    "Recorder",
    "SimPlatform",
    "Trace",
    "__version__",
    "host_cbitpos",
    "load_image",
    "measure",
    "open_platform",
    "page_records",
    "run_guest",
    "serve_gdb",
]

_HOME = {
    "Guest": "launch.guest",
    "KvmLaunchError": "errors",
    "LaunchPlan": "images",
    "Measurement": "launch.measure",
    "Outcome": "launch.run",
    "PageRecord": "launch.records",
    "PlanOptions": "images",
    "RealPlatform": "uapi",
    "Recorder": "uapi",
    "SimPlatform": "sim",
    "Trace": "launch.trace",
    "host_cbitpos": "platforms",
    "load_image": "images",
    "measure": "launch.measure",
    "open_platform": "platforms",
    "page_records": "launch.measure",
    "run_guest": "launch.run",
    "serve_gdb": "launch.gdb",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
