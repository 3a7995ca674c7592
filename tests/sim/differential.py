"""Plays scripts of system calls on the real kernel and on the simulated one, and compares.

Every script runs twice, on VMs of type 0; each step notes (ret, errno), with "fd" for a new
descriptor. KVMLAUNCH_REQUIRE=kvm turns the skip on machines without /dev/kvm into a failure.
"""

from __future__ import annotations

import pytest

from kvmlaunch.kvm import Kvm
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import lib
from tests.host import require_kvm

from .driver import PAGE, Driver, Memory, struct


class Script:
    """One run of one script on one platform: its steps, and what to close."""

    def __init__(self, platform):
        self.driver = Driver(platform)
        self.platform = platform
        self.steps = []
        self._fds = []
        self._keep = []
        self.kvm = self.own(self.driver.open_kvm())

    def own(self, fd):
        self._fds.append(fd)
        return fd

    def close_all(self):
        for fd in reversed(self._fds):
            self.platform.close(fd)

    def memory(self, size=16 * PAGE):
        self._keep.append(Memory(size))
        return self._keep[-1].address

    def note(self, label, result, *, makes_fd=False):
        """Note a step; a new fd is owned and returned."""
        ok = result.ret >= 0
        if ok and makes_fd:
            self.own(result.ret)
        shown = "fd" if makes_fd else result.ret
        self.steps.append((label, shown if ok else "error", result.errno))
        return result.ret

    def call(self, label, fd, name, arg=0, **how):
        request = getattr(lib, name) if isinstance(name, str) else name
        return self.note(label, self.driver.ioctl(fd, request, arg), **how)

    def vm(self):
        return self.own(self.driver.create_vm(0, self.kvm))

    def vcpu(self, vm, number=0):
        return self.own(self.driver.ok(self.driver.ioctl(vm, lib.KVM_CREATE_VCPU, number)))

    def region(self, label, vm, **fields):
        fields.setdefault("memory_size", 4 * PAGE)
        region = struct("kvm_userspace_memory_region2", **fields)
        self.call(label, vm, "KVM_SET_USER_MEMORY_REGION2", region)

    def gmem(self, label, vm, size=16 * PAGE, flags=0):
        args = struct("kvm_create_guest_memfd", size=size, flags=flags)
        return self.call(label, vm, "KVM_CREATE_GUEST_MEMFD", args, makes_fd=True)

    def enable(self, label, vm, cap, arg=0, flags=0):
        args = struct("kvm_enable_cap", cap=cap, flags=flags)
        args.args[0] = arg
        self.call(label, vm, "KVM_ENABLE_CAP", args)


def played(script, platform, kind=Script):
    run = kind(platform)
    try:
        script(run)
    finally:
        run.close_all()
    return run.steps


def this_kernel():
    """The real platform, if its kernel is of the generation that profile 6.18 describes.

    These machines run guests without hardware virtualization (vendor module kvm_pvm), and
    answer some calls as no SNP host does.
    """
    platform = require_kvm()
    with Kvm.open(platform) as kvm:
        if not kvm.check_extension(lib.KVM_CAP_GUEST_MEMFD_FLAGS):
            pytest.skip("this machine's KVM is older than profile 6.18: no guest_memfd flags")
    return platform


def differences(script, real, kind=Script):
    """(step of the real kernel, answer of the simulated one) where they aren't the same."""
    expected = played(script, real, kind)
    with SimPlatform("6.18") as platform:
        simulated = played(script, platform, kind)
    assert [step[0] for step in simulated] == [step[0] for step in expected]
    pairs = zip(expected, simulated, strict=True)
    return [(step, answer[1:]) for step, answer in pairs if step != answer]


def names_of_steps(scripts):
    """All steps of the scripts, by name."""
    seen = set()
    for script in scripts:
        with SimPlatform("6.18") as platform:
            seen |= {step[0] for step in played(script, platform)}
    return seen
