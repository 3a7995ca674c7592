"""Which of the simulated devices a path means."""

from __future__ import annotations

import os

from kvmlaunch.supervisor.clients import Call
from kvmlaunch.uapi import lib

__all__ = ["device_path"]

_DEVICES = ("/dev/kvm", "/dev/sev")
_AT_FDCWD = -100
_RELATIVE_TO_FD = (
    *(lib.KL_NR_openat, lib.KL_NR_openat2),
    *(lib.KL_NR_faccessat, lib.KL_NR_faccessat2),
)


def device_path(call: Call) -> str | None:
    """``/dev/kvm`` or ``/dev/sev`` where ``call`` names that, else None. Follows no links."""
    path = call.path
    if not path.startswith("/"):
        try:
            path = os.path.join(os.readlink(f"/proc/{call.thread.tid}/{_start(call)}"), path)
        except OSError:
            return None
    path = os.path.normpath(path)
    return path if path in _DEVICES else None


def _start(call: Call) -> str:
    """Where a relative path starts, below /proc/TID."""
    directory = call.args[0] & 0xFFFFFFFF
    if call.nr not in _RELATIVE_TO_FD or directory == _AT_FDCWD & 0xFFFFFFFF:
        return "cwd"
    return f"fd/{directory}"
