"""The vCPU ioctls that read and write state."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim import interrupts, msrs, registers, vcpu_events, vcpu_msrs
from kvmlaunch.sim.cpuid_table import get_cpuid, set_cpuid
from kvmlaunch.sim.enable_cap import enable_vcpu_cap
from kvmlaunch.sim.tsc import MAX_KHZ
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["HANDLERS"]

_XSAVE_SIZE = ffi.sizeof("struct kvm_xsave")
_MAX_XCRS = 16
_FPU = struct.Struct("<HHBBHQQ")


def _need_open_state(vcpu: Vcpu) -> None:
    """EINVAL once firmware has the registers."""
    if vcpu.protected:
        refuse(errno.EINVAL)


def _get_regs(vcpu: Vcpu, arg: int) -> int:
    _need_open_state(vcpu)
    out = ffi.new("struct kvm_regs *")
    registers.fill_regs(vcpu, out)
    copy_out(vcpu.vm.host.user, arg, out)
    return 0


def _set_regs(vcpu: Vcpu, arg: int) -> int:
    regs = copy_in(vcpu.vm.host.user, "kvm_regs", arg)
    _need_open_state(vcpu)
    registers.take_regs(vcpu, regs)
    return 0


def _get_sregs(vcpu: Vcpu, arg: int) -> int:
    _need_open_state(vcpu)
    out = ffi.new("struct kvm_sregs *")
    registers.fill_sregs(vcpu, out)
    copy_out(vcpu.vm.host.user, arg, out)
    return 0


def _set_sregs(vcpu: Vcpu, arg: int) -> int:
    sregs = copy_in(vcpu.vm.host.user, "kvm_sregs", arg)
    _need_open_state(vcpu)
    registers.take_sregs(vcpu, sregs)
    return 0


def _get_sregs2(vcpu: Vcpu, arg: int) -> int:
    _need_open_state(vcpu)
    out = ffi.new("struct kvm_sregs2 *")
    registers.fill_sregs(vcpu, out)
    if vcpu.state.pae_paging:
        out.flags, out.pdptrs = lib.KVM_SREGS2_FLAGS_PDPTRS_VALID, vcpu.state.pdptrs
    copy_out(vcpu.vm.host.user, arg, out)
    return 0


def _set_sregs2(vcpu: Vcpu, arg: int) -> int:
    # Before the struct is read, unlike KVM_SET_SREGS (x86.c: kvm_arch_vcpu_ioctl()).
    _need_open_state(vcpu)
    sregs = copy_in(vcpu.vm.host.user, "kvm_sregs2", arg)
    if sregs.flags & ~lib.KVM_SREGS2_FLAGS_PDPTRS_VALID:
        refuse(errno.EINVAL)
    pae = sregs.cr0 >> 31 & sregs.cr4 >> 5 & ~(sregs.efer >> 10) & 1
    if sregs.flags and not pae:
        refuse(errno.EINVAL)
    registers.take_sregs(vcpu, sregs)
    if sregs.flags:
        vcpu.state.pdptrs = list(sregs.pdptrs)
    return 0


def _get_debugregs(vcpu: Vcpu, arg: int) -> int:
    _need_open_state(vcpu)
    out = ffi.new("struct kvm_debugregs *")
    out.db, out.dr6, out.dr7 = vcpu.state.db, vcpu.state.dr6, vcpu.state.dr7
    copy_out(vcpu.vm.host.user, arg, out)
    return 0


def _set_debugregs(vcpu: Vcpu, arg: int) -> int:
    regs = copy_in(vcpu.vm.host.user, "kvm_debugregs", arg)
    _need_open_state(vcpu)
    if regs.flags or not vcpu.state.set_debugregs(list(regs.db), regs.dr6, regs.dr7):
        refuse(errno.EINVAL)
    return 0


def _get_xcrs(vcpu: Vcpu, arg: int) -> int:
    _need_open_state(vcpu)
    out = ffi.new("struct kvm_xcrs *")
    out.nr_xcrs = 1
    out.xcrs[0].value = vcpu.state.xcr0
    copy_out(vcpu.vm.host.user, arg, out)
    return 0


def _set_xcrs(vcpu: Vcpu, arg: int) -> int:
    xcrs = copy_in(vcpu.vm.host.user, "kvm_xcrs", arg)
    _need_open_state(vcpu)
    if xcrs.nr_xcrs > _MAX_XCRS or xcrs.flags:
        refuse(errno.EINVAL)
    for at in range(xcrs.nr_xcrs):
        if xcrs.xcrs[at].xcr == 0:
            if not vcpu.state.set_xcr0(xcrs.xcrs[at].value):
                refuse(errno.EINVAL)
            break
    return 0


def _set_guest_debug(vcpu: Vcpu, arg: int) -> int:
    debug = copy_in(vcpu.vm.host.user, "kvm_guest_debug", arg)
    _need_open_state(vcpu)
    vcpu.debug.set(debug)
    return 0


def _get_msrs(vcpu: Vcpu, arg: int) -> int:
    def read(index: int) -> int | None:
        if vcpu.protected and vcpu.state.passes_through(index):
            return None
        return vcpu_msrs.read(vcpu, index, by_guest=False)

    return msrs.transfer(vcpu.vm.host.user, arg, read, write_back=True)


def _set_msrs(vcpu: Vcpu, arg: int) -> int:
    def write(index: int, value: int) -> bool:
        if vcpu.protected and vcpu.state.passes_through(index):
            return False
        return vcpu_msrs.write(vcpu, index, value, by_guest=False)

    return msrs.transfer(vcpu.vm.host.user, arg, store=write)


def _get_fpu(vcpu: Vcpu, arg: int) -> int:
    """Not refused after encryption: the kernel hands out what it last had."""
    image = vcpu.state.fpu.legacy
    fcw, fsw, ftw, _, fop, rip, rdp = _FPU.unpack_from(image)
    out = ffi.new("struct kvm_fpu *")
    ffi.buffer(out.fpr)[:] = image[32:160]
    out.fcw, out.fsw, out.ftwx, out.last_opcode = fcw, fsw, ftw, fop
    out.last_ip, out.last_dp = rip, rdp
    ffi.buffer(out.xmm)[:] = image[160:416]
    copy_out(vcpu.vm.host.user, arg, out)
    return 0


def _set_fpu(vcpu: Vcpu, arg: int) -> int:
    fpu = copy_in(vcpu.vm.host.user, "kvm_fpu", arg)
    head = _FPU.pack(fpu.fcw, fpu.fsw, fpu.ftwx, 0, fpu.last_opcode, fpu.last_ip, fpu.last_dp)
    vcpu.state.fpu.set_legacy(head, bytes(ffi.buffer(fpu.fpr)), bytes(ffi.buffer(fpu.xmm)))
    return 0


def _get_xsave(vcpu: Vcpu, arg: int) -> int:
    vcpu.vm.host.user.write(arg, vcpu.state.fpu.get_xsave(_XSAVE_SIZE))
    return 0


def _set_xsave(vcpu: Vcpu, arg: int) -> int:
    image = vcpu.vm.host.user.read(arg, _XSAVE_SIZE)
    if not vcpu.state.fpu.set_xsave(image):
        refuse(errno.EINVAL)
    return 0


def _get_mp_state(vcpu: Vcpu, arg: int) -> int:
    vcpu.accept_events()
    copy_out(vcpu.vm.host.user, arg, ffi.new("struct kvm_mp_state *", [vcpu.mp_state]))
    return 0


def _set_mp_state(vcpu: Vcpu, arg: int) -> int:
    wanted = copy_in(vcpu.vm.host.user, "kvm_mp_state", arg).mp_state
    apic_states = (
        lib.KVM_MP_STATE_UNINITIALIZED,
        lib.KVM_MP_STATE_HALTED,
        lib.KVM_MP_STATE_AP_RESET_HOLD,
        lib.KVM_MP_STATE_INIT_RECEIVED,
        lib.KVM_MP_STATE_SIPI_RECEIVED,
    )
    if wanted != lib.KVM_MP_STATE_RUNNABLE and (
        wanted not in apic_states or not vcpu.vm.irq.in_kernel
    ):
        refuse(errno.EINVAL)
    waits_for_start = (lib.KVM_MP_STATE_INIT_RECEIVED, lib.KVM_MP_STATE_SIPI_RECEIVED)
    if wanted in waits_for_start and (vcpu.smm or vcpu.smi_pending):
        refuse(errno.EINVAL)
    vcpu.sipi_pending = wanted == lib.KVM_MP_STATE_SIPI_RECEIVED
    vcpu.mp_state = lib.KVM_MP_STATE_INIT_RECEIVED if vcpu.sipi_pending else wanted
    return 0


def _get_lapic(vcpu: Vcpu, arg: int) -> int:
    _need_lapic(vcpu)
    vcpu.vm.host.user.write(arg, vcpu.apic.get_state())
    return 0


def _set_lapic(vcpu: Vcpu, arg: int) -> int:
    _need_lapic(vcpu)
    vcpu.apic.set_state(vcpu.vm.host.user.read(arg, len(vcpu.apic.regs)))
    vcpu.vm.scheduler.wake()
    return 0


def _need_lapic(vcpu: Vcpu) -> None:
    if not vcpu.vm.irq.in_kernel:
        refuse(errno.EINVAL)


def _get_vcpu_events(vcpu: Vcpu, arg: int) -> int:
    out = ffi.new("struct kvm_vcpu_events *")
    vcpu_events.fill(vcpu, out)
    copy_out(vcpu.vm.host.user, arg, out)
    return 0


def _set_vcpu_events(vcpu: Vcpu, arg: int) -> int:
    vcpu_events.take(vcpu, copy_in(vcpu.vm.host.user, "kvm_vcpu_events", arg))
    return 0


def _set_signal_mask(vcpu: Vcpu, arg: int) -> int:
    """Signals that are blocked during KVM_RUN; the thread's own mask without an argument."""
    mask = None
    if arg:
        user = vcpu.vm.host.user
        header = copy_in(user, "kvm_signal_mask", arg)
        if header.len != 8:
            refuse(errno.EINVAL)
        mask = int.from_bytes(user.read(arg + ffi.sizeof("struct kvm_signal_mask"), 8), "little")
    vcpu.signal_mask = mask
    return 0


