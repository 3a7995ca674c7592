"""Registers of one CPU in unicorn's form."""

from __future__ import annotations

import ctypes
from collections.abc import MutableSequence
from typing import Protocol

from kvmlaunch.abi.segment import Segment

from .engine import CS, DS, ES, SS, TR, WORD_NAMES
from .unicorn_env import Env

__all__ = ["UnicornState"]

# hflags: QEMU 5.0, target/i386/cpu.h, HF_*.
_CPL = 0x3
_INHIBIT_IRQ = 1 << 3
_CS32, _SS32, _ADDSEG, _PE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
_LMA, _CS64 = 1 << 14, 1 << 15
_SVME, _GUEST, _OSFXSR, _SMAP = 1 << 20, 1 << 21, 1 << 22, 1 << 23
_ALWAYS = _GUEST  # intercepts are active

_VM = 1 << 17

_BUSY = 2
"""Type bit of a TSS in use: always set in TR, but QEMU has it the other way round inside."""
_DR7, _EVERY_DR = 1 << 7, 0xFF
_IRET_BIT = 1 << (0x74 - 0x60)
_WORDS = frozenset(WORD_NAMES)


class Helper(Protocol):
    """What the state needs of its engine."""

    def load_fpu_control(self, state: UnicornState, mxcsr: int, fcw: int) -> None: ...


