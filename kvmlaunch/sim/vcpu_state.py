"""Register state of a vCPU as KVM keeps it, before firmware takes it away."""

from __future__ import annotations

from collections.abc import Mapping

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim import msrs, mtrr
from kvmlaunch.sim.fpu import FpuState
from kvmlaunch.sim.guest_limits import NOTHING_KNOWN, GuestLimits, canonical
from kvmlaunch.sim.mce import MachineCheck
from kvmlaunch.sim.vmcb import Segment, Vmcb

__all__ = ["GENERAL", "SEGMENTS", "VcpuState"]

GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{n}" for n in range(8, 16)),
)
"""General registers by the names of ``struct kvm_regs``."""

SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
"""Segments of ``struct kvm_sregs``."""

_CR0_PE, _CR0_ET, _CR0_NW, _CR0_CD, _CR0_PG = 1 << 0, 1 << 4, 1 << 29, 1 << 30, 1 << 31
_CR4_PAE, _CR4_MCE = 1 << 5, 1 << 6
_EFER_LME, _EFER_LMA, _EFER_SVME = 1 << 8, 1 << 10, 1 << 12
_RFLAGS_FIXED = 1 << 1
# KVM drops BTF and the bits of the external pins, and refuses all but LBR of the rest.
_DEBUGCTL_LBR, _DEBUGCTL_DROPPED = 1 << 0, 0x3E
_APIC_DEFAULT, _APIC_ENABLE, _APIC_X2, _APIC_BSP = 0xFEE00000, 1 << 11, 1 << 10, 1 << 8
_APIC_RESERVED = 0x2FF
# HWCR: what a write may have set, and what of it is kept (x86.c).
_HWCR_IGNORED, _HWCR_KEPT = 0x40 | 0x100 | 0x8, 1 << 18 | 1 << 24
_PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})
_KEPT = {msrs.TSC_AUX: 0xFFFFFFFF, msrs.HWCR: _HWCR_KEPT}
# x86's EDX at reset: KVM has no CPUID table yet when it resets a new vCPU.
_RESET_RDX = 0x600


