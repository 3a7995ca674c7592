"""The helper that skips, or fails, where this machine has no KVM."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import RealPlatform, Result
from tests.host import require, require_kvm


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RealPlatform, "open", lambda *args: Result(-1, errno.EACCES))


def test_kvm_when_missing_skips_with_the_reason(
    no_kvm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVMLAUNCH_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="open /dev/kvm ret=-13"):
        require_kvm()


def test_kvm_when_missing_and_required_fails_with_the_reason(
    no_kvm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMLAUNCH_REQUIRE", "headers kvm")
    with pytest.raises(pytest.fail.Exception, match="open /dev/kvm ret=-13"):
        require_kvm()


def test_require_when_something_else_is_required_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMLAUNCH_REQUIRE", "headers,kvm2")
    with pytest.raises(pytest.skip.Exception, match="because"):
        require("kvm", "because")
