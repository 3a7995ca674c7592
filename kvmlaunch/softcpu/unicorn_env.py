"""The CPU state inside unicorn 2.1 (QEMU 5.0's CPUX86State), as `uc_context_save` copies it.

unicorn's register calls don't reach hidden segment state, the CPL or the error code, but its
saved context is this structure. `unicorn_engine` checks the layout before it relies on it.

Source: unicorn 2.1, qemu/target/i386/cpu.h, up to end_reset_fields.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64

__all__ = [
    "CONTEXT_HEADER",
    "Block",
    "Env",
    "SegmentCache",
    "TlbEntry",
    "control_page",
    "set_msr_intercepts",
]

CONTEXT_HEADER = 40
"""Bytes of a uc_context before the state."""

_MAP_AT = 0x1000
_MSRPM_FIELD = 0x48  # VMCB: msrpm_base_pa
# FS, GS, kernel GS base, STAR, LSTAR, CSTAR, SFMASK: not intercepted.
_NATIVE_MSRS = (*range(0xC0000081, 0xC0000085), *range(0xC0000100, 0xC0000103))


class SegmentCache(ctypes.Structure):
    """One segment register. `flags` are bits 8-23 of the descriptor's upper half, in place."""

    _fields_ = (
        ("selector", c_uint32),
        ("base", c_uint64),
        ("limit", c_uint32),
        ("flags", c_uint32),
    )


class Env(ctypes.Structure):
    """CPUX86State; `_x_` fields are of no use here."""

    _fields_ = (
        ("gpr", c_uint64 * 16),
        ("rip", c_uint64),
        ("eflags", c_uint64),
        ("cc_dst", c_uint64),
        ("cc_src", c_uint64),
        ("cc_src2", c_uint64),
        ("cc_op", c_uint32),
        ("df", c_int32),
        ("hflags", c_uint32),
        ("hflags2", c_uint32),
        ("segments", SegmentCache * 10),  # ES CS SS DS FS GS LDTR TR GDTR IDTR
        ("cr", c_uint64 * 9),
        ("a20_mask", c_int32),
        ("_x_bounds", c_uint64 * 11),
        ("efer", c_uint64),
        ("_x_start_init", c_int32),
        ("fpstt", c_uint32),
        ("fpus", c_uint16),
        ("fpuc", c_uint16),
        ("fptags", c_uint8 * 8),
        ("_x_align_fpregs", c_uint8 * 4),
        ("fpregs", c_uint8 * 16 * 8),
        ("fpop", c_uint16),
        ("fpcs", c_uint16),
        ("fpds", c_uint16),
        ("fpip", c_uint64),
        ("fpdp", c_uint64),
        ("_x_fp_status", c_uint64),
        ("_x_ft0", c_uint64 * 2),
        ("_x_mmx_sse_status", c_uint64 * 2),
        ("mxcsr", c_uint32),
        ("xmm", c_uint64 * 8 * 32),
        ("_x_vectors", c_uint64 * (8 + 1 + 2 * 16 + 8 + 4 * 16 + 8 * 16)),
        ("sysenter_cs", c_uint32),
        ("sysenter_esp", c_uint64),
        ("sysenter_eip", c_uint64),
        ("star", c_uint64),
        ("_x_vm_hsave", c_uint64),
        ("lstar", c_uint64),
        ("cstar", c_uint64),
        ("sfmask", c_uint64),
        ("kernel_gs_base", c_uint64),
        ("_x_tsc", c_uint64 * 3),
        ("tsc_aux", c_uint64),
        ("xcr0", c_uint64),
        ("_x_mcg_misc", c_uint64 * 3),
        ("_x_counters", c_uint64 * (4 + 3 + 18 + 18)),
        ("g_pat", c_uint64),
        ("_x_smbase", c_uint32),
        ("_x_smi_count", c_uint64),
        ("pkru", c_uint32),
        ("_x_tsx_ctrl", c_uint32),
        ("spec_ctrl", c_uint64),
        ("_x_virt_ssbd", c_uint64),
        ("_x_end_init", c_int32),
        ("_x_paravirtual", c_uint64 * 6),
        ("error_code", c_int32),
        ("exception_is_int", c_int32),
        ("_x_exception_next", c_uint64),
        ("dr", c_uint64 * 8),
        ("_x_breakpoints", c_uint64 * 4),
        ("old_exception", c_int32),
        ("vm_vmcb", c_uint64),
        ("_x_tsc_offset", c_uint64),
        ("intercept", c_uint64),
        ("intercept_cr_read", c_uint16),
        ("intercept_cr_write", c_uint16),
        ("intercept_dr_read", c_uint16),
        ("intercept_dr_write", c_uint16),
        ("intercept_exceptions", c_uint32),
        ("_x_nested_cr3", c_uint64),
        ("_x_nested_mode", c_uint32),
        ("_x_v_tpr", c_uint8),
        ("_x_retaddr", c_uint64),
    )


class TlbEntry(ctypes.Structure):
    """uc_tlb_entry."""

    _fields_ = (("address", ctypes.c_uint64), ("rights", ctypes.c_uint32))


class Block(ctypes.Structure):
    """uc_tb."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("count", ctypes.c_uint16),
        ("size", ctypes.c_uint16),
    )


def control_page() -> ctypes.Array[ctypes.c_char]:
    """A VMCB of which unicorn reads the address of the MSR permission map, and that map."""
    page = ctypes.create_string_buffer(0x3000)
    set_msr_intercepts(page, every=False)
    map_at = ctypes.addressof(page) + _MAP_AT
    ctypes.memmove(ctypes.addressof(page) + _MSRPM_FIELD, map_at.to_bytes(8, "little"), 8)
    return page


def set_msr_intercepts(page: ctypes.Array[ctypes.c_char], *, every: bool) -> None:
    """Let the guest have no MSR for itself, or those that the engine has."""
    bits = bytearray(b"\xff" * 0x2000)
    for index in () if every else _NATIVE_MSRS:
        bit = 2 * (0x2000 + index - 0xC0000000)
        bits[bit // 8] &= ~(3 << bit % 8)
    ctypes.memmove(ctypes.addressof(page) + _MAP_AT, bytes(bits), len(bits))
