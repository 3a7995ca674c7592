"""Instructions on control registers, TR and DR7, SYSCALL and SYSENTER.

The engine would accept what the architecture refuses here (or do nothing at all), so they are
emulated. Sources: AMD APM volume 2, 3.1 (control registers), 4.6 and 6.1; volume 3.
"""

from __future__ import annotations

from .core import VM86, Core, Descriptor, parse_descriptor
from .engine import CS, GDTR, SS, TR
from .faults import GP, NP, UD, GuestFault
from .operand import load_operand

__all__ = [
    "CR4_SUPPORTED",
    "load_task_register",
    "read_debug",
    "syscall",
    "sysenter",
    "write_control",
    "write_cr0",
    "write_cr4",
    "write_debug",
    "write_xcr0",
]

_PE, _NW, _CD, _PG = 1 << 0, 1 << 29, 1 << 30, 1 << 31
_CR0_WRITABLE = 0xE005003F
_CR0_FLUSHES = _PG | _PE | 1 << 16
_PAE, _LA57, _PCIDE = 1 << 5, 1 << 12, 1 << 17
# VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT UMIP FSGSBASE PCIDE OSXSAVE SMEP SMAP:
# what the engine can do. Not LA57, protection keys, CET.
CR4_SUPPORTED = 0x00370FFF
_CR4_FLUSHES = 0x003000B0
_LME, _LMA = 1 << 8, 1 << 10
_X87, _SSE, _AVX, _BOUNDS, _AVX512, _TILE = 1 << 0, 1 << 1, 1 << 2, 3 << 3, 7 << 5, 3 << 17
_RAX, _RCX, _RDX = 0, 1, 2
_IF, _RF = 1 << 9, 1 << 16
_FLAT = 0xFFFFFFFF


def write_cr0(core: Core, value: int) -> None:
    """MOV to CR0, with its checks and the changes of mode.

    Raises:
        GuestFault: #GP.
    """
    state = core.state
    old, cs = state.cr[0], state.attrib(CS)
    enters = value & _PG and not old & _PG
    leaves = old & _PG and not value & _PG
    if (
        value >> 32
        or (value & _PG and not value & _PE)
        or (value & _NW and not value & _CD)
        or (enters and state.efer & _LME and (not state.cr[4] & _PAE or cs & 0x200))
        or (leaves and (state.bits == 64 or state.cr[4] & _PCIDE))
    ):
        raise GuestFault(GP, 0)
    state.set_cr0(value & _CR0_WRITABLE)
    if (old ^ value) & _CR0_FLUSHES:
        core.engine.flush_tlb()


def write_cr4(core: Core, value: int) -> None:
    """MOV to CR4.

    Raises:
        GuestFault: #GP.
    """
    state = core.state
    old = state.cr[4]
    changed = old ^ value
    if (
        value & ~CR4_SUPPORTED
        or (core.long and changed & _PAE)
        or (changed & value & _PCIDE and not core.long)
    ):
        raise GuestFault(GP, 0)
    state.set_cr4(value)
    if changed & _CR4_FLUSHES:
        core.engine.flush_tlb()


def write_control(core: Core, number: int) -> None:
    """MOV to CR0 or CR4, CLTS and LMSW."""
    code = core.code()
    instruction = core.instruction()
    if instruction is None:
        raise GuestFault(GP, 0)
    old = core.state.cr[0]
    if instruction.table == 0x0F and instruction.opcode == 0x06:
        value = old & ~8
    elif instruction.table == 0x0F and instruction.opcode == 0x01:
        status = load_operand(core, instruction, code, 2) & 0xF
        value = (old & ~0xE) | status  # PE can be set this way, not cleared
    else:
        value = core.state.gpr[instruction.rm]
        value &= (1 << 64) - 1 if core.state.bits == 64 else 0xFFFFFFFF
    length = instruction.length
    # In 32-bit code RIP stays 32 bits wide when long mode begins, so go on first.
    rip = core.state.rip
    core.advance(length)
    try:
        if number == 0:
            write_cr0(core, value)
        else:
            write_cr4(core, value)
    except GuestFault:
        core.state.rip = rip
        raise


def write_xcr0(core: Core) -> None:
    """XSETBV of components that CPUID has and the engine lacks (it takes x87, SSE and AVX itself).

    They enable nothing, and XSAVE keeps none of them where CPUID says.

    Raises:
        GuestFault: #GP (__kvm_set_xcr() of Linux).
    """
    state, instruction = core.state, core.instruction()
    low, high = state.gpr[_RAX] & 0xFFFFFFFF, state.gpr[_RDX] & 0xFFFFFFFF
    value = high << 32 | low
    eax, _, _, edx = core.options.cpuid(0xD, 0)
    if (
        instruction is None
        or state.cpl
        or state.gpr[_RCX] & 0xFFFFFFFF
        or not value & _X87
        or value & ~(eax | edx << 32 | _X87)
        or (value & _AVX and not value & _SSE)
        or (value & _AVX512 and not value & _AVX)
        or any(value & group not in (0, group) for group in (_BOUNDS, _AVX512, _TILE))
    ):
        raise GuestFault(GP, 0)
    state.put("xcr0", value)
    core.advance(instruction.length)


