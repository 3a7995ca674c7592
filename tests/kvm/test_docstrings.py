"""A method that issues an ioctl names it in the first line of its docstring."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest

from kvmlaunch.kvm import Kvm, SevDevice
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Call, Recorder, lib
from tests.kvm.methods import METHODS, Method, world

# Descriptor's own take the ioctl's name as their argument.
_CALLING = [m for m in METHODS if m.sees and m.name not in ("ioctl", "ioctl_raw")]
_SILENT = [m for m in METHODS if not m.sees]
# Mainline has no SEV command for a vCPU.
_SUCCEEDING = [m for m in _CALLING if str(m) != "Vcpu.sev_command_raw"]
_NAMED = re.compile(r"\b(?:KVM|SEV|SNP)_[A-Z0-9_]+\b(?!\*)|\bmmap\b|\bfallocate\b")


def _first_line(method: Method) -> str:
    return (getattr(method.kind, method.name).__doc__ or "").splitlines()[0]


def _calls(method: Method) -> list[Call]:
    calls: list[Call] = []
    with SimPlatform() as sim, ExitStack() as stack:
        opened = world(Recorder(sim, calls.append), stack)
        calls.clear()
        made = method.call(opened)
        seen = list(calls)
        if hasattr(made, "close"):
            made.close()
    return seen


def _names(method: Method) -> tuple[str, ...]:
    """The recorded names; a SEV command as the ioctl that carries it."""
    names = [call.name for call in _calls(method)]
    return tuple("KVM_MEMORY_ENCRYPT_OP" if n.startswith("KVM_SEV_") else n for n in names)


@pytest.mark.parametrize("method", _CALLING, ids=str)
def test_method_when_called_issues_exactly_its_calls(method: Method) -> None:
    assert _names(method) == method.sees


@pytest.mark.parametrize("method", _CALLING, ids=str)
def test_docstring_when_method_issues_an_ioctl_names_it_first(method: Method) -> None:
    assert method.sees[0] in _NAMED.findall(_first_line(method))


@pytest.mark.parametrize("method", _SUCCEEDING, ids=str)
def test_call_when_recorded_has_succeeded(method: Method) -> None:
    """Else the tests above would look at half a method."""
    assert [call.errno for call in _calls(method)] == [0] * len(method.sees)


@pytest.mark.parametrize("method", _SILENT, ids=str)
def test_method_when_it_names_no_ioctl_issues_none(method: Method) -> None:
    assert _names(method) == ()


@pytest.mark.parametrize("method", [m for m in _CALLING if m.kind is SevDevice], ids=str)
def test_docstring_when_method_issues_a_device_command_names_that_too(method: Method) -> None:
    (command,) = [call.sent["cmd"] for call in _calls(method)]
    named = [word for word in _NAMED.findall(_first_line(method)) if word != "SEV_ISSUE_CMD"]
    assert [getattr(lib, word) for word in named] == [command]


@pytest.mark.parametrize("kind", [Kvm, SevDevice])
def test_open_when_called_issues_open_only(kind: type[Kvm] | type[SevDevice]) -> None:
    calls: list[Call] = []
    kind.open(Recorder(SimPlatform(), calls.append)).close()
    assert [call.name for call in calls] == ["open", "close"]
