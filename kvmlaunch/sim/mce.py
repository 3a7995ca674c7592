"""Machine checks: the registers, of which none ever happens (x86.c: set_msr_mce, get_msr_mce)."""

from __future__ import annotations

__all__ = ["MAX_BANKS", "MCG_CTL", "MCG_STATUS", "SUPPORTED", "MachineCheck"]

MAX_BANKS = 32
"""KVM_MAX_MCE_BANKS."""

_CTL_P, _SER_P = 1 << 8, 1 << 24  # of MCG_CAP (asm/mce.h)
SUPPORTED = _CTL_P | _SER_P
"""KVM_X86_GET_MCE_CAP_SUPPORTED."""

MCG_STATUS, MCG_CTL = 0x17A, 0x17B
"""The MSRs of all banks that have a state to save."""

_MCG_CAP, _MC0_CTL = 0x179, 0x400
_MC0_CTL2 = 0x280  # of corrected errors' interrupts, which AMD's CPUs signal another way
_P5 = (0x0, 0x1)  # where a Pentium tells of an error
_ALL_ONES = (1 << 64) - 1
# Linux clears bit 10 of bank 4 on AMD K8s, and bit 0 on some others.
_MAY_BE_CLEAR = 1 << 10 | 1
_REGISTERS, _CTL, _STATUS = 4, 0, 1


class MachineCheck:
    """The registers of one vCPU."""

    def __init__(self) -> None:
        self.cap = MAX_BANKS
        self._ctl = 0
        self._status = 0
        self._banks = [0] * (MAX_BANKS * _REGISTERS)

    def set_up(self, cap: int) -> bool:
        """KVM_X86_SETUP_MCE; False where KVM refuses."""
        banks = cap & 0xFF
        if not 0 < banks <= MAX_BANKS or cap & ~(SUPPORTED | 0xFF | 0xFF0000):
            return False
        self.cap = cap
        if cap & _CTL_P:
            self._ctl = _ALL_ONES
        for bank in range(banks):
            self._banks[bank * _REGISTERS] = _ALL_ONES
        return True

    def get(self, index: int) -> int | None:
        """One register as user space sees it; None where there is none."""
        registers = {_MCG_CAP: self.cap, MCG_STATUS: self._status, MCG_CTL: self._ctl}
        if index in registers:
            return registers[index]
        if index in _P5 or self._is_second_control(index):
            return 0
        return self._banks[index - _MC0_CTL] if self._is_bank(index) else None

    def set(self, index: int, value: int) -> bool:
        """Store one register, as user space may; False where KVM refuses."""
        if index == MCG_STATUS:
            self._status = value
        elif index == MCG_CTL:
            if value not in (0, _ALL_ONES) or (value and not self.cap & _CTL_P):
                return False
            self._ctl = value
        elif self._is_bank(index):
            at = index - _MC0_CTL
            is_control = at % _REGISTERS == _CTL
            if is_control and value and value | _MAY_BE_CLEAR != _ALL_ONES:
                return False
            self._banks[at] = value
        else:
            return self._is_second_control(index) and not value
        return True

    def guest_may_access(self, index: int) -> bool:
        """False for registers that user space finds although the guest's CPU lacks them."""
        lacks_control = index == MCG_CTL and not self.cap & _CTL_P
        return not lacks_control and not self._is_second_control(index)

    def makes_up_error(self, index: int, value: int) -> bool:
        """Whether this would set a bank's status, which guests may do in the end only."""
        is_status = self._is_bank(index) and (index - _MC0_CTL) % _REGISTERS == _STATUS
        return is_status and bool(value)

    def _is_second_control(self, index: int) -> bool:
        return 0 <= index - _MC0_CTL2 < self.cap & 0xFF

    def _is_bank(self, index: int) -> bool:
        return 0 <= index - _MC0_CTL < (self.cap & 0xFF) * _REGISTERS
