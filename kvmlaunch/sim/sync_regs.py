"""Registers in ``struct kvm_run`` (KVM_CAP_SYNC_REGS; x86.c: sync_regs(), store_regs())."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlaunch.sim import registers, vcpu_events
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["fill", "take"]


def take(vcpu: Vcpu) -> None:
    """Take what user space marked as dirty: each set's mark goes when it is in. EINVAL."""
    run = vcpu.run
    vcpu.pull_state()
    vcpu.running.unload()
    # Copies: another thread may write there meanwhile.
    if run.kvm_dirty_regs & lib.KVM_SYNC_X86_REGS:
        registers.take_regs(vcpu, ffi.new("struct kvm_regs *", run.s.regs.regs))
        run.kvm_dirty_regs &= ~lib.KVM_SYNC_X86_REGS
    if run.kvm_dirty_regs & lib.KVM_SYNC_X86_SREGS:
        registers.take_sregs(vcpu, ffi.new("struct kvm_sregs *", run.s.regs.sregs))
        run.kvm_dirty_regs &= ~lib.KVM_SYNC_X86_SREGS
    if run.kvm_dirty_regs & lib.KVM_SYNC_X86_EVENTS:
        vcpu_events.take(vcpu, ffi.new("struct kvm_vcpu_events *", run.s.regs.events))
        run.kvm_dirty_regs &= ~lib.KVM_SYNC_X86_EVENTS


def fill(vcpu: Vcpu) -> None:
    """Give user space what it asked for, whatever KVM_RUN's result is."""
    wanted, regs = vcpu.run.kvm_valid_regs, vcpu.run.s.regs
    vcpu.pull_state()
    if wanted & lib.KVM_SYNC_X86_REGS:
        registers.fill_regs(vcpu, regs.regs)
    if wanted & lib.KVM_SYNC_X86_SREGS:
        registers.fill_sregs(vcpu, regs.sregs)
    if wanted & lib.KVM_SYNC_X86_EVENTS:
        events = ffi.new("struct kvm_vcpu_events *")
        vcpu_events.fill(vcpu, events)
        regs.events = events[0]
