"""The CPUID that a guest gets: per vCPU through KVM, and as the SNP CPUID page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvmlaunch.abi import cpuid_page
from kvmlaunch.abi.cpuid_page import CpuidEntry

__all__ = ["guest_cpuid", "snp_cpuid_page"]

_MAX_ENTRIES = 64

# Bits that firmware is known to refuse in a CPUID page: those that QEMU clears, and
# NO_SMM_CTL_MSR, which alioth and OpenVMM clear. (function, index) -> register -> mask.
_REFUSED = {
    (0x1, 0): {"ecx": 1 << 24},  # TSC_DEADLINE
    (0x7, 0): {
        "ebx": 1 << 1,  # TSC_ADJUST
        # SPEC_CTRL, STIBP, FLUSH_L1D, ARCH_CAPABILITIES, CORE_CAPABILITY, SSBD
        "edx": 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 31,
    },
    (0x80000008, 0): {"ebx": 1 << 25},  # VIRT_SSBD
    (0x80000021, 0): {"eax": 1 << 9},  # NO_SMM_CTL_MSR
}
_HTT = 1 << 28
_SEV_LEAF = 0x8000001F
_XSAVE_LEAF = 0xD
_XSAVE_LEGACY_SIZE = 0x240
_HYPERVISOR_LEAVES = range(0x40000000, 0x40010000)


def guest_cpuid(
    supported: Sequence[Mapping[str, int]], vcpu: int, *, confidential: bool, vcpus: int = 1
) -> list[dict[str, int]]:
    """KVM's supported CPUID with the APIC ids of vCPU ``vcpu``, one of ``vcpus``.

    For a confidential guest, without the bits that its CPUID page can't hold, so
    that page and hypervisor agree. A plain VM is told nothing of SEV, which it hasn't.
    """
    leaves = []
    for leaf in supported:
        new = dict(leaf)
        if new["function"] == 0x1:
            new["ebx"] = new["ebx"] & 0x0000FFFF | min(vcpus, 0xFF) << 16 | (vcpu & 0xFF) << 24
            # HTT: the number of vCPUs counts (APM volume 3, E.3.2).
            new["edx"] = new["edx"] & ~_HTT | (_HTT if vcpus > 1 else 0)
        elif new["function"] in (0xB, 0x1F):
            new["edx"] = vcpu
        elif new["function"] == 0x8000001E:
            new["eax"] = vcpu
        if confidential:
            for register, mask in _REFUSED.get((new["function"], new["index"]), {}).items():
                new[register] &= ~mask
        elif new["function"] == _SEV_LEAF:
            new.update(eax=0, ebx=0, ecx=0, edx=0)
        leaves.append(new)
    return leaves


def snp_cpuid_page(leaves: Sequence[Mapping[str, int]]) -> bytes:
    """The 4096-byte CPUID page for a guest that gets ``leaves``.

    Leaves that are all zero mean the same as missing ones and are left out;
    hypervisor leaves go last, since the page holds 64 entries.
    """
    entries = [_entry(leaf) for leaf in leaves]
    entries = [e for e in entries if e.eax or e.ebx or e.ecx or e.edx]
    entries.sort(key=lambda e: e.eax_in in _HYPERVISOR_LEAVES)
    return cpuid_page.encode(entries[:_MAX_ENTRIES])


def _entry(leaf: Mapping[str, int]) -> CpuidEntry:
    function, index = leaf["function"], leaf["index"]
    xsave_size = function == _XSAVE_LEAF and index in (0, 1)
    return CpuidEntry(
        eax_in=function,
        ecx_in=index,
        # Subleaves 0 and 1 tell the size for the XCR0 and XSS in the entry itself.
        xcr0_in=1 if xsave_size else 0,
        xss_in=0,
        eax=leaf["eax"],
        ebx=_XSAVE_LEGACY_SIZE if xsave_size else leaf["ebx"],
        ecx=leaf["ecx"],
        edx=leaf["edx"],
    )