class VcpuState:
    """Registers with KVM's reset values, and KVM's rules for setting them."""

    def __init__(
        self,
        supported_xcr0: int,
        supported_xss: int,
        xsave_components: Mapping[int, tuple[int, int]],
        host: GuestLimits,
        *,
        bsp: bool,
        clear_cd_nw: bool = True,
        sregs_check_efer: bool = True,
    ) -> None:
        self.vmcb = Vmcb()
        self.fpu = FpuState(supported_xcr0, xsave_components)
        self.regs = dict.fromkeys(GENERAL, 0)
        self.regs["rdx"] = _RESET_RDX
        self.regs["rip"] = 0xFFF0
        self.clear_cd_nw = clear_cd_nw
        self.cr0 = self.cr2 = self.cr3 = self.cr4 = self.cr8 = self.efer = 0
        self.apic_base = _APIC_DEFAULT | _APIC_ENABLE | (_APIC_BSP if bsp else 0)
        self.xcr0, self.xss = 1, 0
        self.supported_xss = supported_xss
        self.db = [0, 0, 0, 0]
        self.dr6, self.dr7 = 0xFFFF0FF0, 0x400
        self.msrs = dict(msrs.PLAIN)
        self.machine_check = MachineCheck()
        self._sysenter_high = {msrs.SYSENTER_ESP: 0, msrs.SYSENTER_EIP: 0}
        self.pdptrs = [0, 0, 0, 0]
        self._host = host
        self._sregs_check_efer = sregs_check_efer
        # What SET_CPUID2 makes known about the guest's CPU.
        self.guest = NOTHING_KNOWN
        self.guest_xcr0 = 1
        self.reserved_gpa_bits = self.reserved_bits_raw = _reserved(36)
        self.set_cr0(_CR0_CD | _CR0_NW | _CR0_ET)
        self.set_cr4(0)
        self.set_efer(0)

    def init_event(self, signature: int | None) -> None:
        """kvm_vcpu_reset() for INIT: what a reset sets, but for FPU, MSRs, PAT and CR0.CD/NW."""
        kept_cr0 = self.cr0 & (_CR0_CD | _CR0_NW)
        self.vmcb.reset()
        self.regs = dict.fromkeys(GENERAL, 0)
        self.regs["rdx"] = _RESET_RDX if signature is None else signature
        self.regs["rip"] = 0xFFF0
        self.cr2 = self.cr8 = 0
        self.db = [0, 0, 0, 0]
        self.dr6, self.dr7 = 0xFFFF0FF0, 0x400
        self.set_cr3(0)
        self.set_efer(0)
        self.set_cr0(_CR0_ET | kept_cr0)
        self.set_cr4(0)

    def start_at(self, vector: int) -> None:
        """kvm_vcpu_deliver_sipi_vector(): begin at that page."""
        cs = self.vmcb.segment("cs")
        self.vmcb.put_segment("cs", Segment(vector << 8, cs.attrib, cs.limit, vector << 12))
        self.regs["rip"] = 0

    def is_page_address(self, gpa: int) -> bool:
        """page_address_valid()."""
        return not gpa % PAGE_SIZE and not gpa & self.reserved_gpa_bits

    def set_cr0(self, value: int) -> None:
        """svm_set_cr0(): CD and NW don't reach the CPU while the quirk is on."""
        if self.efer & _EFER_LME:
            self.efer = self.efer | _EFER_LMA if value & _CR0_PG else self.efer & ~_EFER_LMA
            self.vmcb["efer"] = self.efer | _EFER_SVME
        self.cr0 = value
        self.vmcb["cr0"] = value & ~(_CR0_CD | _CR0_NW) if self.clear_cd_nw else value

    def set_cr3(self, value: int) -> None:
        """sev_post_set_cr3() and the NPT path."""
        self.cr3 = self.vmcb["cr3"] = value

    def set_cr4(self, value: int) -> None:
        """svm_set_cr4(): the host's MCE stays on."""
        self.cr4 = value
        self.vmcb["cr4"] = value | _CR4_MCE

    def set_efer(self, value: int) -> None:
        """svm_set_efer(): SVME is always on in the VMCB."""
        self.efer = value
        self.vmcb["efer"] = value | _EFER_SVME

    @property
    def pae_paging(self) -> bool:
        """Whether the page directory pointers are part of the state (is_pae_paging())."""
        paging = self.cr0 & _CR0_PG and self.cr4 & _CR4_PAE
        return bool(paging) and not self.efer & _EFER_LMA

    def set_regs(self, values: dict[str, int]) -> None:
        """KVM_SET_REGS."""
        self.vmcb["rflags"] = values.pop("rflags") | _RFLAGS_FIXED
        self.regs.update(values)

    def get_regs(self) -> dict[str, int]:
        """KVM_GET_REGS."""
        return {**self.regs, "rflags": self.vmcb["rflags"]}

    def sregs_valid(self, cr0: int, cr3: int, cr4: int, efer: int, cs_l: int) -> bool:
        """kvm_is_valid_sregs()."""
        if efer & _EFER_LME and cr0 & _CR0_PG:
            if not cr4 & _CR4_PAE or not efer & _EFER_LMA or cr3 & self.reserved_gpa_bits:
                return False
        elif efer & _EFER_LMA or cs_l:
            return False
        if cr4 & (self._host.cr4 | self.guest.cr4) or cr0 >> 32:
            return False
        if self._sregs_check_efer and efer & (self._host.efer | self.guest.efer_features):
            return False
        return not (cr0 & _CR0_NW and not cr0 & _CR0_CD) and not (
            cr0 & _CR0_PG and not cr0 & _CR0_PE
        )

    def apic_base_valid(self, value: int) -> bool:
        """kvm_set_apic_base(): reserved bits, and x2APIC without APIC or CPUID."""
        reserved = _APIC_RESERVED | self.reserved_gpa_bits | (0 if self.guest.x2apic else _APIC_X2)
        x2_alone = value & _APIC_X2 and not value & _APIC_ENABLE
        return not value & reserved and not x2_alone

    def segments(self) -> dict[str, dict[str, int]]:
        """All segments of ``struct kvm_sregs``, as KVM reports them."""
        return {name: self.vmcb.get_kvm_segment(name) for name in SEGMENTS}

    def set_segments(self, values: dict[str, dict[str, int]]) -> None:
        """Store all segments of ``struct kvm_sregs``."""
        for name in SEGMENTS:
            self.vmcb.set_kvm_segment(name, values[name])

    def set_xcr0(self, value: int) -> bool:
        """__kvm_set_xcr(): x87 is a must, AVX needs SSE, the rest needs leaf 0xD."""
        if not value & 1 or (value & 4 and not value & 2) or value & ~(self.guest_xcr0 | 1):
            return False
        self.xcr0 = value
        return True

    def set_debugregs(self, db: list[int], dr6: int, dr7: int) -> bool:
        """KVM_SET_DEBUGREGS: the upper halves of DR6 and DR7 must be zero."""
        if dr6 >> 32 or dr7 >> 32:
            return False
        self.db, self.dr6, self.dr7 = db, dr6, dr7
        self.vmcb["dr6"], self.vmcb["dr7"] = dr6, dr7
        return True

    def get_msr(self, index: int) -> int | None:
        """One MSR; None where KVM refuses."""
        special = {
            msrs.EFER: self.efer,
            msrs.XSS: self.xss,
            msrs.APIC_BASE: self.apic_base,
            msrs.FS_BASE: self.vmcb.segment("fs").base,
            msrs.GS_BASE: self.vmcb.segment("gs").base,
        }
        if index in special:
            return special[index]
        if index in self._sysenter_high:
            high = 0 if self.guest.amd else self._sysenter_high[index]
            return high << 32 | self.vmcb[msrs.VMCB[index]]
        if index in msrs.VMCB:
            return self.vmcb[msrs.VMCB[index]]
        if index in mtrr.CAPABILITIES:
            return mtrr.CAPABILITIES[index]
        return self.msrs.get(index, self.machine_check.get(index))

    def set_msr(self, index: int, value: int) -> bool:
        """Store one MSR; False where KVM refuses."""
        if not self._msr_value_valid(index, value):
            return False
        if index == msrs.EFER:
            self.set_efer(value & ~_EFER_LMA | self.efer & _EFER_LMA)
        elif index == msrs.XSS:
            self.xss = value
        elif index == msrs.DEBUGCTL:
            self.vmcb["dbgctl"] = value & _DEBUGCTL_LBR
        elif index == msrs.APIC_BASE:
            self.apic_base = value
        elif index in (msrs.FS_BASE, msrs.GS_BASE):
            self.vmcb.set_base("fs" if index == msrs.FS_BASE else "gs", value)
        elif index in self._sysenter_high:
            # AMD's registers have 32 bits; KVM keeps the rest for guests that aren't AMD's.
            value = canonical(value, self._host.virtual_bits)
            self.vmcb[msrs.VMCB[index]] = value & 0xFFFFFFFF
            self._sysenter_high[index] = 0 if self.guest.amd else value >> 32
        elif index in msrs.VMCB:
            self.vmcb[msrs.VMCB[index]] = value
        elif index in msrs.PLAIN:
            self.msrs[index] = value & _KEPT.get(index, msrs.U64)
        else:
            return self.machine_check.set(index, value)
        return True

    def passes_through(self, index: int) -> bool:
        """Whether an SNP guest has this MSR for itself (svm.c, sev.c: set_msr_interception())."""
        if index in self._sysenter_high:
            return self.guest.amd
        if index == msrs.XSS:
            return self.guest.xsaves
        return index in msrs.PASSED_THROUGH

    def _msr_value_valid(self, index: int, value: int) -> bool:
        if index in msrs.ADDRESSES:
            return canonical(value, self._host.virtual_bits) == value
        if index == msrs.TSC_AUX:
            return self.guest.amd or not value >> 32
        if index == msrs.EFER:
            return not value & self._host.efer
        if index == msrs.HWCR:
            return not value & ~(_HWCR_IGNORED | _HWCR_KEPT)
        if index == msrs.PAT:
            return all(byte in _PAT_TYPES for byte in value.to_bytes(8, "little"))
        if index == msrs.DEBUGCTL:
            return not value & ~(_DEBUGCTL_LBR | _DEBUGCTL_DROPPED)
        if index == msrs.XSS:
            return not value & ~self.supported_xss
        if index in mtrr.RESET:
            return mtrr.is_valid(index, value, self.reserved_bits_raw)
        return index != msrs.APIC_BASE or self.apic_base_valid(value)


def _reserved(width: int) -> int:
    """Bits of a guest physical address from ``width`` up."""
    return (1 << 64) - (1 << width)


def reserved_gpa_bits(width: int, c_bit: int | None) -> int:
    """Address bits that a guest of this width can't use; the C-bit isn't one of them."""
    bits = _reserved(width)
    return bits if c_bit is None else bits & ~(1 << c_bit)
