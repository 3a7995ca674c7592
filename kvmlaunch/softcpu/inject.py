"""Delivery of exceptions and interrupts through the guest's own IDT, done by hand.

In long mode, in protected and virtual-8086 mode (16- and 32-bit gates), and in real mode. Not
done: task gates, which give #GP.

Source: AMD APM volume 2, chapter 8.
"""

from __future__ import annotations

import dataclasses
import struct

from .core import VM86, Core, Descriptor, parse_descriptor
from .engine import CS, DS, ES, FS, GS, IDTR, SS, TR, WRITE
from .faults import DB, DF, GP, NP, PF, SS_FAULT, TS, VC, GuestFault

__all__ = ["Delivery", "TripleFault", "deliver"]

_TF, _IF, _NT, _RF, _AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 18
_QUAD = 0xFFFFFFFFFFFFFFFF
_CONTRIBUTORY = frozenset((0, TS, NP, SS_FAULT, GP, VC))
_HAS_ERROR_CODE = frozenset((DF, TS, NP, SS_FAULT, GP, PF, 17, VC))
_P = 0x80


class TripleFault(Exception):
    """No exception could be delivered. `vectors`: what was tried, the last one first."""

    def __init__(self, vectors: tuple[int, ...]) -> None:
        super().__init__(vectors)
        self.vectors = vectors


@dataclasses.dataclass(frozen=True)
class Delivery:
    """What is to be delivered.

    `software`: by INT n, INT3 or INTO, so that the gate's DPL counts; `length` is then the
    instruction's. `external`: an interrupt or NMI, which isn't the instruction's fault.
    """

    vector: int
    error_code: int | None = None
    software: bool = False
    external: bool = False
    length: int = 0


def deliver(core: Core, what: Delivery, address: int = 0) -> None:
    """Enter the guest's handler; faults on the way become #DF and in the end a triple fault.

    `address` is CR2 for a #PF.

    Raises:
        TripleFault: the CPU shuts down.
        HostFault: the hypervisor is needed first; nothing has changed, so deliver again.
    """
    vectors: tuple[int, ...] = ()
    while True:
        vectors = (what.vector, *vectors)
        if what.vector == PF and not what.software and not what.external:
            core.state.cr[2] = address
        try:
            _enter(core, what)
            return
        except GuestFault as fault:
            if what.vector == DF and not what.software and not what.external:
                raise TripleFault((fault.vector, *vectors)) from None
            benign = what.software or what.external
            if not benign and _makes_double(what.vector, fault.vector):
                what = Delivery(DF, 0)
            else:
                what = Delivery(fault.vector, fault.error_code)
                address = fault.address
        if len(vectors) > 8:
            raise TripleFault(vectors)


def _makes_double(first: int, second: int) -> bool:
    if first == PF:
        return second == PF or second in _CONTRIBUTORY
    return first in _CONTRIBUTORY and second in _CONTRIBUTORY


def _enter(core: Core, what: Delivery) -> None:
    if not core.state.cr[0] & 1:
        _enter_real(core, what)
    elif core.long:
        _enter_long(core, what)
    else:
        _enter_protected(core, what)
    core.state.shadow = False


def _return_address(core: Core, what: Delivery) -> int:
    state = core.state
    mask = {64: _QUAD, 32: 0xFFFFFFFF, 16: 0xFFFF}[state.bits]
    return state.rip + what.length & mask


def _pushed_flags(core: Core, what: Delivery) -> int:
    """RFLAGS for the frame: RF says that a fault's instruction is to be restarted."""
    fault = not (what.software or what.external or what.vector in (DB, 3, 4, DF))
    flags = core.state.rflags
    return flags | _RF if fault else flags


def _gate_error(what: Delivery) -> int:
    """Error code that points to the IDT entry; EXT for interrupts."""
    return what.vector * 8 + 2 + what.external


