"""What is launched and predicted alike: on the simulated host, and on a real kernel."""

from __future__ import annotations

from typing import Any

from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image
from tests.images import igvm_files as f
from tests.images.builders import Seg, elf64, ovmf, pvh_note
from tests.launch.rig import reset_state

FLAT = bytes(range(256)) * 40
IGVM = (
    *(f.platform(), f.area(0, 0x2000), f.parameter(0x307, 0), f.context(0x9000, 0x1000)),
    *(f.page(0x1000, 0), f.page(0x2000), f.page(0x3000, kind=1), f.page(0x4000, kind=2)),
    *(f.page(0x5000, 0, flags=2), f.insert(0x20000, 0), f.page(0x8000, 0, flags=4)),
    *(f.page(0xFFFFF000, 0), f.error_range(0xA000, 0x1000), f.page(0x6000, 0)),
)
IMAGES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "real-mode": (FLAT, {}),
    "real-mode-above-64k": (FLAT, {"load_addr": 0x20000}),
    "rom": (FLAT.ljust(0x10000, b"\x90"), {"load_addr": 0xFFFF0000}),
    "flat-64": (FLAT, {"load_addr": 0x200000}),
    "elf": (elf64([Seg(0x100000, FLAT, memsz=0x8000), Seg(0x180123, b"data" * 99)]), {}),
    "elf-pvh": (elf64([Seg(0x100000, FLAT, memsz=0x8000), pvh_note(0x100010)]), {}),
    "ovmf": (ovmf(), {}),
    "igvm": (f.igvm(IGVM, FLAT[:4096] + f.vmsa(rbx=7)), {"order": "kvm"}),
}


def image_plan(name: str, **options: Any) -> LaunchPlan:
    data, more = IMAGES[name]
    return load_image(data, PlanOptions(memory=32 << 20, **more, **options))


_C_BIT = 1 << 51
XMM = bytes(range(256))
X87 = bytes(range(100, 180))
STATES: dict[str, dict[str, Any]] = {
    "general": {
        name: 0x1111_0000_0000_0000 + number
        for number, name in enumerate(
            [
                *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10"),
                *("r11", "r12", "r13", "r14", "r15", "rip"),
            ]
        )
    },
    "rflags": {"rflags": 0x202},
    "rflags-without-bit-1": {"rflags": 0},
    "dr6": {"dr6": 0xFFFF0FF1},
    "dr6-zero": {"dr6": 0},
    "dr0-to-3": {"dr0": 1, "dr1": 2, "dr2": 3, "dr3": 4},
    "dr7-zero": {"dr7": 0},
    "cr2": {"cr2": 0xDEAD000},
    "cr0-cd-nw": {"cr0": 0x60000010},
    "cr4-without-mce": {"cr4": 0},
    "efer-without-svme": {"efer": 0},
    "efer-sce-nx": {"efer": 0x1801},
    "segments": {
        "cs": Segment(0x1234, 0x9A, 0x1FFF, 0x12340),
        "ds": Segment(0x10, 0xC92, 0xFFFFFFFF, 0),
        "es": Segment(0, 0, 0, 0),
        "fs": Segment(7, 0xF3, 0x10, 0x7FFF_0000_0000),
        "gs": Segment(0x2B, 0x1F3, 0xFFFF, 0xFFFF_8000_0000_0000),
        "ldtr": Segment(0x50, 0x82, 0x67, 0x9000),
        "tr": Segment(0x40, 0x89, 0x67, 0xA000),
    },
    "user-mode": {"ss": Segment(0x2B, 0xF3, 0xFFFF, 0), "cpl": 3},
    "tables": {"gdtr": Segment(0, 0, 0x7F, 0x5000), "idtr": Segment(0, 0, 0xFFF, 0x6000)},
    "tables-with-more-than-a-table": {"gdtr": Segment(8, 0x93, 0x1FFFF, 0x5000)},
    "long-mode": {
        "cs": Segment(8, 0xA9B, 0xFFFFFFFF, 0),
        "cr0": 0x80000011,
        "cr3": 0x2000 | _C_BIT,
        "cr4": 0x60,
        "efer": 0x1500,
        "rip": 0x100000,
    },
    "pat": {"g_pat": 0x0000_0000_0007_0106},
    "syscall-msrs": {
        "star": 0x0023_0010_0000_0000,
        "lstar": 0xFFFF_8000_0000_1000,
        "cstar": 0xFFFF_8000_0000_2000,
        "sfmask": 0x47700,
        "kernel_gs_base": 0xFFFF_8000_0000_3000,
    },
    "sysenter-msrs": {"sysenter_cs": 0x10, "sysenter_esp": 0x8000, "sysenter_eip": 0x9000},
    "sysenter-high": {"sysenter_esp": 0x5_0000_8000, "sysenter_eip": 0x7FFF_0000_9000},
    "debugctl-lbr": {"dbgctl": 1},
    "debugctl": {"dbgctl": 0x3F},
    "x87": {
        "x87_fcw": 0x27F,
        "x87_fsw": 0x3800,
        "x87_ftw": 0x81,
        "x87_fop": 0x123,
        "x87_rip": 0x1122334455667788,
        "x87_dp": 0x8877665544332211,
        "fpreg_x87": X87,
    },
    "x87-segments": {"x87_cs": 8, "x87_ds": 0x10},
    "mxcsr": {"mxcsr": 0x1FA0},
    "xmm": {"fpreg_xmm": XMM},
    "ymm": {"fpreg_ymm": XMM[::-1], "fpreg_xmm": XMM, "xcr0": 7},
    "ymm-without-xcr0": {"fpreg_ymm": XMM},
    "xcr0": {"xcr0": 7},
    "xcr0-zero": {"xcr0": 0},
    "pkru": {"pkru": 0x55555554, "xcr0": 0x207},
    "pkru-without-xcr0": {"pkru": 1},
    "not-carried": {"tsc_aux": 7, "virtual_tom": 1 << 39, "guest_exit_code": 5, "vmpl": 1},
    "sev-features-of-the-page": {"sev_features": 0x3F},
}
"""Changes to the reset state, by name."""


def state_named(name: str, cbitpos: int) -> Vmsa:
    """The reset state with the changes of ``STATES[name]``, on a host with that C-bit."""
    state = reset_state().replace(**STATES[name])
    if not state.cr3 & _C_BIT:
        return state
    return state.replace(cr3=state.cr3 & ~_C_BIT | 1 << cbitpos)
