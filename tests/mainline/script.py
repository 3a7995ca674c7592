"""Scripts: sequences of system calls as plain data, for two hosts to answer alike.

A script is a list of steps, a step a dict that JSON can carry:

| op | keys |
|---|---|
| open | path, flags |
| close | fd |
| ioctl | fd, request (name or number), arg: a value, or the fields of the struct behind it |
| sev | fd, id (name or number), sev_fd, error, data: a value, or the fields of its struct |
| fallocate | fd, mode, offset, length |
| mmap | fd, length, offset |
| run | fd, in: fields of kvm_run set before; KVM_RUN |
| write | to, bytes (hex) |

``as`` gives the descriptor that a step makes a name. ``at`` (and ``data_at``) say where a struct
is put, else it is somewhere of its own. Structs with entries (kvm_cpuid2, kvm_msrs) take
``entries``, a list of fields; ``room`` adds empty ones.

A value is a number or a text: ``fd:NAME`` (-1 if its step failed; the old number once it is
closed), or ``REGION+OFFSET``, where the regions are

    arena   32 pages of memory; page n is filled with the byte n + 1
    rom     2 pages that can be read only
    guard   a page that can't be touched, behind the arena's last
    kernel  the kernel's half
    top     the first address that the CPU can't have, for guest physical ones
    ids     the first vCPU id that this kernel doesn't allow

The functions here make steps; they are there so that kept scripts can be read.
"""

from __future__ import annotations

import struct
from typing import Any

__all__ = [
    "ARENA_PAGES",
    "PAGE",
    "ROM_PAGES",
    "Script",
    "Step",
    "Value",
    "attributes",
    "close",
    "cpuid_page",
    "fallocate",
    "finish",
    "gmem",
    "init2",
    "ioctl",
    "launch",
    "mmap",
    "open_kvm",
    "open_sev",
    "run",
    "sev",
    "slot",
    "slot_v1",
    "start",
    "update",
    "vcpu",
    "vm",
    "write",
]

Value = int | str
Step = dict[str, Any]
Script = list[Step]

PAGE = 4096
ARENA_PAGES = 32
ROM_PAGES = 2

POLICY = 0x30000
GPA = 0x100000
RAM_PAGES = 8
PRIVATE = 8
SNP_VM = 4
_GMEM_SLOT = 4


def open_kvm(name: str = "kvm", flags: int = 2, path: str = "/dev/kvm") -> Step:
    return {"op": "open", "path": path, "flags": flags, "as": name}


def open_sev(name: str = "sev", flags: int = 2) -> Step:
    return open_kvm(name, flags, "/dev/sev")


def close(fd: str) -> Step:
    return {"op": "close", "fd": fd}


def ioctl(fd: str, request: str | int, arg: Any = 0, **more: Any) -> Step:
    return {"op": "ioctl", "fd": fd, "request": request, "arg": arg, **more}


def vm(name: str = "vm", vm_type: int = SNP_VM, kvm: str = "kvm") -> Step:
    return {**ioctl(kvm, "KVM_CREATE_VM", vm_type), "as": name}


def vcpu(name: str = "vcpu0", number: Value = 0, vm: str = "vm") -> Step:
    return {**ioctl(vm, "KVM_CREATE_VCPU", number), "as": name}


def gmem(name: str = "gmem", size: int = RAM_PAGES * PAGE, vm: str = "vm", **fields: Any) -> Step:
    return {**ioctl(vm, "KVM_CREATE_GUEST_MEMFD", {"size": size, **fields}), "as": name}


def slot(vm: str = "vm", gmem: str = "gmem", pages: int = RAM_PAGES, **fields: Any) -> Step:
    """KVM_SET_USER_MEMORY_REGION2 with a private side; ``fields`` override."""
    region = {
        "slot": 0,
        "flags": _GMEM_SLOT,
        "guest_phys_addr": GPA,
        "memory_size": pages * PAGE,
        "userspace_addr": "arena",
        "guest_memfd": f"fd:{gmem}",
    }
    return ioctl(vm, "KVM_SET_USER_MEMORY_REGION2", {**region, **fields})


def slot_v1(vm: str = "vm", **fields: Any) -> Step:
    region = {"guest_phys_addr": GPA, "memory_size": RAM_PAGES * PAGE, "userspace_addr": "arena"}
    return ioctl(vm, "KVM_SET_USER_MEMORY_REGION", {**region, **fields})


def attributes(vm: str = "vm", **fields: Any) -> Step:
    args = {"address": GPA, "size": RAM_PAGES * PAGE, "attributes": PRIVATE}
    return ioctl(vm, "KVM_SET_MEMORY_ATTRIBUTES", {**args, **fields})


def sev(vm: str, command: str | int, data: Any = 0, sev_fd: Value = "fd:sev", **more: Any) -> Step:
    """KVM_MEMORY_ENCRYPT_OP."""
    return {"op": "sev", "fd": vm, "id": command, "sev_fd": sev_fd, "data": data, **more}


def init2(vm: str = "vm", **fields: Any) -> Step:
    return sev(vm, "KVM_SEV_INIT2", fields)


def start(vm: str = "vm", sev_fd: Value = "fd:sev", **fields: Any) -> Step:
    return sev(vm, "KVM_SEV_SNP_LAUNCH_START", {"policy": POLICY, **fields}, sev_fd)


def update(
    page: int = 0, pages: int = 1, vm: str = "vm", sev_fd: Value = "fd:sev", **fields: Any
) -> Step:
    """Page ``page`` of the usual slot from the same page of the arena."""
    args = {
        "gfn_start": GPA // PAGE + page,
        "uaddr": f"arena+{page * PAGE:#x}",
        "len": pages * PAGE,
        "type": 1,
    }
    return sev(vm, "KVM_SEV_SNP_LAUNCH_UPDATE", {**args, **fields}, sev_fd)


def finish(vm: str = "vm", sev_fd: Value = "fd:sev", **fields: Any) -> Step:
    return sev(vm, "KVM_SEV_SNP_LAUNCH_FINISH", fields, sev_fd)


def fallocate(fd: str, mode: int, offset: int, length: int) -> Step:
    return {"op": "fallocate", "fd": fd, "mode": mode, "offset": offset, "length": length}


def mmap(fd: str, length: int, offset: int = 0) -> Step:
    return {"op": "mmap", "fd": fd, "length": length, "offset": offset}


def run(fd: str = "vcpu0", **fields: Any) -> Step:
    return {"op": "run", "fd": fd, "in": fields}


def write(to: Value, data: bytes) -> Step:
    return {"op": "write", "to": to, "bytes": data.hex()}


def cpuid_page(leaf: int = 0x40000000, eax: int = 0x40000010) -> bytes:
    """A CPUID page of one entry; a hypervisor leaf is nothing that firmware has an opinion of."""
    entry = struct.pack("<IIQQIIIIQ", leaf, 0, 0, 0, eax, 0, 0, 0, 0)
    return (struct.pack("<IIQ", 1, 0, 0) + entry).ljust(PAGE, b"\0")


def launch(*between: Step, vcpus: int = 1, started: bool = True) -> Script:
    """A VM with memory, vCPUs and START, ready for UPDATE; then the steps ``between``."""
    steps = [open_kvm(), open_sev(), vm(), init2(), gmem(), slot(), attributes()]
    steps += [vcpu(f"vcpu{n}", n) for n in range(vcpus)]
    if started:
        steps.append(start())
    return [*steps, *between]
