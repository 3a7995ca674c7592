"""Programs that others wrote for /dev/kvm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.clients import kernel_selftests as selftests
from tests.clients import qemu as qemus
from tests.clients.qemu import Command
from tests.debian import Unavailable
from tests.host import require

_Client = TypeVar("_Client")


def _or_skip(get: Callable[[], _Client]) -> _Client:
    try:
        return get()
    except Unavailable as error:
        require("clients", str(error))


@pytest.fixture(scope="session")
def kernel_selftests() -> Path:
    """A folder with the kernel's KVM selftests; the first test that asks waits for the build."""
    return _or_skip(selftests.selftests)


@pytest.fixture(scope="session")
def qemu10() -> Command:
    """A QEMU that launches SNP guests."""
    return _or_skip(qemus.qemu10)


@pytest.fixture(scope="session")
def qemu() -> Command:
    """Any QEMU, for plain machines."""
    return _or_skip(qemus.qemu)
