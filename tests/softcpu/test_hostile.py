"""Guests that mean harm: none may hurt the process or keep it for ever."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.softcpu import Budget, InvalidState
from kvmlaunch.softcpu.decode import decode, io_instructions
from tests.softcpu.model import Guest, vmsa

ROOT = Path(__file__).resolve().parents[2]
COUNT = int(os.environ.get("KVMLAUNCH_HOSTILE_GUESTS", "250"))
"""More guests for a longer hunt."""


def test_random_guests_when_run_leave_the_process_alive() -> None:
    pytest.importorskip("unicorn", reason="unicorn, the software CPU's engine, isn't there")
    run = subprocess.run(
        [sys.executable, "-m", "tests.softcpu.hostile", "1", str(COUNT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50 + COUNT // 10,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for event in ("Shutdown", "NestedFault", "Budget", "Halt", "InvalidState"):
        assert event in run.stdout, "the guests are too tame"


@pytest.mark.timeout(120)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(page=st.binary(min_size=0x3F0, max_size=0x3F0), tame=st.booleans(), snp=st.booleans())
def test_vmsa_when_garbage_runs_or_is_refused(page: bytes, tame: bool, snp: bool) -> None:
    state = Vmsa.decode(page + bytes(4096 - len(page)))
    if tame:
        ok = vmsa(snp=snp)
        names = ("efer", "cr0", "cr3", "cr4", "dr6", "dr7", "vmpl", "cpl", "sev_features")
        state = state.replace(**{name: getattr(ok, name) for name in names})
    guest = Guest(snp=snp)
    refused = guest.cpu.load(state)
    if tame and not state.rflags & 1 << 17:
        assert refused is None
    event = guest.cpu.run(2000)
    assert refused is None or isinstance(event, InvalidState)


@settings(max_examples=300)
@given(code=st.binary(max_size=40), bits=st.sampled_from((16, 32, 64)))
def test_decode_when_bytes_are_garbage_stays_inside(code: bytes, bits: int) -> None:
    found = decode(code, bits)
    assert found is None or 1 <= found.length <= min(len(code), 15)
    places = io_instructions(code, bits, len(code))
    assert all(0 <= place < len(code) for place in places)


def test_memory_when_guest_runs_long_does_not_grow() -> None:
    """Jumps through code that it writes anew all the time."""
    guest = Guest(snp=False)
    # 1: inc dword [0x3001]; call 0x3000; jmp 1b; at 0x3000: mov eax,imm32; ret
    guest.put(0x3000, bytes.fromhex("b800000000c3"))
    cpu = guest.start(bytes.fromhex("ff0501300000 e8f51f0000 ebf3"))
    assert cpu.run(100_000) == Budget()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cpu.run(1_000_000) == Budget()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cpu.read("rax") > 1000
    assert after - before < 100_000, "KiB"
