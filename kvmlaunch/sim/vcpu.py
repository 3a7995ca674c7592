"""A vCPU and its fd: registers, CPUID, MP state, KVM_RUN (x86.c, regs.c, svm.c)."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim import caps, msrs, vcpu_commands, vcpu_ioctls
from kvmlaunch.sim.cpuid_table import find_leaf
from kvmlaunch.sim.fdtable import File
from kvmlaunch.sim.guest_debug import GuestDebug
from kvmlaunch.sim.lapic import LocalApic
from kvmlaunch.sim.plain_state import from_vmsa
from kvmlaunch.sim.sev_es import SevEsState
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.sim.vcpu_run import VcpuRun
from kvmlaunch.sim.vcpu_state import VcpuState
from kvmlaunch.uapi import ffi, ioctl_name, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["Vcpu", "VcpuFile"]


class Vcpu:
    """What the kernel keeps of one vCPU; it lives as long as its VM."""

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        self.vm = vm
        self.id = vcpu_id
        self.mutex = threading.RLock()
        bsp = vcpu_id == vm.bsp_id
        host = vm.host
        # First of all: there may be none.
        self.run_pages = host.user.new_run_pages(caps.VCPU_MMAP_SIZE)
        self.state = VcpuState(
            host.supported_xcr0,
            host.supported_xss,
            host.xsave_components,
            host.guest_limits,
            bsp=bsp,
            clear_cd_nw=not vm.disabled_quirks & lib.KVM_X86_QUIRK_CD_NW_CLEARED,
            sregs_check_efer=host.profile.sregs_check_efer,
        )
        self.cpuid = b""
        self.tsc_khz = vm.tsc_khz
        self.tsc_offset = 0
        self.enforce_pv_features = False
        self.signal_mask: int | None = None
        self.has_run = False
        self.protected = False
        own_vmsa = vm.is_snp_type and not vm.sev.direct_vmsa
        self.vmsa_spa = host.memory.alloc() if own_vmsa else None
        """Of KVM's own VMSA page."""
        runnable = bsp or not vm.irq.in_kernel
        self.mp_state = lib.KVM_MP_STATE_RUNNABLE if runnable else lib.KVM_MP_STATE_UNINITIALIZED
        self.sipi_pending = False
        self.interrupt: int | None = None
        self.nmi_pending = 0
        self.nmi_masked = False
        self.init_pending = False
        self.sipi_vector = 0
        self.smm = self.smi_pending = self.smm_inside_nmi = False
        self.update_state = False
        """KVM_REQ_UPDATE_PROTECTED_GUEST_STATE."""
        self.apic = LocalApic(self)
        self.sev_es = SevEsState(self) if vm.is_snp_type else None
        self.running = VcpuRun(self)
        self.debug = GuestDebug(self)
        vm.tsc.synchronize(self, None)
        self.seat = vm.scheduler.add(self)
        self.run: Any = ffi.cast("struct kvm_run *", self.run_pages.address)

    def destroy(self) -> None:
        """The VM is gone: free the run pages and the VMSA page."""
        host = self.vm.host
        host.user.free_run_pages(self.run_pages, caps.VCPU_MMAP_SIZE)
        # A page that firmware won't give back is leaked, as in the kernel.
        if self.vmsa_spa is not None and not host.rmp.make_shared(self.vmsa_spa):
            host.memory.free(self.vmsa_spa)

    def has_events(self) -> bool:
        """kvm_vcpu_has_events(): something that ends a wait. Takes no lock."""
        if ((self.init_pending or self.sipi_pending) and not self.smm) or self.update_state:
            return True
        if self.mp_state in (lib.KVM_MP_STATE_UNINITIALIZED, lib.KVM_MP_STATE_INIT_RECEIVED):
            return False  # nothing else starts it
        if self.running.exception is not None or (self.nmi_pending and not self.nmi_masked):
            return True
        if self.smi_pending and not self.smm:
            return True
        waits = self.interrupt is not None or self.apic.has_interrupt()
        return waits and self.running.takes_interrupts

    def can_run(self) -> bool:
        """kvm_arch_vcpu_runnable(). Takes no lock."""
        return self.mp_state == lib.KVM_MP_STATE_RUNNABLE or self.has_events()

    def interrupted(self) -> bool:
        """Whether its thread, which asks, was told to leave KVM_RUN."""
        return bool(self.run.immediate_exit) or self.vm.host.user.signal_pending(self.signal_mask)

    def accept_events(self) -> None:
        """kvm_apic_accept_events(): INIT, which waits for the end of SMM, then SIPI."""
        if self.smm:
            self.sipi_pending = False
            return
        if self.init_pending:
            self.init_pending = False
            self.reset()
            bsp = self.id == self.vm.bsp_id
            self.mp_state = lib.KVM_MP_STATE_RUNNABLE if bsp else lib.KVM_MP_STATE_INIT_RECEIVED
        if self.sipi_pending:
            self.sipi_pending = False
            if self.mp_state == lib.KVM_MP_STATE_INIT_RECEIVED:
                self._deliver_sipi()
                self.mp_state = lib.KVM_MP_STATE_RUNNABLE

    def reset(self) -> None:
        """kvm_vcpu_reset() for an INIT: registers, but not those that firmware has."""
        self.interrupt, self.running.exception = None, None
        self.running.shadow = self.running.nmi_blocked = False
        self.nmi_pending, self.smi_pending = 0, False
        self.apic.reset()
        self.state.msrs.update(dict.fromkeys(msrs.RESET_BY_INIT, 0))
        if self.vm.irq.in_kernel:
            self.state.msrs[msrs.PV_EOI_EN] = 0
        if self.sev_es is not None:
            self.sev_es.init_event()
            return
        self.pull_state()
        signature = find_leaf(self.cpuid, 1)
        self.state.init_event(None if signature is None else signature.eax)
        self.running.unload()

    @property
    def nmis_blocked(self) -> bool:
        """svm_get_nmi_mask(): until the guest is done with the one that it got."""
        return self.nmi_masked or self.running.nmi_blocked

    @property
    def smbase(self) -> int:
        """Where the memory of SMM is."""
        return self.state.msrs[msrs.SMBASE]

    @smbase.setter
    def smbase(self, value: int) -> None:
        self.state.msrs[msrs.SMBASE] = value

    def pend_smi(self) -> None:
        """kvm_inject_smi(); SMM and encrypted state don't go together."""
        if self.sev_es is None:
            self.smi_pending = True
            self.vm.scheduler.wake()

    def set_smm(self, inside: bool) -> None:
        """kvm_smm_changed(), where it runs: from now on its memory is another."""
        self.smm = inside
        self.smm_inside_nmi = False
        self.vm.slots.use_space(int(inside))

    def _deliver_sipi(self) -> None:
        if self.sev_es is not None:
            self.sev_es.deliver_sipi()
        else:
            self.pull_state()
            self.state.start_at(self.sipi_vector)
            self.running.unload()

    @property
    def cr8(self) -> int:
        """kvm_get_cr8(): the task priority, which is the APIC's if that is in the kernel."""
        return self.apic.cr8 if self.vm.irq.in_kernel else self.state.cr8

    @cr8.setter
    def cr8(self, value: int) -> None:
        if self.vm.irq.in_kernel:
            self.apic.cr8 = value
        else:
            self.state.cr8 = value

    def guest_tsc(self) -> int:
        """The TSC, which counts what the guest has executed, not the time of the host."""
        return self.vm.guest_ticks + self.tsc_offset & msrs.U64

    def set_tsc_offset(self, offset: int) -> None:
        """kvm_vcpu_write_tsc_offset()."""
        self.tsc_offset = offset & msrs.U64
        self.running.set_tsc_offset(self.tsc_offset)

    def pull_state(self) -> None:
        """Bring the registers of a plain guest from the CPU to where the ioctls find them."""
        if self.sev_es is not None:
            return
        vmsa = self.running.save()
        if vmsa is not None:
            from_vmsa(self.state, vmsa, self.running.live_cpu.read("cr8"))


