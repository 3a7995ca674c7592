"""A vCPU's wanted state, written through the ioctls that KVM has for it.

Everything is written and nothing is read back first: a GET_SREGS/SET_SREGS round
trip alone changes what KVM measures (segment types come back as "accessed").
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from kvmlaunch.abi.vmsa import Segment, Vmsa
from kvmlaunch.errors import MissingCapability
from kvmlaunch.kvm.system import CpuidLeaf
from kvmlaunch.kvm.vcpu import Vcpu

__all__ = ["apply_state"]

# APM volume 2, table A-1.
_MSRS = {
    0x277: "g_pat",
    0xDA0: "xss",
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0x1D9: "dbgctl",
    0xC0000081: "star",
    0xC0000082: "lstar",
    0xC0000083: "cstar",
    0xC0000084: "sfmask",
    0xC0000102: "kernel_gs_base",
}
_ALWAYS_WRITTEN = {0x277}

_EFER_SVME = 0x1000
_APIC_BASE = 0xFEE00800
_APIC_BASE_BSP = 0x100

# Standard XSAVE format (APM volume 4, "XSAVE format"): FXSAVE image, header, components.
_XSTATE_BV = 512
_YMM_OFFSET = 576
_X87, _SSE, _YMM, _PKRU = 1 << 0, 1 << 1, 1 << 2, 1 << 9
_CPUID_XSTATE = 0xD
_PKRU_COMPONENT = 9


def apply_state(vcpu: Vcpu, state: Vmsa, cpuid: Sequence[CpuidLeaf], *, bsp: bool) -> None:
    """Give ``vcpu`` the CPUID table and the registers of ``state``.

    Issues KVM_SET_CPUID2, SET_SREGS, SET_REGS, SET_XCRS, SET_XSAVE, SET_DEBUGREGS
    and SET_MSRS. Fields of ``state`` that no ioctl carries are left alone (see
    :func:`kvmlaunch.abi.kvm_sync.not_carried`). Raises IoctlError, and
    MissingCapability where KVM took not all MSRs.
    """
    # First, since the C-bit in CR3 and bits of XCR0 are valid only with their CPUID.
    vcpu.set_cpuid(cpuid)
    vcpu.set_sregs(_sregs(state, bsp=bsp))
    vcpu.set_regs({name: getattr(state, name) for name in _REGS})
    # KVM refuses a value without x87; the reset value, which has it, stays.
    if state.xcr0 & _X87:
        vcpu.set_xcr0(state.xcr0)
    vcpu.set_xsave(_xsave(state, cpuid))
    vcpu.set_debugregs(
        {
            "db": [state.dr0, state.dr1, state.dr2, state.dr3],
            "dr6": state.dr6,
            "dr7": state.dr7,
        }
    )
    _set_msrs(vcpu, state)


_REGS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12"),
    *("r13", "r14", "r15", "rip", "rflags"),
)


def _sregs(state: Vmsa, *, bsp: bool) -> dict[str, Any]:
    sregs: dict[str, Any] = {
        name: _segment(getattr(state, name)) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr")
    }
    sregs["ldt"] = _segment(state.ldtr)
    sregs["gdt"] = {"base": state.gdtr.base, "limit": state.gdtr.limit & 0xFFFF}
    sregs["idt"] = {"base": state.idtr.base, "limit": state.idtr.limit & 0xFFFF}
    for name in ("cr0", "cr2", "cr3", "cr4"):
        sregs[name] = getattr(state, name)
    # KVM adds SVME by itself and would refuse it from a guest without SVM.
    sregs["efer"] = state.efer & ~_EFER_SVME
    sregs["apic_base"] = _APIC_BASE | (_APIC_BASE_BSP if bsp else 0)
    return sregs


def _segment(segment: Segment) -> dict[str, int]:
    """VMCB attributes (type, S, DPL, P, AVL, L, D/B, G from bit 0 up) as struct kvm_segment."""
    attrib = segment.attrib
    present = attrib >> 7 & 1
    return {
        "base": segment.base,
        "limit": segment.limit,
        "selector": segment.selector,
        "type": attrib & 0xF,
        "s": attrib >> 4 & 1,
        "dpl": attrib >> 5 & 3,
        "present": present,
        "avl": attrib >> 8 & 1,
        "l": attrib >> 9 & 1,
        "db": attrib >> 10 & 1,
        "g": attrib >> 11 & 1,
        "unusable": 1 - present,
    }


def _xsave(state: Vmsa, cpuid: Sequence[CpuidLeaf]) -> bytes:
    area = bytearray(4096)
    struct.pack_into(
        "<HHBxHQQI",
        area,
        0,
        state.x87_fcw,
        state.x87_fsw,
        state.x87_ftw & 0xFF,
        state.x87_fop,
        state.x87_rip,
        state.x87_dp,
        state.mxcsr,
    )
    # The VMSA keeps the registers' low 8 bytes first and their high 2 bytes behind.
    for index in range(8):
        at = 32 + index * 16
        area[at : at + 8] = state.fpreg_x87[index * 8 : index * 8 + 8]
        area[at + 8 : at + 10] = state.fpreg_x87[64 + index * 2 : 66 + index * 2]
    area[160:416] = state.fpreg_xmm
    components = _X87 | _SSE
    if any(state.fpreg_ymm):
        area[_YMM_OFFSET : _YMM_OFFSET + 256] = state.fpreg_ymm
        components |= _YMM
    if state.pkru:
        struct.pack_into("<I", area, _pkru_offset(cpuid), state.pkru)
        components |= _PKRU
    struct.pack_into("<Q", area, _XSTATE_BV, components)
    return bytes(area)


def _pkru_offset(cpuid: Sequence[CpuidLeaf]) -> int:
    for leaf in cpuid:
        if leaf["function"] == _CPUID_XSTATE and leaf["index"] == _PKRU_COMPONENT and leaf["eax"]:
            return leaf["ebx"]
    raise MissingCapability("PKRU in CPUID leaf 0xd", "a vCPU state with PKRU set")


def _set_msrs(vcpu: Vcpu, state: Vmsa) -> None:
    values = {
        index: getattr(state, name)
        for index, name in _MSRS.items()
        if index in _ALWAYS_WRITTEN or getattr(state, name)
    }
    done = vcpu.set_msrs(values)
    if done < len(values):
        index = list(values)[done]
        raise MissingCapability(f"MSR {index:#x} ({_MSRS[index]})", "the vCPU state of this plan")
