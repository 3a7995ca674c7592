"""Random guests: code, tables, registers and answers. Run as a process of its own.

    python -m tests.softcpu.hostile SEED COUNT

Prints how often each event came; a guest that harms the process ends it.
"""

from __future__ import annotations

import faulthandler
import random
import struct
import sys
import time
from collections import Counter

from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError
from kvmlaunch.softcpu import (
    Budget,
    Event,
    FaultReason,
    InvalidState,
    IoRead,
    MmioRead,
    MsrRead,
    MsrWrite,
    NestedFault,
    Shutdown,
    SoftCpu,
    VmgExit,
)
from tests.softcpu.model import FLAT_CODE64, Guest, Memory, vmsa
from tests.softcpu.tables import (
    ALL,
    GDTR,
    IDT_AT,
    IDTR,
    LONG,
    PD,
    PDPT,
    PML4,
    PT,
    TR,
    USER64,
    put_gdt,
)

SIZE = 0x40000
# CPUID, INT3, INT n, HLT, WRMSR, RDMSR, VMGEXIT, PVALIDATE, RMPADJUST, RMPQUERY, MOV CRn, VMRUN,
# LTR, LLDT, SYSCALL, SYSRET, SYSENTER, SYSEXIT, IRET, RETF, far JMP and CALL, segment loads, LGDT,
# LIDT, string and port instructions, POPF, STI, CLI, WBINVD, RDTSC(P), XSETBV, FXSAVE, XSAVES,
# XRSTOR, INVLPG, MOV DRn, ENTER, PUSHA, POPA, XLAT, CMPXCHG8B, LOCK CMPXCHG, ANDN.
TEXTS = """
0fa2 cc cd80 f4 0f30 0f32 f30f01d9 f20f01ff f30f01fe f30f01fd 0f22c0 0f22d8 0f22e0 0f20c0 0f01d8
0f00d8 0f00d0 0f05 0f07 0f34 0f35 cf 48cf cb ea 9a ff18 ff28 8ed8 8ed0 0fb2 0f0110 0f0118 f3a4 f3ab
ee 6e f36c 9c9d fb fa 0f09 0f31 0f01f9 0f01d1 0fae00 0fc720 0fae28 0f0138 0f23f8 0f21f8 e410
c8ffff1f 60 61 d7 0fc708 f00fb108 c4e278f2c1
"""
INSTRUCTIONS = [bytes.fromhex(text) for text in TEXTS.split()]
GATE_KINDS = (0x8E, 0xEE, 0x8F, 0x8E, 0x86, 0x85)
FIELDS = (
    *("rip", "rsp", "rflags", "efer", "cr0", "cr3", "cr4"),
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
)
SEGMENTS = ["cs", "ss", "ds", "es", "tr", "ldtr", "gdtr", "idtr"]
REAL = dict.fromkeys(("ss", "ds", "es"), Segment(0, 0x93, 0xFFFF, 0))


def random_memory(rng: random.Random, guest: Guest) -> None:
    code = bytearray(rng.randbytes(0x1000))
    for _ in range(200):
        text, at = rng.choice(INSTRUCTIONS), rng.randrange(0xFF0)
        code[at : at + len(text)] = text
    guest.put(0x1000, bytes(code))
    if rng.random() < 0.7:
        put_gdt(guest)
        for vector in range(64):
            low = rng.randrange(0x1000, 0x2000) | rng.choice((8, 24, 32)) << 16
            low |= rng.choice((*GATE_KINDS, rng.randrange(256))) << 40
            low |= rng.randrange(8) << 32 if rng.random() < 0.2 else 0
            guest.put(IDT_AT + 16 * vector, struct.pack("<QQ", low, 0))
        guest.put(TR.base, rng.randbytes(0x68))
    private = 1 << 51 if guest.snp else 0
    for table, value in ((PML4, PDPT), (PDPT, PD), (PD, PT)):
        guest.put(table, struct.pack("<Q", value | ALL | private))
    for page in range(512):
        value = page << 12 | ALL | (private if rng.random() < 0.95 else 0)
        value ^= 1 << rng.randrange(64) if rng.random() < 0.1 else 0
        guest.put(PT + 8 * page, struct.pack("<Q", value))


