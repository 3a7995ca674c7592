"""Which of the simulated files a path means."""

from __future__ import annotations

import os
import re

from kvmlaunch.supervisor.clients import Call
from kvmlaunch.uapi import lib

__all__ = ["descriptor_path", "device_path"]

_DEVICES = ("/dev/kvm", "/dev/sev")
_DESCRIPTOR = re.compile(
    r"/(?:dev|proc/(?:self|thread-self|(?P<process>\d{1,9}))(?:/task/(?P<task>\d{1,9}))?)"
    r"/fd/(?P<fd>\d{1,9})"
)
_AT_FDCWD = -100
_RELATIVE_TO_FD = (
    *(lib.KL_NR_openat, lib.KL_NR_openat2),
    *(lib.KL_NR_faccessat, lib.KL_NR_faccessat2),
)


def device_path(call: Call) -> str | None:
    """``/dev/kvm`` or ``/dev/sev`` where ``call`` names that, else None. Follows no links."""
    path = _absolute(call)
    return path if path in _DEVICES else None


def descriptor_path(call: Call) -> tuple[int, int] | None:
    """Thread and descriptor where ``call`` names an entry of a folder of descriptors."""
    found = _DESCRIPTOR.fullmatch(_absolute(call) or "")
    if found is None:
        return None
    return int(found["task"] or found["process"] or call.thread.tid), int(found["fd"])


def _absolute(call: Call) -> str | None:
    path = call.path
    if not path.startswith("/"):
        try:
            path = os.path.join(os.readlink(f"/proc/{call.thread.tid}/{_start(call)}"), path)
        except OSError:
            return None
    # A file that is no folder has nothing below it. Two slashes at the start mean no more than one.
    return None if path.endswith("/") else os.path.normpath("/" + path.lstrip("/"))


def _start(call: Call) -> str:
    """Where a relative path starts, below /proc/TID."""
    directory = call.args[0] & 0xFFFFFFFF
    if call.nr not in _RELATIVE_TO_FD or directory == _AT_FDCWD & 0xFFFFFFFF:
        return "cwd"
    return f"fd/{directory}"
