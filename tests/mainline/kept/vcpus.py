"""Kept cases: vCPUs, their state before and after FINISH, KVM_RUN before it."""

from __future__ import annotations

from tests.mainline.kept.common import (
    BARE,
    READY,
    TOP,
)
from tests.mainline.script import (
    GPA,
    PAGE,
    Script,
    Step,
    attributes,
    close,
    finish,
    gmem,
    ioctl,
    launch,
    run,
    slot,
    start,
    vcpu,
)

__all__ = ["vcpus"]


_SET = {
    "REGS": {"rip": 0x1000, "rflags": 2},
    "SREGS": {},
    "SREGS2": {},
    "DEBUGREGS": {"dr7": 0x400},
    "XCRS": {"nr_xcrs": 1, "xcrs": [{"value": 1}]},
    "FPU": {"mxcsr": 0x1F80},
    "XSAVE": {},
    "MP_STATE": {},
    "VCPU_EVENTS": {},
    "LAPIC": {},
}


def _pre_fault(gpa: int, size: int) -> Step:
    return ioctl("vcpu0", "KVM_PRE_FAULT_MEMORY", {"gpa": gpa, "size": size})


def vcpus() -> dict[str, Script]:
    ready = [*READY, vcpu()]
    out = {
        "vcpu ids": [
            *READY,
            *(vcpu(f"v{n}", n) for n in ("ids", 1 << 32, TOP - 1, "ids-1", 0, 0)),
        ],
        "vcpu before INIT2": [*BARE, vcpu(), run(), ioctl("vcpu0", "KVM_GET_REGS", {})],
        "run before INIT2, now": [*BARE, vcpu(), run(immediate_exit=1), run(immediate_exit=1)],
        "run before FINISH": launch(run(), run(immediate_exit=1), finish(), run(immediate_exit=1)),
        "run with an argument": launch({**run(), "arg": 1}),
        "run with sync regs": launch(run(kvm_valid_regs=1), run(kvm_dirty_regs=1), run()),
        "CPUID after a run": [
            *(*ready, run(), ioctl("vcpu0", "KVM_SET_CPUID2", {"nent": 1}, room=1)),
            ioctl("vcpu0", "KVM_SET_CPUID2", {}),
        ],
        "round trip of sregs": [
            *(*ready, gmem(), slot(), attributes(), start(), finish()),
            ioctl("vcpu0", "KVM_GET_SREGS", {}),
        ],
        "irqchip": [
            *READY,
            *(
                ioctl("vm", "KVM_CREATE_IRQCHIP"),
                ioctl("vm", "KVM_CREATE_IRQCHIP"),
                vcpu(),
                vcpu("ap", 1),
            ),
            *(ioctl("ap", "KVM_GET_MP_STATE", {}), ioctl("vcpu0", "KVM_GET_MP_STATE", {})),
            *(start(), finish(), ioctl("ap", "KVM_GET_MP_STATE", {})),
        ],
        "irqchip late": [*ready, ioctl("vm", "KVM_CREATE_IRQCHIP")],
        "pre-fault before FINISH": launch(
            ioctl("vcpu0", "KVM_PRE_FAULT_MEMORY", {"gpa": GPA, "size": PAGE})
        ),
        "pre-fault after FINISH": launch(
            *(
                finish(),
                attributes(size=2 * PAGE),
                attributes(address=GPA + PAGE, attributes=0, size=PAGE),
            ),
            *(_pre_fault(GPA, 2 * PAGE), _pre_fault(GPA, 0), _pre_fault(GPA + 1, PAGE)),
            *(_pre_fault(0, PAGE), slot(memory_size=0, flags=0), _pre_fault(GPA, PAGE)),
            *(slot(userspace_addr="guard"), _pre_fault(GPA + PAGE, PAGE), close("gmem")),
            _pre_fault(GPA, PAGE),
        ),
        "boot id": [
            *(*READY, ioctl("vm", "KVM_SET_BOOT_CPU_ID", 1), ioctl("vm", "KVM_CREATE_IRQCHIP")),
            *(vcpu(), vcpu("ap", 1), ioctl("vm", "KVM_SET_BOOT_CPU_ID", 0)),
            *(ioctl("ap", "KVM_GET_MP_STATE", {}), ioctl("vcpu0", "KVM_GET_MP_STATE", {})),
        ],
    }
    out["mp_state without irqchip"] = [
        *ready,
        *(ioctl("vcpu0", "KVM_SET_MP_STATE", {"mp_state": n}) for n in (*range(11), 77)),
    ]
    out["mp_state with irqchip"] = [*READY, ioctl("vm", "KVM_CREATE_IRQCHIP"), vcpu()]
    for n in (*range(11), 77):
        out["mp_state with irqchip"] += [
            ioctl("vcpu0", "KVM_SET_MP_STATE", {"mp_state": n}),
            ioctl("vcpu0", "KVM_GET_MP_STATE", {}),
        ]
    for name, fields in _SET.items():
        get = ioctl("vcpu0", f"KVM_GET_{name}", {})
        put = ioctl("vcpu0", f"KVM_SET_{name}", fields)
        null = [ioctl("vcpu0", f"KVM_{verb}_{name}") for verb in ("GET", "SET")]
        out[f"{name} before FINISH"] = [*ready, get, *null, put, get]
        out[f"{name} after FINISH"] = launch(finish(), get, put, *null)
    return out
