"""What a SEV command gave, with the firmware word as it was left."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from kvmlaunch.kvm.descriptor import Descriptor
from kvmlaunch.uapi import address_of, ffi

__all__ = ["MARK", "Answer", "issue", "issue_at"]

MARK = 0x5E1F7E57
"""What the firmware word holds before each command; no firmware has that code."""


@dataclass(frozen=True)
class Answer:
    """One KVM_MEMORY_ENCRYPT_OP: ``what`` was asked, ``errno`` (0 = success), ``fw_error``.

    ``data`` is the command's struct as the kernel left it.
    """

    what: str
    errno: int
    fw_error: int = MARK
    data: Any = None

    @property
    def ok(self) -> bool:
        """The call succeeded."""
        return not self.errno

    @property
    def untouched(self) -> bool:
        """The firmware word is as it was before the call."""
        return self.fw_error == MARK

    def __str__(self) -> str:
        if self.ok:
            return "success"
        text = f"errno {errno.errorcode.get(self.errno, self.errno)}"
        return text if self.untouched else f"{text}, firmware code {self.fw_error}"


def issue(
    target: Descriptor, what: str, command: int, address: int, sev_fd: int, data: Any = None
) -> Answer:
    """Issue a command on a VM or vCPU; ``address`` of its struct, ``data`` to keep it alive."""
    request = ffi.new(
        "struct kvm_sev_cmd *",
        {"id": command, "data": address, "sev_fd": sev_fd, "error": MARK},
    )
    answer = issue_at(target, what, address_of(request))
    return Answer(what, answer.errno, int(request.error), data)


def issue_at(target: Descriptor, what: str, address: int) -> Answer:
    """Issue whatever ``struct kvm_sev_cmd`` is at this address."""
    result = target.ioctl_raw("KVM_MEMORY_ENCRYPT_OP", address)
    return Answer(what, result.errno if result.ret < 0 else 0)
