"""Guests that say anything: no crash, no endless answer, nothing written outside their memory."""

from __future__ import annotations

import errno
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvmlaunch.sim.uaccess import OwnProcess
from kvmlaunch.softcpu import VmgExit
from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, RAM_PAGES, Guest
from .scripted import BUFFER, GHCB_GPA, Rig, Script, ScriptedCpu, register_ghcb

CODES = [
    *(0x27, 0x37, 0x6E, 0x6F, 0x72, 0x76, 0x7B, 0x7C, 0x81, 0x87, 0x89, 0x8A, 0x8B, 0x78),
    *range(0x80000000, 0x8000001A),
    *(0x8000FFFD, 0x8000FFFE, 0x8000FFFF, (1 << 64) - 1),
]
MAX_EXITS = 20_000
REASONS = {
    lib.KVM_EXIT_HLT,
    lib.KVM_EXIT_IO,
    lib.KVM_EXIT_MMIO,
    lib.KVM_EXIT_HYPERCALL,
    lib.KVM_EXIT_SYSTEM_EVENT,
    lib.KVM_EXIT_INTERNAL_ERROR,
    lib.KVM_EXIT_AP_RESET_HOLD,
    lib.KVM_EXIT_SNP_REQ_CERTS,
}
ENDS = {lib.KVM_EXIT_HLT, lib.KVM_EXIT_SYSTEM_EVENT, lib.KVM_EXIT_INTERNAL_ERROR}
ERRNOS = {errno.EINVAL, errno.EFAULT, errno.EIO}
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

u64 = st.integers(0, (1 << 64) - 1)
gpas = st.one_of(
    u64,
    st.integers(GHCB_GPA - 8, GHCB_GPA + PAGE + 8),
    st.integers(Guest.GPA - 8, Guest.GPA + RAM_PAGES * PAGE + 8),
)
words = st.one_of(st.sampled_from([0, 1, 2, 8, 0x15, 0x3F80014, 0x600041, 1 << 31]), gpas)
requests = st.fixed_dictionaries(
    {
        "code": st.one_of(st.sampled_from(CODES), u64),
        "info_1": words,
        "info_2": words,
        "rax": words,
        "rcx": words,
        "scratch": st.one_of(st.just(GHCB_GPA + BUFFER), gpas),
    },
    optional={"rbx": words, "rdx": words, "rsi": words, "cpl": st.integers(0, 3), "xcr0": u64},
)
pages = st.tuples(requests, st.binary(max_size=PAGE - BUFFER), st.integers(0, 1 << 128))


class Watched(OwnProcess):
    """User memory in which, once ``only`` is set, nothing else may be written."""

    only: range | None = None

    def write(self, address: int, data: bytes) -> None:
        if self.only is not None:
            assert address in self.only
            assert not data or address + len(data) - 1 in self.only
        super().write(address, data)


def verdicts(rig: Rig, answers: list[int]) -> list[int]:
    """Every exit until the guest ends; the last entry is an errno, negative, or the reason."""
    seen: list[int] = []
    while len(seen) < MAX_EXITS:
        ret, code = rig.enter()
        if ret < 0:
            assert code in ERRNOS
            return [*seen, -code]
        reason = int(rig.run.exit_reason)
        assert reason in REASONS
        seen.append(reason)
        if reason in ENDS:
            return seen
        value = answers[len(seen) % len(answers)]
        rig.run.hypercall.ret = value if reason == lib.KVM_EXIT_HYPERCALL else 0
        if reason == lib.KVM_EXIT_IO:
            assert rig.run.io.size * rig.run.io.count <= PAGE
        if reason == lib.KVM_EXIT_MMIO:
            assert rig.run.mmio.len <= 8
            ffi.buffer(rig.run.mmio.data)[:] = value.to_bytes(8, "little")
    raise AssertionError("the guest never ends")


def played(script: Any, answers: list[int], **options: Any) -> list[int]:
    user = Watched()
    rig = Rig(script, user=user, **options)
    script.rig = rig
    user.only = range(rig.guest.ram.address, rig.guest.ram.address + rig.guest.ram.size)
    try:
        return verdicts(rig, answers)
    finally:
        user.only = None
        rig.platform.shutdown()


class Ghcbs:
    """A guest that makes random requests, one after the other."""

    rig: Rig

    def __init__(self, wanted: list[Any], bitmaps: bool) -> None:
        self.wanted = wanted
        self.bitmaps = bitmaps

    def __call__(self, cpu: ScriptedCpu) -> Script:
        yield from register_ghcb(cpu)
        for request, buffer, bitmap in self.wanted:
            self.rig.request(**request)
            self.rig.put(BUFFER, buffer[: 0xFF0 - BUFFER])
            if self.bitmaps:
                self.rig.put(0x3F0, (bitmap & (1 << 128) - 1).to_bytes(16, "little"))
            cpu.ghcb = GHCB_GPA
            yield VmgExit(GHCB_GPA)


@SETTINGS
@given(
    st.lists(pages, min_size=1, max_size=6),
    st.booleans(),
    st.lists(st.sampled_from([0, 0, 0, 1, 22]), min_size=1, max_size=5),
    st.sampled_from([1, 2]),
    st.sampled_from(["6.12", "6.18", "7.0", "multi-vmpl"]),
)
@example(
    [
        (
            {
                "code": 0x80000010,
                "info_1": 0,
                "info_2": 0,
                "scratch": GHCB_GPA + BUFFER,
                "rax": 0,
                "rcx": 0,
            },
            b"\0\0\xfc\0" + b"\0" * 4 + b"\x01\0\0\0\0\0\x10\0" * 253,
            0,
        )
    ],
    False,
    [0],
    2,
    "6.12",
)
def test_random_ghcb_pages_end_in_a_verdict(
    wanted: list[Any], bitmaps: bool, answers: list[int], version: int, profile: str
) -> None:
    if profile != "6.12":
        version = 0
    played(Ghcbs(wanted, bitmaps), answers, ghcb_version=version, profile=profile)


@SETTINGS
@given(st.binary(min_size=PAGE, max_size=PAGE), st.sampled_from([1, 2]))
def test_random_bytes_as_a_ghcb_end_in_a_verdict(page: bytes, version: int) -> None:
    def script(cpu: ScriptedCpu) -> Script:
        yield from register_ghcb(cpu)
        script.rig.put(0, page)  # type: ignore[attr-defined]
        cpu.ghcb = GHCB_GPA
        yield VmgExit(GHCB_GPA)

    played(script, [0], ghcb_version=version)


@SETTINGS
@given(
    st.lists(
        st.one_of(
            u64,
            st.builds(
                lambda v, i: v << 12 | i,
                st.integers(0, (1 << 52) - 1),
                st.sampled_from([2, 4, 6, 0x10, 0x12, 0x14, 0x16, 0x80, 0x100]),
            ),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_random_msr_values_end_in_a_verdict(values: list[int]) -> None:
    def script(cpu: ScriptedCpu) -> Script:
        for value in values:
            cpu.ghcb = value
            yield VmgExit(value)

    played(script, [0, 1])
