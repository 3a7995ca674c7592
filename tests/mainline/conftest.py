"""The emulated machine for the tests that need the kernel's own code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.host import require


@pytest.fixture(scope="session")
def machine() -> Iterator[Any]:
    """Mainline KVM over a fake secure processor: ``ask(request)`` (tests.mainline.agent)."""
    running = boot()
    yield running
    running.close()


def boot() -> Any:
    """Boot it; skips with a reason where that can't be done."""
    require("snp", "there is no emulated machine with SNP here yet")
