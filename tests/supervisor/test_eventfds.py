"""Eventfds of supervised programs are signalled by their guests, and interrupt them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.host import require_simulated_cpu
from tests.supervisor.rig import WELL, Ran


@pytest.mark.parametrize("what", ["signalled", "woken"])
def test_an_eventfd_is_the_clients_when_it_gives_kvm_one(
    client: Callable[..., Ran], what: str
) -> None:
    require_simulated_cpu()
    assert client("eventfds", what) == WELL
