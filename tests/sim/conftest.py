"""Fixtures of the simulator's tests."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from .driver import Driver, simulated
from .one_vcpu import Machine

_generate = rsa.generate_private_key


@cache
def _key(number: int) -> rsa.RSAPrivateKey:
    return _generate(65537, 4096)


@pytest.fixture
def few_rsa_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three RSA keys for all tests: one takes up to a second, and no test wants a fresh one."""
    numbers = itertools.count()
    monkeypatch.setattr(rsa, "generate_private_key", lambda *_: _key(next(numbers) % 3))


@pytest.fixture
def machine():
    """A plain VM with one vCPU."""
    with simulated() as platform:
        yield Machine(platform)


@pytest.fixture
def driver():
    """System calls of a simulated host."""
    with simulated() as platform:
        yield Driver(platform)


@pytest.fixture
def vm(driver):
    """A plain VM of it without vCPUs."""
    return driver.create_vm(0)
