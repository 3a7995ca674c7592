"""KVM_SET_GUEST_DEBUG: user space debugs a plain guest (x86.c, svm.c: db_interception())."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim import exits
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.softcpu import (
    DebugControl,
    DebugTrap,
    Event,
    Halt,
    InterruptWindow,
    NestedFault,
    Shutdown,
    SoftCpu,
)
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["VALID", "GuestDebug"]

VALID = (
    lib.KVM_GUESTDBG_ENABLE
    | lib.KVM_GUESTDBG_SINGLESTEP
    | lib.KVM_GUESTDBG_USE_SW_BP
    | lib.KVM_GUESTDBG_USE_HW_BP
    | lib.KVM_GUESTDBG_INJECT_DB
    | lib.KVM_GUESTDBG_INJECT_BP
    | lib.KVM_GUESTDBG_BLOCKIRQ
)
"""KVM_CAP_SET_GUEST_DEBUG2."""

_DB, _BP = 1, 3
_DR6_RESET, _DR6_STEP = 0xFFFF0FF0, 1 << 14
_NOT_EXECUTED = (InterruptWindow, NestedFault)
_LAST_WORD = (DebugTrap, Halt, Shutdown)


class GuestDebug:
    """What user space wants of one vCPU.

    ``control`` is that of ``struct kvm_guest_debug``; ``step_is_due``: an instruction that
    user space has completed was to be a single step.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.control = 0
        self._registers = [0] * 8
        self.step_is_due = False
        self._is_news = False

    def set(self, debug: Any) -> None:
        """kvm_arch_vcpu_ioctl_set_guest_debug(). EBUSY."""
        running, control = self._vcpu.running, debug.control
        if control & (lib.KVM_GUESTDBG_INJECT_DB | lib.KVM_GUESTDBG_INJECT_BP):
            if running.exception is not None:
                refuse(errno.EBUSY)
            running.exception = (_DB if control & lib.KVM_GUESTDBG_INJECT_DB else _BP, None)
        self.control = control if control & lib.KVM_GUESTDBG_ENABLE else 0
        self._registers = list(debug.arch.debugreg)
        self.step_is_due, self._is_news = False, True

    def tell(self, cpu: SoftCpu) -> None:
        """Tell the CPU, where it doesn't know yet; before it runs, when no other one does."""
        if not self._is_news:
            return
        self._is_news = False
        first, second, third, fourth = self._registers[:4]
        hardware = self.control & lib.KVM_GUESTDBG_USE_HW_BP
        cpu.set_debug(
            DebugControl(
                (first, second, third, fourth),
                self._registers[7] if hardware else 0,
                breakpoints=bool(self.control & lib.KVM_GUESTDBG_USE_SW_BP),
            )
        )

    @property
    def steps(self) -> bool:
        """Whether it goes instruction by instruction."""
        return bool(self.control & lib.KVM_GUESTDBG_SINGLESTEP)

    @property
    def blocks_interrupts(self) -> bool:
        """Whether interrupts and NMIs wait."""
        return bool(self.control & lib.KVM_GUESTDBG_BLOCKIRQ)

    def after_step(self, event: Event | None, done: int) -> int:
        """kvm_vcpu_do_singlestep(): an exit where an instruction has been executed."""
        if isinstance(event, (*_NOT_EXECUTED, *_LAST_WORD)):
            return done
        if not done:
            self.step_is_due = True
            return done
        self.exit(_DB, _DR6_STEP)
        return 0

    def trap(self, event: DebugTrap) -> int:
        """db_interception(), bp_interception()."""
        self.exit(event.vector, event.dr6)
        return 0

    def exit(self, vector: int = _DB, dr6: int = _DR6_STEP) -> None:
        """KVM_EXIT_DEBUG where the guest is."""
        hardware = self.control & lib.KVM_GUESTDBG_USE_HW_BP
        dr7 = self._registers[7] if hardware else self._vcpu.running.live_cpu.read("dr7")
        rip = self._vcpu.running.live_cpu.linear_rip
        exits.debug(self._vcpu.run, rip, vector, _DR6_RESET | dr6, dr7)
