"""Simulated SNP host: kernel, secure processor, RMP, CPUs. It never claims to be hardware."""

from __future__ import annotations

from kvmlaunch.sim.faults import Faults
from kvmlaunch.sim.platform import SimPlatform
from kvmlaunch.sim.profiles import KernelProfile

__all__ = ["Faults", "KernelProfile", "SimPlatform"]
