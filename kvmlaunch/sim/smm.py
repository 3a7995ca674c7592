"""System management mode of plain guests (arch/x86/kvm/smm.c).

The state-save area has KVM's layout, which follows AMD's: the 64-bit one for guests whose CPUID
has long mode, else the 32-bit one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmlaunch.sim.cpuid_table import find_leaf

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu
    from kvmlaunch.sim.vcpu_state import VcpuState

__all__ = ["enter", "leave"]

_AREA, _AREA_SIZE, _ENTRY = 0xFE00, 512, 0x8000
_REVISION_64, _REVISION_32 = 0x00020064, 0x00020000
_NATURAL = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{n}" for n in range(8, 16)),
)
_CODE_AND_DATA = ("es", "cs", "ss", "ds", "fs", "gs")

# Offsets in the area (struct kvm_smram_state_64 and _32).
_SEGMENTS_64 = {name: 0x10 * n for n, name in enumerate(_CODE_AND_DATA)} | {"ldt": 0x70, "tr": 0x90}
_TABLES_64 = {"gdt": 0x60, "idt": 0x80}
_SHADOW_64, _EFER_64, _REVISION_AT_64, _SMBASE_64, _GPRS_64 = 0xCB, 0xD0, 0xFC, 0x100, 0x180
_WORDS_64: Mapping[str, int] = MappingProxyType(
    {"cr4": 0x148, "cr3": 0x150, "cr0": 0x158, "dr7": 0x160, "dr6": 0x168}
    | {"rflags": 0x170, "rip": 0x178}
)
_SEGMENTS_32 = {"ds": 0x12C, "fs": 0x138, "gs": 0x144, "tr": 0x15C, "ldt": 0x178}
_SEGMENTS_32 |= {"es": 0x184, "cs": 0x190, "ss": 0x19C}
_TABLES_32 = {"idt": 0x150, "gdt": 0x16C}
_SELECTORS_32 = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")
_SELECTORS_AT_32, _GPRS_32, _SHADOW_32 = 0x1A8, 0x1D0, 0x11A
_REVISION_AT_32, _SMBASE_32 = 0xFC, 0xF8
_WORDS_32: Mapping[str, int] = MappingProxyType(
    {"cr4": 0x114, "dr7": 0x1C8, "dr6": 0x1CC, "rip": 0x1F0, "rflags": 0x1F4}
    | {"cr3": 0x1F8, "cr0": 0x1FC}
)

_FLAT = {"base": 0, "limit": 0xFFFFFFFF, "selector": 0, "type": 3, "present": 1, "dpl": 0}
_FLAT |= {"db": 0, "s": 1, "l": 0, "g": 1, "avl": 0, "unusable": 0}
# Fields of a segment in the area's flags, by their lowest bit (rsm_set_desc_flags()).
_FLAGS = {"g": 23, "db": 22, "l": 21, "avl": 20, "present": 15, "dpl": 13, "s": 12, "type": 8}
_WIDTHS = {"dpl": 3, "type": 15}
_CR0_PE, _CR0_EM, _CR0_TS, _CR0_PG = 1 << 0, 1 << 2, 1 << 3, 1 << 31
_EFER_LMA = 1 << 10
_RFLAGS_FIXED, _DR7_FIXED = 1 << 1, 0x400
_SHADOW = 3  # of MOV SS and STI


def enter(vcpu: Vcpu) -> None:
    """enter_smm(): save the state and begin at SMBASE + 0x8000. The VM dies if that fails."""
    vcpu.pull_state()
    long = _has_long_mode(vcpu)
    area = _save_64(vcpu) if long else _save_32(vcpu)
    vcpu.set_smm(True)
    try:
        vcpu.vm.memory.write(vcpu.smbase + _AREA, area)
    except OSError:
        vcpu.vm.dead = True
        return
    running, state = vcpu.running, vcpu.state
    vcpu.smm_inside_nmi, running.nmi_blocked = running.nmi_blocked, True
    running.shadow = False
    state.vmcb["rflags"] = _RFLAGS_FIXED
    state.regs["rip"] = _ENTRY
    state.set_cr0(state.cr0 & ~(_CR0_PE | _CR0_EM | _CR0_TS | _CR0_PG))
    state.set_cr4(0)
    state.vmcb.set_table("idt", 0, 0)
    state.set_debugregs(state.db, state.dr6, _DR7_FIXED)
    code = {**_FLAT, "selector": vcpu.smbase >> 4 & 0xFFFF, "base": vcpu.smbase}
    for name in _CODE_AND_DATA:
        state.vmcb.set_kvm_segment(name, code if name == "cs" else _FLAT)
    if long:
        state.set_efer(0)
    running.unload()


def leave(vcpu: Vcpu) -> bool:
    """emulator_leave_smm(): False where the saved state can't be, which is a triple fault."""
    vcpu.pull_state()
    try:
        area = vcpu.vm.memory.read(vcpu.smbase + _AREA, _AREA_SIZE)
    except OSError:
        return False
    running = vcpu.running
    if not vcpu.smm_inside_nmi:
        running.nmi_blocked = False
    vcpu.set_smm(False)
    done = _load_64(vcpu, area) if _has_long_mode(vcpu) else _load_32(vcpu, area)
    running.unload()
    return done


