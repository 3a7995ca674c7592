"""What a refused launch command can mean: the kernel says only errno and firmware word.

Source of each row: the check tables in Linux arch/x86/kvm/svm/sev.c (6.12.117).
"""

from __future__ import annotations

import errno

from kvmlaunch.abi import fwstatus
from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.policy import GuestPolicy
from kvmlaunch.abi.vmsa import describe_sev_features

__all__ = ["explain_finish", "explain_init", "explain_start", "explain_update"]

_KERNEL_POLICY_BITS = 0x1BFFFF
_POLICY_SMT = 1 << 16
_POLICY_RESERVED_ONE = 1 << 17
_POLICY_SINGLE_SOCKET = 1 << 20

_NOT_SNP = (
    "The VM is no SNP guest, or KVM_SEV_INIT2 has not been done on it "
    "(check /sys/module/kvm_amd/parameters/sev_snp)."
)


def explain_init(err: int, vmsa_features: int) -> str:
    """Why KVM_SEV_INIT2 gave ``err``."""
    names = ", ".join(describe_sev_features(vmsa_features))
    named = f" ({names})" if names else ""
    return {
        errno.EINVAL: "KVM_SEV_INIT2 has been done already, a vCPU exists, or this kernel doesn't "
        f"offer vmsa_features {vmsa_features:#x}{named}; KVM_X86_SEV_VMSA_FEATURES tells "
        "what it offers, and bit 0 is never given. Or it doesn't offer the GHCB version.",
        errno.EPERM: "KVM_SEV_INIT2 has been done already.",
        errno.ENOTTY: "The host has no memory encryption, or no ASID is configured for SNP "
        "(firmware setup: number of SEV-ES/SNP ASIDs).",
        errno.EBUSY: "No ASID is free: other guests hold them, or the misc cgroup's limit is "
        "reached (/sys/fs/cgroup/misc.current).",
    }.get(err, "")


def explain_start(err: int, fw_error: int, policy: int) -> str:
    """Why SNP_LAUNCH_START gave ``err``."""
    if err == errno.EINVAL:
        return f"The kernel refused it before the firmware saw it. {_refused_policy(policy)}"
    if err == errno.ENOTTY:
        if fw_error:
            return "The firmware made no guest context (GCTX_CREATE). " + fwstatus.advice(fw_error)
        return f"{_NOT_SNP} It also means that the descriptor given is not an open /dev/sev."
    if fw_error == FwStatus.POLICY_FAILURE:
        named = GuestPolicy.from_int(policy, strict=False)
        return (
            f"The firmware refuses guest policy {named}: the minimum ABI version is above the "
            "firmware's, SMT is on but not allowed, a reserved bit is set, or a requirement is "
            "not met by this host."
        )
    return fwstatus.advice(fw_error) if fw_error else ""


def _refused_policy(policy: int) -> str:
    """Every rule that the policy breaks: which one counts depends on the kernel's age."""
    broken = []
    if not policy & _POLICY_RESERVED_ONE:
        broken.append("bit 17 must be 1")
    unknown = policy & ~_KERNEL_POLICY_BITS
    if unknown:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        broken.append(f"this kernel does not accept bit {bits}")
    if not policy & _POLICY_SMT:
        broken.append("kernels before 6.17 want bit 16 (SMT allowed), whether or not SMT is on")
    if policy & _POLICY_SINGLE_SOCKET:
        broken.append("kernels before 6.17 refuse bit 20 (single socket)")
    if broken:
        return f"Guest policy {policy:#x}: {'; '.join(broken)}."
    return "SNP_LAUNCH_START has been done already on this VM, or flags are not 0."


def explain_update(err: int, fw_error: int, page_type: int, what: str) -> str:
    """Why SNP_LAUNCH_UPDATE gave ``err`` for the page described by ``what``."""
    where = f"Page: {what}. " if what else ""
    if err == errno.EINVAL:
        vmsa = ""
        if page_type == PageType.VMSA:
            vmsa = (
                " Mainline kernels don't; one with the proposal refuses a VMSA whose vmpl isn't 0 "
                "or whose sev_features aren't the VM's, and more than a page at once."
            )
        return where + (
            "The kernel refused the request itself: no SNP_LAUNCH_START yet, length or source not "
            "page aligned, no memory slot with guest_memfd at this GPA, or it doesn't accept "
            f"page type {_type_name(page_type)}.{vmsa}"
        )
    if err == errno.EIO and fw_error == FwStatus.SUCCESS:
        return where + (
            "The kernel does not tell the reason. In the order of likelihood: the page has been "
            "launched already (two ranges overlap), its GFN is not set private "
            "(KVM_SET_MEMORY_ATTRIBUTES), the source can't be read, a signal is pending, or the "
            "descriptor given is not an open /dev/sev."
        )
    if fw_error == FwStatus.INVALID_PARAM and page_type == PageType.CPUID:
        return where + "The firmware doesn't accept the CPUID page; below is what it would accept."
    return where + (fwstatus.advice(fw_error) if fw_error else "")


def explain_finish(
    err: int,
    fw_error: int,
    digest: bytes | None,
    id_block: bytes | None,
    *,
    kvm_vmsas: bool,
) -> str:
    """Why SNP_LAUNCH_FINISH gave ``err``. Where KVM makes the VMSAs, the VM is spent."""
    spent = "This VM can't be used any more: its VMSAs are encrypted. Launch anew."
    if not kvm_vmsas:
        spent = "The launch isn't over: SNP_LAUNCH_FINISH may be tried again."
    if fw_error == FwStatus.BAD_MEASUREMENT and id_block is not None:
        predicted = f"; predicted for this launch: {digest.hex()}" if digest else ""
        return (
            f"The ID block's launch digest is not what the firmware measured. ID block: "
            f"{id_block[:48].hex()}{predicted}.\n{spent}"
        )
    if err == errno.EINVAL:
        return (
            "Already finished, no SNP_LAUNCH_START, DR7 of a vCPU has bits besides 0x400, or the "
            f"ID block or ID authentication is missing.\n{spent}"
        )
    if err == errno.EBUSY:
        return "A vCPU is being created at this moment."
    if err == errno.EBADF:
        return (
            "The descriptor given is not an open /dev/sev, or the one that SNP_LAUNCH_START got "
            f"has been closed.\n{spent}"
        )
    advice = fwstatus.advice(fw_error) if fw_error else ""
    return f"{advice}\n{spent}" if advice else spent


def _type_name(page_type: int) -> str:
    try:
        return f"{page_type} ({PageType(page_type).name})"
    except ValueError:
        return str(page_type)
