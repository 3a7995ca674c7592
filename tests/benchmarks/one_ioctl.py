"""One KVM_CHECK_EXTENSION: through the binding, through the Kvm object, and in C."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from kvmlaunch.kvm import Kvm
from kvmlaunch.uapi import RealPlatform, lib
from tests.benchmarks.native import compiled
from tests.benchmarks.timing import Figure, compare, timed

NEEDS_KVM = True

_CALLS = 1000


def figures(work: Path, rounds: int) -> list[Figure]:
    """Binding and object, each against C."""
    program = str(compiled("ioctls", work))
    platform = RealPlatform()

    def in_c() -> float:
        done = subprocess.run(
            [program, str(_CALLS * 10)], capture_output=True, text=True, check=True, timeout=60
        )
        return float(done.stdout)

    with Kvm.open(platform) as kvm:
        raw = timed(_raw(platform, kvm.fd), _CALLS)
        checked = timed(_checked(kvm), _CALLS)
        return [
            compare("one ioctl: RealPlatform.ioctl", raw, "C", in_c, rounds),
            compare("one ioctl: Kvm.check_extension", checked, "C", in_c, rounds),
        ]


def _raw(platform: RealPlatform, fd: int) -> Callable[[], None]:
    request, cap = lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_USER_MEMORY

    def call() -> None:
        for _ in range(_CALLS):
            assert platform.ioctl(fd, request, cap).ret == 1

    return call


def _checked(kvm: Kvm) -> Callable[[], None]:
    def call() -> None:
        for _ in range(_CALLS):
            assert kvm.check_extension(lib.KVM_CAP_USER_MEMORY) == 1

    return call