class VcpuFile(File):
    """A vCPU fd."""

    name = "vCPU"

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        vcpu.vm.get()
        self._handlers: dict[int, Callable[[Vcpu, int], int]] = dict(vcpu_ioctls.HANDLERS)
        self._handlers[lib.KVM_MEMORY_ENCRYPT_OP] = vcpu_commands.encrypt_op

    def ioctl_names(self, request: int, arg: int) -> tuple[str, ...]:
        """The kernel's name of a vCPU ioctl, and of the command behind KVM_MEMORY_ENCRYPT_OP."""
        if request != lib.KVM_MEMORY_ENCRYPT_OP:
            return (ioctl_name(request),)
        return (ioctl_name(request), vcpu_commands.command_name(self.vcpu, arg))

    def locks(self, request: int, arg: int) -> Sequence[threading.RLock]:
        """A vCPU serves one call at a time, KVM_RUN included."""
        return (self.vcpu.mutex,)

    def ioctl(self, request: int, arg: int) -> int:
        """One vCPU ioctl but KVM_RUN; an unknown one is EINVAL."""
        self.vcpu.vm.check_alive()
        handler = self._handlers.get(request)
        if handler is None:
            refuse(errno.EINVAL)
        self.vcpu.pull_state()
        result = handler(self.vcpu, arg)
        if self.vcpu.sev_es is None and ioctl_name(request).startswith("KVM_SET_"):
            self.vcpu.running.unload()
        return result

    def prepare_run(self, arg: int) -> None:
        """KVM_RUN's checks of the call itself."""
        self.vcpu.vm.check_alive()
        if arg:
            refuse(errno.EINVAL)

    def enter(self) -> int:
        """Run the guest, without the host's lock. 0 where ``struct kvm_run`` has an exit."""
        return self.vcpu.running.run()

    def mmap(self, length: int, offset: int) -> int:
        """The run pages. Each mapping is the same memory at the same address."""
        if offset or not 0 < length <= caps.VCPU_MMAP_SIZE:
            refuse(errno.EINVAL)
        return self.vcpu.run_pages.address

    def hold(self) -> None:
        """A call begins."""
        self.vcpu.vm.get()

    def let_go(self, *, last: bool) -> bool:
        """It has ended."""
        return self.vcpu.vm.let_go(last=last)

    def release(self) -> None:
        """The vCPU itself stays in its VM."""
        self.vcpu.vm.put()