def read_debug(core: Core) -> None:
    """MOV from DR7."""
    instruction = core.instruction()
    if instruction is None:
        raise GuestFault(GP, 0)
    size = 8 if core.state.bits == 64 else 4
    core.set_gpr(instruction.rm, core.state.dr[7], size)
    core.advance(instruction.length)


def write_debug(core: Core) -> None:
    """MOV to DR7: stored; hardware breakpoints have no effect."""
    instruction = core.instruction()
    if instruction is None:
        raise GuestFault(GP, 0)
    value = core.state.gpr[instruction.rm]
    if core.state.bits != 64:
        value &= 0xFFFFFFFF
    if value >> 32:
        raise GuestFault(GP, 0)
    core.state.dr[7] = value & 0xFFFF2FFF | 0x400
    core.advance(instruction.length)


def load_task_register(core: Core) -> None:
    """LTR: the TSS must be an available one and becomes busy."""
    code, instruction = core.code(), core.instruction()
    if instruction is None:
        raise GuestFault(GP, 0)
    selector = load_operand(core, instruction, code, 2)
    error = selector & 0xFFFC
    if not error or selector & 4:
        raise GuestFault(GP, error)
    state = core.state
    low = core.descriptor(selector)
    high = 0
    if core.long:
        if (selector & 0xFFF8) + 15 > state.limit(GDTR):
            raise GuestFault(GP, error)
        high = core.load_int(state.base(GDTR) + (selector & 0xFFF8) + 8, 8)
        if high >> 40 & 0x1F:
            raise GuestFault(GP, error)
    kind = low >> 40 & 0x1F
    if kind not in ((9,) if core.long else (1, 9)):
        raise GuestFault(GP, error)
    if not low >> 47 & 1:
        raise GuestFault(NP, error)
    low |= 2 << 40  # busy
    core.store(state.base(GDTR) + (selector & 0xFFF8) + 5, bytes((low >> 40 & 0xFF,)))
    state.set_segment(TR, *parse_descriptor(selector, low, high & 0xFFFFFFFF))
    core.advance(instruction.length)


def _flat_code(selector: int, dpl: int, *, long: bool) -> Descriptor:
    return Descriptor(selector, 0x89B | dpl << 5 | (0x200 if long else 0x400), _FLAT, 0)


def _flat_stack(selector: int, dpl: int) -> Descriptor:
    return Descriptor(selector, 0xC93 | dpl << 5, _FLAT, 0)


def syscall(core: Core) -> None:
    """SYSCALL; RIP is behind it already."""
    state = core.state
    if not state.efer & 1:
        core.advance(-2)
        raise GuestFault(UD)
    star = state.get("star")
    selector = star >> 32 & 0xFFFC
    flags, rip = state.rflags, state.rip
    if core.long:
        target = state.get("lstar") if state.bits == 64 else state.get("cstar")
        state.gpr[1] = rip
        state.gpr[11] = flags
        flags &= ~(state.get("sfmask") | _RF)
    else:
        target = star & 0xFFFFFFFF
        state.gpr[1] = rip & 0xFFFFFFFF
        flags &= ~(VM86 | _IF | _RF)
    state.cpl = 0
    long = core.long
    state.set_segment(CS, *_flat_code(selector, 0, long=long))
    state.set_segment(SS, *_flat_stack(selector + 8 & 0xFFFF, 0))
    state.rflags = flags
    state.rip = target


def sysenter(core: Core) -> None:
    """SYSENTER in legacy mode (AMD has it nowhere else); RIP is behind it already."""
    state = core.state
    selector = state.get("sysenter_cs") & 0xFFFC
    if core.long or not state.cr[0] & 1 or not selector:
        core.advance(-2)
        raise GuestFault(UD) if core.long else GuestFault(GP, 0)
    state.cpl = 0
    state.set_segment(CS, *_flat_code(selector, 0, long=False))
    state.set_segment(SS, *_flat_stack(selector + 8 & 0xFFFF, 0))
    state.rflags = state.rflags & ~(VM86 | _IF | _RF)
    state.gpr[4] = state.get("sysenter_esp") & 0xFFFFFFFF
    state.rip = state.get("sysenter_eip") & 0xFFFFFFFF
