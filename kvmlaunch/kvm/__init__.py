"""One object per file descriptor: Kvm, Vm, Vcpu, GuestMemfd, SevDevice."""

from __future__ import annotations

from kvmlaunch.kvm.guest_memfd import GuestMemfd
from kvmlaunch.kvm.memory import HostMemory
from kvmlaunch.kvm.sev import SevDevice, SevStatus, SnpStatus
from kvmlaunch.kvm.sev_command import SevResult
from kvmlaunch.kvm.state import apply_state
from kvmlaunch.kvm.system import Kvm, cbitpos
from kvmlaunch.kvm.vcpu import Vcpu
from kvmlaunch.kvm.vm import Vm

__all__ = [
    "GuestMemfd",
    "HostMemory",
    "Kvm",
    "SevDevice",
    "SevResult",
    "SevStatus",
    "SnpStatus",
    "Vcpu",
    "Vm",
    "apply_state",
    "cbitpos",
]
