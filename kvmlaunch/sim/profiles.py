"""What differs between kernel versions, as data.

Only what the simulated host acts on.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from kvmlaunch.errors import FormatError
from kvmlaunch.sim.vmsa_rules import DIRECT_VMSA, VMSA_PAGE, VmsaRules
from kvmlaunch.uapi import lib

__all__ = ["DEBUG_SWAP", "KERNEL_PROFILES", "KernelProfile", "kernel_profile"]

# Bits of the guest policy (AMD 56860) and of SEV_FEATURES (APM 2): hardware numbers
# that the uAPI doesn't define.
_POLICY_6_12 = 0xFFFF | 1 << 16 | 1 << 17 | 1 << 19 | 1 << 20
_POLICY_6_19 = _POLICY_6_12 | 0x1F << 21
_QUIRKS_6_12 = (
    lib.KVM_X86_QUIRK_LINT0_REENABLED
    | lib.KVM_X86_QUIRK_CD_NW_CLEARED
    | lib.KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | lib.KVM_X86_QUIRK_OUT_7E_INC_RIP
    | lib.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | lib.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | lib.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
    | lib.KVM_X86_QUIRK_SLOT_ZAP_ALL
)
_QUIRKS_6_18 = (
    _QUIRKS_6_12
    | lib.KVM_X86_QUIRK_STUFF_FEATURE_MSRS
    | lib.KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM
)
DEBUG_SWAP = 1 << 5
"""Bit of SEV_FEATURES."""
_SECURE_TSC = 1 << 9


@dataclass(frozen=True)
class KernelProfile:
    """One kernel's answers where kernels differ.

    Attributes:
        name: what users type.
        release: the kernel that was read or observed.
        policy_mask: policy bits that START takes (the rest: EINVAL).
        policy_smt_optional: START takes a policy with SMT (bit 16) clear.
        policy_single_socket_allowed: START takes a policy with bit 20 set.
        policy_bits_attr: device attribute KVM_X86_SNP_POLICY_BITS exists.
        init2_ghcb_v1: INIT2 takes ghcb_version 1 for SNP.
        vmsa_features: features that INIT2 takes for SNP.
        update_zero_length: UPDATE with len 0 succeeds (else EINVAL).
        update_aligned_source: UPDATE refuses an unaligned uaddr.
        update_prepared_check: UPDATE looks at guest_memfd's own bookkeeping before the RMP.
        finish_locks_vcpus: FINISH takes every vCPU's lock.
        finish_refuses_encrypted_vmsa: a second FINISH is EINVAL before it does harm.
        vm_tsc_khz_after_vcpu: VM-scoped KVM_SET_TSC_KHZ works after the first vCPU.
        guest_memfd_flags: flags of KVM_CREATE_GUEST_MEMFD on a VM without private memory.
        guest_memfd_flags_private: the same on an SNP VM.
        guest_memfd_on_default_vm: guest_memfd slots work on a VM without private memory.
        sregs_check_efer: KVM_SET_SREGS holds EFER against CPUID: long mode needs LM there.
        req_certs: KVM_SEV_SNP_ENABLE_REQ_CERTS and its attribute exist.
        hypercall_ret_cleared: KVM presets hypercall.ret before a page state change exits.
        ap_create_exact_features: AP creation wants SEV_FEATURES as in INIT2, not only the same
            injection modes.
        vmpls: how many VMPLs a vCPU can run at; mainline has VMPL0 only.
        apic_id_list: the GHCB event of that name, and its feature bit.
        ap_create_uninitialized: AP creation starts a vCPU that waits for its first INIT.
        quirks: bits of KVM_CAP_DISABLE_QUIRKS2.
        vmsa: what it does with VMSA pages from user space, which mainline doesn't take.
        forced_vmsa_features: features that INIT2 adds, whatever it is asked for.
    """

    name: str
    release: str
    policy_mask: int
    policy_smt_optional: bool
    policy_single_socket_allowed: bool
    policy_bits_attr: bool
    init2_ghcb_v1: bool
    vmsa_features: int
    update_zero_length: bool
    update_aligned_source: bool
    update_prepared_check: bool
    finish_locks_vcpus: bool
    finish_refuses_encrypted_vmsa: bool
    vm_tsc_khz_after_vcpu: bool
    guest_memfd_flags: int
    guest_memfd_flags_private: int
    guest_memfd_on_default_vm: bool
    sregs_check_efer: bool
    req_certs: bool
    hypercall_ret_cleared: bool
    ap_create_exact_features: bool
    vmpls: int
    apic_id_list: bool
    ap_create_uninitialized: bool
    quirks: int
    vmsa: VmsaRules
    forced_vmsa_features: int = 0

    def __str__(self) -> str:
        return self.name


_6_12 = KernelProfile(
    name="6.12",
    release="6.12.117",
    policy_mask=_POLICY_6_12,
    policy_smt_optional=False,
    policy_single_socket_allowed=False,
    policy_bits_attr=False,
    init2_ghcb_v1=True,
    vmsa_features=DEBUG_SWAP,
    update_zero_length=True,
    update_aligned_source=False,
    update_prepared_check=True,
    finish_locks_vcpus=False,
    finish_refuses_encrypted_vmsa=True,
    vm_tsc_khz_after_vcpu=True,
    guest_memfd_flags=0,
    guest_memfd_flags_private=0,
    guest_memfd_on_default_vm=False,
    sregs_check_efer=True,
    req_certs=False,
    hypercall_ret_cleared=False,
    ap_create_exact_features=False,
    vmpls=1,
    apic_id_list=False,
    ap_create_uninitialized=False,
    quirks=_QUIRKS_6_12,
    vmsa=VmsaRules(vcpu_op_errno=errno.EINVAL),
)

_6_18 = replace(
    _6_12,
    name="6.18",
    release="6.18.y",
    policy_smt_optional=True,
    policy_single_socket_allowed=True,
    init2_ghcb_v1=False,
    vmsa_features=DEBUG_SWAP | _SECURE_TSC,
    update_zero_length=False,
    finish_locks_vcpus=True,
    vm_tsc_khz_after_vcpu=False,
    guest_memfd_flags=lib.GUEST_MEMFD_FLAG_MMAP | lib.GUEST_MEMFD_FLAG_INIT_SHARED,
    guest_memfd_flags_private=lib.GUEST_MEMFD_FLAG_MMAP,
    guest_memfd_on_default_vm=True,
    hypercall_ret_cleared=True,
    ap_create_exact_features=True,
    sregs_check_efer=False,
    quirks=_QUIRKS_6_18,
    vmsa=VmsaRules(),
)

_7_0 = replace(
    _6_18,
    name="7.0",
    release="7.0",
    policy_mask=_POLICY_6_19,
    policy_bits_attr=True,
    update_aligned_source=True,
    update_prepared_check=False,
    req_certs=True,
)

_MULTI_VMPL = replace(_7_0, name="multi-vmpl", release="7.0, and VMPLs as 56421 has them", vmpls=4)

_VMSA_PAGE = replace(
    _7_0,
    name="vmsa-page",
    release="7.0, and VMSA pages by proposal v1",
    vmsa=VMSA_PAGE,
)

_DIRECT_VMSA = replace(
    _7_0,
    name="direct-vmsa",
    release="7.0, and VMSA pages by proposal v2",
    apic_id_list=True,
    ap_create_uninitialized=True,
    vmsa=DIRECT_VMSA,
)

_PROFILES = (_6_12, _6_18, _7_0, _MULTI_VMPL, _VMSA_PAGE, _DIRECT_VMSA)

KERNEL_PROFILES: Mapping[str, KernelProfile] = MappingProxyType(
    {profile.name: profile for profile in _PROFILES}
)
"""Every kernel profile by name."""


def kernel_profile(name: str) -> KernelProfile:
    """The profile of that name. Raises FormatError with the known names."""
    if name not in KERNEL_PROFILES:
        known = ", ".join(KERNEL_PROFILES)
        raise FormatError(f"no kernel profile is named {name!r}; known are {known}")
    return KERNEL_PROFILES[name]
