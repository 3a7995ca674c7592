"""From a failed call to its exception, with nothing lost on the way."""

from __future__ import annotations

import errno as _errno
from collections.abc import Mapping
from typing import Any

from kvmlaunch.abi import fwstatus
from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.errors import FirmwareError, IoctlError, IoctlPermissionError, VmDeadError

__all__ = ["dead_error", "ioctl_error"]

_HINTS = {
    ("open /dev/kvm", _errno.ENOENT): "This machine has no KVM: load kvm_amd (or kvm_intel), "
    "and enable virtualisation in the firmware setup.",
    ("open /dev/kvm", _errno.EACCES): "Your user may not open it: join group kvm, or run as root.",
    ("open /dev/sev", _errno.ENOENT): "No secure processor: the ccp driver found none, so this "
    "host can't launch SEV guests.",
    ("KVM_RUN", _errno.ENOSYS): "The simulated host runs guests by unicorn, which is missing or "
    "of a version that kvmlaunch doesn't know: pip install 'kvmlaunch[softcpu]'.",
    ("open /dev/sev", _errno.EACCES): "Its mode is 0600 root by default: run as root.",
}


def ioctl_error(
    name: str,
    errno: int,
    *,
    fw_error: int | None = None,
    fields: Mapping[str, Any] | None = None,
    explanation: str = "",
) -> IoctlError:
    """The exception for a call that gave -1 and ``errno``.

    A firmware word that is neither 0 nor "not called" makes a FirmwareError.
    """
    kind = IoctlError
    if errno in (_errno.EPERM, _errno.EACCES):
        kind = IoctlPermissionError
    text = ""
    if fw_error:
        text = fwstatus.text(fw_error)
        if fw_error != FwStatus.NO_FW_CALL:
            kind = FirmwareError
        explanation = explanation or fwstatus.advice(fw_error)
    explanation = explanation or _HINTS.get((name, errno), "")
    return kind(
        name, errno, fw_error=fw_error, fw_text=text, fields=fields, explanation=explanation
    )


def dead_error(
    name: str, fields: Mapping[str, Any] | None, *, fw_error: int | None = None
) -> VmDeadError:
    """The exception for a call on a VM that the kernel has killed."""
    return VmDeadError(
        name,
        _errno.EIO,
        fw_error=fw_error,
        fw_text=fwstatus.text(fw_error) if fw_error else "",
        fields=fields,
        explanation="The kernel has killed this VM (KVM_BUG), or another process created it: "
        "every ioctl on it gives EIO now. The kernel log says why.",
    )
