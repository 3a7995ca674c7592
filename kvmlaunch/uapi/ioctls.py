"""Names of the requests and of the structs behind them, for messages and records."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvmlaunch.uapi._ext import lib

__all__ = ["ARGUMENT", "COMMAND_ARGUMENT", "command_name", "ioctl_name"]

# Request -> struct behind its argument; "" where the argument is a plain value.
# Some system, VM and vCPU ioctls share a number; they share the struct, too.
_STRUCTS = {
    "KVM_GET_API_VERSION": "",
    "KVM_CREATE_VM": "",
    "KVM_GET_MSR_INDEX_LIST": "kvm_msr_list",
    "KVM_CHECK_EXTENSION": "",
    "KVM_GET_VCPU_MMAP_SIZE": "",
    "KVM_GET_SUPPORTED_CPUID": "kvm_cpuid2",
    "KVM_GET_EMULATED_CPUID": "kvm_cpuid2",
    "KVM_GET_MSR_FEATURE_INDEX_LIST": "kvm_msr_list",
    "KVM_X86_GET_MCE_CAP_SUPPORTED": "",
    "KVM_CREATE_VCPU": "",
    "KVM_GET_DIRTY_LOG": "kvm_dirty_log",
    "KVM_SET_NR_MMU_PAGES": "",
    "KVM_SET_USER_MEMORY_REGION": "kvm_userspace_memory_region",
    "KVM_SET_TSS_ADDR": "",
    "KVM_SET_IDENTITY_MAP_ADDR": "",
    "KVM_SET_USER_MEMORY_REGION2": "kvm_userspace_memory_region2",
    "KVM_CREATE_IRQCHIP": "",
    "KVM_IRQ_LINE": "kvm_irq_level",
    "KVM_IRQ_LINE_STATUS": "kvm_irq_level",
    "KVM_REGISTER_COALESCED_MMIO": "kvm_coalesced_mmio_zone",
    "KVM_UNREGISTER_COALESCED_MMIO": "kvm_coalesced_mmio_zone",
    "KVM_SET_GSI_ROUTING": "kvm_irq_routing",
    "KVM_IRQFD": "kvm_irqfd",
    "KVM_CREATE_PIT2": "kvm_pit_config",
    "KVM_SET_BOOT_CPU_ID": "",
    "KVM_IOEVENTFD": "kvm_ioeventfd",
    "KVM_SET_CLOCK": "kvm_clock_data",
    "KVM_GET_CLOCK": "kvm_clock_data",
    "KVM_SET_TSC_KHZ": "",
    "KVM_GET_TSC_KHZ": "",
    "KVM_ENABLE_CAP": "kvm_enable_cap",
    "KVM_SIGNAL_MSI": "kvm_msi",
    "KVM_MEMORY_ENCRYPT_OP": "kvm_sev_cmd",
    "KVM_MEMORY_ENCRYPT_REG_REGION": "kvm_enc_region",
    "KVM_MEMORY_ENCRYPT_UNREG_REGION": "kvm_enc_region",
    "KVM_CLEAR_DIRTY_LOG": "kvm_clear_dirty_log",
    "KVM_X86_SET_MSR_FILTER": "kvm_msr_filter",
    "KVM_GET_STATS_FD": "",
    "KVM_SET_MEMORY_ATTRIBUTES": "kvm_memory_attributes",
    "KVM_CREATE_GUEST_MEMFD": "kvm_create_guest_memfd",
    "KVM_SET_DEVICE_ATTR": "kvm_device_attr",
    "KVM_GET_DEVICE_ATTR": "kvm_device_attr",
    "KVM_HAS_DEVICE_ATTR": "kvm_device_attr",
    "KVM_RUN": "",
    "KVM_GET_REGS": "kvm_regs",
    "KVM_SET_REGS": "kvm_regs",
    "KVM_GET_SREGS": "kvm_sregs",
    "KVM_SET_SREGS": "kvm_sregs",
    "KVM_TRANSLATE": "kvm_translation",
    "KVM_INTERRUPT": "kvm_interrupt",
    "KVM_GET_MSRS": "kvm_msrs",
    "KVM_SET_MSRS": "kvm_msrs",
    "KVM_SET_SIGNAL_MASK": "kvm_signal_mask",
    "KVM_GET_FPU": "kvm_fpu",
    "KVM_SET_FPU": "kvm_fpu",
    "KVM_GET_LAPIC": "kvm_lapic_state",
    "KVM_SET_LAPIC": "kvm_lapic_state",
    "KVM_SET_CPUID2": "kvm_cpuid2",
    "KVM_GET_CPUID2": "kvm_cpuid2",
    "KVM_TPR_ACCESS_REPORTING": "kvm_tpr_access_ctl",
    "KVM_SET_VAPIC_ADDR": "kvm_vapic_addr",
    "KVM_GET_MP_STATE": "kvm_mp_state",
    "KVM_SET_MP_STATE": "kvm_mp_state",
    "KVM_NMI": "",
    "KVM_SMI": "",
    "KVM_SET_GUEST_DEBUG": "kvm_guest_debug",
    "KVM_X86_SETUP_MCE": "",
    "KVM_X86_SET_MCE": "kvm_x86_mce",
    "KVM_GET_VCPU_EVENTS": "kvm_vcpu_events",
    "KVM_SET_VCPU_EVENTS": "kvm_vcpu_events",
    "KVM_GET_DEBUGREGS": "kvm_debugregs",
    "KVM_SET_DEBUGREGS": "kvm_debugregs",
    "KVM_GET_XSAVE": "kvm_xsave",
    "KVM_SET_XSAVE": "kvm_xsave",
    "KVM_GET_XCRS": "kvm_xcrs",
    "KVM_SET_XCRS": "kvm_xcrs",
    "KVM_GET_SREGS2": "kvm_sregs2",
    "KVM_SET_SREGS2": "kvm_sregs2",
    "KVM_GET_XSAVE2": "kvm_xsave",
    "KVM_PRE_FAULT_MEMORY": "kvm_pre_fault_memory",
    "SEV_ISSUE_CMD": "sev_issue_cmd",
}

_COMMANDS = {
    "KVM_SEV_INIT2": "kvm_sev_init",
    "KVM_SEV_SNP_LAUNCH_START": "kvm_sev_snp_launch_start",
    "KVM_SEV_SNP_LAUNCH_UPDATE": "kvm_sev_snp_launch_update",
    "KVM_SEV_SNP_LAUNCH_FINISH": "kvm_sev_snp_launch_finish",
    "KVM_SEV_SNP_ENABLE_REQ_CERTS": "",
    "KVM_SEV_SNP_GET_VCPU_STATE": "kvm_sev_snp_vcpu_state",
    "KVM_SEV_SNP_SET_VCPU_STATE": "kvm_sev_snp_vcpu_state",
}

ARGUMENT: Mapping[str, str] = MappingProxyType(_STRUCTS)
"""Request name -> name of the struct that its argument points to ("" = a value)."""

COMMAND_ARGUMENT: Mapping[str, str] = MappingProxyType(_COMMANDS)
"""SNP command name of KVM_MEMORY_ENCRYPT_OP -> name of the struct behind ``data``."""

_NAMES = {getattr(lib, name): name for name in _STRUCTS}
_COMMAND_NAMES = {getattr(lib, name): name for name in _COMMANDS}


def ioctl_name(request: int) -> str:
    """The kernel's name of a request number, or the number in hex."""
    return _NAMES.get(request, f"{request:#x}")


def command_name(command: int) -> str:
    """The kernel's name of a KVM_MEMORY_ENCRYPT_OP command id, or the id itself."""
    return _COMMAND_NAMES.get(command, f"KVM_SEV_CMD_{command}")
