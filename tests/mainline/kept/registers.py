"""Kept cases: control registers, CPUID and MSRs (regs.c, cpuid.c, x86.c, svm/svm.c)."""

from __future__ import annotations

from typing import Any

from tests.mainline.kept.common import (
    READY,
)
from tests.mainline.script import (
    Script,
    Step,
    finish,
    ioctl,
    launch,
    run,
    start,
    vcpu,
)

__all__ = ["control_registers", "msrs"]


# A CPUID table that gives a guest what an EPYC has, as far as control registers follow it.
_FEATURES = [
    {"function": 0x0, "eax": 0x10, "ebx": 0x68747541, "edx": 0x69746E65, "ecx": 0x444D4163},
    {"function": 0x1, "ecx": 1 << 26 | 1 << 21},
    {"function": 0x7, "flags": 1, "ebx": 1 << 0 | 1 << 7 | 1 << 20, "ecx": 1 << 2 | 1 << 3},
    {"function": 0xD, "flags": 1, "eax": 7, "ebx": 0x340, "ecx": 0x340},
    {"function": 0xD, "index": 1, "flags": 1, "eax": 0xF},
    {"function": 0x80000000, "eax": 0x80000021},
    {"function": 0x80000001, "ecx": 1 << 2, "edx": 1 << 20 | 1 << 29},
    {"function": 0x80000008, "eax": 0x3030},
]
_CPUID = ioctl("vcpu0", "KVM_SET_CPUID2", {"nent": len(_FEATURES)}, entries=_FEATURES)
_SHOWN = ioctl("vcpu0", "KVM_GET_CPUID2", {"nent": len(_FEATURES)}, room=len(_FEATURES))
_GET_SREGS = ioctl("vcpu0", "KVM_GET_SREGS", {})
# Features that the emulated CPU lacks, and a real EPYC has: PCID, FXSR_OPT.
_CR4_PCIDE, _EFER_FFXSR = 17, 14


def _sregs(name: str = "KVM_SET_SREGS", **fields: Any) -> Step:
    return ioctl("vcpu0", name, {"apic_base": 0xFEE00900, **fields})


def _msr(index: int, value: int, *, get: bool = False) -> Step:
    name = "KVM_GET_MSRS" if get else "KVM_SET_MSRS"
    return ioctl("vcpu0", name, {"nmsrs": 1}, entries=[{"index": index, "data": value}])


def control_registers() -> dict[str, Script]:
    """Each bit of each, with and without a CPUID table."""
    ready = [*READY, vcpu()]
    out = {}
    usual = {"cr0": 0x11, "cr4": 0x20, "efer": 0, "apic_base": 0xFEE00900, "cr3": 0, "cr8": 0}
    unlike = {"cr4": _CR4_PCIDE, "efer": _EFER_FFXSR}
    for register, value in usual.items():
        bits = [bit for bit in range(64) if bit != unlike.get(register)]
        tried = [_sregs(**{**usual, register: value ^ 1 << bit}) for bit in bits]
        out[f"{register} bits"] = [*ready, *tried, _GET_SREGS]
        out[f"{register} bits with CPUID"] = [*ready, _CPUID, *tried, _GET_SREGS]
    long = {"cr0": 0x80000011, "cr4": 0x20, "cr3": 0x2000, "efer": 0x500}
    out["long mode without CPUID"] = [*ready, _sregs(**long), _GET_SREGS]
    out["long mode"] = [
        *(*ready, _CPUID, _sregs(**long), _sregs(**{**long, "efer": 0x1D01}), _GET_SREGS),
        *(_sregs(**{**long, "cr3": 1 << bit}) for bit in (12, 40, 47, 48, 51, 52, 63)),
        *(_sregs(**long, cs={"l": 1}), start(), finish()),
    ]
    out["paging in all modes"] = [
        *(*ready, _CPUID),
        *(
            _sregs(cr0=c, cr4=d, efer=e)
            for c in (0x80000011, 0x11)
            for d in (0, 32)
            for e in (0, 256)
        ),
        _GET_SREGS,
    ]
    out["PDPTRs"] = [
        *(*ready, _sregs(cr0=0x80000011, cr4=0x20), ioctl("vcpu0", "KVM_GET_SREGS2", {})),
        _sregs("KVM_SET_SREGS2", cr0=0x80000011, cr4=0x20, flags=1, pdptrs=[1, 2, 3, 4]),
        *(ioctl("vcpu0", "KVM_GET_SREGS2", {}), _sregs("KVM_SET_SREGS2", flags=1)),
        *(_sregs("KVM_SET_SREGS2", flags=2), ioctl("vcpu0", "KVM_GET_SREGS2", {})),
    ]
    out["CPUID follows the state"] = [
        *(*ready, _CPUID, _SHOWN, ioctl("vcpu0", "KVM_SET_XCRS", _XCR0_AVX), _SHOWN),
        *(_sregs(cr4=1 << 18 | 1 << 22), _SHOWN, _sregs(apic_base=0xFEE00100), _SHOWN),
        *(run(), _CPUID, _SHOWN, start(), finish(), _SHOWN),
    ]
    out["CPUID too short"] = [*ready, _CPUID, ioctl("vcpu0", "KVM_GET_CPUID2", {"nent": 1})]
    return out


_XCR0_AVX = {"nr_xcrs": 1, "xcrs": [{"value": 7}]}
_MSRS = (
    *(0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101),
    *(0xC0000102, 0x174, 0x175, 0x176, 0x277, 0x1B),
)


def msrs() -> dict[str, Script]:
    values = (0, 1, 0x901, 0x0007040600070406, 0x0207040600070406, 1 << 32 | 5, 1 << 47, 1 << 63)
    out = {}
    for name, table in (("", []), (" with CPUID", [_CPUID])):
        out[f"MSRs{name}"] = [
            *(*READY, vcpu(), *table),
            *(step for m in _MSRS for v in values for step in (_msr(m, v), _msr(m, 9, get=True))),
            *(start(), finish()),
        ]
    out["MSRs after FINISH"] = launch(
        finish(), *(step for m in _MSRS for step in (_msr(m, 5, get=True), _msr(m, 0)))
    )
    unknown = 0xC0DE0000
    out["MSR unknown"] = launch(_msr(unknown, 7), _msr(unknown, 7, get=True))
    out["MSRs too many"] = launch(
        *(ioctl("vcpu0", f"KVM_{verb}_MSRS", {"nmsrs": 256}, room=256) for verb in ("GET", "SET"))
    )
    return out