def _enter_long(core: Core, what: Delivery) -> None:
    state, error = core.state, _gate_error(what)
    if what.vector * 16 + 15 > state.limit(IDTR):
        raise GuestFault(GP, error)
    at = state.base(IDTR) + what.vector * 16
    low, high = struct.unpack("<QQ", core.load(at, 16))
    kind, dpl = low >> 40 & 0x1F, low >> 45 & 3
    if kind not in (0xE, 0xF) or (what.software and dpl < state.cpl):
        raise GuestFault(GP, error)
    if not low >> 47 & 1:
        raise GuestFault(NP, error)
    target = (low & 0xFFFF) | (low >> 32 & 0xFFFF0000) | (high & 0xFFFFFFFF) << 32
    code, cpl = _code_segment(core, low >> 16 & 0xFFFF)
    if code.attrib & 0x600 != 0x200:  # L and not D
        raise GuestFault(GP, code.selector & 0xFFFC)
    if target + (1 << 47) & 0xFFFF000000000000:
        raise GuestFault(GP, 0)
    stack_index = low >> 32 & 7
    inner = cpl < state.cpl
    if stack_index:
        stack = _tss(core, 0x1C + 8 * stack_index, 8)
    elif inner:
        stack = _tss(core, 4 + 8 * cpl, 8)
    else:
        stack = state.gpr[4]
    stack &= ~15
    frame = [
        state.selector(SS),
        state.gpr[4],
        _pushed_flags(core, what),
        state.selector(CS),
        _return_address(core, what),
    ]
    if what.error_code is not None:
        frame.append(what.error_code)
    stack = stack - 8 * len(frame) & _QUAD
    if stack + (1 << 47) & 0xFFFF000000000000:
        raise GuestFault(SS_FAULT, 0)
    data = struct.pack(f"<{len(frame)}Q", *reversed(frame))
    _push(core, stack, data, 8, cpl)
    if inner:
        state.set_segment(SS, cpl, cpl << 5, 0, 0)
    state.gpr[4] = stack
    _jump(core, code, cpl, target, interrupt_gate=kind == 0xE)


def _enter_protected(core: Core, what: Delivery) -> None:
    state, error = core.state, _gate_error(what)
    from_vm86 = bool(state.rflags & VM86)
    if what.vector * 8 + 7 > state.limit(IDTR):
        raise GuestFault(GP, error)
    gate = core.load_int(state.base(IDTR) + what.vector * 8, 8)
    kind, dpl = gate >> 40 & 0x1F, gate >> 45 & 3
    if kind not in (6, 7, 0xE, 0xF) or (what.software and dpl < state.cpl):
        raise GuestFault(GP, error)
    if not gate >> 47 & 1:
        raise GuestFault(NP, error)
    size = 4 if kind & 8 else 2
    target = (gate & 0xFFFF) | (gate >> 32 & 0xFFFF0000 if size == 4 else 0)
    code, cpl = _code_segment(core, gate >> 16 & 0xFFFF)
    if from_vm86 and cpl:
        raise GuestFault(GP, code.selector & 0xFFFC)
    frame = []
    if cpl < state.cpl:
        stack_segment, stack = _inner_stack(core, cpl)
        if from_vm86:
            frame += [state.selector(n) for n in (GS, FS, DS, ES)]
        frame += [state.selector(SS), state.gpr[4]]
    else:
        stack_segment, stack = _current(core, SS), state.gpr[4]
    frame += [_pushed_flags(core, what), state.selector(CS), _return_address(core, what)]
    if what.error_code is not None:
        frame.append(what.error_code)
    unit = (1 << 8 * size) - 1
    data = b"".join((value & unit).to_bytes(size, "little") for value in reversed(frame))
    wrap = 0xFFFFFFFF if stack_segment.attrib & 0x400 else 0xFFFF
    new_stack = stack - len(data) & wrap
    _push(core, stack_segment.base + new_stack, data, size, cpl)
    if from_vm86:
        for number in (DS, ES, FS, GS):
            state.set_segment(number, 0, 0, 0, 0)
    flags = state.rflags
    if cpl < state.cpl:
        state.rflags = flags & ~VM86
        state.set_segment(SS, *stack_segment)
    state.gpr[4] = stack & ~wrap | new_stack
    _jump(core, code, cpl, target, interrupt_gate=not kind & 1)


