"""The software CPU against its engine alone: instructions, one exit, one page-table fill."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmlaunch.softcpu import Budget, Halt
from kvmlaunch.softcpu.core import Core
from tests.benchmarks.timing import Figure, compare, timed
from tests.softcpu.model import Guest
from tests.softcpu.tables import A, D, P, W, entry, gate32, start_long, start_protected

NEEDS_KVM = False

INSTRUCTIONS = 2_000_000
EXITS = 1000
# mov ecx,N; 1: add eax,edx; xor edx,eax; ror ebx; dec ecx; jnz 1b; hlt
LOOP = b"\xb9" + struct.pack("<I", INSTRUCTIONS // 5) + bytes.fromhex("01d0 31c2 d1cb 49 75f7 f4")


def figures(_work: Path, rounds: int) -> list[Figure]:
    """Four comparisons; the baseline is unicorn used as a plain emulator."""
    return [
        compare("an instruction", _instruction(), "by unicorn alone", _bare_loop(), rounds),
        compare("a VMGEXIT", _vmgexit(), "a plain engine hook", bare_hook(), rounds),
        compare("a page-table fill (SNP)", _fill(), "a plain engine hook", bare_hook(), rounds),
        compare("CPUID by #VC", _vc(), "a plain engine hook", bare_hook(), rounds),
    ]


def _bare() -> tuple[Any, Any]:
    import unicorn
    from unicorn import x86_const

    engine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    engine.ctl_set_cpu_model(x86_const.UC_CPU_X86_EPYC_ROME)
    engine.mem_map(0x1000, 0x1000)
    return engine, unicorn


def _instruction() -> Callable[[], float]:
    guest = Guest(snp=True)

    def run() -> None:
        guest.start(LOOP)
        assert guest.cpu.run(1 << 40) == Halt()

    return timed(run, INSTRUCTIONS)


def _bare_loop() -> Callable[[], float]:
    engine, _ = _bare()
    engine.mem_write(0x1000, LOOP)
    return timed(lambda: engine.emu_start(0x1000, 0x1000 + len(LOOP) - 1), INSTRUCTIONS)


def bare_hook() -> Callable[[], float]:
    """A Python callback at each of EXITS instructions."""
    engine, unicorn = _bare()
    engine.mem_write(0x1000, b"\x90" * EXITS)
    engine.hook_add(unicorn.UC_HOOK_CODE, lambda *_: None)
    return timed(lambda: engine.emu_start(0x1000, 0x1000 + EXITS), EXITS)


def _vmgexit() -> Callable[[], float]:
    guest = Guest(snp=True)
    cpu = guest.start(bytes.fromhex("f30f01d9 ebfa"))

    def run() -> None:
        for _ in range(EXITS):
            cpu.run(1000)

    return timed(run, EXITS)


def _fill() -> Callable[[], float]:
    """Reads 256 pages after each MOV to CR3."""
    guest = Guest(snp=True)
    # 1: mov rax,cr3; mov cr3,rax; mov esi,0x20000; 2: mov al,[rsi]; add rsi,0x1000;
    # cmp rsi,0x120000; jb 2b; jmp 1b
    code = "0f20d8 0f22d8 be00000200 8a06 4881c600100000 4881fe00001200 72ee ebe1"
    start_long(guest, bytes.fromhex(code))
    for page in range(0x20, 0x120):
        entry(guest, 0x13000, page, page << 12 | P | W | A | D | 1 << 51)
    count = 0
    fill = Core.fill

    def counted(core: Core, page: int, kind: int) -> int:
        nonlocal count
        count += 1
        return fill(core, page, kind)

    def run() -> float:
        nonlocal count
        count = 0
        Core.fill = counted  # type: ignore[method-assign]
        begin = time.perf_counter()
        assert guest.cpu.run(20_000) == Budget()
        took = time.perf_counter() - begin
        Core.fill = fill  # type: ignore[method-assign]
        return took / count

    return run


def _vc() -> Callable[[], float]:
    """CPUID, delivery of #VC, a handler of three instructions."""
    guest = Guest(snp=True)
    start_protected(guest, bytes.fromhex("b9") + struct.pack("<I", EXITS) + b"\x0f\xa2\xe2\xfc\xf4")
    state = guest.cpu.save()
    gate32(guest, 29)
    guest.put(0x4000, bytes.fromhex("83c404 83042402 cf"))  # add esp,4; add dword [esp],2; iret

    def run() -> None:
        assert guest.cpu.load(state) is None
        assert guest.cpu.run(1 << 30) == Halt()

    return timed(run, EXITS)