def _has_long_mode(vcpu: Vcpu) -> bool:
    leaf = find_leaf(vcpu.cpuid, 0x80000001)
    return leaf is not None and bool(leaf.edx >> 29 & 1)


def _flags(segment: dict[str, int]) -> int:
    return sum(segment[name] << bit for name, bit in _FLAGS.items())


def _segment(selector: int, flags: int, limit: int, base: int) -> dict[str, int]:
    found = {name: flags >> bit & _WIDTHS.get(name, 1) for name, bit in _FLAGS.items()}
    place = {"selector": selector, "limit": limit, "base": base}
    return {**found, **place, "unusable": 1 - found["present"]}


def _words(state: VcpuState) -> dict[str, int]:
    return {
        "cr0": state.cr0,
        "cr3": state.cr3,
        "cr4": state.cr4,
        "dr6": state.dr6,
        "dr7": state.dr7,
        "rflags": state.vmcb["rflags"],
        "rip": state.regs["rip"],
    }


def _save_64(vcpu: Vcpu) -> bytes:
    state, area = vcpu.state, bytearray(_AREA_SIZE)
    for n, name in enumerate(_NATURAL):
        struct.pack_into("<Q", area, _GPRS_64 + 8 * (15 - n), state.regs[name])
    words = _words(state)
    for name, at in _WORDS_64.items():
        struct.pack_into("<Q", area, at, words[name])
    for name, at in _SEGMENTS_64.items():
        segment = state.vmcb.get_kvm_segment(name)
        values = (segment["selector"], _flags(segment) >> 8, segment["limit"], segment["base"])
        struct.pack_into("<HHIQ", area, at, *values)
    for name, at in _TABLES_64.items():
        table = state.vmcb.segment(name)
        struct.pack_into("<HHIQ", area, at, 0, 0, table.limit & 0xFFFF, table.base)
    struct.pack_into("<Q", area, _EFER_64, state.efer)
    struct.pack_into("<I", area, _REVISION_AT_64, _REVISION_64)
    struct.pack_into("<I", area, _SMBASE_64, vcpu.smbase & 0xFFFFFFFF)
    area[_SHADOW_64] = _SHADOW if vcpu.running.shadow else 0
    return bytes(area)


