"""Hosts that run guests: real and simulated ones, for the same tests.

The simulated variants have the marker ``simulated``: the emulated machine of tests/mainline
leaves them out.
"""

from __future__ import annotations

import pytest

from kvmlaunch.uapi import Platform
from tests.host import require_kvm, require_simulated_cpu, require_snp


def simulated(name: str) -> object:
    """A parameter for the simulated host."""
    return pytest.param(name, marks=pytest.mark.simulated)


@pytest.fixture(params=["kvm", simulated("sim")])
def plain_host(request: pytest.FixtureRequest) -> Platform:
    """A platform that runs plain guests."""
    return require_kvm() if request.param == "kvm" else require_simulated_cpu()


@pytest.fixture(params=["kvm", simulated("sim")])
def snp_host(request: pytest.FixtureRequest) -> Platform:
    """A platform that runs SNP guests."""
    return require_snp() if request.param == "kvm" else require_simulated_cpu()


@pytest.fixture(params=["plain-kvm", "snp-kvm", simulated("plain-sim"), simulated("snp-sim")])
def kind(request: pytest.FixtureRequest) -> tuple[Platform, bool]:
    """A platform and whether the guest is confidential."""
    guest, _, host = request.param.partition("-")
    confidential = guest == "snp"
    if host == "sim":
        return require_simulated_cpu(), confidential
    return (require_snp() if confidential else require_kvm()), confidential
