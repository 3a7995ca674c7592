"""How each guest of examples/guests ends, on every kind of platform.

One table for all: plain VMs, SNP hosts, the kernel's SNP code over fakes (tests/mainline) and the
simulated host, which ends like the kernel that it simulates. What is expected is what the guests'
head comments say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvmlaunch.abi.ghcb_msr import decode_termination
from kvmlaunch.kvm.exits import Exit, HypercallExit, IoExit, SystemEventExit
from kvmlaunch.launch.run import Outcome
from kvmlaunch.uapi import lib

MEMORY = 16 << 20
ENDLESS_SECONDS = 1.5
FAKES = Path("/sys/kernel/debug/fake_psp")


@dataclass(frozen=True)
class End:
    """``text`` (a pattern for the whole console), ``kind`` of the outcome, exit ``code`` of
    ``kvmlaunch run``, ``exits`` (see :func:`shorten`) of all vCPUs, those of the first one first;
    ``again`` repeats at their end for ever. ``detail`` is in what the outcome says; ``why`` tells
    why a platform has an end of its own."""

    text: str
    kind: str
    code: int
    exits: tuple[str, ...]
    again: tuple[str, ...] = ()
    detail: str = ""
    why: str = ""


def ok(text: str, *exits: str) -> End:
    """The guest returned from guest_main()."""
    return End(text, "exit-port", 0, (*exits, "exit 0x0"), detail="the guest wrote 0x0")


def terminated(text: str, code: int, *exits: str, detail: str) -> End:
    """The guest asked for its termination, with a code of the runtime."""
    return End(text, "terminated", 1, (*exits, f"term 15:{code}"), detail=detail)


NEEDS_SNP = End(
    "this guest needs SEV-SNP\n", "exit-port", 1, ("exit 0x1",), detail="the guest wrote 0x1"
)

# Every SNP guest on the runtime shares its GHCB page first.
GHCB = "shared 1"
HEX_LINES = "(?:[0-9a-f]{64}\n){37}"
REPORT = f"-----BEGIN ATTESTATION REPORT-----\n{HEX_LINES}-----END ATTESTATION REPORT-----\n"
RUN = ("253", "253", "6")  # 512 pages in lists of up to 253
ALL_UP = "vCPU 0 is up\nvCPU 1 is up\nvCPU 2 is up\nvCPU 3 is up\nall 4 vCPUs are up\n"

PSC_EXITS = (
    GHCB,
    *("shared 1", "private 1"),
    *("shared 1",) * 3,
    *("shared 1", "private 1") * 3,
    *("private 1",) * 3,
    *(f"private {n}" for n in RUN),
    *(f"shared {n}" for n in RUN),
    *(f"private {n}" for n in RUN),
    "shared 1",
)

SNP: dict[str, End] = {
    "attest": ok(REPORT, GHCB, "shared 1", "shared 1"),
    "bad-double-validate": terminated("", 6, GHCB, "private 1", detail="PVALIDATE failed"),
    "bad-ghcb-private": terminated(
        r"check failed: bad-ghcb-private\.c:[0-9]+: answered is 0x0, expected 0x1\n",
        12,
        GHCB,
        detail="a check failed): check failed: bad-ghcb-private.c:",
    ),
    "bad-ghcb-unregistered": End(
        "", "failed", 1, (GHCB, "shared 1"), detail="KVM_RUN ret=-22 (EINVAL"
    ),
    "bad-loop": End("looping\n", "timeout", 124, (GHCB,), detail="still ran"),
    "bad-psc-storm": End(
        "converting\n",
        "timeout",
        124,
        (GHCB,),
        again=("shared 253", "private 253"),
        detail="still ran",
    ),
    "bad-scratch": terminated("", 35, GHCB, detail="was refused: invalid scratch area"),
    "bad-triple-fault": End(
        "no handlers\n", "shutdown", 1, (GHCB, "KVM_EXIT_SHUTDOWN"), detail="triple fault"
    ),
    "bad-unvalidated": terminated("", 13, GHCB, "private 1", detail="that isn't validated"),
    "bad-version": terminated("", 34, GHCB, detail="was refused: invalid usage"),
    "bad-vmsa-write": End(
        "running from a broken VMSA\n",
        "failed",
        1,
        (GHCB, "KVM_EXIT_FAIL_ENTRY"),
        detail="the processor refused to enter the guest",
    ),
    "certs": ok(f"{REPORT}the host has no certificates\n", GHCB, *("shared 1",) * 6),
    "halt": End("", "halted", 0, ("KVM_EXIT_HLT",), detail="the guest halted"),
    "hello": ok(
        "hello from a kvmlaunch guest\nSEV-SNP guest, C-bit [0-9]+, GHCB protocol 2\n",
        GHCB,
        "private 1",
    ),
    "misbehave": End("", "shutdown", 1, ("KVM_EXIT_SHUTDOWN",), detail="triple fault"),
    "msrproto": End(
        "", "halted", 0, ("shared 1", "private 1", "KVM_EXIT_HLT"), detail="the guest halted"
    ),
    "psc": ok(
        "single pages: ok\nmixed list: ok\n2 MiB in 4 KiB pages: ok\nrefusals: ok\n", *PSC_EXITS
    ),
    # The end of vCPU 0 comes before the exits of the others, who have a GHCB page each.
    "smp": replace(ok(ALL_UP), exits=(GHCB, "exit 0x0", GHCB, GHCB, GHCB)),
    "vc": ok("string\nports, CPUID, MSRs: ok\nmemory\ndevice in memory: ok\n", GHCB),
    "vmpl": terminated("this host runs VMPL0 only\n", 15, GHCB, detail="runs no other VMPL than 0"),
}
"""SNP guests on KVM, which offers no other VMPL than 0."""

PLAIN: dict[str, End] = {
    **dict.fromkeys(SNP, NEEDS_SNP),
    "bad-loop": replace(SNP["bad-loop"], exits=()),
    "bad-triple-fault": replace(SNP["bad-triple-fault"], exits=("KVM_EXIT_SHUTDOWN",)),
    "halt": SNP["halt"],
    "hello": ok("hello from a kvmlaunch guest\n"),
    "misbehave": End(
        "", "failed", 1, ("KVM_EXIT_MMIO",), detail="gpa=0xd0000000 size=4: nothing is at this GPA"
    ),
    "smp": ok(ALL_UP),
    "vc": ok("string\nports, CPUID, MSRs: ok\nmemory\ndevice in memory: ok\n"),
}


def _unanswered(*exits: str) -> End:
    return replace(
        terminated(
            "guest request: VMM error 0, firmware status 0x[0-9a-f]+\n",
            14,
            *(GHCB, *exits),
            detail="didn't answer a guest message",
        ),
        why="the fake secure processor knows no guest messages",
    )


OWN: dict[str, dict[str, End]] = {
    "mainline": {
        "attest": _unanswered(*("shared 1",) * 2),
        "certs": _unanswered(*("shared 1",) * 6),
    },
    "sim": {
        "vmpl": End(
            "VMPL1: may read, may not take more\nVMPL0: VMPL1 came back\n",
            "failed",
            1,
            (GHCB, "shared 1", "KVM_EXIT_MEMORY_FAULT"),
            detail="its VMPL may not use it",
            why="the image asks for VMPLs, which mainline KVM doesn't run",
        ),
    },
}
"""What differs from SNP, by kind of platform."""

VCPUS = {"smp": 4}


def end_of(guest: str, kind: str) -> End:
    """The end on a kind of platform: ``plain``, ``snp`` (hardware, and mainline
    simulated), ``mainline`` (over the fakes), ``sim`` (as ``run`` chooses it)."""
    if kind == "plain":
        return PLAIN[guest]
    return OWN.get(kind, {}).get(guest, SNP[guest])


def snp_kind() -> str:
    """The kind of this machine's SNP host."""
    return "mainline" if FAKES.exists() else "snp"


