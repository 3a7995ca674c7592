"""The only package that touches the compiled extension.

``lib`` and ``ffi`` hold the kernel's numbers and structs under the kernel's own
names; :class:`Platform` is the boundary that a real kernel and the simulated
host both stand behind.
"""

from __future__ import annotations

from kvmlaunch.uapi._ext import ffi, lib
from kvmlaunch.uapi.inspection import Inspector, TraceEvent
from kvmlaunch.uapi.ioctls import ARGUMENT, COMMAND_ARGUMENT, command_name, ioctl_name
from kvmlaunch.uapi.memory import address_of, peek, poke
from kvmlaunch.uapi.platform import MeasuredPage, Platform, Result, RunResult
from kvmlaunch.uapi.proposal import (
    PROPOSAL_VARIABLE,
    Proposal,
    default_proposal,
    parse_proposal,
)
from kvmlaunch.uapi.real import RealPlatform
from kvmlaunch.uapi.recorder import Call, Recorder

__all__ = [
    "ARGUMENT",
    "COMMAND_ARGUMENT",
    "PROPOSAL_VARIABLE",
    "Call",
    "Inspector",
    "MeasuredPage",
    "Platform",
    "Proposal",
    "RealPlatform",
    "Recorder",
    "Result",
    "RunResult",
    "TraceEvent",
    "address_of",
    "command_name",
    "default_proposal",
    "ffi",
    "ioctl_name",
    "lib",
    "parse_proposal",
    "peek",
    "poke",
]
