"""One instruction at a time, by the trap flag, so that the guest doesn't notice.

A guest that sets TF itself by POPF or IRET loses it when that instruction is stepped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .core import Core
from .engine import SS, Stop
from .faults import WatchFault

__all__ = ["STEP_TICKS", "step", "step_over", "unwatched"]

STEP_TICKS = 1 << 14
"""More than any instruction takes."""
_TF = 1 << 8
_SINGLE_STEP = 0x41
_PUSHF = 0x9C


def step(core: Core) -> int | None:
    """Execute one instruction, of a string instruction one repetition.

    Returns None when it is done, otherwise why the engine stopped before.
    """
    state, engine = core.state, core.engine
    flags, dr6 = state.rflags, state.dr[6]
    if flags & _TF:
        return engine.run(state, core, STEP_TICKS)
    instruction = core.instruction()
    state.rflags = flags | _TF
    code = engine.run(state, core, STEP_TICKS)
    state.rflags = state.rflags & ~_TF
    if code not in (_SINGLE_STEP, Stop.BUDGET):
        return code
    state.dr[6] = dr6
    if instruction is not None and not instruction.table and instruction.opcode == _PUSHF:
        _hide_trap_flag(core)
    return None


def _hide_trap_flag(core: Core) -> None:
    """Clear TF in what PUSHF has just pushed."""
    state = core.state
    at = state.gpr[4] + 1
    if state.bits != 64:
        at = state.base(SS) + (at & (0xFFFFFFFF if state.attrib(SS) & 0x400 else 0xFFFF))
    core.store(at, bytes((state.rflags >> 8 & 0xFE,)), user=state.cpl == 3)


@contextlib.contextmanager
def unwatched(core: Core) -> Iterator[None]:
    """Nothing that is watched, instructions or data, stops what is executed within."""
    watched, core.watched = core.watched, {}
    core.engine.flush_tlb()
    core.engine.watching = False
    try:
        yield
    finally:
        core.engine.watching = True
        core.watched = watched
        core.engine.flush_tlb()


def step_over(core: Core, fault: WatchFault, linear: int) -> tuple[int | None, int]:
    """Let an instruction access a watched page.

    Returns the exit code if something else came in between, and the bits of DR6.
    """
    instruction = core.instruction()
    size = 1 if instruction is None else instruction.access_size
    hit = core.debug.hits_data(linear, size, write=fault.write)
    with unwatched(core):
        code = step(core)
    return code, 0 if code is not None else hit
