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

from kvmlaunch.version import __version__

TYPE_CHECKING = False  # typing's, which takes longer to import than all of this
if TYPE_CHECKING:
    from kvmlaunch.errors import KvmLaunchError
    from kvmlaunch.images import (
        LaunchPlan,
        PlanOptions,
        VmsaChoice,
        VmsaMode,
        load_image,
        to_sync,
    )
    from kvmlaunch.launch.gdb import serve_gdb
    from kvmlaunch.launch.guest import Guest
    from kvmlaunch.launch.measure import Measurement, measure, page_records
    from kvmlaunch.launch.records import PageRecord
    from kvmlaunch.launch.run import Outcome, run_guest
    from kvmlaunch.launch.trace import Trace
    from kvmlaunch.launch.vmsa_mode import probe_vmsa_mode, settle_vmsa_mode
    from kvmlaunch.platforms import host_cbitpos, open_platform
    from kvmlaunch.sim import SimPlatform
    from kvmlaunch.uapi import Proposal, RealPlatform, Recorder

__all__ = [
    "Guest",
    "KvmLaunchError",
    "LaunchPlan",
    "Measurement",
    "Outcome",
    "PageRecord",
    "PlanOptions",
    "Proposal",
    "RealPlatform",
    "Recorder",
    "SimPlatform",
    "Trace",
    "VmsaChoice",
    "VmsaMode",
    "__version__",
    "host_cbitpos",
    "load_image",
    "measure",
    "open_platform",
    "page_records",
    "probe_vmsa_mode",
    "run_guest",
    "serve_gdb",
    "settle_vmsa_mode",
    "to_sync",
]

_HOME = {
    "Guest": "launch.guest",
    "KvmLaunchError": "errors",
    "LaunchPlan": "images",
    "Measurement": "launch.measure",
    "Outcome": "launch.run",
    "PageRecord": "launch.records",
    "PlanOptions": "images",
    "Proposal": "uapi",
    "RealPlatform": "uapi",
    "Recorder": "uapi",
    "SimPlatform": "sim",
    "Trace": "launch.trace",
    "VmsaChoice": "images",
    "VmsaMode": "images",
    "host_cbitpos": "platforms",
    "load_image": "images",
    "measure": "launch.measure",
    "open_platform": "platforms",
    "page_records": "launch.measure",
    "probe_vmsa_mode": "launch.vmsa_mode",
    "run_guest": "launch.run",
    "serve_gdb": "launch.gdb",
    "settle_vmsa_mode": "launch.vmsa_mode",
    "to_sync": "images",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
