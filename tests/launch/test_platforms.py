"""The one place that chooses a platform, and the sentence that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmlaunch import platforms
from kvmlaunch.errors import FormatError, MissingCapability
from kvmlaunch.platforms import host_cbitpos, open_platform
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import RealPlatform, Result, lib

from .rig import Wrapped

ENOENT, EACCES = 2, 13


class Machine(Wrapped):
    """Stands for this machine's kernel: a simulated SNP host with parts taken away."""

    name = "kvm"
    profile = ""

    def __init__(self, *, refuse: dict[str, int] | None = None, snp: bool = True) -> None:
        super().__init__(SimPlatform())
        self.refuse = refuse or {}
        self.snp = snp

    def open(self, path: str, flags: int) -> Result:
        number = self.refuse.get(path)
        return super().open(path, flags) if number is None else Result(-1, number)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        if request == lib.KVM_CHECK_EXTENSION and arg == lib.KVM_CAP_VM_TYPES and not self.snp:
            return Result(1, 0)
        return super().ioctl(fd, request, arg)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def set_up(**parts: Any) -> Machine:
        made = Machine(**parts)
        monkeypatch.setattr(platforms, "RealPlatform", lambda: made)
        return made

    return set_up


def test_auto_when_the_machine_can_launch_snp_guests_takes_it(
    machine: Callable[..., Machine],
) -> None:
    made = machine()
    choice = open_platform()
    assert choice.platform is made
    assert choice.why == "platform kvm: this machine's kernel"


@pytest.mark.parametrize("name", ["auto", "kvm"])
def test_kvm_when_it_is_a_simulated_one_says_so(machine: Callable[..., Machine], name: str) -> None:
    machine().profile = "simulated 6.18"
    assert open_platform(name).why == "platform kvm: simulated 6.18's kernel"


ROWS = [
    ({"refuse": {"/dev/kvm": ENOENT}}, "open /dev/kvm ret=-2 (ENOENT"),
    ({"refuse": {"/dev/kvm": EACCES}}, "open /dev/kvm ret=-13 (EACCES"),
    ({"refuse": {"/dev/sev": EACCES}}, "open /dev/sev ret=-13 (EACCES"),
    ({"refuse": {"/dev/sev": ENOENT}}, "open /dev/sev ret=-2 (ENOENT"),
    ({"snp": False}, "this machine's KVM has no SEV-SNP"),
]


@pytest.mark.parametrize(("parts", "why"), ROWS)
def test_auto_when_the_machine_can_not_takes_the_simulator_and_says_why(
    machine: Callable[..., Machine], parts: dict[str, Any], why: str
) -> None:
    machine(**parts)
    choice = open_platform("auto", profile="6.18")
    assert (choice.platform.name, choice.platform.profile) == ("sim", "6.18")
    assert choice.why.startswith("platform sim (6.18): a simulated host, since ")
    assert why in choice.why


@pytest.mark.parametrize(("parts", "_why"), ROWS)
def test_sentence_when_the_machine_can_not_is_one_line(
    machine: Callable[..., Machine], parts: dict[str, Any], _why: str
) -> None:
    machine(**parts)
    assert "\n" not in open_platform().why


@pytest.mark.parametrize(("parts", "_why"), [*ROWS, ({}, "")])
def test_auto_when_it_looked_leaves_nothing_open(
    machine: Callable[..., Machine], parts: dict[str, Any], _why: str
) -> None:
    made = machine(**parts)
    open_platform()
    assert made.inner.open_fds == ()  # type: ignore[attr-defined]


def test_auto_when_the_guest_is_plain_needs_no_snp(machine: Callable[..., Machine]) -> None:
    made = machine(snp=False, refuse={"/dev/sev": ENOENT})
    assert open_platform(confidential=False).platform is made


def test_auto_when_the_guest_is_plain_and_there_is_no_kvm_takes_the_simulator(
    machine: Callable[..., Machine],
) -> None:
    machine(refuse={"/dev/kvm": ENOENT})
    assert open_platform(confidential=False).platform.name == "sim"


def test_kvm_when_asked_for_is_taken_whatever_it_can() -> None:
    choice = open_platform("kvm")
    assert isinstance(choice.platform, RealPlatform)


def test_kvm_when_asked_for_is_not_looked_at(machine: Callable[..., Machine]) -> None:
    made = machine(refuse={"/dev/kvm": ENOENT})
    assert open_platform("kvm").platform is made


def test_sim_when_asked_for_says_so() -> None:
    choice = open_platform("sim", profile="7.0")
    assert choice.platform.name == "sim"
    assert choice.why == "platform sim (7.0): a simulated host, as asked"


def test_sim_when_faults_are_ordered_has_them() -> None:
    platform = open_platform("sim", faults=["KVM_GET_API_VERSION:errno=EIO"]).platform
    kvm = platform.open("/dev/kvm", 2).ret
    assert platform.ioctl(kvm, lib.KVM_GET_API_VERSION) == Result(-1, 5)
    platform.close(kvm)


@pytest.mark.parametrize("name", ["", "KVM", "qemu", "simulator"])
def test_platform_when_the_name_is_unknown_lists_the_known_ones(name: str) -> None:
    with pytest.raises(FormatError, match="auto, kvm, sim"):
        open_platform(name)


def test_profile_when_unknown_is_a_format_error() -> None:
    with pytest.raises(FormatError, match=r"6\.12"):
        open_platform("sim", profile="5.10")


def test_fault_when_malformed_is_a_format_error() -> None:
    with pytest.raises(FormatError, match="grammar"):
        open_platform("sim", faults=["nonsense"])


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_c_bit_when_a_simulated_host_is_asked_is_51(product: str) -> None:
    with SimPlatform(product=product) as platform:
        assert host_cbitpos(platform) == 51


def test_c_bit_when_the_host_does_not_tell_is_none(silent_cpuid: None) -> None:
    with SimPlatform() as platform:
        assert host_cbitpos(platform) is None


def test_c_bit_when_the_host_has_no_snp_is_a_missing_capability() -> None:
    with pytest.raises(MissingCapability, match="lacks SEV-SNP"):
        host_cbitpos(Machine(snp=False))
