"""Memory operands of emulated instructions.

Source: AMD APM volume 3, 1.2 (instruction encoding).
"""

from __future__ import annotations

from .core import Core
from .decode import PREFIXES, Instruction
from .engine import DS, FS, SS

__all__ = ["linear_address", "load_operand", "segment_base"]

# 16-bit ModRM: registers added, and whether the stack segment is the default.
_FORMS_16 = ((3, 6), (3, 7), (5, 6), (5, 7), (6,), (7,), (5,), (3,))


def segment_base(core: Core, number: int) -> int:
    """Return the base that a memory access adds."""
    if core.state.bits == 64 and number < FS:
        return 0
    return core.state.base(number)


def linear_address(core: Core, instruction: Instruction, code: bytes) -> int:
    """Return the linear address of the ModRM operand; the registers are those before it."""
    gpr, rex = core.state.gpr, instruction.rex
    size = instruction.address_size
    at = _opcode_end(instruction, code) + 1
    mod, rm = instruction.modrm >> 6, instruction.modrm & 7
    segment = DS
    if size == 2:
        if mod == 0 and rm == 6:
            value = int.from_bytes(code[at : at + 2], "little")
        else:
            registers = _FORMS_16[rm]
            value = sum(gpr[n] for n in registers)
            value += int.from_bytes(code[at : at + mod], "little", signed=True)
            segment = SS if 5 in registers else DS
    else:
        value = 0
        if rm == 4:
            sib = code[at]
            at += 1
            index = (sib >> 3 & 7) | (rex & 2) << 2
            if index != 4:
                value = gpr[index] << (sib >> 6)
            rm = sib & 7
            has_base = not (mod == 0 and rm == 5)
        else:
            has_base = not (mod == 0 and rm == 5)
            if not has_base and core.state.bits == 64:
                value = core.state.rip + instruction.length
        if has_base:
            value += gpr[rm | (rex & 1) << 3]
            segment = SS if rm in (4, 5) and not rex & 1 else DS
        width = {0: 0 if has_base else 4, 1: 1, 2: 4}[mod]
        value += int.from_bytes(code[at : at + width], "little", signed=True)
    value &= (1 << 8 * size) - 1
    if instruction.segment >= 0:
        segment = instruction.segment
    wrap = 64 if core.long else 32
    return segment_base(core, segment) + value & (1 << wrap) - 1


def _opcode_end(instruction: Instruction, code: bytes) -> int:
    """Offset of ModRM."""
    at = 0
    while code[at] in PREFIXES or (instruction.rex and code[at] == instruction.rex):
        at += 1
    return at + {0: 1, 0x0F: 2}.get(instruction.table, 3)


def load_operand(core: Core, instruction: Instruction, code: bytes, size: int) -> int:
    """Return the r/m operand, from a register or from memory."""
    if instruction.in_memory:
        user = core.state.cpl == 3
        data = core.load(linear_address(core, instruction, code), size, user=user)
        return int.from_bytes(data, "little")
    return core.state.gpr[instruction.rm] & (1 << 8 * size) - 1
