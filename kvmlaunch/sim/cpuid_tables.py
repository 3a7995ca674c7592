"""CPUID answers of the simulated CPUs, as data.

This is the simulator's own table, not AMD's: plausible values, put together from what is
public (the feature lists of QEMU's EPYC-Milan, EPYC-Genoa and EPYC-Turin models, leaf names
of the APM). No real part answers exactly like this. A leaf that isn't here doesn't exist.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import TypeAlias

__all__ = ["INDEXED", "XSAVE_COMPONENTS", "Registers", "Table", "flags", "tables"]

Registers: TypeAlias = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""
Table: TypeAlias = Mapping[tuple[int, int], Registers]
"""Answers by (function, index)."""

INDEXED = frozenset({0x7, 0xB, 0xD, 0x8000001D})
"""Functions whose answer depends on the index in ECX."""

XSAVE_COMPONENTS: Mapping[int, tuple[int, int]] = {
    2: (0x100, 0x240),  # YMM
    5: (0x040, 0x340),  # AVX-512 opmask
    6: (0x200, 0x380),  # ZMM 0-15, upper halves
    7: (0x400, 0x580),  # ZMM 16-31
    9: (0x008, 0x980),  # PKRU
    11: (0x010, 0),  # CET, user
    12: (0x018, 0),  # CET, supervisor
}
"""XSAVE state components: size, and offset in the standard format (0: supervisor state)."""

_SUPERVISOR_COMPONENTS = 1 << 11 | 1 << 12
_VENDOR = struct.unpack("<3I", b"AuthcAMDenti")  # EBX, ECX, EDX; the text reads EBX EDX ECX


def flags(names: str) -> int:
    """Return the word whose bits are named, from ``SSE3:0 PCLMULQDQ:1``."""
    word = 0
    for bit in re.findall(r":(\d+)(?!\S)", names):
        word |= 1 << int(bit)
    return word


_1_ECX = flags(
    "SSE3:0 PCLMULQDQ:1 MONITOR:3 SSSE3:9 FMA:12 CX16:13 PCID:17 SSE41:19 SSE42:20 X2APIC:21 "
    "MOVBE:22 POPCNT:23 AES:25 XSAVE:26 OSXSAVE:27 AVX:28 F16C:29 RDRAND:30"
)
_1_EDX = flags(
    "FPU:0 VME:1 DE:2 PSE:3 TSC:4 MSR:5 PAE:6 MCE:7 CX8:8 APIC:9 SEP:11 MTRR:12 PGE:13 MCA:14 "
    "CMOV:15 PAT:16 PSE36:17 CLFLUSH:19 MMX:23 FXSR:24 SSE:25 SSE2:26 HTT:28"
)
_7_EBX = flags(
    "FSGSBASE:0 BMI1:3 AVX2:5 SMEP:7 BMI2:8 ERMS:9 INVPCID:10 RDSEED:18 ADX:19 SMAP:20 "
    "CLFLUSHOPT:23 CLWB:24 SHA:29"
)
_7_EBX_AVX512 = flags("F:16 DQ:17 IFMA:21 CD:28 BW:30 VL:31")
_7_ECX = flags("UMIP:2 PKU:3 OSPKE:4 CET_SS:7 VAES:9 VPCLMULQDQ:10 RDPID:22")
_7_ECX_AVX512 = flags("VBMI:1 VBMI2:6 GFNI:8 VNNI:11 BITALG:12 VPOPCNTDQ:14 LA57:16")
_7_EDX = flags("FSRM:4")
_D_1_EAX = flags("XSAVEOPT:0 XSAVEC:1 XGETBV1:2 XSAVES:3")
_EXT1_ECX = flags(
    "LAHF:0 CMP_LEGACY:1 SVM:2 EXTAPIC:3 CR8_LEGACY:4 ABM:5 SSE4A:6 MISALIGNSSE:7 "
    "3DNOWPREFETCH:8 OSVW:9 IBS:10 SKINIT:12 WDT:13 TCE:17 TOPOEXT:22 PERFCTR_CORE:23 "
    "PERFCTR_NB:24 BPEXT:26 PERFCTR_LLC:28 MWAITX:29 ADDR_MASK_EXT:30"
)
_EXT1_EDX = flags("SYSCALL:11 NX:20 MMXEXT:22 FXSR_OPT:25 GBPAGES:26 RDTSCP:27 LM:29")
_EXT1_EDX |= _1_EDX & 0x0183_F3FF  # the legacy features, named a second time
_EXT8_EBX = flags(
    "CLZERO:0 INSTRETCNT:1 XSAVEERPTR:2 INVLPGB:3 RDPRU:4 MCOMMIT:8 WBNOINVD:9 IBPB:12 IBRS:14 "
    "STIBP:15 STIBP_ALWAYS_ON:17 IBRS_PREFERRED:18 IBRS_SAME_MODE:19 SSBD:24 PSFD:28 BTC_NO:29"
)
_SVM = flags(
    "NPT:0 LBRV:1 SVML:2 NRIPS:3 TSC_RATE:4 VMCB_CLEAN:5 FLUSH_BY_ASID:6 DECODE_ASSISTS:7 "
    "PAUSE_FILTER:10 PAUSE_THRESHOLD:12 AVIC:13 VVMLOAD:15 VGIF:16 GMET:17 V_SPEC_CTRL:20 "
    "INVLPGB:24"
)
_SEV = flags(
    "SME:0 SEV:1 PAGE_FLUSH:2 ES:3 SNP:4 VMPL:5 COHERENT:10 HOST64:11 RESTRICTED_INJ:12 "
    "ALTERNATE_INJ:13 DEBUG_SWAP:14 PREVENT_HOST_IBS:15 VTE:16"
)
_SEV_GENOA = _SEV | flags("RMPQUERY:6 VMPL_SSS:7 SECURE_TSC:8 TSC_AUX:9 IBS_VIRT:19 SMT_PROT:25")
_SEV_TURIN = _SEV_GENOA | flags("RMPREAD:21 SEGMENTED_RMP:23 ALLOWED_FEATURES:27")
_EXT21_EAX = flags("NO_NESTED_DATA_BP:0 LFENCE_RDTSC:2 SMM_PAGE_LOCK:3 NULL_SEL_CLR_BASE:6")
_EXT21_EAX_GENOA = _EXT21_EAX | flags("UPPER_ADDRESS_IGNORE:7 AUTOIBRS:8")
_EXT21_EAX_TURIN = _EXT21_EAX_GENOA | flags("FSRS:10 FSRC:11 PREFETCHI:20")

_C_BIT = 51
_VMPLS = 4


def _xsave_leaves(xcr0: int) -> dict[tuple[int, int], Registers]:
    """Leaf 0xD. EBX of indexes 0 and 1 depends on XCR0 and XSS; here all is enabled."""
    offered = xcr0 | _SUPERVISOR_COMPONENTS
    components = {n: place for n, place in XSAVE_COMPONENTS.items() if offered >> n & 1}
    standard = max(size + offset for size, offset in components.values())
    compacted = 0x240 + sum(size for size, _ in components.values())
    leaves: dict[tuple[int, int], Registers] = {
        (0xD, 0): (xcr0, standard, standard, 0),
        (0xD, 1): (_D_1_EAX, compacted, _SUPERVISOR_COMPONENTS, 0),
    }
    for number, (size, offset) in components.items():
        leaves[0xD, number] = (size, offset, 1 if _SUPERVISOR_COMPONENTS >> number & 1 else 0, 0)
    return leaves


def _brand_leaves(name: str) -> dict[tuple[int, int], Registers]:
    text = f"Simulated EPYC ({name}), no hardware".encode().ljust(48, b"\0")
    return {(0x80000002 + n, 0): struct.unpack_from("<4I", text, 16 * n) for n in range(3)}


def _common(name: str, signature: int) -> dict[tuple[int, int], Registers]:
    """What the three products share; signature, features and sizes of Milan."""
    return {
        (0x0, 0): (0x10, *_VENDOR),
        (0x1, 0): (signature, 0x00800800, _1_ECX, _1_EDX),
        (0x5, 0): (0x40, 0x40, 0x3, 0x11),
        (0x6, 0): (flags("ARAT:2"), 0, flags("APERFMPERF:0"), 0),
        (0x7, 0): (0, _7_EBX, _7_ECX, _7_EDX),
        # One package of 64 cores with two threads.
        (0xB, 0): (1, 2, 0x100, 0),
        (0xB, 1): (7, 128, 0x201, 0),
        **_xsave_leaves(0x207),
        (0x80000000, 0): (0x80000021, *_VENDOR),
        (0x80000001, 0): (signature, 0x40000000, _EXT1_ECX, _EXT1_EDX),
        **_brand_leaves(name),
        (0x80000005, 0): (0xFF40FF40, 0xFF40FF40, 0x20080140, 0x20080140),
        (0x80000006, 0): (0x48002200, 0x68004200, 0x02006140, 0x08009140),
        (0x80000007, 0): (0, flags("MCA_OVERFLOW:0 SUCCOR:1"), 0, flags("INVARIANT_TSC:8")),
        (0x80000008, 0): (0x00003030, _EXT8_EBX, 0x0000707F, 0x00010007),
        (0x8000000A, 0): (1, 0x8000, 0, _SVM),
        (0x80000019, 0): (0xF040F040, 0xF0400000, 0, 0),
        (0x8000001A, 0): (flags("MOVU:1 FP256:2"), 0, 0, 0),
        (0x8000001B, 0): (0x3FF, 0, 0, 0),
        (0x8000001C, 0): (0, 0, 0, 0),
        (0x8000001D, 0): (0x00004121, 0x01C0003F, 0x003F, 0),
        (0x8000001D, 1): (0x00004122, 0x01C0003F, 0x003F, 0),
        (0x8000001D, 2): (0x00004143, 0x01C0003F, 0x03FF, 2),
        # EDX 2 is what a published refusal expected (nvtrust issue 91).
        (0x8000001D, 3): (0x0003C163, 0x03C0003F, 0x7FFF, 2),
        (0x8000001E, 0): (0, 0x100, 0, 0),
        (0x8000001F, 0): (_SEV, _VMPLS << 12 | 1 << 6 | _C_BIT, 509, 100),
        (0x80000020, 0): (0, 0, 0, 0),
        (0x80000021, 0): (_EXT21_EAX, 0, 0, 0),
    }


def _milan(signature: int) -> Table:
    return _common("Milan", signature)


def _genoa(signature: int) -> Table:
    return _common("Genoa", signature) | {
        (0x7, 0): (1, _7_EBX | _7_EBX_AVX512, _7_ECX | _7_ECX_AVX512, _7_EDX),
        (0x7, 1): (flags("AVX512_BF16:5"), 0, 0, 0),
        **_xsave_leaves(0x2E7),
        (0x80000000, 0): (0x80000022, *_VENDOR),
        (0x80000006, 0): (0x48002200, 0x68004200, 0x04006140, 0x08009140),
        (0x80000008, 0): (0x00003934, _EXT8_EBX, 0x0000707F, 0x00010007),
        (0x8000001A, 0): (flags("MOVU:1 FP256:2 FP512:3"), 0, 0, 0),
        (0x8000001F, 0): (_SEV_GENOA, _VMPLS << 12 | 6 << 6 | _C_BIT, 1006, 100),
        (0x80000021, 0): (_EXT21_EAX_GENOA, 0, 0, 0),
        (0x80000022, 0): (flags("PERFMON_V2:0"), 0x0006, 0, 0),
    }


def _turin(signature: int) -> Table:
    more_7_ecx = flags("MOVDIRI:27 MOVDIR64B:28")
    return {
        **_genoa(signature),
        **_brand_leaves("Turin"),
        (0x7, 0): (
            1,
            _7_EBX | _7_EBX_AVX512,
            _7_ECX | _7_ECX_AVX512 | more_7_ecx,
            _7_EDX | flags("AVX512_VP2INTERSECT:8"),
        ),
        (0x7, 1): (flags("AVX_VNNI:4 AVX512_BF16:5"), 0, 0, 0),
        (0x8000001F, 0): (_SEV_TURIN, _VMPLS << 12 | 6 << 6 | _C_BIT, 1006, 100),
        (0x80000021, 0): (_EXT21_EAX_TURIN, 0, 0, 0),
    }


def tables(name: str, signature: int) -> Table:
    """Return the table of 'Milan', 'Genoa' or 'Turin'; KeyError for another name."""
    return {"Milan": _milan, "Genoa": _genoa, "Turin": _turin}[name](signature)
