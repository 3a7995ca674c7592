"""KVM_CHECK_EXTENSION: what a capability is worth, on /dev/kvm and on a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlaunch.sim import coalesced, guest_debug, kvmclock, mce
from kvmlaunch.sim.host import Host
from kvmlaunch.sim.irq import MAX_ROUTES
from kvmlaunch.sim.slots import NR_USER_SLOTS
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = [
    "DISABLED_EXITS",
    "MAX_VCPUS",
    "MAX_VCPU_ID",
    "VCPU_MMAP_SIZE",
    "VM_TYPES",
    "system_capability",
    "vm_capability",
]

VM_TYPES = sum(
    1 << vm_type
    for vm_type in (
        lib.KVM_X86_DEFAULT_VM,
        lib.KVM_X86_SEV_VM,
        lib.KVM_X86_SEV_ES_VM,
        lib.KVM_X86_SNP_VM,
    )
)
"""Types of KVM_CREATE_VM. Of SEV and SEV-ES guests only what comes before their launch works."""

VCPU_MMAP_SIZE = 3 * 4096
"""kvm_run, the PIO data page and the coalesced MMIO ring."""

MAX_VCPUS = 1024
MAX_VCPU_ID = 4 * MAX_VCPUS

DISABLED_EXITS = (
    lib.KVM_X86_DISABLE_EXITS_MWAIT
    | lib.KVM_X86_DISABLE_EXITS_HLT
    | lib.KVM_X86_DISABLE_EXITS_PAUSE
    | lib.KVM_X86_DISABLE_EXITS_CSTATE
)
"""Exits that KVM_CAP_X86_DISABLE_EXITS can switch off."""

_NR_VCPUS = 2
_SYNC_REGS = lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS | lib.KVM_SYNC_X86_EVENTS
_XSAVE2_MIN = 4096

_PLAIN = {
    lib.KVM_CAP_IRQCHIP: 1,
    lib.KVM_CAP_MMU_SHADOW_CACHE_CONTROL: 1,
    lib.KVM_CAP_USER_MEMORY: 1,
    lib.KVM_CAP_SET_TSS_ADDR: 1,
    lib.KVM_CAP_EXT_CPUID: 1,
    lib.KVM_CAP_NR_VCPUS: _NR_VCPUS,
    lib.KVM_CAP_NR_MEMSLOTS: NR_USER_SLOTS,
    lib.KVM_CAP_MP_STATE: 1,
    lib.KVM_CAP_COALESCED_MMIO: coalesced.RING_PAGE,
    lib.KVM_CAP_SYNC_MMU: 1,
    lib.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    lib.KVM_CAP_SET_GUEST_DEBUG: 1,
    lib.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    lib.KVM_CAP_SET_BOOT_CPU_ID: 1,
    lib.KVM_CAP_IRQ_ROUTING: MAX_ROUTES,
    lib.KVM_CAP_MCE: mce.MAX_BANKS,
    lib.KVM_CAP_IRQFD: 1,
    lib.KVM_CAP_IOEVENTFD: 1,
    lib.KVM_CAP_IOEVENTFD_NO_LENGTH: 1,
    lib.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
    lib.KVM_CAP_INTERNAL_ERROR_DATA: 1,
    lib.KVM_CAP_SIGNAL_MSI: 1,
    lib.KVM_CAP_ADJUST_CLOCK: kvmclock.FLAGS,
    lib.KVM_CAP_TSC_DEADLINE_TIMER: 1,
    lib.KVM_CAP_X86_ROBUST_SINGLESTEP: 1,
    lib.KVM_CAP_SET_IDENTITY_MAP_ADDR: 1,
    lib.KVM_CAP_VCPU_EVENTS: 1,
    lib.KVM_CAP_DEBUGREGS: 1,
    lib.KVM_CAP_XSAVE: 1,
    lib.KVM_CAP_XCRS: 1,
    lib.KVM_CAP_TSC_CONTROL: 1,
    lib.KVM_CAP_GET_TSC_KHZ: 1,
    lib.KVM_CAP_MAX_VCPUS: MAX_VCPUS,
    lib.KVM_CAP_SYNC_REGS: _SYNC_REGS,
    lib.KVM_CAP_READONLY_MEM: 1,
    lib.KVM_CAP_ENABLE_CAP_VM: 1,
    lib.KVM_CAP_X86_SMM: 1,
    lib.KVM_CAP_MULTI_ADDRESS_SPACE: 2,
    lib.KVM_CAP_SPLIT_IRQCHIP: 1,
    lib.KVM_CAP_MAX_VCPU_ID: MAX_VCPU_ID,
    lib.KVM_CAP_IMMEDIATE_EXIT: 1,
    lib.KVM_CAP_X86_DISABLE_EXITS: DISABLED_EXITS,
    lib.KVM_CAP_GET_MSR_FEATURES: 1,
    lib.KVM_CAP_MSR_PLATFORM_INFO: 1,
    lib.KVM_CAP_COALESCED_PIO: 1,
    lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: (
        lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | lib.KVM_DIRTY_LOG_INITIALLY_SET
    ),
    lib.KVM_CAP_X86_USER_SPACE_MSR: 1,
    lib.KVM_CAP_X86_MSR_FILTER: 1,
    lib.KVM_CAP_ENFORCE_PV_FEATURE_CPUID: 1,
    lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE: 1,
    lib.KVM_CAP_SREGS2: 1,
    lib.KVM_CAP_SET_GUEST_DEBUG2: guest_debug.VALID,
    lib.KVM_CAP_EXIT_HYPERCALL: 1 << lib.KVM_HC_MAP_GPA_RANGE,
    lib.KVM_CAP_XSAVE2: _XSAVE2_MIN,
    lib.KVM_CAP_SYS_ATTRIBUTES: 1,
    lib.KVM_CAP_VM_TSC_CONTROL: 1,
    lib.KVM_CAP_SYSTEM_EVENT_DATA: 1,
    lib.KVM_CAP_USER_MEMORY2: 1,
    lib.KVM_CAP_MEMORY_FAULT_INFO: 1,
    lib.KVM_CAP_MEMORY_ATTRIBUTES: lib.KVM_MEMORY_ATTRIBUTE_PRIVATE,
    lib.KVM_CAP_GUEST_MEMFD: 1,
    lib.KVM_CAP_VM_TYPES: VM_TYPES,
    lib.KVM_CAP_PRE_FAULT_MEMORY: 1,
    lib.KVM_CAP_X86_APIC_BUS_CYCLES_NS: 1,
    lib.KVM_CAP_X86_GUEST_MODE: 1,
}


def system_capability(host: Host, cap: int) -> int:
    """The answer on /dev/kvm; 0 for what nobody knows."""
    if cap == lib.KVM_CAP_GUEST_MEMFD_FLAGS:
        return host.profile.guest_memfd_flags
    if cap == lib.KVM_CAP_DISABLE_QUIRKS2:
        return host.profile.quirks
    if cap in host.profile.vmsa.capabilities:
        return 1
    return int(_PLAIN.get(cap, 0))


def vm_capability(vm: Vm, cap: int) -> int:
    """The answer on a VM, which may differ."""
    if cap == lib.KVM_CAP_SYNC_REGS:
        return vm.sync_regs
    if cap == lib.KVM_CAP_READONLY_MEM:
        return int(not vm.has_protected_state)
    if cap == lib.KVM_CAP_X86_SMM:
        return int(not vm.sev.es_active)
    if cap == lib.KVM_CAP_MULTI_ADDRESS_SPACE:
        return vm.address_spaces
    if cap == lib.KVM_CAP_MEMORY_ATTRIBUTES:
        return vm.memory_attributes
    if cap == lib.KVM_CAP_GUEST_MEMFD:
        return int(vm.guest_memfd_slots)
    if cap == lib.KVM_CAP_GUEST_MEMFD_FLAGS:
        return vm.guest_memfd_flags
    return system_capability(vm.host, cap)
