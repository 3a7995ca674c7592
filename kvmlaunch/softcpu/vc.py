"""Which exits of an SNP guest become #VC (non-automatic) and which go to the hypervisor.

Automatic exits are HLT, PAUSE, shutdown, nested page faults and VMGEXIT; all else that KVM
intercepts is #VC with the exit code as error code. Sources: AMD APM volume 2, 15.35.4 and table
15-33 for the kinds; Linux svm.c, init_vmcb, and sev.c, sev_es_init_vmcb for what is intercepted.
"""

from __future__ import annotations

from kvmlaunch.abi.vmsa import SEV_FEATURES

__all__ = [
    "CPUID",
    "DEBUG_SWAP",
    "EXCEPTION",
    "HLT",
    "INVD",
    "IOIO",
    "IRET",
    "LTR",
    "MONITOR",
    "MSR",
    "MWAIT",
    "PAUSE",
    "RDTSC",
    "RDTSCP",
    "READ_CR8",
    "READ_DRS",
    "RSM",
    "SHUTDOWN",
    "SOFTWARE_INTERRUPT",
    "VC_EXCEPTIONS",
    "VC_EXITS",
    "VMMCALL",
    "WBINVD",
    "WRITE_CR0",
    "WRITE_CR4",
    "WRITE_CR8",
    "WRITE_DRS",
]

READ_CR8, WRITE_CR0, WRITE_CR4, WRITE_CR8 = 0x08, 0x10, 0x14, 0x18
READ_DRS, WRITE_DRS = range(0x20, 0x28), range(0x30, 0x38)
"""MOV from and to DR0 to DR7."""
EXCEPTION = 0x40
"""Plus the vector."""
LTR, RDTSC, CPUID, RSM, IRET = 0x6D, 0x6E, 0x72, 0x73, 0x74
SOFTWARE_INTERRUPT, PAUSE, HLT, IOIO, MSR, SHUTDOWN = 0x75, 0x77, 0x78, 0x7B, 0x7C, 0x7F
INVD, VMMCALL, RDTSCP, WBINVD, MONITOR, MWAIT = 0x76, 0x81, 0x87, 0x89, 0x8A, 0x8B

VC_EXITS = frozenset(
    (
        *(0x6F, CPUID, RSM, INVD, 0x7A),  # RDPMC, INVLPGA
        *range(0x80, 0x87),  # VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT
        *(WBINVD, MONITOR, MWAIT),
    )
)
"""Exit codes that are always #VC. Others depend: IOIO, MSR, RDTSC, DR7."""

VC_EXCEPTIONS = frozenset((1, 17))
"""#DB and #AC, which KVM intercepts; #DB not with DebugSwap."""

DEBUG_SWAP = 1 << SEV_FEATURES["debug_swap"]
