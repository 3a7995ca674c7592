"""The in-kernel local APIC of a vCPU: registers and state (lapic.c)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmlaunch.sim import interrupts
from kvmlaunch.sim.cpuid_table import find_leaf
from kvmlaunch.sim.interrupts import Interrupt, Mode
from kvmlaunch.sim.lapic_timer import TSC_DEADLINE, Timer
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["LocalApic"]

# Offsets in the APIC page (asm/apicdef.h); the x2APIC MSR is 0x800 + offset / 16.
_ID, _VERSION, _TPR, _ARBPRI, _PPR, _EOI = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0
_LDR, _DFR, _SPIV, _ISR, _TMR, _IRR = 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200
_ESR, _ICR, _ICR2, _LVTT = 0x280, 0x300, 0x310, 0x320
_LVTTHMR, _LVTPC, _LVT0, _LVT1, _LVTERR = 0x330, 0x340, 0x350, 0x360, 0x370
_TMICT, _TMCCT, _TDCR, _SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0

_SIZE = 0x400
_PAGE = 0x1000
_X2APIC_MSR, _TSC_DEADLINE_MSR = 0x800, 0x6E0
_LVT = (_LVTT, _LVTTHMR, _LVTPC, _LVT0, _LVT1, _LVTERR)
_VERSION_NUMBER = 0x14 | len(_LVT) - 1 << 16
_DIRECTED_EOI = 1 << 24
_MASKED, _LEVEL = 1 << 16, 1 << 15
# LVT_MASK and LINT_MASK of lapic.c; modes are bits 10:8, of the timer 18:17.
_ENTRY = _MASKED | 1 << 12 | 0xFF
_MODE = 0x700
_PIN = _ENTRY | _MODE | 1 << 13 | 1 << 14 | _LEVEL
_WRITABLE = {
    _LVTTHMR: _ENTRY | _MODE,
    _LVTPC: _ENTRY | _MODE,
    _LVT0: _PIN,
    _LVT1: _PIN,
    _LVTERR: _ENTRY,
}
_ONE_MODE, _BOTH_MODES = 1 << 17, 3 << 17
_SW_ENABLED = 1 << 8
_SPIV_DIRECTED_EOI = 1 << 12
_HW_ENABLED, _X2APIC = 1 << 11, 1 << 10
_BASE = 0xFFFFFF000
_BUSY = 1 << 12
_X2APIC_ICR_RESERVED = 0xFFF << 20 | 3 << 16 | 1 << 13
_SELF = 1 << 18
_U32 = 0xFFFFFFFF
_TSC_DEADLINE_BIT = 1 << 24  # CPUID leaf 1 ECX
_BITMAPS = frozenset(base + 0x10 * n for base in (_ISR, _TMR, _IRR) for n in range(8))
_READABLE = _BITMAPS | {
    *(_ID, _VERSION, _TPR, _PPR, _LDR, _SPIV, _ESR, _ICR, *_LVT, _TMICT, _TMCCT, _TDCR)
}
_XAPIC_ONLY = frozenset((_ARBPRI, _DFR, _ICR2))


class LocalApic:
    """Registers of one vCPU's APIC, as the guest and user space see them.

    ``regs`` is the page as KVM keeps it, but for the current count.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.regs = bytearray(_SIZE)
        self.timer = Timer(vcpu)
        self[_ID] = vcpu.id << 24 & _U32
        self.reset()

    def __getitem__(self, offset: int) -> int:
        return int.from_bytes(self.regs[offset : offset + 4], "little")

    def __setitem__(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self.regs, offset, value)

    def reset(self) -> None:
        """kvm_lapic_reset(), for an INIT: the ID stays."""
        vcpu = self._vcpu
        self.timer.stop()
        self.set_version()
        for entry in _LVT:
            self[entry] = _MASKED
        self._update_mode()
        quirk = not vcpu.vm.disabled_quirks & lib.KVM_X86_QUIRK_LINT0_REENABLED
        if vcpu.id == vcpu.vm.bsp_id and quirk:
            self[_LVT0] = Mode.EXTINT
        self[_DFR], self[_SPIV] = _U32, 0xFF
        if not self.x2apic:
            self[_LDR] = 0
        for register in (_TPR, _ESR, _ICR, _ICR2, _TDCR, _TMICT, *_BITMAPS):
            self[register] = 0
        self.timer.set_divide(0, 0)
        self._update_ppr()

    def set_version(self) -> None:
        """kvm_apic_set_version()."""
        vcpu = self._vcpu
        directed = vcpu.state.guest.x2apic and not vcpu.vm.irq.pic
        self[_VERSION] = _VERSION_NUMBER | (_DIRECTED_EOI if directed else 0)

    # -- what others ask

    @property
    def present(self) -> bool:
        """kvm_apic_present()."""
        vcpu = self._vcpu
        return vcpu.vm.irq.in_kernel and bool(vcpu.state.apic_base & _HW_ENABLED)

    @property
    def x2apic(self) -> bool:
        """Whether it is in x2APIC mode."""
        both = _HW_ENABLED | _X2APIC
        return self._vcpu.state.apic_base & both == both

    @property
    def software_enabled(self) -> bool:
        """Whether the spurious-interrupt vector register enables it."""
        return bool(self[_SPIV] & _SW_ENABLED)

    @property
    def xapic_id(self) -> int:
        """The ID of xAPIC mode, which the guest can change."""
        return self[_ID] >> 24

    @property
    def logical_id(self) -> int:
        """The logical destination register."""
        return self[_LDR]

    @property
    def is_flat(self) -> bool:
        """xAPIC's model of logical destinations; KVM's map takes any other for clusters."""
        return self[_DFR] == _U32

    def has_interrupt(self) -> bool:
        """Whether an interrupt is to be injected as soon as the guest takes one. No locks."""
        return self._next_vector() is not None or (self.timer.due and self._timer_is_heard())

    def blocked_by_priority(self) -> bool:
        """Whether an interrupt waits for the task priority to go down."""
        highest = self._highest(_IRR)
        return highest is not None and self._next_vector() is None

    def wakes_at(self) -> int | None:
        """When its timer will interrupt a vCPU that takes interrupts; None for never."""
        return self.timer.deadline if self._timer_is_heard() else None

    def accept_interrupt(self) -> int:
        """Return the vector of the interrupt, which is in service from now on."""
        self.poll()
        vector = self._next_vector()
        assert vector is not None
        self._put_bit(_IRR, vector, False)
        self._put_bit(_ISR, vector, True)
        self._update_ppr()
        return vector

    def accept(self, vector: int, *, level: bool) -> bool:
        """Take a fixed interrupt; False if the APIC is off."""
        if not self.present or not self.software_enabled:
            return False
        self._put_bit(_TMR, vector, level)
        self._put_bit(_IRR, vector, True)
        return True

    def poll(self) -> None:
        """kvm_inject_pending_timer_irqs(): an expired timer waits until its entry isn't masked."""
        self.timer.expire()
        if self.timer.pending and self._timer_is_on():
            self.timer.pending = False
            self._deliver_local(_LVTT)

    # -- CR8

    @property
    def cr8(self) -> int:
        """The task priority as CR8 has it."""
        return self[_TPR] >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self[_TPR] = value << 4
        self._update_ppr()

    # -- access by the guest

    def read_msr(self, index: int) -> int | None:
        """RDMSR of an x2APIC register or of the TSC deadline; None is #GP."""
        self.poll()
        if index == _TSC_DEADLINE_MSR:
            return self._read_deadline()
        if not self._vcpu.vm.irq.in_kernel or not self.x2apic:
            return None
        register = index - _X2APIC_MSR << 4
        if register == _ICR:
            return self[_ICR2] << 32 | self[_ICR]
        return self._read(register) if register in _READABLE else None

    def write_msr(self, index: int, value: int) -> bool:
        """WRMSR, as `read_msr`; False is #GP."""
        self.poll()
        if index == _TSC_DEADLINE_MSR:
            return self._write_deadline(value)
        if not self._vcpu.vm.irq.in_kernel or not self.x2apic:
            return False
        register = index - _X2APIC_MSR << 4
        if register == _ICR:
            if value & _X2APIC_ICR_RESERVED:
                return False
            self._send(value & _U32, value >> 32)
            return True
        return not value >> 32 and self._write(register, value)

    def read_mmio(self, gpa: int, size: int) -> bytes | None:
        """A read of the APIC page; None leaves it to user space."""
        offset = self._offset(gpa)
        if offset is None:
            return None
        if self.x2apic or not self.present:
            return b"\xff" * size if self._has_mmio_hole() else None
        self.poll()
        at = offset & 0xF
        register = offset & ~0xF
        if at + size > 4 or register not in _READABLE | _XAPIC_ONLY:
            return bytes(size)
        return self._read(register).to_bytes(4, "little")[at : at + size]

    def write_mmio(self, gpa: int, data: bytes) -> bool:
        """A write to the APIC page; False leaves it to user space."""
        offset = self._offset(gpa)
        if offset is None:
            return False
        if self.x2apic or not self.present:
            return self._has_mmio_hole()
        self.poll()
        if len(data) == 4 and not offset & 0xF:
            self._write(offset, int.from_bytes(data, "little"))
        return True

    def guest_sets_base(self, value: int) -> bool:
        """WRMSR of the APIC base; False is #GP. x2APIC mode is entered from xAPIC mode only."""
        both = _HW_ENABLED | _X2APIC
        old, new = self._vcpu.state.apic_base & both, value & both
        if (old == both and new == _HW_ENABLED) or (not old and new == both):
            return False
        return self._vcpu.state.apic_base_valid(value) and self.set_base(value)

    def set_base(self, value: int) -> bool:
        """__kvm_apic_set_base(): a change of mode sets the ID."""
        vcpu = self._vcpu
        old, vcpu.state.apic_base = vcpu.state.apic_base, value
        changed = old ^ value
        if changed & (_HW_ENABLED | _X2APIC) and value & _HW_ENABLED:
            self[_ID] = vcpu.id << 24 & _U32
        if changed & _X2APIC and value & _X2APIC:
            self[_ID] = vcpu.id
            self[_LDR] = _x2apic_ldr(vcpu.id)
        return True

    # -- user space

    def get_state(self) -> bytes:
        """KVM_GET_LAPIC, in the format without KVM_CAP_X2APIC_API."""
        self.poll()
        page = bytearray(self.regs)
        struct.pack_into("<I", page, _TMCCT, self._read(_TMCCT))
        if self.x2apic:
            struct.pack_into("<I", page, _ID, self._vcpu.id << 24 & _U32)
        return bytes(page)

    def set_state(self, page: bytes) -> None:
        """KVM_SET_LAPIC; ``page`` has 1024 bytes."""
        self.regs[:] = page
        if self.x2apic:
            self[_ID], self[_LDR] = self._vcpu.id, _x2apic_ldr(self._vcpu.id)
        self.set_version()
        self._update_ppr()
        self._update_mode()
        self.timer.set_divide(self[_TDCR], 0)
        self.timer.start(self[_TMICT], self[_TMCCT])

    # -- registers

    def _read(self, register: int) -> int:
        if register == _ARBPRI:
            return 0
        if register == _TMCCT:
            return 0 if not self[_TMICT] else self.timer.count()
        return self[register]

    def _write(self, register: int, value: int) -> bool:
        """kvm_lapic_reg_write(); False where there is nothing to write to."""
        if register == _TPR:
            self[_TPR] = value & 0xFF
            self._update_ppr()
        elif register == _EOI:
            self._end_of_interrupt()
        elif register == _SPIV:
            self._write_spiv(value)
        elif register in _WRITABLE:
            if not self.software_enabled:
                value |= _MASKED
            self[register] = value & _WRITABLE[register]
        elif register == _LVTT:
            if not self.software_enabled:
                value |= _MASKED
            self[_LVTT] = value & (_ENTRY | self._mode_mask)
            self._update_mode()
        elif register == _TMICT:
            if self.timer.mode != TSC_DEADLINE:
                self[_TMICT] = value
                self.timer.start(value)
        elif register == _TDCR:
            self[_TDCR] = value & 0xB
            self.timer.set_divide(value & 0xB, self[_TMICT])
        elif register == _ESR:
            return not (self.x2apic and value)
        elif self.x2apic:
            return self._write_self_ipi(register, value)
        else:
            return self._write_xapic(register, value)
        return True

    def _write_self_ipi(self, register: int, value: int) -> bool:
        if register != _SELF_IPI or value & ~0xFF:
            return False
        interrupts.send(self._vcpu, _SELF | value, 0)
        return True

    def _write_xapic(self, register: int, value: int) -> bool:
        """Registers that x2APIC mode doesn't have, or not for writing."""
        if register == _ID:
            self[_ID] = value & 0xFF000000
        elif register == _LDR:
            self[_LDR] = value & 0xFF000000
        elif register == _DFR:
            self[_DFR] = value | 0x0FFFFFFF
        elif register == _ICR:
            self._send(value, self[_ICR2])
        elif register == _ICR2:
            self[_ICR2] = value & 0xFF000000
        else:
            return False
        return True

    def _write_spiv(self, value: int) -> None:
        directed = _SPIV_DIRECTED_EOI if self[_VERSION] & _DIRECTED_EOI else 0
        self[_SPIV] = value & (0x3FF | directed)
        if not value & _SW_ENABLED:
            for entry in _LVT:
                self[entry] |= _MASKED
            self._update_mode()
            self.timer.pending = False

    def _send(self, low: int, high: int) -> None:
        """kvm_apic_send_ipi(). There is no delay, so it is never busy."""
        low &= ~_BUSY
        interrupts.send(self._vcpu, low, high if self.x2apic else high >> 24)
        self[_ICR], self[_ICR2] = low, high

    def _end_of_interrupt(self) -> None:
        vector = self._highest(_ISR)
        if vector is not None:
            self._put_bit(_ISR, vector, False)
            self._update_ppr()

    def _deliver_local(self, register: int) -> None:
        """kvm_apic_local_deliver()."""
        entry = self[register]
        if self.present and not entry & _MASKED:
            interrupts.accept(
                self._vcpu,
                Interrupt(entry & 0xFF, Mode(entry & _MODE), level=bool(entry & _LEVEL)),
            )

    # -- timer

    @property
    def _mode_mask(self) -> int:
        leaf = find_leaf(self._vcpu.cpuid, 1)
        if leaf is None:
            return 0
        return _BOTH_MODES if leaf.ecx & _TSC_DEADLINE_BIT else _ONE_MODE

    def _update_mode(self) -> None:
        if self.timer.set_mode(self[_LVTT] & self._mode_mask):
            self[_TMICT] = 0

    def _timer_is_heard(self) -> bool:
        """Whether the timer's interrupt would get through to the vCPU, if that takes any.

        Of another delivery mode, which only KVM_SET_LAPIC can give it, it is no interrupt.
        """
        is_fixed = Mode(self[_LVTT] & _MODE) in (Mode.FIXED, Mode.LOWEST)
        return is_fixed and self._timer_is_on() and self[_LVTT] & 0xF0 > self[_PPR] & 0xF0

    def _timer_is_on(self) -> bool:
        return self.present and self.software_enabled and not self[_LVTT] & _MASKED

    def _read_deadline(self) -> int:
        deadline = self.timer.deadline if self.timer.mode == TSC_DEADLINE else None
        return deadline or 0

    def _write_deadline(self, value: int) -> bool:
        """Without that mode, or without an APIC, it is dropped."""
        if self.present and self.timer.mode == TSC_DEADLINE:
            self.timer.stop()
            self.timer.deadline = value or None
        return True

    # -- priorities

    def _next_vector(self) -> int | None:
        """kvm_apic_has_interrupt()."""
        vector = self._highest(_IRR) if self.present else None
        return vector if vector is not None and vector & 0xF0 > self[_PPR] else None

    def _update_ppr(self) -> None:
        tpr, in_service = self[_TPR], (self._highest(_ISR) or 0) & 0xF0
        self[_PPR] = tpr & 0xFF if tpr & 0xF0 >= in_service else in_service

    def _highest(self, bitmap: int) -> int | None:
        for n in range(7, -1, -1):
            word = self[bitmap + 0x10 * n]
            if word:
                return 32 * n + word.bit_length() - 1
        return None

    def _put_bit(self, bitmap: int, vector: int, value: bool) -> None:
        register, bit = bitmap + 0x10 * (vector // 32), 1 << vector % 32
        self[register] = self[register] | bit if value else self[register] & ~bit

    # -- MMIO

    def _offset(self, gpa: int) -> int | None:
        if not self._vcpu.vm.irq.in_kernel:
            return None
        offset = gpa - (self._vcpu.state.apic_base & _BASE)
        return offset if 0 <= offset < _PAGE else None

    def _has_mmio_hole(self) -> bool:
        return not self._vcpu.vm.disabled_quirks & lib.KVM_X86_QUIRK_LAPIC_MMIO_HOLE


def _x2apic_ldr(apic_id: int) -> int:
    return apic_id >> 4 << 16 | 1 << (apic_id & 0xF)
