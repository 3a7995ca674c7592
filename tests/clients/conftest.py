"""Programs that others wrote for /dev/kvm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients import kernel_selftests as selftests
from tests.clients import qemu as qemus
from tests.clients.qemu import Command
from tests.debian import Unavailable
from tests.host import require


@pytest.fixture(scope="session")
def kernel_selftests() -> Path:
    """A folder with the kernel's KVM selftests; the first test that asks waits for the build."""
    try:
        return selftests.selftests()
    except Unavailable as error:
        require("clients", str(error))


@pytest.fixture(scope="session")
def qemu10() -> Command:
    """A QEMU that launches SNP guests."""
    try:
        return qemus.qemu10()
    except Unavailable as error:
        require("clients", str(error))


@pytest.fixture(scope="session")
def qemu() -> Command:
    """Any QEMU, for plain machines."""
    try:
        return qemus.qemu()
    except Unavailable as error:
        require("clients", str(error))
