"""x86 instructions, as far as their length, prefixes and memory operand matter.

Source: AMD APM volume 3, appendix A (opcode maps).
"""

from __future__ import annotations

import dataclasses
import functools

__all__ = ["PREFIXES", "Instruction", "decode", "io_instructions"]

PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
"""Legacy prefixes."""
_SEGMENT_PREFIXES = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
_MAX_LENGTH = 15


def _opcodes(*parts: int | tuple[int, int]) -> frozenset[int]:
    found: set[int] = set()
    for part in parts:
        first, last = part if isinstance(part, tuple) else (part, part)
        found.update(range(first, last + 1))
    return frozenset(found)


_ALU = tuple((base, base + 3) for base in range(0, 0x40, 8))
_MODRM = _opcodes(
    *_ALU,
    *(0x62, 0x63, 0x69, 0x6B),
    *((0x80, 0x8F), (0xC0, 0xC1), (0xC4, 0xC7), (0xD0, 0xD3), (0xD8, 0xDF)),
    *((0xF6, 0xF7), (0xFE, 0xFF)),
)
_IMM8 = _opcodes(
    *(base + 4 for base in range(0, 0x40, 8)),
    *(0x6A, 0x6B, (0x70, 0x7F), 0x80, 0x82, 0x83, 0xA8, (0xB0, 0xB7), 0xC0, 0xC1, 0xC6, 0xCD),
    *((0xD4, 0xD5), (0xE0, 0xE7), 0xEB),
)
_IMM_OPERAND = _opcodes(  # 2 or 4 bytes
    *(base + 5 for base in range(0, 0x40, 8)), *(0x68, 0x69, 0x81, 0xA9, 0xC7)
)
_BRANCH = _opcodes(0xE8, 0xE9)
_NO_MODRM_0F = _opcodes(
    *((0x05, 0x09), 0x0B, 0x0E, (0x30, 0x37), 0x77, (0x80, 0x8F), (0xA0, 0xA2), (0xA8, 0xAA)),
    (0xC8, 0xCF),
)
_IMM8_0F = _opcodes((0x70, 0x73), 0xA4, 0xAC, 0xBA, 0xC2, (0xC4, 0xC6), 0x0F)
# Read, changed and written back; the first access counts as a write.
_CHANGES = _opcodes(
    *(base + low for base in range(0, 0x38, 8) for low in (0, 1)),
    *(0x86, 0x87, 0xC0, 0xC1, (0xD0, 0xD3), 0xFE),
)
_CHANGES_0F = _opcodes(0xA4, 0xA5, 0xAB, 0xAC, 0xAD, 0xB0, 0xB1, 0xB3, 0xBB, 0xC0, 0xC1, 0xC7)
# Segment loads, far transfers, LAR, LSL, VERR, VERW, LTR, LLDT: they read descriptors.
_DESCRIPTORS = _opcodes(0x07, 0x17, 0x1F, 0x8E, 0x9A, 0xC4, 0xC5, (0xCA, 0xCF), 0xEA, 0xFF)
_DESCRIPTORS_0F = _opcodes(0x00, 0x02, 0x03, 0xA1, 0xA9, 0xB2, 0xB4, 0xB5)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. `table` is 0 for one-byte opcodes, 0x0F, 0x0F38 or 0x0F3A for others."""

    length: int
    table: int
    opcode: int
    modrm: int
    """-1 where there is none."""
    operand_size: int
    """Bytes: 2, 4 or 8."""
    address_size: int
    rex: int
    repeat: int
    """0, or the last of the prefixes F2 and F3."""
    segment: int
    """Number of the segment in an override, or -1."""
    immediate: int
    """Unsigned, 0 where there is none; only the last one of several."""

    @property
    def reg(self) -> int:
        """Register number in ModRM.reg."""
        return (self.modrm >> 3 & 7) | (self.rex & 4) << 1

    @property
    def rm(self) -> int:
        """Register number in ModRM.rm."""
        return (self.modrm & 7) | (self.rex & 1) << 3

    @property
    def in_memory(self) -> bool:
        """Whether ModRM names a memory operand."""
        return 0 <= self.modrm < 0xC0

    @property
    def changes_memory(self) -> bool:
        """Whether the memory operand is read and written back."""
        if not self.in_memory:
            return False
        operation = self.modrm >> 3 & 7
        if self.table == 0x0F:
            return self.opcode in _CHANGES_0F or (self.opcode == 0xBA and operation > 4)
        if self.table:
            return False
        if 0x80 <= self.opcode <= 0x83:
            return operation != 7
        if self.opcode in (0xF6, 0xF7):
            return operation in (2, 3)
        if self.opcode == 0xFF:
            return operation < 2
        return self.opcode in _CHANGES

    @property
    def reads_descriptors(self) -> bool:
        """Whether it may read the GDT, the LDT or a TSS by itself."""
        if self.table == 0x0F:
            return self.opcode in _DESCRIPTORS_0F
        return not self.table and self.opcode in _DESCRIPTORS

    @property
    def access_size(self) -> int:
        """Bytes of one access to the memory operand, 8 at most."""
        op = self.opcode
        if self.table == 0x0F:
            if op in (0xB6, 0xBE) or 0x90 <= op <= 0x9F or op in (0xB0, 0xC0):
                return 1
            if op in (0xB7, 0xBF):
                return 2
            if op in (0x6E, 0x7E, 0xC3) or 0x40 <= op <= 0x4F or op > 0xA0:
                return self.operand_size
            return 8
        if self.table:
            return self.operand_size if op >= 0xF0 else 8
        if op == 0x63:
            return 4
        if op in (0x8C, 0x8E):
            return 2
        byte = op & 1 == 0 and (op < 0x40 or 0x80 <= op <= 0x8A or op in _BYTE_FORMS)
        return 1 if byte else self.operand_size


_BYTE_FORMS = _opcodes(
    *(0xA0, 0xA2, 0xA4, 0xA6, 0xAA, 0xAC, 0xAE, 0xC0, 0xC6, 0xD0, 0xD2, 0xF6, 0xFE, 0x6C, 0x6E)
)


@functools.lru_cache(maxsize=4096)
def decode(code: bytes, bits: int) -> Instruction | None:
    """Decode the first instruction of `code` for a code segment of 16, 32 or 64 bits.

    None: too long, or not all of it is there. Undefined opcodes get a length all the same.
    """
    try:
        found = _decode(code, bits)
    except IndexError:
        return None
    return found if found.length <= min(len(code), _MAX_LENGTH) else None


def _decode(code: bytes, bits: int) -> Instruction:
    at, rex, repeat, segment = 0, 0, 0, -1
    operand_override = address_override = False
    while True:
        byte = code[at]
        if byte in PREFIXES:
            operand_override |= byte == 0x66
            address_override |= byte == 0x67
            repeat = byte if byte in (0xF2, 0xF3) else repeat
            segment = _SEGMENT_PREFIXES.get(byte, segment)
            rex = 0
        elif bits == 64 and byte & 0xF0 == 0x40:
            rex = byte
        else:
            break
        at += 1
    if bits == 64:
        operand_size = 8 if rex & 8 else 2 if operand_override else 4
        address_size = 4 if address_override else 8
    else:
        operand_size = 2 if (bits == 16) != operand_override else 4
        address_size = 2 if (bits == 16) != address_override else 4
    opcode, table = code[at], 0
    at += 1
    if opcode in (0xC4, 0xC5) and (bits == 64 or code[at] >= 0xC0):
        table = 0x0F if opcode == 0xC5 else (0, 0x0F, 0x0F38, 0x0F3A)[code[at] & 3]
        at += 1 if opcode == 0xC5 else 2
        opcode = code[at]
        at += 1
        has_modrm = not (table == 0x0F and opcode == 0x77)
    else:
        if opcode == 0x0F:
            table, opcode = 0x0F, code[at]
            at += 1
            if opcode in (0x38, 0x3A):
                table, opcode = 0x0F00 | opcode, code[at]
                at += 1
        has_modrm = opcode in _MODRM if not table else _has_modrm_0f(table, opcode)
    modrm = -1
    if has_modrm:
        modrm = code[at]
        at += 1 + _displacement(code[at + 1 : at + 2], modrm, address_size)
    size = _immediate_size(table, opcode, modrm, bits, operand_size, address_size)
    immediate = int.from_bytes(code[at : at + size], "little")
    return Instruction(
        length=at + size,
        table=table,
        opcode=opcode,
        modrm=modrm,
        operand_size=operand_size,
        address_size=address_size,
        rex=rex,
        repeat=repeat,
        segment=segment,
        immediate=immediate,
    )


def _has_modrm_0f(table: int, opcode: int) -> bool:
    return table != 0x0F or opcode not in _NO_MODRM_0F


def _displacement(sib: bytes, modrm: int, address_size: int) -> int:
    """Bytes of SIB and displacement."""
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        return 0
    if address_size == 2:
        return 2 if mod == 2 or (mod == 0 and rm == 6) else mod
    has_sib = rm == 4
    base = sib[0] & 7 if has_sib else rm
    far = mod == 2 or (mod == 0 and base == 5)
    return has_sib + (4 if far else mod)


def _immediate_size(
    table: int, opcode: int, modrm: int, bits: int, operand_size: int, address_size: int
) -> int:
    word = 2 if operand_size == 2 else 4
    if table == 0x0F:
        if 0x80 <= opcode <= 0x8F:
            return 4 if bits == 64 else word
        return 1 if opcode in _IMM8_0F else 0
    if table:
        return 1 if table == 0x0F3A else 0
    if opcode in _IMM8:
        return 1
    if opcode in _IMM_OPERAND:
        return word
    if opcode in _BRANCH:
        return 4 if bits == 64 else word
    if 0xB8 <= opcode <= 0xBF:
        return operand_size
    if 0xA0 <= opcode <= 0xA3:
        return address_size
    if opcode in (0x9A, 0xEA):
        return word + 2
    if opcode in (0xC2, 0xCA):
        return 2
    if opcode == 0xC8:
        return 3
    if opcode in (0xF6, 0xF7) and modrm >> 3 & 7 < 2:
        return 1 if opcode == 0xF6 else word
    return 0


def io_instructions(code: bytes, bits: int, count: int) -> list[int]:
    """Return the offsets of IN, OUT, INS and OUTS in a block of `count` instructions.

    Where the block can't be followed, every place where one of them could start.
    """
    places, at = [], 0
    for _ in range(count):
        found = decode(code[at:], bits)
        if found is None:
            break
        if not found.table and _is_io(found.opcode):
            places.append(at)
        at += found.length
    if at == len(code):
        return places
    return [p for p in range(len(code)) if _could_be_io(code[p:])]


def _is_io(opcode: int) -> bool:
    return 0xE4 <= opcode <= 0xE7 or 0xEC <= opcode <= 0xEF or 0x6C <= opcode <= 0x6F


def _could_be_io(code: bytes) -> bool:
    for byte in code[:_MAX_LENGTH]:
        if _is_io(byte):
            return True
        if byte not in PREFIXES and byte & 0xF0 != 0x40:
            return False
    return False
