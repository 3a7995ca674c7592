"""A vCPU and its fd: registers, CPUID, MP state, KVM_RUN (x86.c, regs.c, svm.c)."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim import caps, vcpu_ioctls
from kvmlaunch.sim.fdtable import File
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.sim.vcpu_state import VcpuState
from kvmlaunch.uapi import RealPlatform, ffi, ioctl_name, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["Vcpu", "VcpuFile"]

_FAIL_ENTRY_REASON = 0xFFFFFFFF


class Vcpu:
    """What the kernel keeps of one vCPU; it lives as long as its VM."""

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        self.vm = vm
        self.id = vcpu_id
        self.mutex = threading.RLock()
        bsp = vcpu_id == vm.bsp_id
        host = vm.host
        self.state = VcpuState(
            host.supported_xcr0,
            host.supported_xss,
            host.xsave_components,
            host.guest_limits,
            bsp=bsp,
            clear_cd_nw=not vm.disabled_quirks & lib.KVM_X86_QUIRK_CD_NW_CLEARED,
            sregs_check_efer=host.profile.sregs_check_efer,
        )
        self.lapic = bytearray(1024)
        self.events = ffi.new("struct kvm_vcpu_events *")
        self.cpuid = b""
        self.tsc_khz = vm.tsc_khz
        self.tsc_offset = bytes(8)
        self.guest_debug = 0
        self.has_run = False
        self.protected = False
        self.vmsa_spa = host.memory.alloc() if vm.is_snp_type else 0
        runnable = bsp or not vm.irq.in_kernel
        self.mp_state = lib.KVM_MP_STATE_RUNNABLE if runnable else lib.KVM_MP_STATE_UNINITIALIZED
        self.sipi_pending = False
        self.run_address = _anonymous(caps.VCPU_MMAP_SIZE)
        self.run: Any = ffi.cast("struct kvm_run *", self.run_address)

    def destroy(self) -> None:
        """The VM is gone: free the run pages and the VMSA page."""
        host = self.vm.host
        RealPlatform().munmap(self.run_address, caps.VCPU_MMAP_SIZE)
        # A page that firmware won't give back is leaked, as in the kernel.
        if self.vmsa_spa and not host.rmp.make_shared(self.vmsa_spa):
            host.memory.free(self.vmsa_spa)

    def check_run(self) -> bool:
        """KVM_RUN up to the entry: False where the entry itself failed (FAIL_ENTRY)."""
        run, vm = self.run, self.vm
        immediate = run.immediate_exit
        run.flags = 0
        waiting = self.mp_state == lib.KVM_MP_STATE_UNINITIALIZED
        if waiting and immediate:
            refuse(errno.EINTR)
        if not waiting and (run.kvm_valid_regs | run.kvm_dirty_regs) & ~vm.sync_regs:
            refuse(errno.EINVAL)
        # The kernel looks at immediate_exit before it asks the vendor module (need_init).
        if immediate:
            refuse(errno.EINTR)
        if waiting:
            return True
        if vm.sev.need_init:
            refuse(errno.EINVAL)
        if vm.is_snp_type and not self.protected:
            run.exit_reason = lib.KVM_EXIT_FAIL_ENTRY
            run.fail_entry.hardware_entry_failure_reason = _FAIL_ENTRY_REASON
            run.fail_entry.cpu = 0
            self.has_run = True
            return False
        return True


class VcpuFile(File):
    """A vCPU fd."""

    name = "vCPU"

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        vcpu.vm.get()
        self._handlers: dict[int, Callable[[Vcpu, int], int]] = dict(vcpu_ioctls.HANDLERS)

    def ioctl_names(self, request: int, arg: int) -> tuple[str, ...]:
        """The kernel's name of a vCPU ioctl."""
        return (ioctl_name(request),)

    def locks(self, request: int, arg: int) -> Sequence[threading.RLock]:
        """A vCPU serves one call at a time, KVM_RUN included."""
        return (self.vcpu.mutex,)

    def ioctl(self, request: int, arg: int) -> int:
        """One vCPU ioctl but KVM_RUN; an unknown one is EINVAL."""
        self.vcpu.vm.check_alive()
        handler = self._handlers.get(request)
        if handler is None:
            refuse(errno.EINVAL)
        return handler(self.vcpu, arg)

    def prepare_run(self, arg: int) -> bool:
        """KVM_RUN's checks; False where it is over already, with ret 0."""
        self.vcpu.vm.check_alive()
        if arg:
            refuse(errno.EINVAL)
        return self.vcpu.check_run()

    def enter(self) -> int:
        """Run the guest: without the platform's lock, and not at all so far.

        ENOSYS is never a kernel's answer to KVM_RUN. It also stands for an AP that
        would block until another vCPU starts it.
        """
        refuse(errno.ENOSYS)

    def mmap(self, length: int, offset: int) -> int:
        """The run pages. Each mapping is the same memory at the same address."""
        if offset or not 0 < length <= caps.VCPU_MMAP_SIZE:
            refuse(errno.EINVAL)
        return self.vcpu.run_address

    def release(self) -> None:
        """The vCPU itself stays in its VM."""
        self.vcpu.vm.put()


def _anonymous(length: int) -> int:
    result = RealPlatform().mmap(
        -1, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    if result.ret == -1:
        refuse(result.errno)
    return result.ret
