"""Names of the registers that a debugger shows, all of them plain numbers.

``flat`` makes them of a VMSA, from which every other form in this package comes.
"""

from __future__ import annotations

from .vmsa import Vmsa

__all__ = ["GENERAL", "SEGMENTS", "SYSTEM", "flat"]

GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{n}" for n in range(8, 16)),
    *("rip", "rflags"),
)
SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
"""Selectors."""
SYSTEM = ("fs_base", "gs_base", "cr0", "cr2", "cr3", "cr4", "efer")


def flat(vmsa: Vmsa) -> dict[str, int]:
    """General registers, selectors, bases, control registers, EFER, x87 and SSE."""
    found = {name: int(getattr(vmsa, name)) for name in GENERAL}
    found.update((name, getattr(vmsa, name).selector) for name in SEGMENTS)
    found.update(fs_base=vmsa.fs.base, gs_base=vmsa.gs.base)
    found.update((name, int(getattr(vmsa, name))) for name in SYSTEM if name not in found)
    found.update(
        fctrl=vmsa.x87_fcw,
        fstat=vmsa.x87_fsw,
        ftag=vmsa.x87_ftw,
        fop=vmsa.x87_fop,
        fioff=vmsa.x87_rip & 0xFFFFFFFF,
        fooff=vmsa.x87_dp & 0xFFFFFFFF,
        mxcsr=vmsa.mxcsr,
    )
    # The VMSA keeps the low 8 bytes of all x87 registers first, their high 2 bytes behind.
    low, high = vmsa.fpreg_x87[:64], vmsa.fpreg_x87[64:]
    for n in range(8):
        value = low[8 * n : 8 * n + 8] + high[2 * n : 2 * n + 2]
        found[f"st{n}"] = int.from_bytes(value, "little")
    for n in range(16):
        found[f"xmm{n}"] = int.from_bytes(vmsa.fpreg_xmm[16 * n : 16 * n + 16], "little")
    return found