def _interrupt(vcpu: Vcpu, arg: int) -> int:
    vector = copy_in(vcpu.vm.host.user, "kvm_interrupt", arg).irq
    if vector >= 256:
        refuse(errno.EINVAL)
    if vcpu.vm.irq.pic:
        refuse(errno.ENXIO)
    if vcpu.vm.irq.split and vcpu.interrupt is not None:
        refuse(errno.EEXIST)
    vcpu.interrupt = vector
    return 0


def _nmi(vcpu: Vcpu, arg: int) -> int:
    interrupts.pend_nmi(vcpu)
    vcpu.vm.scheduler.wake()
    return 0


def _smi(vcpu: Vcpu, arg: int) -> int:
    vcpu.pend_smi()
    return 0


def _set_tsc_khz(vcpu: Vcpu, arg: int) -> int:
    khz = arg & 0xFFFFFFFF
    if khz >= MAX_KHZ:
        refuse(errno.EINVAL)
    vcpu.tsc_khz = khz or vcpu.vm.host.tsc_khz
    return 0


def _get_tsc_khz(vcpu: Vcpu, arg: int) -> int:
    return vcpu.tsc_khz


def _tpr_access_reporting(vcpu: Vcpu, arg: int) -> int:
    """Taken, and without effect: it was for CPUs whose task priority isn't virtualised."""
    control = copy_in(vcpu.vm.host.user, "kvm_tpr_access_ctl", arg)
    if control.flags:
        refuse(errno.EINVAL)
    copy_out(vcpu.vm.host.user, arg, control)
    return 0


