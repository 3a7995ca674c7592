"""What the CPUID instruction shows to supervised programs, and that they notice nothing else."""

from __future__ import annotations

import functools
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlaunch.sim.cpumodel import CpuModel, cpu_model
from kvmlaunch.supervisor import cpuid
from kvmlaunch.supervisor.cpuid import Masked, differs, masked_leaves
from kvmlaunch.uapi import lib
from tests.supervisor.rig import SOURCES, WELL, Ran, sim

Client = Callable[..., Ran]
Registers = tuple[int, int, int, int]

ALL = (0xFFFFFFFF,) * 4
EAX = (0xFFFFFFFF, 0, 0, 0)
NOTHING = (0, 0, 0, 0)
# AMD 24594, CPUID Fn0000_0000: "AuthenticAMD" in EBX, EDX, ECX. Intel's: SDM volume 2A, CPUID.
AMD = (0x68747541, 0x444D4163, 0x69746E65)
INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)
SEV = (0x1A, 51 | 1 << 6, 509, 1)


def hand_made(table: dict[tuple[int, int], Registers]) -> CpuModel:
    """A CPU with these leaves."""
    model = CpuModel("Hand-made", 0x19, 1, 1)
    model.__dict__["table"] = table
    return model


CPU = hand_made(
    {
        (0, 0): (0x10, *AMD),
        (1, 0): (0xA00F11, 1, 2, 3),
        (0x80000000, 0): (0x80000020, *AMD),
        (0x80000001, 0): (0xA00F11, 4, 5, 6),
        (0x80000005, 0): (7, 8, 9, 10),
        (0x80000008, 0): (0x3030, 11, 12, 13),
        (0x8000001D, 0): (0x121, 14, 15, 16),
        (0x8000001D, 1): (0x122, 17, 18, 19),
        (0x8000001F, 0): SEV,
        (0x80000020, 0): (0, 2, 0, 0),
    }
)


def leaves(last_native: int) -> dict[tuple[int, int | None], Masked]:
    found = list(masked_leaves(CPU, last_native))
    by_number = {(leaf.function, leaf.subleaf): leaf for leaf in found}
    assert len(by_number) == len(found)
    return by_number


def test_masked_leaves_when_the_machine_has_all_replace_names_and_sizes() -> None:
    found = leaves(0x80000020)
    assert found == {
        (0, None): Masked(0, None, (0, *ALL[1:]), (0x10, *AMD)),
        (1, None): Masked(1, None, EAX, (0xA00F11, 1, 2, 3)),
        (2, None): Masked(2, None, ALL, NOTHING),  # descriptors of Intel's caches
        (4, None): Masked(4, None, ALL, NOTHING),
        (0x80000000, None): Masked(0x80000000, None, ALL, (0x80000020, *AMD)),
        (0x80000001, None): Masked(0x80000001, None, EAX, (0xA00F11, 4, 5, 6)),
        (0x80000005, None): Masked(0x80000005, None, ALL, (7, 8, 9, 10)),
        (0x80000006, None): Masked(0x80000006, None, ALL, NOTHING),
        (0x80000008, None): Masked(
            0x80000008, None, (0xFFFFFFFF, 0, 0xFFFFFFFF, 0), (0x3030, 11, 12, 13)
        ),
        (0x8000001F, None): Masked(0x8000001F, None, ALL, SEV),
        (0x80000020, None): Masked(0x80000020, None, ALL, (0, 2, 0, 0)),
    }


def test_masked_leaves_when_the_machine_ends_early_give_the_rest_whole() -> None:
    found = leaves(0x80000008)  # as Intel's do
    extended = {number: leaf for number, leaf in found.items() if number[0] > 0x80000008}
    assert all(leaf.mask == ALL for leaf in extended.values())
    values = {number: leaf.value for number, leaf in extended.items()}
    caches: dict[tuple[int, int | None], Registers] = {
        (0x8000001D, n): NOTHING for n in range(2, 8)
    }
    assert values == {
        **{(function, None): NOTHING for function in range(0x80000009, 0x8000001D)},
        (0x8000001D, 0): (0x121, 14, 15, 16),
        (0x8000001D, 1): (0x122, 17, 18, 19),
        **caches,
        (0x8000001E, None): NOTHING,
        (0x8000001F, None): SEV,
        (0x80000020, None): (0, 2, 0, 0),
    }


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        ({}, False),
        ({0: (0x16, *AMD)}, False),  # other leaves are the machine's business
        ({0: (0x10, *INTEL)}, True),
        ({0x8000001F: (0x1A, 47 | 1 << 6, 509, 1)}, True),
        ({0x8000001F: (0x0A, 51 | 1 << 6, 509, 1)}, True),
        ({0x80000000: (0x8000001E, *AMD)}, True),
    ],
)
def test_differs_when_vendor_or_sev_differ(
    monkeypatch: pytest.MonkeyPatch, native: dict[int, Registers], expected: bool
) -> None:
    machine = {0: (0x10, *AMD), 0x80000000: (0x80000020, *AMD), 0x8000001F: SEV, **native}
    monkeypatch.setattr(cpuid, "_native", machine.__getitem__)
    assert differs(CPU) is expected


@functools.cache
def require_trap() -> None:
    """Skip where the machine's CPU shows itself to programs."""
    if not lib.kl_can_trap_cpuid():
        pytest.skip("this machine can't make the CPUID instruction fault")
    if not differs(cpu_model("Milan")):
        pytest.skip("this machine's CPU is the simulated one")


@pytest.mark.parametrize(
    "what",
    [
        "show",  # vendor AuthenticAMD, C-bit 51
        "forked",  # and by vfork
        "threads",  # many at once
        "executed-by-thread",
        "handler",  # its own SIGSEGVs
        "signals",  # sent to itself, and by a timer
        "stopped",  # its parent sees it stop and go on
        "pending",  # signals that wait across an execve
        "killed",  # at any moment of an execve
        "stopped-early",  # the same
        "asks-for-faults",  # ARCH_SET_CPUID
    ],
)
def test_a_program_sees_the_simulated_cpu_when_it_asks(client: Client, what: str) -> None:
    require_trap()
    assert client("cpuid", what) == WELL


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("ends", 0), 0),
        (("ends", 77), 77),
        (("left-by-first-thread",), 9),
        (("dies",), 128 + signal.SIGSEGV),
    ],
)
def test_the_exit_code_is_the_programs_when_cpuid_is_trapped(
    client: Client, words: tuple[object, ...], code: int
) -> None:
    require_trap()
    assert client("cpuid", *words) == Ran(code)


def test_a_32_bit_program_sees_the_simulated_cpu_when_it_asks(
    client: Client, tmp_path: Path
) -> None:
    require_trap()
    program = tmp_path / "cpuid32"
    source = SOURCES / "cpuid32.S"
    built = subprocess.run(
        ["gcc", "-m32", "-nostdlib", "-static", "-o", program, source],
        check=False,
        capture_output=True,
        timeout=60,
    )
    if built.returncode:
        pytest.skip("gcc can't build 32-bit programs")
    if subprocess.run([program], check=False, timeout=10).returncode < 0:
        pytest.skip("this kernel runs no 32-bit programs")
    assert sim(program) == Ran(51)
