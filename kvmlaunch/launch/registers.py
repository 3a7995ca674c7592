"""Registers of a vCPU by name, from whichever side shows them."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from kvmlaunch.abi.registers import GENERAL, SEGMENTS, SYSTEM
from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.kvm import Vcpu

__all__ = ["format_registers", "read_registers", "write_registers"]

_SREGS = tuple(name for name in SYSTEM if not name.endswith("_base"))
_FXSAVE = struct.Struct("<HHBxHQQI")
_X87, _XMM = 32, 160
"""Offsets in an FXSAVE image, 16 bytes for each register (APM volume 2, figure 11-9)."""
_ROWS = (
    ("rip", "rflags", "efer"),
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rbp", "rsp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
    ("cr0", "cr2", "cr3", "cr4"),
    SEGMENTS,
)


def read_registers(vcpu: Vcpu) -> dict[str, int]:
    """Registers by the ioctls of a vCPU whose state isn't encrypted. Raises IoctlError."""
    regs, sregs, area = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_xsave()
    found = {name: int(regs[name]) for name in GENERAL}
    found.update((name, int(sregs[name]["selector"])) for name in SEGMENTS)
    found.update(fs_base=int(sregs["fs"]["base"]), gs_base=int(sregs["gs"]["base"]))
    found.update((name, int(sregs[name])) for name in _SREGS)
    # Not KVM_GET_FPU, which leaves MXCSR out.
    fctrl, fstat, ftag, fop, rip, data, mxcsr = _FXSAVE.unpack_from(area)
    found.update(fctrl=fctrl, fstat=fstat, ftag=ftag, fop=fop, mxcsr=mxcsr)
    found.update(fioff=rip & 0xFFFFFFFF, fooff=data & 0xFFFFFFFF)
    for n in range(8):
        at = _X87 + 16 * n
        found[f"st{n}"] = int.from_bytes(area[at : at + 10], "little")
    for n in range(16):
        at = _XMM + 16 * n
        found[f"xmm{n}"] = int.from_bytes(area[at : at + 16], "little")
    return found


def write_registers(vcpu: Vcpu, values: Mapping[str, int]) -> bool:
    """Change registers by ioctl; False, and nothing is changed, for those that are only read."""
    known = {*GENERAL, *SYSTEM}
    if values.keys() - known:
        return False
    try:
        if values.keys() & set(SYSTEM):
            sregs = vcpu.get_sregs()
            for name in values.keys() & set(SYSTEM):
                if name.endswith("_base"):
                    sregs[name[:2]]["base"] = values[name]
                else:
                    sregs[name] = values[name]
            vcpu.set_sregs(sregs)
        if values.keys() & set(GENERAL):
            general = {name: values[name] for name in values.keys() & set(GENERAL)}
            vcpu.set_regs({**vcpu.get_regs(), **general})
    except KvmLaunchError:
        return False
    return True


def format_registers(vcpu: int, registers: Mapping[str, int]) -> list[str]:
    """Lines for people: what is needed to see where a guest got stuck."""
    lines = [f"registers of vCPU {vcpu}:"]
    for row in _ROWS:
        width = 4 if row is SEGMENTS else 16
        lines.append("  " + " ".join(f"{name:>6} {registers[name]:0{width}x}" for name in row))
    return lines