def _set_vapic_addr(vcpu: Vcpu, arg: int) -> int:
    """As KVM_TPR_ACCESS_REPORTING."""
    _need_lapic(vcpu)
    address = copy_in(vcpu.vm.host.user, "kvm_vapic_addr", arg).vapic_addr
    if address and not vcpu.vm.slots.writable(address, 4):
        refuse(errno.EINVAL)
    return 0


def _setup_mce(vcpu: Vcpu, arg: int) -> int:
    cap = int.from_bytes(vcpu.vm.host.user.read(arg, 8), "little")
    if not vcpu.state.machine_check.set_up(cap):
        refuse(errno.EINVAL)
    return 0


def _translate(vcpu: Vcpu, arg: int) -> int:
    """Without paging an address is its own translation; page tables need a CPU (ENOSYS)."""
    user = vcpu.vm.host.user
    out = copy_in(user, "kvm_translation", arg)
    if vcpu.state.cr0 >> 31:
        refuse(errno.ENOSYS)
    out.physical_address, out.valid, out.writeable, out.usermode = out.linear_address, 1, 1, 0
    copy_out(user, arg, out)
    return 0


def _enable_cap(vcpu: Vcpu, arg: int) -> int:
    return enable_vcpu_cap(vcpu, copy_in(vcpu.vm.host.user, "kvm_enable_cap", arg))


def _get_device_attr(vcpu: Vcpu, arg: int) -> int:
    address = _tsc_offset_address(vcpu, arg)
    vcpu.vm.host.user.write(address, vcpu.tsc_offset.to_bytes(8, "little"))
    return 0


def _set_device_attr(vcpu: Vcpu, arg: int) -> int:
    offset = vcpu.vm.host.user.read(_tsc_offset_address(vcpu, arg), 8)
    vcpu.vm.tsc.set_offset(vcpu, int.from_bytes(offset, "little"))
    return 0


def _has_device_attr(vcpu: Vcpu, arg: int) -> int:
    _tsc_offset_address(vcpu, arg)
    return 0


def _tsc_offset_address(vcpu: Vcpu, arg: int) -> int:
    """Where the value of KVM_VCPU_TSC_OFFSET is, the only attribute there is."""
    attr = copy_in(vcpu.vm.host.user, "kvm_device_attr", arg)
    if attr.group != lib.KVM_VCPU_TSC_CTRL or attr.attr != lib.KVM_VCPU_TSC_OFFSET:
        refuse(errno.ENXIO)
    return int(attr.addr)