def random_state(rng: random.Random, snp: bool) -> Vmsa:
    if rng.random() < 0.1:
        state = Vmsa.decode(rng.randbytes(4096))
        return state.replace(
            efer=0x1000 | rng.choice((0, 0x500, 0xD01)),
            cr0=rng.choice((0x10, 0x11, 0x80000011)),
            cr4=rng.choice((0, 0x20, 0x620)),
            cr3=PML4,
            dr6=0,
            dr7=0x400,
            vmpl=0,
            cpl=rng.randrange(4),
            sev_features=int(snp),
        )
    tables = {"gdtr": GDTR, "idtr": IDTR, "tr": TR}
    changes: dict[str, object] = rng.choice(
        (
            {**REAL, "cs": Segment(0, 0x9B, 0xFFFF, 0), "cr0": 0x10},
            tables,
            {**tables, **LONG, "cs": FLAT_CODE64, "cr3": PML4},
            {**tables, "cr0": 0x80000011, "cr3": PDPT, "cr4": 0x620},
            {**tables, **LONG, **USER64, "cr3": PML4, "star": 0x0013000800000000, "lstar": 0x1234},
        )
    ).copy()
    for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi"):
        changes[name] = rng.randrange(SIZE)
    for _ in range(rng.randrange(4)):
        name = rng.choice(FIELDS)
        old = changes.get(name, 0)
        assert isinstance(old, int)
        changes[name] = old ^ 1 << rng.randrange(22 if name == "rflags" else 64)
    if rng.random() < 0.2:
        limit, base = rng.getrandbits(32), rng.getrandbits(rng.choice((20, 32, 64)))
        changes[rng.choice(SEGMENTS)] = Segment(
            rng.getrandbits(16), rng.getrandbits(12), limit, base
        )
    return vmsa(snp=snp, **changes)


def answer(rng: random.Random, guest: Guest, event: Event) -> bool:
    """Do what a hypervisor might; False ends the guest."""
    cpu, memory = guest.cpu, guest.memory
    if isinstance(event, (Shutdown, InvalidState)):
        return False
    if isinstance(event, (IoRead, MmioRead, MsrRead, MsrWrite)):
        if rng.random() < 0.7:
            cpu.complete(rng.getrandbits(64))
        else:
            cpu.refuse()
    elif isinstance(event, NestedFault):
        page = event.gpa & -0x1000
        if page >= memory.size or event.reason is not FaultReason.ABSENT:
            return False
        if not event.private:
            memory.make_shared(page)
        else:
            memory.make_private(page)
    elif isinstance(event, VmgExit):
        cpu.ghcb = rng.getrandbits(64)
    elif isinstance(event, Budget):
        inject(rng, cpu)
        return rng.random() < 0.8
    cpu.want_window = rng.random() < 0.1
    return True


def inject(rng: random.Random, cpu: SoftCpu) -> None:
    if rng.random() < 0.3 and cpu.interruptible:
        cpu.inject_interrupt(rng.randrange(256))
    elif rng.random() < 0.1 and not cpu.nmi_blocked:
        try:
            cpu.inject_nmi()
        except RuntimeError:
            cpu.want_window = True


def run_guest(seed: int) -> Counter[str]:
    rng = random.Random(seed)
    snp = rng.random() < 0.6
    memory = Memory(SIZE, snp=snp)
    memory.mmio.add(0x3F000)
    guest = Guest(snp=snp, memory=memory, exit_on_pause=rng.random() < 0.5)
    random_memory(rng, guest)
    seen: Counter[str] = Counter()
    try:
        state = random_state(rng, snp)
    except FormatError:
        return seen
    invalid = guest.cpu.load(state)
    if invalid is not None:
        return Counter(("InvalidState",))
    started = time.monotonic()
    for _ in range(200):
        event = guest.cpu.run(5000)
        seen[type(event).__name__] += 1
        if not answer(rng, guest, event):
            break
    guest.cpu.save()
    assert time.monotonic() - started < 20, f"guest {seed} takes too long"
    return seen


if __name__ == "__main__":
    faulthandler.enable()
    first, count = (int(argument) for argument in sys.argv[1:])
    total: Counter[str] = Counter()
    for number in range(first, first + count):
        try:
            total += run_guest(number)
        except BaseException:
            print(f"guest {number}", file=sys.stderr)
            raise
    print(dict(total))