def _load_64(vcpu: Vcpu, area: bytes) -> bool:
    state = vcpu.state
    words = {name: struct.unpack_from("<Q", area, at)[0] for name, at in _WORDS_64.items()}
    (efer,) = struct.unpack_from("<Q", area, _EFER_64)
    for n, name in enumerate(_NATURAL):
        (state.regs[name],) = struct.unpack_from("<Q", area, _GPRS_64 + 8 * (15 - n))
    (vcpu.smbase,) = struct.unpack_from("<I", area, _SMBASE_64)
    for name, at in _TABLES_64.items():
        _, _, limit, base = struct.unpack_from("<HHIQ", area, at)
        state.vmcb.set_table(name, limit & 0xFFFF, base)
    segments = {}
    for name, at in _SEGMENTS_64.items():
        selector, attributes, limit, base = struct.unpack_from("<HHIQ", area, at)
        segments[name] = _segment(selector, attributes << 8, limit, base)
    return _load(vcpu, words, efer, segments, area[_SHADOW_64])


def _save_32(vcpu: Vcpu) -> bytes:
    state, area = vcpu.state, bytearray(_AREA_SIZE)
    words = _words(state)
    for name, at in _WORDS_32.items():
        struct.pack_into("<I", area, at, words[name] & 0xFFFFFFFF)
    for n, name in enumerate(_NATURAL[:8]):
        struct.pack_into("<I", area, _GPRS_32 + 4 * n, state.regs[name] & 0xFFFFFFFF)
    for name, at in _SEGMENTS_32.items():
        segment = state.vmcb.get_kvm_segment(name)
        values = (_flags(segment), segment["limit"], segment["base"] & 0xFFFFFFFF)
        struct.pack_into("<III", area, at, *values)
        selector_at = _SELECTORS_AT_32 + 4 * _SELECTORS_32.index(name)
        struct.pack_into("<I", area, selector_at, segment["selector"])
    for name, at in _TABLES_32.items():
        table = state.vmcb.segment(name)
        struct.pack_into("<III", area, at, 0, table.limit & 0xFFFF, table.base & 0xFFFFFFFF)
    struct.pack_into("<I", area, _REVISION_AT_32, _REVISION_32)
    struct.pack_into("<I", area, _SMBASE_32, vcpu.smbase & 0xFFFFFFFF)
    area[_SHADOW_32] = _SHADOW if vcpu.running.shadow else 0
    return bytes(area)


def _load_32(vcpu: Vcpu, area: bytes) -> bool:
    state = vcpu.state
    words = {name: struct.unpack_from("<I", area, at)[0] for name, at in _WORDS_32.items()}
    for n, name in enumerate(_NATURAL[:8]):
        (state.regs[name],) = struct.unpack_from("<I", area, _GPRS_32 + 4 * n)
    (vcpu.smbase,) = struct.unpack_from("<I", area, _SMBASE_32)
    for name, at in _TABLES_32.items():
        _, limit, base = struct.unpack_from("<III", area, at)
        state.vmcb.set_table(name, limit & 0xFFFF, base)
    segments = {}
    for name, at in _SEGMENTS_32.items():
        flags, limit, base = struct.unpack_from("<III", area, at)
        selector_at = _SELECTORS_AT_32 + 4 * _SELECTORS_32.index(name)
        (selector,) = struct.unpack_from("<I", area, selector_at)
        segments[name] = _segment(selector & 0xFFFF, flags, limit, base)
    # EFER isn't in this area: it is what it was.
    return _load(vcpu, words, state.efer, segments, area[_SHADOW_32])


def _load(
    vcpu: Vcpu, words: dict[str, int], efer: int, segments: dict[str, dict[str, int]], shadow: int
) -> bool:
    """What both layouts have; False where KVM refuses a register."""
    state = vcpu.state
    state.regs["rip"] = words["rip"]
    state.vmcb["rflags"] = words["rflags"] | _RFLAGS_FIXED
    if not state.set_debugregs(state.db, words["dr6"], words["dr7"]):
        return False
    long_mode = efer & _EFER_LMA
    cr0, cr3, cr4 = words["cr0"], words["cr3"], words["cr4"]
    if not state.sregs_valid(cr0, cr3, cr4, efer, segments["cs"]["l"] if long_mode else 0):
        return False
    state.set_cr3(cr3)
    state.set_efer(efer)
    state.set_cr0(cr0)
    state.set_cr4(cr4)
    state.set_segments(segments)
    vcpu.running.shadow = bool(shadow)
    return True
