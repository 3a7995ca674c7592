"""Kept cases: firmware answers on order."""

from __future__ import annotations

from tests.mainline.kept.common import (
    READY,
    Case,
)
from tests.mainline.script import (
    PAGE,
    attributes,
    close,
    cpuid_page,
    fallocate,
    finish,
    gmem,
    ioctl,
    launch,
    slot,
    start,
    update,
    vcpu,
    write,
)

__all__ = ["faults"]


def faults() -> dict[str, Case]:
    three = launch(update(0, 3), update(0, 3), finish())
    retried = [*READY, start(), start(), gmem(), slot(), attributes(), update(), finish()]
    out = {
        f"{name} fails with {status:#x}": Case([*retried, close("vm")], (f"{name}:fw={status:#x}",))
        for name in ("SNP_GCTX_CREATE", "SNP_LAUNCH_START", "SNP_ACTIVATE")
        for status in (0x1, 0x7, 0x10)
    }
    for nth in (1, 2, 3, 4):
        order = (f"SNP_LAUNCH_UPDATE:fw=0x1a@{nth}",)
        out[f"UPDATE {nth} fails"] = Case(three, order)
        out[f"UPDATE {nth} and on fail"] = Case(three, (f"SNP_LAUNCH_UPDATE:fw=0x2@{nth}+",))
    for status in (0xA, 0xB, 0x7, 0x16):
        name, order = f"FINISH fails with {status:#x}", (f"SNP_LAUNCH_FINISH:fw={status:#x}",)
        out[name] = Case(launch(update(), finish(), finish(), update(1)), order)
        out[f"{name}, no vcpus"] = Case(launch(update(), finish(), finish(), vcpus=0), order)
    out["VMSA refused"] = Case(
        launch(finish(), finish(), vcpus=2), ("SNP_LAUNCH_UPDATE:fw=0x19@2",)
    )
    out["decommission fails"] = Case(launch(update()), ("SNP_DECOMMISSION:fw=0x10",))
    out["reclaim fails"] = Case(
        launch(
            *(update(), vcpu("late", 3), ioctl("vcpu0", "KVM_GET_REGS", {}), finish()),
            *(attributes(), fallocate("gmem", 3, 0, PAGE), gmem("more"), close("vm")),
        ),
        ("SNP_LAUNCH_UPDATE:fw=0x1a", "SNP_PAGE_RECLAIM:fail"),
    )
    sent = launch(write("arena", cpuid_page()), update(type=6), update(type=6), finish())
    leaf = "CPUID:correct=0x40000000"
    out["CPUID corrected"] = Case(sent, (f"{leaf}.eax",))
    out["CPUID corrected to a value"] = Case(sent, (f"{leaf}.ecx=0x1234",))
    out["CPUID corrected, other leaf"] = Case(sent, ("CPUID:correct=0x7/1.ebx",))
    out["CPUID corrected twice"] = Case(sent, (f"{leaf}.edx=1@1+",))
    out["CPUID refused, nothing corrected"] = Case(sent, ("SNP_LAUNCH_UPDATE:fw=0x16",))
    out["CPUID refused for another reason"] = Case(sent, ("SNP_LAUNCH_UPDATE:fw=0x10",))
    out["CPUID corrected, read-only"] = Case(
        launch(update(type=6, uaddr="rom"), update(type=6, uaddr="rom")), (f"{leaf}.eax",)
    )
    out["CPUID corrected, reclaim fails"] = Case(sent, (f"{leaf}.eax", "SNP_PAGE_RECLAIM:fail"))
    out["CPUID page in a range"] = Case(
        launch(
            write("arena", cpuid_page() + cpuid_page()), update(0, 3, type=6), update(1, type=6)
        ),
        (f"{leaf}.eax@2",),
    )
    return out
