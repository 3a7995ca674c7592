"""Model-specific registers: which exist, where they live, and the batch ioctls."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvmlaunch.sim import mce, mtrr
from kvmlaunch.sim.uaccess import UserSpace, copy_in, refuse
from kvmlaunch.uapi import ffi

__all__ = [
    "ADDRESSES",
    "APIC",
    "APIC_BASE",
    "ASYNC_PF_ACK",
    "ASYNC_PF_EN",
    "ASYNC_PF_INT",
    "FEATURES",
    "HOST_WRITTEN",
    "PASSED_THROUGH",
    "PLAIN",
    "PLATFORM_INFO",
    "POLL_CONTROL",
    "PV_EOI_EN",
    "RESET_BY_INIT",
    "SAVED",
    "STEAL_TIME",
    "SYSTEM_TIME",
    "SYSTEM_TIME_NEW",
    "TSC",
    "TSC_ADJUST",
    "U64",
    "VMCB",
    "WALL_CLOCK",
    "WALL_CLOCK_NEW",
    "X2APIC",
    "transfer",
]

_MAX_BATCH = 256
_ENTRY = ffi.sizeof("struct kvm_msr_entry")

EFER, PAT, DEBUGCTL, XSS = 0xC0000080, 0x277, 0x1D9, 0xDA0
SYSENTER_ESP, SYSENTER_EIP = 0x175, 0x176
FS_BASE, GS_BASE, APIC_BASE, TSC_AUX = 0xC0000100, 0xC0000101, 0x1B, 0xC0000103

TSC, TSC_ADJUST = 0x10, 0x3B
PLATFORM_INFO, HWCR = 0xCE, 0xC0010015
SMBASE, SMI_COUNT = 0x9E, 0x34
WALL_CLOCK, SYSTEM_TIME = 0x11, 0x12
WALL_CLOCK_NEW, SYSTEM_TIME_NEW, ASYNC_PF_EN, STEAL_TIME = range(0x4B564D00, 0x4B564D04)
PV_EOI_EN, POLL_CONTROL, ASYNC_PF_INT, ASYNC_PF_ACK = range(0x4B564D04, 0x4B564D08)
U64 = (1 << 64) - 1
X2APIC = range(0x800, 0x900)
APIC = frozenset({*X2APIC, 0x6E0})
"""x2APIC registers and the TSC deadline."""

VMCB: Mapping[int, str] = MappingProxyType(
    {
        0xC0000081: "star",
        0xC0000082: "lstar",
        0xC0000083: "cstar",
        0xC0000084: "sfmask",
        0xC0000102: "kernel_gs_base",
        0x174: "sysenter_cs",
        SYSENTER_ESP: "sysenter_esp",
        SYSENTER_EIP: "sysenter_eip",
        PAT: "g_pat",
        DEBUGCTL: "dbgctl",
        0x1DB: "br_from",
        0x1DC: "br_to",
        0x1DD: "last_excp_from",
        0x1DE: "last_excp_to",
        0x48: "spec_ctrl",
    }
)
"""MSR -> field of the VMCB save area that holds it."""

PLAIN: Mapping[int, int] = MappingProxyType(
    {
        TSC_ADJUST: 0,
        SMI_COUNT: 0,
        SMBASE: 0x30000,
        PLATFORM_INFO: 1 << 31,  # CPUID faulting
        0x1FC: 0,  # POWER_CTL
        0x1A0: 0x1,  # MISC_ENABLE
        **mtrr.RESET,
        TSC_AUX: 0,
        HWCR: 0,
        WALL_CLOCK: 0,
        SYSTEM_TIME: 0,
        WALL_CLOCK_NEW: 0,
        SYSTEM_TIME_NEW: 0,
        ASYNC_PF_EN: 0,
        STEAL_TIME: 0,
        PV_EOI_EN: 0,
        POLL_CONTROL: 1,
        ASYNC_PF_INT: 0,
        ASYNC_PF_ACK: 0,
    }
)
"""MSR -> reset value, kept by KVM and never in the VMSA.

Of those of KVM itself (WALL_CLOCK and so on) only SYSTEM_TIME_NEW has an effect, see `kvmclock`.
"""

HOST_WRITTEN = frozenset({SMBASE, SMI_COUNT, PLATFORM_INFO})
"""MSRs that no guest can write."""

RESET_BY_INIT = (SMI_COUNT, SYSTEM_TIME_NEW, ASYNC_PF_EN, ASYNC_PF_INT, STEAL_TIME)
"""MSRs of `PLAIN` that an INIT clears (kvm_vcpu_reset())."""

PASSED_THROUGH = frozenset({*VMCB, EFER, XSS, FS_BASE, GS_BASE})
"""MSRs that a running SNP guest owns: after encryption a batch stops at them.

The guest's CPUID decides for XSS and SYSENTER_ESP/EIP (VcpuState.passes_through()).
"""

ADDRESSES = frozenset({FS_BASE, GS_BASE, 0xC0000102, 0xC0000083, 0xC0000082})
"""MSRs that refuse an address that isn't canonical (__kvm_set_msr())."""

SAVED = tuple(
    sorted(
        {*VMCB, *PLAIN, TSC, EFER, XSS, FS_BASE, GS_BASE, APIC_BASE, mce.MCG_STATUS, mce.MCG_CTL}
        - (mtrr.RESET.keys() - {mtrr.DEFAULT_TYPE})
    )
)
"""KVM_GET_MSR_INDEX_LIST."""

FEATURES: Mapping[int, int] = MappingProxyType(
    {
        0x8B: 0x01000065,  # UCODE_REV, KVM's default on AMD
        0x10A: 0,  # ARCH_CAPABILITIES
        0x345: 0,  # PERF_CAPABILITIES
        0xC0011029: 0x2,  # DE_CFG: LFENCE serialises
    }
)
"""KVM_GET_MSR_FEATURE_INDEX_LIST with the values."""


def transfer(
    user: UserSpace,
    arg: int,
    access: Callable[[int], int | None] | None = None,
    *,
    store: Callable[[int, int], bool] | None = None,
    write_back: bool = False,
) -> int:
    """KVM_GET_MSRS and KVM_SET_MSRS: the number of entries done before one was refused."""
    header = copy_in(user, "kvm_msrs", arg)
    if header.nmsrs >= _MAX_BATCH:
        refuse(errno.E2BIG)
    at = arg + ffi.sizeof("struct kvm_msrs")
    entries = ffi.new("struct kvm_msr_entry[]", header.nmsrs)
    ffi.buffer(entries)[:] = user.read(at, header.nmsrs * _ENTRY)
    done = 0
    for entry in entries:
        if store is not None:
            if not store(entry.index, entry.data):
                break
        elif access is not None:
            value = access(entry.index)
            if value is None:
                entry.data = 0  # kvm_do_msr_access(): a read that fails shows nothing old
                break
            entry.data = value
        done += 1
    if write_back:
        user.write(at, bytes(ffi.buffer(entries)))
    return done
