"""What sev_es_sync_vmsa() writes: the VMSA page of a vCPU from KVM's own state.

An independent model, made from the kernel's field list. It shares nothing with the
launcher's prediction, so that each can prove the other wrong.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmlaunch.sim.vmcb import SAVE_SIZE

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu_state import VcpuState

__all__ = ["VMSA_SIZE", "sync_vmsa"]

VMSA_SIZE = 4096

# struct sev_es_save_area: what isn't copied from the VMCB, field -> offset.
_REGISTERS = {
    "rax": 0x1F8,
    "rsp": 0x1D8,
    "rip": 0x178,
    "rcx": 0x308,
    "rdx": 0x310,
    "rbx": 0x318,
    "rbp": 0x328,
    "rsi": 0x330,
    "rdi": 0x338,
    **{f"r{n}": 0x340 + 8 * (n - 8) for n in range(8, 16)},
}
_XSS, _DR6, _PKRU, _SEV_FEATURES, _XCR0 = 0x140, 0x168, 0x2E8, 0x3B0, 0x3E8
_X87_DP, _MXCSR, _X87_RIP, _ST, _XMM, _YMM = 0x400, 0x408, 0x418, 0x420, 0x470, 0x570
_FTW, _FSW, _FCW, _FOP = 0x40C, 0x40E, 0x410, 0x412


def sync_vmsa(state: VcpuState, sev_features: int) -> bytes:
    """The 4096 bytes that KVM gives to firmware for this vCPU."""
    page = bytearray(VMSA_SIZE)
    page[:SAVE_SIZE] = state.vmcb.save
    for name, offset in _REGISTERS.items():
        _put64(page, offset, state.regs[name])
    _put64(page, _XCR0, state.xcr0)
    struct.pack_into("<I", page, _PKRU, state.fpu.pkru)
    _put64(page, _XSS, state.xss)
    _put64(page, _DR6, state.dr6)
    _put64(page, _SEV_FEATURES, sev_features)
    _put_fpu(page, state.fpu.legacy, state.fpu.ymm_high)
    return bytes(page)


def _put_fpu(page: bytearray, fxsave: bytes, ymm_high: bytes) -> None:
    fcw, fsw, ftw, fop, rip, rdp, mxcsr = struct.unpack_from("<HHBxHQQI", fxsave)
    _put64(page, _X87_DP, rdp)
    struct.pack_into("<I", page, _MXCSR, mxcsr)
    # The tag word stays in its abridged form, one bit per register.
    struct.pack_into("<H", page, _FTW, ftw)
    struct.pack_into("<H", page, _FSW, fsw)
    struct.pack_into("<H", page, _FCW, fcw)
    struct.pack_into("<H", page, _FOP, fop)
    _put64(page, _X87_RIP, rip)
    for n in range(8):
        register = fxsave[32 + 16 * n : 32 + 16 * n + 10]
        page[_ST + 8 * n : _ST + 8 * n + 8] = register[:8]
        page[_ST + 64 + 2 * n : _ST + 64 + 2 * n + 2] = register[8:]
    page[_XMM : _XMM + 256] = fxsave[160:416]
    page[_YMM : _YMM + 256] = ymm_high


def _put64(page: bytearray, offset: int, value: int) -> None:
    struct.pack_into("<Q", page, offset, value)
