"""Unmodified programs on the simulated host.

A seccomp listener hands the supervisor what a program wants of /dev/kvm and /dev/sev;
everything else goes to the machine's own kernel. Linux on x86-64.
"""

from __future__ import annotations

from kvmlaunch.supervisor.supervisor import Supervisor

__all__ = ["Supervisor"]
