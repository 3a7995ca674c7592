"""PVALIDATE, RMPADJUST and RMPQUERY.

Sources: AMD APM volume 3 for operands and return codes; Linux sev.h. GEN, to be checked against
the document: the order of the checks, that PVALIDATE above VMPL0 is #GP, and that permissions
can't be given that the caller lacks.
"""

from __future__ import annotations

from .core import Core
from .decode import Instruction
from .engine import READ, WRITE
from .events import FaultReason, NestedFault
from .faults import GP, PAGE_NOT_VALIDATED, UD, VC, GuestFault, HostFault
from .memory import Access, RmpEntry
from .pages import LARGE_PAGE

__all__ = ["FAIL_INPUT", "FAIL_PERMISSION", "FAIL_SIZEMISMATCH", "execute", "is_snp_instruction"]

FAIL_INPUT, FAIL_PERMISSION, FAIL_SIZEMISMATCH = 1, 2, 6
_ARITHMETIC, _CF, _ZF, _SF, _PF = 0x8D5, 1, 0x40, 0x80, 4
_PERMS = 0x1F
_VMSA = 1 << 16
_RAX, _RCX, _RDX = 0, 1, 2
_PVALIDATE, _RMPADJUST, _RMPQUERY = (0xF2, 0xFF), (0xF3, 0xFE), (0xF3, 0xFD)


def is_snp_instruction(instruction: Instruction) -> bool:
    """Whether it is one of the three."""
    if instruction.table != 0x0F or instruction.opcode != 0x01:
        return False
    return (instruction.repeat, instruction.modrm) in (_PVALIDATE, _RMPADJUST, _RMPQUERY)


def execute(core: Core, instruction: Instruction) -> None:
    """Execute one of the three.

    Raises:
        GuestFault, HostFault: it could not be executed.
    """
    state = core.state
    kind = (instruction.repeat, instruction.modrm)
    if not core.protected or (kind != _PVALIDATE and state.bits != 64):
        raise GuestFault(UD)
    if state.cpl:
        raise GuestFault(GP, 0)
    if kind == _PVALIDATE:
        _pvalidate(core)
    elif kind == _RMPADJUST:
        _rmpadjust(core)
    else:
        _rmpquery(core)
    core.advance(instruction.length)


def _page(core: Core, size: int, kind: int) -> tuple[int, RmpEntry]:
    """Return GPA and entry of the private page at rAX."""
    state = core.state
    linear = state.gpr[_RAX]
    if state.bits != 64:
        linear = linear & 0xFFFFFFFF
    gpa, private = core.translate(linear & -size, kind)
    if not private:
        raise HostFault(NestedFault(gpa, Access(_NAMES[kind]), False, FaultReason.NOT_ASSIGNED))
    found = core.pages.memory.resolve(gpa, True)
    if not isinstance(found, int):
        raise HostFault(NestedFault(gpa, Access(_NAMES[kind]), True, FaultReason.ABSENT))
    return gpa, core.pages.entry(gpa, kind)


_NAMES = {READ: "read", WRITE: "write"}


def _finish(core: Core, code: int, *, carry: bool = False) -> None:
    """Set EAX and the flags: ZF, SF and PF by the code, CF as given."""
    state = core.state
    state.gpr[_RAX] = code
    flags = _CF if carry else 0
    flags |= _ZF if not code else 0
    flags |= _PF if code.bit_count() % 2 == 0 else 0
    state.rflags = state.rflags & ~_ARITHMETIC | flags


def _pvalidate(core: Core) -> None:
    state = core.state
    large, validate = state.gpr[_RCX] & 0xFFFFFFFF, state.gpr[_RDX] & 1
    if core.vmpl:
        raise GuestFault(GP, 0)
    if large > 1:
        _finish(core, FAIL_INPUT)
        return
    linear = state.gpr[_RAX]
    if large and linear & LARGE_PAGE - 1 & ~0xFFF:
        _finish(core, FAIL_INPUT)
        return
    gpa, entry = _page(core, LARGE_PAGE if large else 0x1000, WRITE)
    if large != entry.page_size:
        _finish(core, FAIL_SIZEMISMATCH)
        return
    unchanged = entry.validated == bool(validate)
    if not unchanged:
        core.pages.memory.rmp_update(gpa, validated=bool(validate))
        core.flush()
    _finish(core, 0, carry=unchanged)


def _rmpadjust(core: Core) -> None:
    state = core.state
    large, attributes = state.gpr[_RCX] & (1 << 64) - 1, state.gpr[_RDX]
    target, perms = attributes & 0xFF, attributes >> 8 & 0xFF
    if large > 1 or target > 3 or perms & ~_PERMS or attributes >> 17:
        _finish(core, FAIL_INPUT)
        return
    if target <= core.vmpl:
        _finish(core, FAIL_PERMISSION)
        return
    if large and state.gpr[_RAX] & LARGE_PAGE - 1 & ~0xFFF:
        _finish(core, FAIL_INPUT)
        return
    gpa, entry = _page(core, LARGE_PAGE if large else 0x1000, WRITE)
    if large != entry.page_size:
        _finish(core, FAIL_SIZEMISMATCH)
        return
    if not entry.validated:
        raise GuestFault(VC, PAGE_NOT_VALIDATED)
    vmsa = bool(attributes & _VMSA)
    lacks = perms & ~entry.perms[core.vmpl] & 0xF
    if lacks or (vmsa != entry.vmsa and core.vmpl):
        _finish(core, FAIL_PERMISSION)
        return
    new = list(entry.perms)
    new[target] = perms
    core.pages.memory.rmp_update(gpa, vmsa=vmsa, perms=(new[0], new[1], new[2], new[3]))
    core.flush()
    _finish(core, 0)


def _rmpquery(core: Core) -> None:
    state = core.state
    target = state.gpr[_RDX] & 0xFF
    if target > 3:
        _finish(core, FAIL_INPUT)
        return
    if target <= core.vmpl:
        _finish(core, FAIL_PERMISSION)
        return
    _, entry = _page(core, 0x1000, READ)
    state.gpr[_RDX] = target | entry.perms[target] << 8 | (_VMSA if entry.vmsa else 0)
    state.gpr[_RCX] = entry.page_size
    _finish(core, 0)