def shorten(exit_: Exit) -> str:
    """An exit without what depends on compiler and machine."""
    if isinstance(exit_, HypercallExit):
        return f"{str(exit_).rpartition('to=')[2]} {exit_.args[1]}"
    if isinstance(exit_, IoExit):
        return f"exit {int.from_bytes(exit_.data, 'little'):#x}"
    if isinstance(exit_, SystemEventExit) and exit_.type == lib.KVM_SYSTEM_EVENT_SEV_TERM:
        reason = decode_termination(exit_.data[0])
        return f"term {reason.reason_set}:{reason.reason_code}"
    return exit_.reason


def check(end: End, outcome: Outcome, text: str, exits: Iterable[tuple[int, Exit]]) -> None:
    """Hold a run against the table; ``exits`` are (vCPU, exit) as the run loop gave them."""
    assert re.fullmatch(end.text, text), text
    assert outcome.kind == end.kind
    assert outcome.ok == (end.code == 0)
    assert end.detail in str(outcome)
    seen = [shorten(exit_) for _, exit_ in sorted(exits, key=lambda pair: pair[0])]
    if end.kind != "halted":
        # Other vCPUs halt when they are done, before or after the end.
        seen = [exit_ for exit_ in seen if exit_ != "KVM_EXIT_HLT"]
    assert seen[: len(end.exits)] == list(end.exits)
    assert repeats(seen[len(end.exits) :], end.again)


def repeats(seen: Sequence[str], again: Sequence[str]) -> bool:
    """True if ``seen`` is ``again`` over and over, perhaps cut; nothing where that is empty."""
    if not again:
        return not seen
    return bool(seen) and all(exit_ == again[n % len(again)] for n, exit_ in enumerate(seen))
