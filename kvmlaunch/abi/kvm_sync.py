"""What mainline KVM measures for a vCPU whose wanted state is applied by ioctls.

In `sync` mode nobody hands KVM a VMSA: KVM builds one per vCPU at SNP_LAUNCH_FINISH. It
copies the VMCB save area (0x2E8 bytes), then registers, XCR0, XSS, PKRU, DR6, the FPU and
SEV_FEATURES. What no ioctl reaches is measured as zero.

Source: Linux 6.12 arch/x86/kvm/svm/sev.c sev_es_sync_vmsa, svm.c svm_set_segment,
svm_get_segment, svm_set_cr0, svm_set_cr4, svm_set_efer, svm_set_msr, x86.c kvm_is_valid_sregs,
__set_regs.
"""

from __future__ import annotations

from kvmlaunch.errors import FormatError

from .segment import Segment
from .vmsa import FieldDiff, Vmsa, diff

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from typing import Any

__all__ = ["not_carried", "sregs_round_trip", "synced"]

_CR0_PE = 1 << 0
_CR0_NW = 1 << 29
_CR0_CD = 1 << 30
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_CR4_MCE = 1 << 6
_EFER_LME = 1 << 8
_EFER_LMA = 1 << 10
_EFER_SVME = 1 << 12
_RFLAGS_FIXED = 1 << 1
_DR7_FIXED = 0x400
_SNP_ACTIVE = 1 << 0
_DEBUGCTL_LBR = 1 << 0
_DEBUGCTL_WRITABLE = 0x3F

_TYPE_ACCESSED = 1 << 0
_TYPE_BUSY = 1 << 1
_DPL_SHIFT = 5
_PRESENT = 1 << 7
_LONG = 1 << 9
_DB = 1 << 10
_GRANULARITY = 1 << 11
_ATTRIB_BITS = 0xFFF

_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
_DATA_SEGMENTS = ("es", "ds", "fs", "gs")

