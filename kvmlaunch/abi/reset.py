"""Reset states that are measured, and the vCPU signature.

| field     | QEMU >= 9.1          | KVM, a vCPU nobody touched |
|-----------|----------------------|----------------------------|
| cs.attrib | 0x9B                 | 0x9A                       |
| es ds fs gs ss attrib | 0x93     | 0x92                       |
| tr.attrib | 0x8B                 | 0x83                       |
| rdx       | vCPU signature       | 0x600                      |
| cs.base, rip | of the given EIP  | of 0xFFFFFFF0              |

All else is common. Sources: sev-snp-measure 0.0.13 and virtee/sev for QEMU; Linux
svm_vcpu_reset, init_vmcb and sev_es_sync_vmsa for KVM (6.12).
"""

from __future__ import annotations

from kvmlaunch.errors import FormatError

from ._check import uint
from .record import read_only
from .segment import Segment
from .vmsa import Vmsa

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BSP_EIP",
    "VCPU_TYPES",
    "kvm_untouched",
    "qemu_reset",
    "vcpu_signature",
    "vcpu_type_signature",
]

BSP_EIP = 0xFFFFFFF0
"""Reset vector of x86: where the boot processor starts."""

# EDX of a vCPU that has no CPUID yet: family 6, the kernel's fallback.
_KVM_RESET_RDX = 0x600
_SNP_ACTIVE = 1


def qemu_reset(eip: int, *, signature: int, sev_features: int) -> Vmsa:
    """Return the VMSA that QEMU (on Linux >= 6.10) has measured for one vCPU.

    Args:
        eip: 32-bit start address: `BSP_EIP`, or the SEV-ES reset block's for other vCPUs.
        signature: vCPU signature, see `vcpu_signature` and `VCPU_TYPES`.
        sev_features: SEV_FEATURES as measured, 0x1 by default (nothing is or-ed in).

    Raises:
        FormatError: an argument doesn't fit its field.
    """
    uint("eip", eip, 32)
    uint("signature", signature, 32)
    return _reset(eip, code=0x9B, data=0x93, tr=0x8B, rdx=signature, sev_features=sev_features)


def kvm_untouched(*, sev_features: int) -> Vmsa:
    """Return the VMSA that KVM has measured for a vCPU nobody touched, boot processor or not.

    Args:
        sev_features: vmsa_features of KVM_SEV_INIT2; KVM sets SNPActive (bit 0) itself.
    """
    return _reset(
        BSP_EIP,
        code=0x9A,
        data=0x92,
        tr=0x83,
        rdx=_KVM_RESET_RDX,
        sev_features=sev_features | _SNP_ACTIVE,
    )


def _reset(eip: int, *, code: int, data: int, tr: int, rdx: int, sev_features: int) -> Vmsa:
    flat = Segment(attrib=data, limit=0xFFFF)
    table = Segment(limit=0xFFFF)
    return Vmsa(
        es=flat,
        cs=Segment(0xF000, code, 0xFFFF, eip & 0xFFFF0000),
        ss=flat,
        ds=flat,
        fs=flat,
        gs=flat,
        gdtr=table,
        ldtr=Segment(attrib=0x82, limit=0xFFFF),
        idtr=table,
        tr=Segment(attrib=tr, limit=0xFFFF),
        efer=0x1000,  # SVME, which KVM ors in
        cr4=0x40,  # MCE, which KVM ors in
        cr0=0x10,  # ET; KVM takes CD and NW away (a quirk that is on by default)
        dr7=0x400,
        dr6=0xFFFF0FF0,
        rflags=0x2,
        rip=eip & 0xFFFF,
        g_pat=0x0007040600070406,
        rdx=rdx,
        sev_features=sev_features,
        xcr0=0x1,
        mxcsr=0x1F80,
        x87_fcw=0x037F,
    )


def vcpu_signature(family: int, model: int, stepping: int) -> int:
    """Return EAX of CPUID leaf 1 for a processor: the reset value of EDX.

    Source: AMD 25481, CPUID Fn0000_0001_EAX.

    Raises:
        FormatError: family above 270, model above 255 or stepping above 15.
    """
    extended = max(family - 0xF, 0)
    uint("family", family, 9)
    uint("extended family", extended, 8)
    uint("model", model, 8)
    uint("stepping", stepping, 4)
    base = min(family, 0xF)
    return extended << 20 | (model >> 4) << 16 | base << 8 | (model & 0xF) << 4 | stepping


_NAPLES = vcpu_signature(23, 1, 2)
_ROME = vcpu_signature(23, 49, 0)
_MILAN = vcpu_signature(25, 1, 1)
_GENOA = vcpu_signature(25, 17, 0)
_TURIN = vcpu_signature(26, 0, 0)

VCPU_TYPES: Mapping[str, int] = read_only(
    {
        **dict.fromkeys(("EPYC", *(f"EPYC-v{n}" for n in range(1, 6)), "EPYC-IBPB"), _NAPLES),
        **dict.fromkeys(("EPYC-Rome", *(f"EPYC-Rome-v{n}" for n in range(1, 6))), _ROME),
        **dict.fromkeys(("EPYC-Milan", *(f"EPYC-Milan-v{n}" for n in range(1, 4))), _MILAN),
        **dict.fromkeys(("EPYC-Genoa", "EPYC-Genoa-v1", "EPYC-Genoa-v2"), _GENOA),
        **dict.fromkeys(("EPYC-Turin", "EPYC-Turin-v1"), _TURIN),
    }
)
"""vCPU signature by QEMU's model name: all EPYC models of a QEMU that has EPYC-Turin (10.1 or
newer), whose versions differ in features only. Source: QEMU target/i386/cpu.c builtin_x86_defs
(family, model, stepping), and the list of `qemu-system-x86_64 -device help`."""


def vcpu_type_signature(name: str) -> int:
    """Return the signature of QEMU's CPU model.

    Raises:
        FormatError: no such model; the nearest ones are named.
    """
    if name in VCPU_TYPES:
        return VCPU_TYPES[name]
    import difflib  # only here

    names = {known.lower(): known for known in VCPU_TYPES}
    close = [names[near] for near in difflib.get_close_matches(name.lower(), names, cutoff=0.4)]
    hint = f"; near to it: {', '.join(close)}" if close else ""
    raise FormatError(f"unknown CPU type {name!r}{hint}; known are {', '.join(VCPU_TYPES)}")
