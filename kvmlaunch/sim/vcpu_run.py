"""KVM_RUN: complete the last exit, then run the guest until the next (x86.c, svm.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.sim import exits, msrs, plain_exits, plain_state, smm, sync_regs, vmgexit
from kvmlaunch.sim.guest_memory import MemoryFault
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.softcpu import (
    Access,
    Budget,
    DebugStop,
    DebugTrap,
    Event,
    FaultReason,
    Halt,
    InterruptWindow,
    InvalidState,
    NestedFault,
    Pause,
    Rsm,
    Shutdown,
    SoftCpu,
    VmgExit,
)
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["VcpuRun"]

_RUN_TICKS = 200_000
"""Most that a CPU runs before its thread looks up: a millisecond or so."""
_EXIT_TICKS = 1000
"""What an exit costs, so that a guest that only exits uses up its turn."""
_CR8_RESERVED = ~0xF
_IF = 1 << 9
_UD = 6
_FAULT_FETCH = 1 << 4


class VcpuRun:
    """The running side of one vCPU. Handlers return 1 to go on, 0 to exit, or raise OSError.

    All but the guest's own code happens under the host's lock.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.cpu: SoftCpu | None = None
        self.complete: Callable[[], int] | None = None
        """What the next KVM_RUN does first (complete_userspace_io)."""
        self.exception: tuple[int, int | None] | None = None
        self._loaded = False
        self._shadow = self._nmi_blocked = False
        self._interrupt_flag = self._interruptible = False
        self._handlers: dict[type[Any], Callable[[Any], int]] = {
            Budget: self._nothing,
            DebugStop: self._debug_stop,
            DebugTrap: lambda event: self.vcpu.debug.trap(event),
            Rsm: self._rsm,
            Halt: lambda event: self.halt(lib.KVM_MP_STATE_HALTED, lib.KVM_EXIT_HLT),
            InterruptWindow: self._nothing,
            InvalidState: self._fail_entry,
            NestedFault: self._nested_fault,
            Pause: self._pause,
            Shutdown: self._shutdown,
            VmgExit: lambda event: vmgexit.handle(self.vcpu, event.ghcb),
            **plain_exits.handlers(self),
        }

    @property
    def live_cpu(self) -> SoftCpu:
        """The CPU, which exists since the first entry."""
        assert self.cpu is not None
        return self.cpu

    # kvm_arch_vcpu_ioctl_run()

    def run(self) -> int:
        """One KVM_RUN, by the vCPU's own thread, which doesn't hold the host's lock."""
        vcpu, vm = self.vcpu, self.vcpu.vm
        vm.host.user.forget_signals()
        vm.scheduler.enter(vcpu.seat, vm.host.user.caller)
        try:
            # Completing an exit touches the CPU, and it may be another vCPU's turn.
            with vm.host.gate.stopped(), vm.host.lock:
                vm.sync_user_memory()
                vcpu.run.flags = 0
                waiting = vcpu.mp_state == lib.KVM_MP_STATE_UNINITIALIZED
                if waiting and vcpu.run.immediate_exit:
                    refuse(errno.EINTR)
                if not waiting and not self._before_run():
                    return 0
            return self._wait_for_start() if waiting else self._loop()
        finally:
            self._signal()
            with vm.host.lock:
                self._after_run()
            vm.scheduler.leave(vcpu.seat)

    def _before_run(self) -> bool:
        """What comes before the guest runs: False where the last exit isn't over yet."""
        vcpu, run, vm = self.vcpu, self.vcpu.run, self.vcpu.vm
        if (run.kvm_valid_regs | run.kvm_dirty_regs) & ~vm.sync_regs:
            refuse(errno.EINVAL)
        if run.kvm_dirty_regs:
            sync_regs.take(vcpu)
        if not vm.irq.in_kernel:
            if run.cr8 & _CR8_RESERVED:
                refuse(errno.EINVAL)
            vcpu.cr8 = run.cr8
        vm.flush_if_changed()
        complete, self.complete = self.complete, None
        if complete is not None and not complete():
            return False
        if vcpu.debug.step_is_due:
            vcpu.debug.step_is_due = False
            vcpu.debug.exit()
            return False
        if run.immediate_exit:
            refuse(errno.EINTR)
        if vm.sev.need_init:
            refuse(errno.EINVAL)
        if vm.sev.active and not vm.sev.is_snp:
            refuse(errno.ENOSYS)  # the memory of SEV and SEV-ES guests is not simulated
        run.exit_reason = lib.KVM_EXIT_UNKNOWN
        return True

    def _wait_for_start(self) -> int:
        """A vCPU that nobody started: EAGAIN once something happened to it."""
        vcpu = self.vcpu
        ticks = vcpu.vm.scheduler.turn(vcpu.seat)
        with vcpu.vm.host.lock:
            if ticks is None:
                vcpu.run.exit_reason = lib.KVM_EXIT_INTR
                refuse(errno.EINTR)
            vcpu.accept_events()
            # The proposal's text names the need, not the way; this one is that of the SNP host
            # series before 6.11 (sev_vcpu_unblocking).
            noticed = vcpu.vm.host.profile.ap_create_uninitialized and vcpu.update_state
            if noticed and vcpu.mp_state == lib.KVM_MP_STATE_UNINITIALIZED:
                vcpu.mp_state = lib.KVM_MP_STATE_RUNNABLE
        refuse(errno.EAGAIN)

    def _loop(self) -> int:
        """vcpu_run()."""
        vcpu, vm = self.vcpu, self.vcpu.vm
        while True:
            self._sync(idle=vcpu.mp_state != lib.KVM_MP_STATE_RUNNABLE)
            ticks = vm.scheduler.turn(vcpu.seat)
            if ticks is None:
                vcpu.run.exit_reason = lib.KVM_EXIT_INTR
                refuse(errno.EINTR)
            self._sync(idle=False)  # the call that ended a wait may have come after a write
            try:
                done = not self._step(min(ticks, _RUN_TICKS))
            except MemoryFault as fault:
                exits.memory_fault(vcpu.run, fault.gpa, PAGE_SIZE, private=fault.private)
                refuse(fault.errno)
            self._signal()
            if done:
                return 0
            if self._window_is_open():
                vcpu.run.exit_reason = lib.KVM_EXIT_IRQ_WINDOW_OPEN
                return 0

    def _sync(self, *, idle: bool) -> None:
        vm = self.vcpu.vm
        if vm.host.user.wants_sync(idle=idle):
            with vm.host.gate.stopped(), vm.host.lock:
                vm.sync_user_memory()

    def _signal(self) -> None:
        """Let ioeventfds be seen, after what the guest wrote to memory before."""
        vm = self.vcpu.vm
        if vm.ioeventfds.waiting:
            with vm.host.gate.stopped(), vm.host.lock:
                vm.sync_user_memory()
                vm.ioeventfds.signal()

    def _step(self, ticks: int) -> int:
        vcpu, vm = self.vcpu, self.vcpu.vm
        with vm.host.lock:
            if vcpu.mp_state != lib.KVM_MP_STATE_RUNNABLE:
                return self._block()
            vm.slots.use_space(int(vcpu.smm))
            entered = self._enter()
        if entered is not None:
            return entered
        cpu = self.live_cpu
        before = cpu.ticks
        with vm.host.gate.running():
            vm.running = vcpu
            vm.flush_if_changed()
            steps = vcpu.debug.steps
            event = cpu.step() if steps else cpu.run(min(ticks, self._ticks_to_timer()))
        spent = cpu.ticks - before + (0 if isinstance(event, Budget) else _EXIT_TICKS)
        with vm.host.lock:
            self._take_priority(cpu)
            if vm.inspector is not None and event is not None:
                vm.inspector.saw(vcpu, event)
            done = 1 if event is None else self._handle(event)
            if steps:
                done = vcpu.debug.after_step(event, done)
            self._look(cpu)
        vm.scheduler.spend(vcpu.seat, spent, keep=not done)
        return done

    def _block(self) -> int:
        """vcpu_block(), once there is something to wake up for."""
        vcpu = self.vcpu
        vcpu.accept_events()
        if vcpu.mp_state in (lib.KVM_MP_STATE_HALTED, lib.KVM_MP_STATE_AP_RESET_HOLD):
            vcpu.mp_state = lib.KVM_MP_STATE_RUNNABLE
        elif vcpu.mp_state != lib.KVM_MP_STATE_RUNNABLE:
            vcpu.vm.scheduler.give_up_turn(self.vcpu.seat)
        return 1

    # vcpu_enter_guest()

    def _enter(self) -> int | None:
        """Everything up to VMRUN; a handler's result where it doesn't come to that."""
        vcpu = self.vcpu
        if vcpu.update_state:
            vcpu.update_state = False
            vcpu.reset()
            if vcpu.mp_state != lib.KVM_MP_STATE_RUNNABLE:
                return 1
        vcpu.accept_events()
        if vcpu.mp_state == lib.KVM_MP_STATE_INIT_RECEIVED:
            return 1
        vcpu.has_run = True
        if not self.load():
            return self._fail_entry(None)
        vcpu.vm.clock.update(vcpu)
        vcpu.vm.flush_if_changed()
        vcpu.debug.tell(self.live_cpu)
        event = self._inject()
        if event is not None:
            return self._handle(event)
        self._set_priority(self.live_cpu)
        if vcpu.sev_es is not None:
            vcpu.sev_es.unmap_ghcb()
        return None

    def load(self, *, keep_waiting: bool = False) -> bool:
        """Give the CPU its state, where it hasn't got it: False if VMRUN refuses it."""
        if self._loaded:
            return True
        vcpu = self.vcpu
        vmsa = plain_state.to_vmsa(vcpu.state) if vcpu.sev_es is None else vcpu.sev_es.vmsa()
        if vmsa is None:
            return False
        if self.cpu is None:
            cpu = vcpu.vm.machine().new_cpu()
            if vcpu.sev_es is not None:
                cpu.ghcb = vcpu.sev_es.msr
            cpu.tsc_offset = vcpu.tsc_offset
            self.cpu = cpu
            if vcpu.vm.inspector is not None:
                vcpu.vm.inspector.new_cpu(vcpu)
        # The GHCB MSR is the VMCB's: a new VMSA leaves it as it is.
        ghcb = self.cpu.ghcb
        if self.cpu.load(vmsa, keep_waiting=keep_waiting) is not None:
            return False
        self.cpu.ghcb = ghcb
        self.cpu.shadow, self.cpu.nmi_blocked = self._shadow, self._nmi_blocked
        self._loaded = True
        return True

    @property
    def shadow(self) -> bool:
        """The guest's interrupt shadow."""
        return self.live_cpu.shadow if self._loaded else self._shadow

    @shadow.setter
    def shadow(self, value: bool) -> None:
        self._shadow = value
        if self._loaded:
            self.live_cpu.shadow = value

    @property
    def nmi_blocked(self) -> bool:
        """Whether a plain guest is handling an NMI."""
        return self.live_cpu.nmi_blocked if self._loaded else self._nmi_blocked

    @nmi_blocked.setter
    def nmi_blocked(self, value: bool) -> None:
        self._nmi_blocked = value
        if self._loaded:
            self.live_cpu.nmi_blocked = value

    def save(self) -> Vmsa | None:
        """The guest's registers, None if the CPU doesn't have them; they stay there."""
        return self.live_cpu.save() if self._loaded else None

    def set_tsc_offset(self, offset: int) -> None:
        """What the guest's TSC is ahead of the VM's clock."""
        if self.cpu is not None:
            self.cpu.tsc_offset = offset

    def is_still_at(self, rip: int) -> bool:
        """Whether an access that user space answers is still the one that the guest is at.

        Registers that it has changed meanwhile count, unless RIP is one (complete_fast_pio_in()).
        """
        if self._loaded:
            return True
        return plain_state.linear_rip(self.vcpu.state) == rip and self.load(keep_waiting=True)

    def unload(self) -> None:
        """The next entry takes the state from where it is kept."""
        self._shadow, self._nmi_blocked = self.shadow, self.nmi_blocked
        self._loaded = False
        # A guest that is set up anew may find other code where it was before.
        self.vcpu.vm.memory_changed(code=True)

    def _inject(self) -> Event | None:
        """kvm_check_and_inject_events(): one event at a time, and a window for the next."""
        vcpu, cpu = self.vcpu, self.live_cpu
        event: Event | None = None
        if self.exception is not None and not cpu.unfinished:
            (vector, code), self.exception = self.exception, None
            event = cpu.inject_exception(vector, code, cpu.read("cr2"))
        elif vcpu.debug.blocks_interrupts:
            cpu.want_window = False
            return None
        elif vcpu.smi_pending and not (vcpu.smm or cpu.unfinished):
            vcpu.smi_pending = False
            vcpu.state.msrs[msrs.SMI_COUNT] = vcpu.state.msrs[msrs.SMI_COUNT] + 1 & msrs.U64
            smm.enter(vcpu)
            vcpu.vm.check_alive()
            if not self.load():
                return InvalidState("the state at the beginning of SMM")
            cpu = self.live_cpu
        elif vcpu.interrupt is not None and cpu.interruptible:
            vector, vcpu.interrupt = vcpu.interrupt, None
            event = cpu.inject_interrupt(vector)
        elif vcpu.nmi_pending and not (vcpu.nmi_masked or cpu.nmi_blocked or cpu.unfinished):
            vcpu.nmi_pending -= 1
            # A plain CPU sees IRET itself; an SNP guest says when it is done.
            vcpu.nmi_masked = vcpu.sev_es is not None
            event = cpu.inject_nmi()
        elif vcpu.apic.has_interrupt() and cpu.interruptible:
            event = cpu.inject_interrupt(vcpu.apic.accept_interrupt())
        wanted = bool(vcpu.run.request_interrupt_window and not vcpu.vm.irq.in_kernel)
        waiting = vcpu.interrupt is not None or vcpu.apic.has_interrupt()
        cpu.want_window = not cpu.interruptible and (wanted or waiting)
        return event

    def _set_priority(self, cpu: SoftCpu) -> None:
        """sync_lapic_to_cr8(), update_cr8_intercept()."""
        vcpu = self.vcpu
        # Without an APIC here, the priority of a guest with encrypted state is its own.
        if vcpu.vm.irq.in_kernel or vcpu.sev_es is None:
            cpu.write("cr8", vcpu.cr8)
        cpu.stop_at_cr8 = vcpu.apic.blocked_by_priority()

    def _take_priority(self, cpu: SoftCpu) -> None:
        """sync_cr8_to_lapic(): the priority's lower half is lost, unless CR8 is intercepted."""
        value = cpu.read("cr8") & 0xF
        if not cpu.stop_at_cr8 or value != self.vcpu.cr8:
            self.vcpu.cr8 = value

    def _ticks_to_timer(self) -> int:
        """How long the guest may run before its APIC's timer wants it to stop."""
        at, now = self.vcpu.apic.wakes_at(), self.vcpu.vm.guest_ticks
        return _RUN_TICKS if at is None or at <= now else min(at - now, _RUN_TICKS)

    @property
    def takes_interrupts(self) -> bool:
        """kvm_arch_interrupt_allowed(), as it was when the guest stopped. No locks."""
        if self._loaded or self.vcpu.protected:
            return self._interruptible
        return bool(self.vcpu.state.vmcb["rflags"] & _IF) and not self._shadow

    # Exits

    def _handle(self, event: Event) -> int:
        """svm_handle_exit()."""
        return self._handlers[type(event)](event)

    def _nothing(self, _event: object) -> int:
        return 1

    def _debug_stop(self, _event: object) -> int:
        exits.debug(self.vcpu.run, self.live_cpu.linear_rip)
        return 0

    def _rsm(self, event: Rsm) -> int:
        """em_rsm(): #UD outside SMM."""
        if not self.vcpu.smm:
            self.exception = (_UD, None)
            return 1
        return 1 if smm.leave(self.vcpu) else self._shutdown(event)

    def _pause(self, _event: object) -> int:
        """kvm_vcpu_on_spin(): let the others go on."""
        self.vcpu.vm.scheduler.give_up_turn(self.vcpu.seat)
        return 1

    def _fail_entry(self, _event: object) -> int:
        exits.fail_entry(self.vcpu.run)
        return 0

    def _nested_fault(self, event: NestedFault) -> int:
        """npf_interception()."""
        vm = self.vcpu.vm
        if event.reason is FaultReason.VMPL and vm.host.profile.vmpls > 1:
            # KVM, which knows no other VMPL than 0, would let the guest try for ever.
            raise MemoryFault(event.gpa & -PAGE_SIZE, event.private)
        there = vm.memory.handle_fault(event.gpa, event.private, write=event.access is Access.WRITE)
        # A guest with encrypted state is resumed in any case (svm_check_emulate_instruction).
        if not there and self.vcpu.sev_es is None:
            fetch = _FAULT_FETCH if event.access is Access.FETCH else 0
            reason = exits.FAULT_USER | fetch
            exits.emulation_failure(self.vcpu.run, exits.NESTED_FAULT, reason, event.gpa)
            return 0
        if event.reason is FaultReason.ABSENT:
            vm.memory_changed()
        return 1

    def _shutdown(self, _event: object) -> int:
        """shutdown_interception(): a plain vCPU gets an INIT; encrypted state stays as it is."""
        if self.vcpu.sev_es is None:
            if self.vcpu.smm:
                self.vcpu.set_smm(False)
            self.vcpu.reset()
        self.vcpu.run.exit_reason = lib.KVM_EXIT_SHUTDOWN
        return 0

    def halt(self, state: int, reason: int) -> int:
        """__kvm_emulate_halt(): wait in the kernel if the APIC is there, else exit.

        A HLT that KVM isn't told of waits in any case.
        """
        vcpu = self.vcpu
        if not vcpu.vm.irq.in_kernel and not vcpu.vm.hlt_in_guest:
            vcpu.run.exit_reason = reason
            return 0
        self._look(self.live_cpu)
        if not vcpu.has_events():
            vcpu.mp_state = state
        return 1

    # post_kvm_run_save()

    def _look(self, cpu: SoftCpu) -> None:
        """Note what user space will want to know; the engine may be another vCPU's then."""
        self._interrupt_flag = bool(cpu.read("rflags") & _IF)
        self._interruptible = cpu.interruptible

    def _after_run(self) -> None:
        vcpu, run = self.vcpu, self.vcpu.run
        if run.kvm_valid_regs and not vcpu.protected:
            sync_regs.fill(vcpu)
        if not self._loaded and not vcpu.protected:
            self._interrupt_flag = bool(vcpu.state.vmcb["rflags"] & _IF)
            self._interruptible = self.takes_interrupts
        run.if_flag = self._interrupt_flag
        run.flags |= lib.KVM_RUN_X86_SMM if vcpu.smm else 0
        run.cr8 = vcpu.cr8
        run.apic_base = vcpu.state.apic_base
        run.ready_for_interrupt_injection = vcpu.vm.irq.pic or self._ready()

    def _ready(self) -> bool:
        """kvm_vcpu_ready_for_interrupt_injection()."""
        pending = self.vcpu.interrupt is not None or self.exception is not None
        return self._interruptible and not pending

    def _window_is_open(self) -> bool:
        wanted = self.vcpu.run.request_interrupt_window and not self.vcpu.vm.irq.pic
        return bool(wanted) and self._ready()
