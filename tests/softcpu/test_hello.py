"""The hello guest of examples/guests, to its end, with a small hypervisor of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.softcpu.hypervisor import Hypervisor, pvh_entry

GREETING = b"hello from a kvmlaunch guest\n"


@pytest.fixture(scope="session")
def hello(guests: Path) -> Path:
    path = guests / "hello.elf"
    if pvh_entry(path) is None:
        pytest.skip("this hello.elf has no PVH entry")
    return path


def test_hello_when_plain_greets(hello: Path) -> None:
    hypervisor = Hypervisor(hello, snp=False)
    assert hypervisor.run() == 0
    assert hypervisor.console == GREETING


@pytest.mark.parametrize("c_bit", [51, 47])
def test_hello_when_snp_greets_through_the_ghcb(hello: Path, c_bit: int) -> None:
    hypervisor = Hypervisor(hello, snp=True, c_bit=c_bit)
    assert hypervisor.run() == 0
    assert hypervisor.console == GREETING + (
        f"SEV-SNP guest, C-bit {c_bit}, GHCB protocol 2\n".encode()
    )


def test_hello_when_run_twice_ends_at_the_same_tick(hello: Path) -> None:
    first, second = Hypervisor(hello, snp=True), Hypervisor(hello, snp=True)
    assert first.run() == second.run() == 0
    assert first.guest.cpu.ticks == second.guest.cpu.ticks
    assert first.guest.cpu.save() == second.guest.cpu.save()