def _enter_real(core: Core, what: Delivery) -> None:
    state = core.state
    if what.vector * 4 + 3 > state.limit(IDTR):
        raise GuestFault(GP, None)
    entry = core.load_int(state.base(IDTR) + what.vector * 4, 4)
    values = (_return_address(core, what), state.selector(CS), state.rflags)
    data = b"".join((value & 0xFFFF).to_bytes(2, "little") for value in values)
    stack = state.gpr[4] - len(data) & 0xFFFF
    core.store(state.base(SS) + stack, data)
    state.gpr[4] = state.gpr[4] & ~0xFFFF | stack
    state.rflags = state.rflags & ~(_IF | _TF | _AC)
    selector = entry >> 16
    state.set_segment(CS, selector, state.attrib(CS), state.limit(CS), selector << 4)
    state.rip = entry & 0xFFFF


def _current(core: Core, number: int) -> Descriptor:
    state = core.state
    return Descriptor(
        state.selector(number), state.attrib(number), state.limit(number), state.base(number)
    )


def _push(core: Core, stack: int, data: bytes, unit: int, cpl: int) -> None:
    """Write a frame; a #PF has the address that pushing from the top meets first."""
    top = stack + len(data) - unit
    lowest_above = max(stack, (stack | 0xFFF) + 1 - unit)
    for address in (top, min(top, lowest_above)):
        try:
            core.resolve(address, WRITE, user=cpl == 3)
        except GuestFault as fault:
            fault.address = address
            raise
    core.store(stack, data, user=cpl == 3)


def _code_segment(core: Core, selector: int) -> tuple[Descriptor, int]:
    """Return a handler's code segment and the privilege level it runs at."""
    if not selector & 0xFFFC:
        raise GuestFault(GP, 0)
    low = core.descriptor(selector)
    found = parse_descriptor(selector, low)
    dpl, cpl = found.attrib >> 5 & 3, core.state.cpl
    if found.attrib & 0x18 != 0x18 or dpl > cpl:  # S, code
        raise GuestFault(GP, selector & 0xFFFC)
    if not found.attrib & _P:
        raise GuestFault(NP, selector & 0xFFFC)
    level = cpl if found.attrib & 4 else dpl
    return found._replace(selector=selector & 0xFFFC | level), level


def _inner_stack(core: Core, cpl: int) -> tuple[Descriptor, int]:
    """Return SS and (E)SP of the TSS for an inner level, 16- or 32-bit TSS."""
    if core.state.attrib(TR) & 8:
        stack, selector = _tss(core, 4 + 8 * cpl, 4), _tss(core, 8 + 8 * cpl, 2)
    else:
        stack, selector = _tss(core, 2 + 4 * cpl, 2), _tss(core, 4 + 4 * cpl, 2)
    return core.stack_segment(selector, cpl, TS), stack


def _tss(core: Core, offset: int, size: int) -> int:
    state = core.state
    if offset + size - 1 > state.limit(TR) or not state.attrib(TR) & _P:
        raise GuestFault(TS, state.selector(TR) & 0xFFFC)
    return core.load_int(state.base(TR) + offset, size)


def _jump(core: Core, code: Descriptor, cpl: int, target: int, *, interrupt_gate: bool) -> None:
    state = core.state
    state.cpl = cpl
    state.set_segment(CS, *code)
    cleared = _TF | _NT | _RF | VM86 | (_IF if interrupt_gate else 0)
    state.rflags = state.rflags & ~cleared
    state.rip = target
