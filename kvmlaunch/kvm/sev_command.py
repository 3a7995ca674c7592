"""KVM_MEMORY_ENCRYPT_OP, which VMs have, and vCPUs under the proposals."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvmlaunch.kvm.descriptor import Descriptor
from kvmlaunch.uapi import address_of, ffi

__all__ = ["SevResult", "sev_command"]


class SevResult(NamedTuple):
    """Outcome of a SEV command: ``ret``, ``errno`` and the firmware word ``fw_error``."""

    ret: int
    errno: int
    fw_error: int


def sev_command(target: Descriptor, command: int, data: Any, sev_fd: int) -> SevResult:
    """Issue a SEV command, unchecked. ``data`` is a cffi pointer to its struct, or None.

    The firmware word is set to 0 beforehand, since the kernel leaves it alone when the
    firmware isn't called.
    """
    request = ffi.new(
        "struct kvm_sev_cmd *",
        {"id": command, "data": address_of(data) if data is not None else 0, "sev_fd": sev_fd},
    )
    result = target.ioctl_raw("KVM_MEMORY_ENCRYPT_OP", request)
    return SevResult(result.ret, result.errno, int(request.error))