# Taken over as they are. spec_ctrl depends on the host (V_SPEC_CTRL): better left alone.
_VERBATIM = (
    *("xss", "cr3", "dr7", "dr6", "rip", "rsp", "rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("star", "lstar", "cstar", "sfmask", "kernel_gs_base"),
    *("sysenter_cs", "g_pat", "spec_ctrl", "pkru"),
    *("x87_dp", "mxcsr", "x87_ftw", "x87_fsw", "x87_fcw", "x87_fop", "x87_rip"),
    *("fpreg_x87", "fpreg_xmm", "fpreg_ymm"),
)


def synced(vmsa: Vmsa, *, sev_features: int) -> Vmsa:
    """Return the VMSA that KVM measures when `vmsa` is applied by ioctls.

    Every register goes through its ioctl (SET_REGS, SET_SREGS, SET_MSRS, SET_XCRS,
    SET_XSAVE, SET_DEBUGREGS), once, without a GET before. Fields that no ioctl of 6.12
    reaches become 0, among them those that newer kernels can set (s_cet, ssp, isst_addr,
    LBR): leave them alone there for the same digest.

    Args:
        vmsa: the wanted state.
        sev_features: vmsa_features of KVM_SEV_INIT2; KVM sets SNPActive itself, and the
            wanted state's own SEV_FEATURES count for nothing.

    Raises:
        FormatError: KVM would refuse the state (EINVAL).
    """
    _refuse_debug_registers(vmsa)
    _refuse_sregs(vmsa)
    fields: dict[str, Any] = {name: getattr(vmsa, name) for name in _VERBATIM}
    for name in _SEGMENTS:
        segment: Segment = getattr(vmsa, name)
        fields[name] = _with_attrib(segment, segment.attrib & _ATTRIB_BITS)
    for name in ("gdtr", "idtr"):
        # struct kvm_dtable has a base and a 16-bit limit, nothing else.
        table: Segment = getattr(vmsa, name)
        fields[name] = Segment(limit=table.limit & 0xFFFF, base=table.base)
    return Vmsa(
        **fields,
        cpl=vmsa.ss.attrib >> _DPL_SHIFT & 3,  # svm_set_segment copies SS.DPL
        efer=vmsa.efer | _EFER_SVME,
        cr4=vmsa.cr4 | _CR4_MCE,
        cr0=vmsa.cr0 & ~(_CR0_CD | _CR0_NW),  # the quirk CD_NW_CLEARED, on by default
        rflags=vmsa.rflags | _RFLAGS_FIXED,
        # svm_set_msr: AMD's SYSENTER addresses have 32 bits; BTF and external pins are dropped.
        sysenter_esp=vmsa.sysenter_esp & 0xFFFFFFFF,
        sysenter_eip=vmsa.sysenter_eip & 0xFFFFFFFF,
        dbgctl=vmsa.dbgctl & _DEBUGCTL_LBR,
        # SET_XCRS refuses a value without x87, so the reset value stays.
        xcr0=vmsa.xcr0 if vmsa.xcr0 & 1 else 1,
        sev_features=sev_features | _SNP_ACTIVE,
    )


def not_carried(vmsa: Vmsa, *, sev_features: int) -> list[FieldDiff]:
    """Return each field where KVM measures (`b`) something else than is wanted (`a`).

    Raises:
        FormatError: as `synced`.
    """
    return diff(vmsa, synced(vmsa, sev_features=sev_features))


def sregs_round_trip(vmsa: Vmsa) -> Vmsa:
    """Return `vmsa` after KVM_GET_SREGS and KVM_SET_SREGS with nothing edited between.

    GET_SREGS reports present data segments as accessed and TR as busy, makes G up from the
    limit, SS.DPL from CPL, and drops D/B of an absent SS; SET_SREGS writes that back. Only
    segments are treated here: apply `synced` for the rest.
    """
    changes: dict[str, Any] = {}
    for name in _SEGMENTS:
        segment: Segment = getattr(vmsa, name)
        attrib = segment.attrib & _ATTRIB_BITS & ~_GRANULARITY
        if segment.limit > 0xFFFFF:
            attrib |= _GRANULARITY
        if name == "tr":
            attrib |= _TYPE_BUSY
        elif name in _DATA_SEGMENTS and attrib & _PRESENT:
            attrib |= _TYPE_ACCESSED
        elif name == "ss":
            attrib = attrib & ~(3 << _DPL_SHIFT) | (vmsa.cpl & 3) << _DPL_SHIFT
            if not attrib & _PRESENT:
                attrib &= ~_DB
        changes[name] = _with_attrib(segment, attrib)
    return vmsa.replace(**changes)


def _refuse_debug_registers(vmsa: Vmsa) -> None:
    if vmsa.dr7 & ~_DR7_FIXED:
        raise FormatError(
            f"dr7 {vmsa.dr7:#x} has bits besides 0x400, which SNP_LAUNCH_FINISH refuses (EINVAL)"
        )
    if vmsa.dr6 >> 32:
        raise FormatError(f"dr6 {vmsa.dr6:#x} is above 32 bits, which SET_DEBUGREGS refuses")
    if vmsa.dbgctl & ~_DEBUGCTL_WRITABLE:
        raise FormatError(f"dbgctl {vmsa.dbgctl:#x} has bits above 5, which SET_MSRS refuses")


def _refuse_sregs(vmsa: Vmsa) -> None:
    """Refuse what kvm_is_valid_sregs refuses, short of what depends on the guest's CPUID."""
    cr0, cr4, efer = vmsa.cr0, vmsa.cr4, vmsa.efer
    reason = ""
    if cr0 >> 32:
        reason = f"cr0 {cr0:#x} is above 32 bits"
    elif cr0 & _CR0_NW and not cr0 & _CR0_CD:
        reason = f"cr0 {cr0:#x} has NW without CD"
    elif cr0 & _CR0_PG and not cr0 & _CR0_PE:
        reason = f"cr0 {cr0:#x} has PG without PE"
    elif efer & _EFER_LME and cr0 & _CR0_PG:
        if not cr4 & _CR4_PAE:
            reason = f"cr4 {cr4:#x} lacks PAE in long mode (EFER.LME and CR0.PG)"
        elif not efer & _EFER_LMA:
            reason = f"efer {efer:#x} lacks LMA in long mode (EFER.LME and CR0.PG)"
    elif efer & _EFER_LMA:
        reason = f"efer {efer:#x} has LMA without EFER.LME and CR0.PG"
    elif vmsa.cs.attrib & _LONG:
        reason = f"cs.attrib {vmsa.cs.attrib:#x} has L outside long mode"
    if reason:
        raise FormatError(f"{reason}, which KVM_SET_SREGS refuses (EINVAL)")


def _with_attrib(segment: Segment, attrib: int) -> Segment:
    return Segment(segment.selector, attrib, segment.limit, segment.base)
