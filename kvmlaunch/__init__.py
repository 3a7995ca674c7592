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

TYPE_CHECKING = False  # typing's, which takes longer to import than all of this
if TYPE_CHECKING:
    from kvmlaunch.abi.idblock import IdBlock
    from kvmlaunch.abi.idblock_sign import Signer, sign_id_block
    from kvmlaunch.errors import KvmLaunchError
    from kvmlaunch.images import (
        LaunchPlan,
        PlanOptions,
        VmmProfile,
        VmsaChoice,
        VmsaMode,
        load_image,
        load_vmm,
        to_sync,
    )
    from kvmlaunch.launch.bisect import bisect
    from kvmlaunch.launch.explain import Cause, Explanation, explain_digest, explain_vmsa
    from kvmlaunch.launch.gdb import serve_gdb
    from kvmlaunch.launch.guest import Guest
    from kvmlaunch.launch.legacy import LegacyLaunch, plan_legacy
    from kvmlaunch.launch.measure import Measurement, firmware_digest, measure, page_records
    from kvmlaunch.launch.oracle import Oracle
    from kvmlaunch.launch.records import PageRecord
    from kvmlaunch.launch.run import Outcome, run_guest
    from kvmlaunch.launch.trace import Trace
    from kvmlaunch.launch.verify import verify
    from kvmlaunch.launch.vmsa_mode import probe_vmsa_mode, settle_vmsa_mode
    from kvmlaunch.platforms import host_cbitpos, open_platform
    from kvmlaunch.sim import SimPlatform
    from kvmlaunch.uapi import Proposal, RealPlatform, Recorder
    from kvmlaunch.version import __version__

__all__ = [
    "Cause",
    "Explanation",
    "Guest",
    "IdBlock",
    "KvmLaunchError",
    "LaunchPlan",
    "LegacyLaunch",
    "Measurement",
    "Oracle",
    "Outcome",
    "PageRecord",
    "PlanOptions",
    "Proposal",
    "RealPlatform",
    "Recorder",
    "Signer",
    "SimPlatform",
    "Trace",
    "VmmProfile",
    "VmsaChoice",
    "VmsaMode",
    "__version__",
    "bisect",
    "explain_digest",
    "explain_vmsa",
    "firmware_digest",
    "host_cbitpos",
    "load_image",
    "load_vmm",
    "measure",
    "open_platform",
    "page_records",
    "plan_legacy",
    "probe_vmsa_mode",
    "run_guest",
    "serve_gdb",
    "settle_vmsa_mode",
    "sign_id_block",
    "to_sync",
    "verify",
]

_HOME = {
    "Cause": "launch.explain",
    "Explanation": "launch.explain",
    "Guest": "launch.guest",
    "IdBlock": "abi.idblock",
    "KvmLaunchError": "errors",
    "LaunchPlan": "images",
    "LegacyLaunch": "launch.legacy",
    "Measurement": "launch.measure",
    "Oracle": "launch.oracle",
    "Outcome": "launch.run",
    "PageRecord": "launch.records",
    "PlanOptions": "images",
    "Proposal": "uapi",
    "RealPlatform": "uapi",
    "Recorder": "uapi",
    "Signer": "abi.idblock_sign",
    "SimPlatform": "sim",
    "Trace": "launch.trace",
    "VmmProfile": "images",
    "VmsaChoice": "images",
    "VmsaMode": "images",
    "__version__": "version",
    "explain_digest": "launch.explain",
    "explain_vmsa": "launch.explain",
    "bisect": "launch.bisect",
    "firmware_digest": "launch.measure",
    "host_cbitpos": "platforms",
    "load_image": "images",
    "load_vmm": "images",
    "measure": "launch.measure",
    "open_platform": "platforms",
    "page_records": "launch.measure",
    "plan_legacy": "launch.legacy",
    "probe_vmsa_mode": "launch.vmsa_mode",
    "run_guest": "launch.run",
    "serve_gdb": "launch.gdb",
    "settle_vmsa_mode": "launch.vmsa_mode",
    "sign_id_block": "abi.idblock_sign",
    "to_sync": "images",
    "verify": "launch.verify",
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
