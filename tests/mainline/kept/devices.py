"""Kept cases: descriptors, /dev/kvm and /dev/sev."""

from __future__ import annotations

from tests.mainline.kept.common import HOST, TOP
from tests.mainline.script import (
    PAGE,
    Script,
    close,
    fallocate,
    finish,
    init2,
    ioctl,
    launch,
    open_kvm,
    open_sev,
    run,
    start,
    update,
    vcpu,
    vm,
)

__all__ = ["devices"]


def devices() -> dict[str, Script]:
    out = {
        "open kvm read-only": [open_kvm(flags=0), vm()],
        "open sev read-only": [open_kvm(), open_sev(flags=0), vm(), init2(), start()],
        "open missing": [open_kvm(path="/dev/kvm-none")],
        "close nothing": [close("nothing")],
        "close twice": [open_kvm(), close("kvm"), close("kvm")],
        "number used again": [
            *(open_kvm(), open_sev(), close("sev"), open_kvm("other")),
            *(ioctl("sev", "KVM_GET_API_VERSION"), vm(), init2(), start()),
        ],
        "vm outlives kvm": [*HOST, vm(), close("kvm"), init2(), vcpu()],
        "vcpu outlives vm": [
            *launch(update(), finish(), close("vm")),
            *(ioctl("vcpu0", "KVM_GET_REGS", {}), ioctl("vcpu0", "KVM_GET_MP_STATE", {})),
            *(run(immediate_exit=1), close("vcpu0")),
        ],
        "gmem outlives vm": [
            *launch(update()),
            *(
                close("vm"),
                close("vcpu0"),
                fallocate("gmem", 3, 0, PAGE),
                fallocate("gmem", 1, 0, PAGE),
            ),
        ],
        "sev outlives nothing": [open_sev(), close("sev"), ioctl("sev", "SEV_ISSUE_CMD", 0)],
    }
    out["vm types"] = [open_kvm(), *(vm(vm_type=n) for n in (1, 5, 31, 32, 1 << 32, TOP - 1))]
    for request in (0xAE00, 0xAE41, 0xAE80, 0xAEFF, 0x1234):
        fds = ("kvm", "vcpu0", "gmem") if request == 0xAE41 else ("kvm", "vm", "gmem")
        out[f"unknown request {request:#x}"] = [
            *launch(started=False),
            *(ioctl(fd, request, 1) for fd in fds),
        ]
    return out