def _unsimulated(vcpu: Vcpu, arg: int) -> int:
    """ENOSYS, as on the VM fd: the simulator has nothing behind it."""
    refuse(errno.ENOSYS)


def _pre_fault(vcpu: Vcpu, arg: int) -> int:
    """KVM_PRE_FAULT_MEMORY: gpa and size come back as what is left, in either case."""
    user = vcpu.vm.host.user
    want = copy_in(user, "kvm_pre_fault_memory", arg)
    unaligned = want.gpa % PAGE_SIZE or want.size % PAGE_SIZE
    if want.flags or unaligned or not want.size or want.gpa + want.size >> 64:
        refuse(errno.EINVAL)
    done, failure = 0, 0
    while done < want.size and not failure:
        failure = _pre_fault_page(vcpu, (want.gpa + done) // PAGE_SIZE)
        done += 0 if failure else PAGE_SIZE
    want.gpa += done
    want.size -= done
    copy_out(user, arg, want)
    if not done:
        refuse(failure)
    return 0


def _pre_fault_page(vcpu: Vcpu, gfn: int) -> int:
    vm = vcpu.vm
    if not vm.pre_fault_allowed:
        return errno.EOPNOTSUPP
    slot, private = vm.slots.find(gfn), vm.attributes.is_private(gfn)
    if slot is None:
        return errno.EFAULT if private else errno.ENOENT  # kvm_handle_noslot_fault()
    if not private:
        try:
            vm.host.user.read(slot.hva + (gfn - slot.base_gfn) * PAGE_SIZE, 1)
        except OSError:
            return errno.EFAULT
        return 0
    if vm.memory.private_page(gfn * PAGE_SIZE) is None:
        return errno.EFAULT
    return 0


HANDLERS: Mapping[int, Callable[[Vcpu, int], int]] = MappingProxyType(
    {
        lib.KVM_GET_REGS: _get_regs,
        lib.KVM_SET_REGS: _set_regs,
        lib.KVM_GET_SREGS: _get_sregs,
        lib.KVM_SET_SREGS: _set_sregs,
        lib.KVM_GET_SREGS2: _get_sregs2,
        lib.KVM_SET_SREGS2: _set_sregs2,
        lib.KVM_GET_DEBUGREGS: _get_debugregs,
        lib.KVM_SET_DEBUGREGS: _set_debugregs,
        lib.KVM_GET_XCRS: _get_xcrs,
        lib.KVM_SET_XCRS: _set_xcrs,
        lib.KVM_SET_GUEST_DEBUG: _set_guest_debug,
        lib.KVM_GET_MSRS: _get_msrs,
        lib.KVM_SET_MSRS: _set_msrs,
        lib.KVM_GET_FPU: _get_fpu,
        lib.KVM_SET_FPU: _set_fpu,
        lib.KVM_GET_XSAVE: _get_xsave,
        lib.KVM_GET_XSAVE2: _get_xsave,
        lib.KVM_SET_XSAVE: _set_xsave,
        lib.KVM_GET_MP_STATE: _get_mp_state,
        lib.KVM_SET_MP_STATE: _set_mp_state,
        lib.KVM_GET_LAPIC: _get_lapic,
        lib.KVM_SET_LAPIC: _set_lapic,
        lib.KVM_SET_CPUID2: set_cpuid,
        lib.KVM_GET_CPUID2: get_cpuid,
        lib.KVM_GET_VCPU_EVENTS: _get_vcpu_events,
        lib.KVM_SET_VCPU_EVENTS: _set_vcpu_events,
        lib.KVM_SET_SIGNAL_MASK: _set_signal_mask,
        lib.KVM_INTERRUPT: _interrupt,
        lib.KVM_NMI: _nmi,
        lib.KVM_SMI: _smi,
        lib.KVM_SET_TSC_KHZ: _set_tsc_khz,
        lib.KVM_GET_TSC_KHZ: _get_tsc_khz,
        lib.KVM_PRE_FAULT_MEMORY: _pre_fault,
        lib.KVM_TRANSLATE: _translate,
        lib.KVM_TPR_ACCESS_REPORTING: _tpr_access_reporting,
        lib.KVM_SET_VAPIC_ADDR: _set_vapic_addr,
        lib.KVM_X86_SETUP_MCE: _setup_mce,
        lib.KVM_X86_SET_MCE: _unsimulated,
        lib.KVM_ENABLE_CAP: _enable_cap,
        lib.KVM_GET_DEVICE_ATTR: _get_device_attr,
        lib.KVM_SET_DEVICE_ATTR: _set_device_attr,
        lib.KVM_HAS_DEVICE_ATTR: _has_device_attr,
        lib.KVM_GET_STATS_FD: _unsimulated,
    }
)
"""Request -> handler, KVM_RUN left out."""
