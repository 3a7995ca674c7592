"""What the machine under the tests has, and what to do where it lacks something.

A test that lacks something skips with a reason. ``KVMLAUNCH_REQUIRE=kvm,headers`` turns
the skips that concern these words into failures, for machines that must have them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NoReturn

import pytest

from kvmlaunch.errors import IoctlError, MissingCapability
from kvmlaunch.kvm import Kvm, SevDevice
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import RealPlatform


def require(what: str, reason: str) -> NoReturn:
    """Skip the running test; fail it where KVMLAUNCH_REQUIRE names ``what``."""
    if what in os.environ.get("KVMLAUNCH_REQUIRE", "").replace(",", " ").split():
        pytest.fail(f"KVMLAUNCH_REQUIRE names {what}, but {reason}", pytrace=False)
    pytest.skip(reason)


def require_kvm() -> RealPlatform:
    """The real platform, where /dev/kvm can be opened."""
    platform = RealPlatform()
    try:
        Kvm.open(platform).close()
    except IoctlError as error:
        require("kvm", str(error).splitlines()[0])
    return platform


def require_snp() -> RealPlatform:
    """The real platform, where it launches SNP guests: an SNP host, or tests/mainline's machine.

    In that machine the firmware is a fake of ours, which can be asked what it measured.
    """
    from tests.mainline.fake import DEBUGFS, FakeHost  # it imports the simulated host

    platform = require_kvm()
    if DEBUGFS.is_dir():
        platform = FakeHost()
        platform.begin(())
    try:
        with Kvm.open(platform) as kvm:
            kvm.require_snp()
        SevDevice.open(platform).close()
    except (IoctlError, MissingCapability) as error:
        require("snp", str(error).splitlines()[0])
    return platform


def require_simulated_cpu(profile: str = "6.12", **options: Any) -> SimPlatform:
    """A simulated host that can run guests."""
    if importlib.util.find_spec("unicorn") is None:
        require("unicorn", "unicorn isn't installed (pip install 'kvmlaunch[softcpu]')")
    return SimPlatform(profile, **options)
