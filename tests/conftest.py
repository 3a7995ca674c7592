"""Fixtures for every test folder."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmlaunch.kvm import Kvm
from kvmlaunch.uapi import RealPlatform
from tests import debian
from tests import guests as guest_builder
from tests.host import require_kvm, require_snp


def pytest_configure(config: pytest.Config) -> None:
    """Property tests draw the same examples each time; without the plugin nothing is drawn."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("repeatable", derandomize=True)
        settings.load_profile("repeatable")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of collected tests aren't looked through again at each garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built guests of examples/guests."""
    return guest_builder.build(tmp_path_factory.mktemp("guests"))


@pytest.fixture(scope="session")
def test_guests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built guests of tests/guest_sources."""
    return guest_builder.build_tests(tmp_path_factory.mktemp("test-guests"))


@pytest.fixture(scope="session")
def ovmf() -> Path:
    """Debian's OVMF.fd."""
    return debian.ovmf()


@pytest.fixture(scope="session")
def ovmf_code_4m() -> Path:
    """Debian's OVMF_CODE_4M.fd, a build that SNP can't launch."""
    return debian.ovmf_code_4m()


@pytest.fixture
def real_kvm() -> RealPlatform:
    """This machine's /dev/kvm, where it can be opened."""
    return require_kvm()


@pytest.fixture
def real_snp() -> RealPlatform:
    """This machine's KVM, where it can launch SNP guests."""
    return require_snp()


@pytest.fixture
def tells_cbitpos(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets every host's CPUID tell this C-bit position (leaf 0x8000001F, EBX bits 5:0)."""
    supported = Kvm.supported_cpuid

    def told(position: int) -> None:
        def changed(kvm: Kvm) -> list[dict[str, int]]:
            leaves = supported(kvm)
            for leaf in leaves:
                if leaf["function"] == 0x8000001F:
                    leaf["ebx"] = leaf["ebx"] & ~0x3F | position
            return leaves

        monkeypatch.setattr(Kvm, "supported_cpuid", changed)

    return told


@pytest.fixture
def silent_cpuid(tells_cbitpos: Callable[[int], None]) -> None:
    """Lets no host's CPUID tell where the C-bit is, as under emulation."""
    tells_cbitpos(0)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and what they start inherits that."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
