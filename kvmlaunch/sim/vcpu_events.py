"""KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS: what is on its way to the guest (x86.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim.interrupts import most_nmis
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["fill", "take"]

_REPORTED = (
    lib.KVM_VCPUEVENT_VALID_NMI_PENDING
    | lib.KVM_VCPUEVENT_VALID_SHADOW
    | lib.KVM_VCPUEVENT_VALID_SMM
)
# Payload and triple fault need capabilities that nobody can enable here.
_SETTABLE = _REPORTED | lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR
_NMI_VECTOR = 2
_SHADOWS = 1 << 0 | 1 << 1  # KVM_X86_SHADOW_INT_MOV_SS, _STI; AMD's CPUs know one


def fill(vcpu: Vcpu, out: Any) -> None:
    """kvm_vcpu_ioctl_x86_get_vcpu_events()."""
    running = vcpu.running
    if running.exception is not None:
        vector, code = running.exception
        out.exception.injected, out.exception.nr = 1, vector
        out.exception.has_error_code = code is not None
        out.exception.error_code = code or 0
    if vcpu.interrupt is not None:
        out.interrupt.injected, out.interrupt.nr = 1, vcpu.interrupt
    out.interrupt.shadow = _SHADOWS if running.shadow else 0
    out.nmi.pending = vcpu.nmi_pending
    out.nmi.masked = vcpu.nmis_blocked
    out.smi.smm, out.smi.pending = vcpu.smm, vcpu.smi_pending
    out.smi.smm_inside_nmi, out.smi.latched_init = vcpu.smm_inside_nmi, vcpu.init_pending
    out.flags = _REPORTED


def take(vcpu: Vcpu, events: Any) -> None:
    """kvm_vcpu_ioctl_x86_set_vcpu_events(). EINVAL."""
    if events.flags & ~_SETTABLE:
        refuse(errno.EINVAL)
    exception = events.exception
    if exception.injected and (exception.nr > 31 or exception.nr == _NMI_VECTOR):
        refuse(errno.EINVAL)
    smm = events.flags & lib.KVM_VCPUEVENT_VALID_SMM and (events.smi.smm or events.smi.pending)
    if smm and vcpu.mp_state == lib.KVM_MP_STATE_INIT_RECEIVED:
        refuse(errno.EINVAL)
    running = vcpu.running
    code = exception.error_code if exception.has_error_code else None
    running.exception = (exception.nr, code) if exception.injected else None
    vcpu.interrupt = events.interrupt.nr if events.interrupt.injected else None
    if events.flags & lib.KVM_VCPUEVENT_VALID_SHADOW:
        running.shadow = bool(events.interrupt.shadow)
    # Delivering an NMI blocks the next one, so the injected one comes before that.
    blocked = bool(events.nmi.masked and not events.nmi.injected)
    if events.flags & lib.KVM_VCPUEVENT_VALID_NMI_PENDING:
        vcpu.nmi_pending = min(events.nmi.pending, most_nmis(blocked=blocked))
    injected = bool(events.nmi.injected)
    vcpu.nmi_pending = min(vcpu.nmi_pending + injected, most_nmis(blocked=False))
    if vcpu.sev_es is None:
        running.nmi_blocked = blocked
    else:
        vcpu.nmi_masked = blocked
    if events.flags & lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR and vcpu.vm.irq.in_kernel:
        vcpu.sipi_vector = events.sipi_vector & 0xFF
    if events.flags & lib.KVM_VCPUEVENT_VALID_SMM and vcpu.sev_es is None:
        _take_smm(vcpu, events.smi)
    vcpu.vm.scheduler.wake()


def _take_smm(vcpu: Vcpu, smi: Any) -> None:
    if vcpu.smm != bool(smi.smm):
        # Its memory changes when it runs next: now it may be another vCPU that does.
        vcpu.smm, vcpu.smm_inside_nmi = bool(smi.smm), False
    vcpu.smi_pending = bool(smi.pending)
    if smi.smm:
        vcpu.smm_inside_nmi = bool(smi.smm_inside_nmi)
    if vcpu.vm.irq.in_kernel:
        vcpu.init_pending = bool(smi.latched_init)