class UnicornState:
    """`EngineState` over a saved context at a host address."""

    def __init__(self, address: int, helper: Helper) -> None:
        env = self.env = Env.from_address(address)
        self._helper = helper
        self._segments = list(env.segments)
        self.gpr: MutableSequence[int] = env.gpr
        self.cr: MutableSequence[int] = env.cr
        self.dr: MutableSequence[int] = env.dr

    @property
    def rip(self) -> int:
        """RIP, relative to CS."""
        return int(self.env.rip)

    @rip.setter
    def rip(self, value: int) -> None:
        self.env.rip = value

    @property
    def rflags(self) -> int:
        """RFLAGS; during `fill` without the arithmetic flags and DF, which QEMU keeps elsewhere."""
        return int(self.env.eflags)

    @rflags.setter
    def rflags(self, value: int) -> None:
        env = self.env
        changed = (env.eflags ^ value) & _VM
        env.eflags = value | 2
        if changed:
            self._refresh()

    @property
    def efer(self) -> int:
        """EFER."""
        return int(self.env.efer)

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return int(self.env.hflags & _CPL)

    @cpl.setter
    def cpl(self, value: int) -> None:
        self.env.hflags = (self.env.hflags & ~_CPL) | value

    @property
    def bits(self) -> int:
        """Size of the code segment: 16, 32 or 64."""
        flags = self.env.hflags
        return 64 if flags & _CS64 else 32 if flags & _CS32 else 16

    @property
    def shadow(self) -> bool:
        """Interrupt shadow."""
        return bool(self.env.hflags & _INHIBIT_IRQ)

    @shadow.setter
    def shadow(self, value: bool) -> None:
        if value:
            self.env.hflags |= _INHIBIT_IRQ
        else:
            self.env.hflags &= ~_INHIBIT_IRQ

    @property
    def error_code(self) -> int:
        """Error code of the exception that was intercepted last."""
        return int(self.env.error_code & 0xFFFFFFFF)

    @property
    def catch_iret(self) -> bool:
        """Whether IRET stops the engine."""
        return bool(self.env.intercept & _IRET_BIT)

    @catch_iret.setter
    def catch_iret(self, value: bool) -> None:
        if value:
            self.env.intercept |= _IRET_BIT
        else:
            self.env.intercept &= ~_IRET_BIT

    @property
    def catch_debug_registers(self) -> bool:
        """Whether MOV of each debug register stops the engine."""
        return bool(self.env.intercept_dr_read == _EVERY_DR)

    @catch_debug_registers.setter
    def catch_debug_registers(self, value: bool) -> None:
        mask = _EVERY_DR if value else _DR7
        self.env.intercept_dr_read = self.env.intercept_dr_write = mask

    def base(self, number: int) -> int:
        """Base of a segment or table register."""
        return int(self._segments[number].base)

    def limit(self, number: int) -> int:
        """Limit of a segment or table register."""
        return int(self._segments[number].limit)

    def selector(self, number: int) -> int:
        """Selector of a segment register."""
        return int(self._segments[number].selector & 0xFFFF)

    def attrib(self, number: int) -> int:
        """Attributes of a segment register."""
        flags = self._segments[number].flags
        attrib = int((flags >> 8 & 0xFF) | (flags >> 12 & 0xF00))
        return attrib | _BUSY if number == TR else attrib

    def segment(self, number: int) -> Segment:
        """Return a segment or table register."""
        s = self._segments[number]
        return Segment(s.selector & 0xFFFF, self.attrib(number), s.limit, s.base)

    def set_segment(self, number: int, selector: int, attrib: int, limit: int, base: int) -> None:
        """Load a segment or table register."""
        if number == TR:
            attrib &= ~_BUSY
        s = self._segments[number]
        s.selector, s.base, s.limit = selector, base, limit
        s.flags = (attrib & 0xFF) << 8 | (attrib & 0xF00) << 12
        self._refresh()

    def set_cr0(self, value: int) -> None:
        """Change CR0; with EFER.LME it enters and leaves long mode."""
        env = self.env
        paging, was = value >> 31 & 1, env.cr[0] >> 31 & 1
        if paging and not was and env.efer & 0x100:
            env.efer |= 0x400
        elif was and not paging:
            env.efer &= ~0x400
        env.cr[0] = value | 0x10
        self._refresh()

    def set_cr4(self, value: int) -> None:
        """Change CR4."""
        self.env.cr[4] = value
        self._refresh()

    def set_efer(self, value: int) -> None:
        """Change EFER."""
        self.env.efer = value
        self._refresh()

    def get(self, name: str) -> int:
        """Return an MSR by its name in the VMSA."""
        assert name in _WORDS
        return int(getattr(self.env, name))

    def put(self, name: str, value: int) -> None:
        """Change an MSR by its name in the VMSA."""
        assert name in _WORDS
        setattr(self.env, name, value)

    def get_fpu(self) -> dict[str, int | bytes]:
        """Return x87 and SSE registers as fields of a VMSA; the tag word is the full one."""
        env = self.env
        stack = [bytes(env.fpregs[(env.fpstt + n) & 7]) for n in range(8)]
        tags = sum((3 if env.fptags[n] else 0) << 2 * n for n in range(8))
        return {
            "mxcsr": env.mxcsr,
            "x87_ftw": tags,
            "x87_fsw": (env.fpus & ~0x3800) | (env.fpstt & 7) << 11,
            "x87_fcw": env.fpuc,
            "x87_fop": env.fpop,
            "x87_cs": env.fpcs,
            "x87_ds": env.fpds,
            "x87_rip": env.fpip,
            "x87_dp": env.fpdp,
            "fpreg_x87": b"".join(r[:8] for r in stack) + b"".join(r[8:10] for r in stack),
            "fpreg_xmm": b"".join(bytes(env.xmm[n])[:16] for n in range(16)),
        }

    def put_fpu(self, fields: dict[str, int | bytes]) -> None:
        """Load what `get_fpu` returns."""
        env = self.env
        status, tags = fields["x87_fsw"], fields["x87_ftw"]
        x87, xmm = fields["fpreg_x87"], fields["fpreg_xmm"]
        assert isinstance(status, int)
        assert isinstance(tags, int)
        assert isinstance(x87, bytes)
        assert isinstance(xmm, bytes)
        env.fpus, env.fpstt = status & ~0x3800, status >> 11 & 7
        env.fpop, env.fpcs, env.fpds = fields["x87_fop"], fields["x87_cs"], fields["x87_ds"]
        env.fpip, env.fpdp = fields["x87_rip"], fields["x87_dp"]
        for n in range(8):
            env.fptags[n] = (tags >> 2 * n & 3) == 3
            value = x87[8 * n : 8 * n + 8] + x87[64 + 2 * n : 66 + 2 * n]
            ctypes.memmove(env.fpregs[(env.fpstt + n) & 7], value, 10)
        for n in range(16):
            ctypes.memmove(env.xmm[n], xmm[16 * n : 16 * n + 16], 16)
        mxcsr, fcw = fields["mxcsr"], fields["x87_fcw"]
        assert isinstance(mxcsr, int)
        assert isinstance(fcw, int)
        self._helper.load_fpu_control(self, mxcsr, fcw)

    def _refresh(self) -> None:
        """Derive what QEMU caches in hflags (cpu_x86_load_seg_cache, cpu_x86_update_cr0 ...)."""
        env, kept = self.env, self.env.hflags & (_CPL | _INHIBIT_IRQ)
        cr0, cr4, efer = env.cr[0], env.cr[4], env.efer
        real = not cr0 & 1
        flags = kept | _ALWAYS | (cr0 & 0xE) << 8
        flags |= 0 if real else _PE
        flags |= _LMA if efer & 0x400 else 0
        flags |= _SVME if efer & 0x1000 else 0
        flags |= _OSFXSR if cr4 & 1 << 9 else 0
        flags |= _SMAP if cr4 & 1 << 21 else 0
        cs = self.attrib(CS)
        flags |= _SS32 if self.attrib(SS) & 0x400 else 0
        if efer & 0x400 and cs & 0x200:
            flags |= _CS64 | _CS32
        else:
            flags |= _CS32 if cs & 0x400 else 0
            based = self.base(DS) | self.base(ES) | self.base(SS)
            if real or env.eflags & _VM or not cs & 0x400 or based:
                flags |= _ADDSEG
        env.hflags = flags
