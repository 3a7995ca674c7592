"""Scripts that hypothesis found, each once a difference: name -> (script, orders)."""

from __future__ import annotations

from kvmlaunch.uapi import lib
from tests.mainline.kept.common import READY
from tests.mainline.script import Script, Step, finish, ioctl, start, vcpu

__all__ = ["FOUND"]


def _enable(cap: int, value: int) -> Step:
    return ioctl("vm", "KVM_ENABLE_CAP", {"cap": cap, "args": [value]})


_MAX_ID = lib.KVM_CAP_MAX_VCPU_ID

FOUND: dict[str, tuple[Script, tuple[str, ...]]] = {
    "vCPU made with quirk CD_NW_CLEARED off": (
        [
            *READY,
            _enable(lib.KVM_CAP_DISABLE_QUIRKS2, lib.KVM_X86_QUIRK_CD_NW_CLEARED),
            vcpu(),
            start(),
            finish(),
        ],
        (),
    ),
    "highest vCPU id 0": (
        [*READY, *(_enable(_MAX_ID, n) for n in (0, 0, 1, 0, 1)), vcpu(), vcpu("second", 1)],
        (),
    ),
    "highest vCPU id before and after the boot CPU's": (
        [
            *READY,
            ioctl("vm", "KVM_SET_BOOT_CPU_ID", 3),
            *(_enable(_MAX_ID, n) for n in (2, 3, 4)),
            *(ioctl("vm", "KVM_SET_BOOT_CPU_ID", n) for n in (3, 4)),
            *(vcpu(f"v{n}", n) for n in (2, 3)),
        ],
        (),
    ),
}
