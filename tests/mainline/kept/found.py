"""Scripts that hypothesis found, each once a difference: name -> (script, orders)."""

from __future__ import annotations

from kvmlaunch.uapi import lib
from tests.mainline.kept.common import READY
from tests.mainline.script import Script, finish, ioctl, start, vcpu

__all__ = ["FOUND"]

FOUND: dict[str, tuple[Script, tuple[str, ...]]] = {
    "vCPU made with quirk CD_NW_CLEARED off": (
        [
            *READY,
            ioctl(
                "vm",
                "KVM_ENABLE_CAP",
                {
                    "cap": lib.KVM_CAP_DISABLE_QUIRKS2,
                    "args": [lib.KVM_X86_QUIRK_CD_NW_CLEARED],
                },
            ),
            vcpu(),
            start(),
            finish(),
        ],
        (),
    ),
}
