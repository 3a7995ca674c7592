"""Kept cases: each refusal that KVM knows on the way to a launch, and what was found by chance.

A name says what happens; what the kernel answers stands nowhere here: the kernel is asked. The
checks are those of arch/x86/kvm/svm/sev.c, virt/kvm/kvm_main.c and virt/kvm/guest_memfd.c.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmlaunch.uapi import lib
from tests.mainline.found import FOUND
from tests.mainline.script import (
    ARENA_PAGES,
    GPA,
    PAGE,
    RAM_PAGES,
    Script,
    Step,
    attributes,
    close,
    cpuid_page,
    fallocate,
    finish,
    gmem,
    init2,
    ioctl,
    launch,
    mmap,
    open_kvm,
    open_sev,
    run,
    sev,
    slot,
    slot_v1,
    start,
    update,
    vcpu,
    vm,
    write,
)

__all__ = ["CASES", "Case"]


class Case(NamedTuple):
    """A script, and orders for the firmware (kvmlaunch.sim.faults)."""

    script: Script
    orders: tuple[str, ...] = ()


_HOST = [open_kvm(), open_sev()]
_BARE = [*_HOST, vm()]
_READY = [*_BARE, init2()]
_PLAIN = [*_HOST, vm(vm_type=0)]
_TOP = 1 << 64
_GFN = GPA // PAGE
_DEBUG_SWAP = 5
_END = f"arena+{ARENA_PAGES * PAGE - 8:#x}"
_ADDRESSES = {"null": 0, "low": 8, "kernel": "kernel", "guard": "guard", "straddling": _END}
_BAD_FDS = {"none": -1, "kvm": "fd:kvm", "vm": "fd:vm", "gmem": "fd:gmem", "high": 1 << 20}


def _devices() -> dict[str, Script]:
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
        "vm outlives kvm": [*_HOST, vm(), close("kvm"), init2(), vcpu()],
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
    for vm_type in (1, 5, 31, 32, 1 << 32):
        out[f"vm type {vm_type}"] = [open_kvm(), vm(vm_type=vm_type)]
    for request in (0xAE00, 0xAE41, 0xAE80, 0xAEFF, 0x1234):
        fds = ("kvm", "vcpu0", "gmem") if request == 0xAE41 else ("kvm", "vm", "gmem")
        out[f"unknown request {request:#x}"] = [
            *launch(started=False),
            *(ioctl(fd, request, 1) for fd in fds),
        ]
    return out


def _entry() -> dict[str, Script]:
    """KVM_MEMORY_ENCRYPT_OP itself."""
    out = {
        "encrypt op null": [*_BARE, ioctl("vm", "KVM_MEMORY_ENCRYPT_OP")],
        "encrypt op null on a plain vm": [*_PLAIN, ioctl("vm", "KVM_MEMORY_ENCRYPT_OP")],
        "encrypt op in a read-only page": [
            *(*_BARE, {**init2(), "at": "rom"}, init2()),
            *({**start(), "at": "rom+0x100"}, start()),
        ],
        "register region": [
            *(
                *_BARE,
                ioctl("vm", "KVM_MEMORY_ENCRYPT_REG_REGION", {"addr": "arena", "size": PAGE}),
            ),
            *(ioctl("vm", "KVM_MEMORY_ENCRYPT_UNREG_REGION", {"addr": "arena", "size": PAGE}),),
        ],
    }
    for name, address in _ADDRESSES.items():
        out[f"encrypt op {name}"] = [*_BARE, ioctl("vm", "KVM_MEMORY_ENCRYPT_OP", address)]
        out[f"encrypt op at {name}"] = [*_BARE, {**init2(), "at": address}, init2()]
    others = [n for n in (*range(27), 99, 103, 104, 105, 1 << 31) if n != lib.KVM_SEV_INIT2]
    commands = [sev("vm", command, error=7) for command in others]
    out["command before INIT2"] = [*_BARE, *commands]
    out["command after FINISH"] = launch(update(), finish(), *commands, init2())
    # KVM_SEV_INIT and KVM_SEV_ES_INIT make a plain VM an SEV guest, which isn't simulated.
    out["command on a plain vm"] = [*_PLAIN, *commands[2:]]
    return out


def _init2() -> dict[str, Script]:
    out = {
        "INIT2 twice": [*_READY, init2()],
        "INIT2 on a plain vm": [*_PLAIN, init2()],
        "INIT2 after a vcpu": [*_BARE, vcpu(), init2(), ioctl("vcpu0", "KVM_GET_REGS", {})],
        "INIT2 retried": [*_BARE, init2(flags=1), init2(), start()],
        "INIT2 keeps the word": [*_BARE, {**init2(), "error": 5}, {**init2(flags=1), "error": 6}],
        "INIT2 without sev_fd": [*_BARE, {**init2(), "sev_fd": -1}],
        "INIT2 with padding": [*_BARE, init2(pad1=1, pad2=[1, 2])],
    }
    out["INIT2 flags"] = [*_BARE, *(init2(flags=1 << bit) for bit in range(32)), init2()]
    unknown = [bit for bit in range(64) if bit != _DEBUG_SWAP]
    out["INIT2 features"] = [*_BARE, *(init2(vmsa_features=1 << bit) for bit in unknown), init2()]
    out["INIT2 debug swap"] = [*_BARE, init2(vmsa_features=1 << _DEBUG_SWAP)]
    for version in (1, 2):
        refused = [init2(ghcb_version=n) for n in (3, 0xFFFF)]
        out[f"INIT2 ghcb version {version}"] = [*_BARE, *refused, init2(ghcb_version=version)]
    for name, address in _ADDRESSES.items():
        out[f"INIT2 data {name}"] = [*_BARE, sev("vm", "KVM_SEV_INIT2", address), init2()]
    return out


def _start() -> dict[str, Script]:
    out = {
        "START before INIT2": [*_BARE, start(), init2(), start()],
        "START on a plain vm": [*_PLAIN, start()],
        "START twice": [*_READY, start(), start()],
        "START after FINISH": [*launch(finish(), start())],
        "START retried": [*_READY, start(policy=0), start()],
        "START without slots": [*_READY, start(), finish()],
        "START keeps the word": [*_READY, {**start(policy=0), "error": 5}],
        "START writes the word": [*_READY, {**start(), "error": 5}],
        "START gosvw": [
            *_READY,
            start(gosvw=[1] * 16),
            gmem(),
            slot(),
            attributes(),
            update(type=5),
        ],
        "START with closed sev": [*_READY, close("sev"), start(), open_sev(), start()],
    }
    known = (*range(16), 19)
    refused = [0x30000 ^ 1 << bit for bit in range(64) if bit not in known]
    out["START policies"] = [*_READY, *(start(policy=policy) for policy in (0, *refused)), start()]
    for policy in (0x30001, 0x30037, 0x30038, 0x30100, 0x30137, 0x30138, 0x30200, 0x3FFFF, 0xB0000):
        out[f"START policy {policy:#x}"] = [*_READY, start(policy=policy), start()]
    out["START flags"] = [*_READY, *(start(flags=1 << bit) for bit in range(16)), start()]
    for name, fd in _BAD_FDS.items():
        out[f"START sev_fd {name}"] = [*_READY, gmem(), {**start(sev_fd=fd), "error": 9}, start()]
    for name, address in _ADDRESSES.items():
        out[f"START data {name}"] = [
            *_READY,
            sev("vm", "KVM_SEV_SNP_LAUNCH_START", address),
            start(),
        ]
    return out


def _update() -> dict[str, Script]:
    last = RAM_PAGES - 1
    out = {
        "UPDATE before INIT2": [*_BARE, update()],
        "UPDATE before START": launch(update(), started=False),
        "UPDATE on a plain vm": [*_PLAIN, update()],
        "UPDATE without a slot": [*_READY, start(), attributes(), update()],
        "UPDATE in a slot without gmem": [
            *(*_READY, start(), attributes(), slot(flags=0, guest_memfd=0), update()),
        ],
        "UPDATE below the slot": launch(update(gfn_start=_GFN - 1)),
        "UPDATE behind the slot": launch(update(RAM_PAGES)),
        "UPDATE over the end": launch(update(last, 2), update(RAM_PAGES, 1)),
        "UPDATE into the next slot": launch(
            *(
                gmem("more"),
                slot(slot=1, guest_phys_addr=GPA + RAM_PAGES * PAGE, guest_memfd="fd:more"),
            ),
            *(attributes(size=2 * RAM_PAGES * PAGE), update(last, 3), update(RAM_PAGES, 2)),
        ),
        "UPDATE everything": launch(update(0, RAM_PAGES), finish()),
        "UPDATE downwards": launch(*(update(page) for page in reversed(range(4))), finish()),
        "UPDATE twice": launch(update(), update(), finish()),
        "UPDATE onto a page that is done": launch(update(2), update(0, 4), update(2), update(3)),
        "UPDATE with a shared page": launch(
            attributes(address=GPA + 2 * PAGE, size=PAGE, attributes=0), update(0, 4), update(2)
        ),
        "UPDATE with all pages shared": launch(attributes(attributes=0), update()),
        "UPDATE after gmem was closed": launch(close("gmem"), {**update(), "error": 4}),
        "UPDATE closed between": launch(update(), close("gmem"), update(1), finish()),
        "UPDATE after the slot went": launch(slot(memory_size=0, flags=0), update()),
        "UPDATE after FINISH": launch(update(), finish(), update(), update(1), update(1, type=3)),
        "UPDATE after FINISH without vcpus": launch(update(), finish(), update(1), vcpus=0),
        "UPDATE after a hole": launch(update(), fallocate("gmem", 3, 0, PAGE), update(), finish()),
        "UPDATE after a hole beside": launch(update(), fallocate("gmem", 3, PAGE, PAGE), update()),
        "UPDATE into preallocated": launch(
            fallocate("gmem", 1, 0, 4 * PAGE), update(0, 4), finish()
        ),
        "UPDATE after the slot moved": launch(
            *(update(), slot(memory_size=0, flags=0)),
            *(slot(guest_phys_addr=GPA + PAGE), update(1), update(2), finish()),
        ),
        "UPDATE at an offset": launch(
            *(slot(memory_size=0, flags=0), slot(pages=4, guest_memfd_offset=2 * PAGE)),
            *(update(0, 4), fallocate("gmem", 3, 0, 2 * PAGE), update(0), finish()),
        ),
        "UPDATE unaligned source": launch(update(uaddr="arena+0x123"), finish()),
        "UPDATE source over the guard": launch(
            update(0, 4, uaddr=f"arena+{(ARENA_PAGES - 2) * PAGE:#x}"),
            update(2, 2, uaddr=f"arena+{(ARENA_PAGES - 2) * PAGE + 8:#x}"),
        ),
        "UPDATE from a read-only page": launch(update(uaddr="rom"), update(1, type=6, uaddr="rom")),
        "UPDATE writes the word": launch({**update(), "error": 5}, {**update(), "error": 6}),
        "UPDATE keeps the word": launch({**update(flags=1), "error": 5}),
        "UPDATE in a read-only page": launch({**update(), "data_at": "rom"}, update()),
        "UPDATE with padding": launch(update(pad0=1, pad1=2, pad2=[3])),
        "UPDATE zero advances no source": launch(update(0, 2, type=3), update(2, type=3, uaddr=0)),
        "UPDATE with closed sev": launch(update(), close("sev"), update(1), open_sev(), update(1)),
        "UPDATE of a cpuid page": launch(write("arena", cpuid_page()), update(type=6), finish()),
        "UPDATE in another vm's memory": [
            *launch(update()),
            *(vm("two"), init2("two"), vcpu("vcpuB", 0, "two"), start("two"), update(1, vm="two")),
            *(slot("two", "gmem"), update(1, vm="two"), finish("two"), finish()),
        ],
    }
    for kind in (0, 1, 2, 3, 4, 5, 6, 7, 255):
        zeros = write("arena", bytes(2 * PAGE))
        out[f"UPDATE type {kind}"] = launch(zeros, update(0, 2, type=kind), finish())
    lengths = (0, 1, PAGE - 1, PAGE + 1)
    out["UPDATE length"] = launch(*(update(len=length) for length in lengths), update(), finish())
    out["UPDATE length too long"] = launch(update(len=_TOP - PAGE), finish())
    out["UPDATE gfn"] = launch(*(update(gfn_start=gfn) for gfn in (0, 1 << 52, _TOP - 1)))
    out["UPDATE flags"] = launch(*(update(flags=1 << bit) for bit in range(16)), update())
    for name, address in _ADDRESSES.items():
        data = sev("vm", "KVM_SEV_SNP_LAUNCH_UPDATE", address)
        out[f"UPDATE data {name}"] = launch(data, update())
        out[f"UPDATE source {name}"] = launch(
            {**update(uaddr=address), "error": 3}, update(1, type=3, uaddr=address), update()
        )
    for name, fd in _BAD_FDS.items():
        out[f"UPDATE sev_fd {name}"] = launch({**update(sev_fd=fd), "error": 9}, update(), finish())
    return out


def _finish() -> dict[str, Script]:
    block = {"id_block_en": 1, "id_block_uaddr": "arena", "id_auth_uaddr": "arena+0x2000"}
    out = {
        "FINISH before INIT2": [*_BARE, finish()],
        "FINISH on a plain vm": [*_PLAIN, finish()],
        "FINISH before START": launch(finish(), started=False),
        "FINISH twice": launch(finish(), finish()),
        "FINISH twice without vcpus": launch(finish(), {**finish(), "error": 7}, vcpus=0),
        "FINISH without pages": launch(finish(), vcpus=0),
        "FINISH of four vcpus": launch(update(), finish(), vcpus=4),
        "FINISH in order of creation": launch(
            *(vcpu("b", 3), vcpu("a", 1), ioctl("a", "KVM_SET_REGS", {"rip": 0x1234})),
            finish(),
        ),
        "FINISH with a vcpu that is closed": launch(close("vcpu0"), finish()),
        "FINISH without the block": launch(finish(**{**block, "id_block_uaddr": 0}), finish()),
        "FINISH without the auth": launch(finish(**{**block, "id_auth_uaddr": 0}), finish()),
        "FINISH ignores an auth key alone": launch(finish(auth_key_en=1)),
        "FINISH block not enabled": launch(finish(id_block_uaddr=8, id_auth_uaddr=8)),
        "FINISH host data": launch(finish(host_data=list(range(32)))),
        "FINISH vcek disabled": launch(finish(vcek_disabled=3)),
        "FINISH with padding": launch(finish(pad0=[1], pad1=[2])),
        "FINISH in a read-only page": launch({**finish(), "data_at": "rom", "at": "rom+0x100"}),
        "FINISH with closed sev": launch(close("sev"), finish(), open_sev(), finish()),
        "FINISH with closed sev, no vcpus": launch(close("sev"), finish(), vcpus=0),
        "FINISH with another sev": launch(open_sev("two"), close("sev"), finish(sev_fd="fd:two")),
        "FINISH with another sev, no vcpus": launch(
            *(open_sev("two"), close("sev"), finish(sev_fd="fd:two"), open_sev("again"), finish()),
            vcpus=0,
        ),
        "FINISH with sev under a number of kvm": launch(
            *(close("sev"), open_kvm("other"), finish(), close("other"), open_sev(), finish()),
            vcpus=0,
        ),
        "FINISH with dr7": launch(ioctl("vcpu0", "KVM_SET_DEBUGREGS", {"dr7": 0x401}), finish()),
        "FINISH with a second vcpu's dr7": launch(
            *(ioctl("vcpu1", "KVM_SET_DEBUGREGS", {"dr7": 0x402}), finish()),
            *(ioctl("vcpu0", "KVM_GET_REGS", {}), ioctl("vcpu1", "KVM_GET_REGS", {})),
            *(ioctl("vcpu1", "KVM_SET_DEBUGREGS", {"dr7": 0x400}), finish()),
            vcpus=2,
        ),
        "FINISH with guest debug": launch(
            ioctl("vcpu0", "KVM_SET_GUEST_DEBUG", {"control": 1}), finish()
        ),
        "FINISH after guest debug": launch(
            *(ioctl("vcpu0", "KVM_SET_GUEST_DEBUG", {"control": 1}),),
            *(ioctl("vcpu0", "KVM_SET_GUEST_DEBUG", {"control": 0}), finish()),
        ),
        "vcpu after FINISH": launch(
            *(finish(), vcpu("late", 5), ioctl("late", "KVM_GET_REGS", {}), run("late")),
            finish(),
        ),
        "memory after FINISH": launch(
            *(update(), finish(), attributes(attributes=0), fallocate("gmem", 3, 0, PAGE)),
            *(slot(memory_size=0, flags=0), slot(), attributes(), update()),
        ),
    }
    out["FINISH flags"] = launch(*(finish(flags=1 << bit) for bit in range(16)), finish())
    for name, address in _ADDRESSES.items():
        data = sev("vm", "KVM_SEV_SNP_LAUNCH_FINISH", address)
        out[f"FINISH data {name}"] = launch(data, finish())
        out[f"FINISH block {name}"] = launch(
            finish(**{**block, "id_block_uaddr": address}), finish()
        )
        out[f"FINISH auth {name}"] = launch(finish(**{**block, "id_auth_uaddr": address}), vcpus=0)
    for name, fd in _BAD_FDS.items():
        out[f"FINISH sev_fd {name}"] = launch({**finish(sev_fd=fd), "error": 9}, finish())
        out[f"FINISH sev_fd {name}, no vcpus"] = launch({**finish(sev_fd=fd), "error": 9}, vcpus=0)
    return out


def _slots() -> dict[str, Script]:
    ready = [*_READY, gmem()]

    def tried(*steps: Step, before: Script = ready) -> Script:
        return [*before, *steps]

    delete = slot(memory_size=0, flags=0)
    out = {
        "slot null": tried(ioctl("vm", "KVM_SET_USER_MEMORY_REGION2")),
        "slot v1 null": tried(ioctl("vm", "KVM_SET_USER_MEMORY_REGION")),
        "slot v1": tried(slot_v1(), slot_v1(flags=1), slot_v1(flags=2), slot_v1(flags=4)),
        "slot read-only": tried(slot(flags=2), slot(flags=6)),
        "slot read-only, plain": tried(slot(flags=2), before=_PLAIN),
        "slot gmem, plain": tried(gmem(), slot(), slot(flags=0), before=_PLAIN),
        "slot with log": tried(slot(flags=1), slot(flags=5)),
        "slot wrong flags": tried(*(slot(flags=1 << bit) for bit in range(3, 32))),
        "slot unaligned": tried(
            slot(memory_size=1), slot(guest_phys_addr=1), slot(userspace_addr="arena+1")
        ),
        "slot user address": tried(
            *(
                slot(slot=n, userspace_addr=at)
                for n, at in enumerate((0, PAGE, "kernel", _TOP - PAGE))
            )
        ),
        "slot offset": tried(
            *(slot(guest_memfd_offset=at) for at in (1, PAGE, RAM_PAGES * PAGE, _TOP - PAGE)),
            slot(pages=RAM_PAGES - 1, guest_memfd_offset=PAGE),
        ),
        "slot id": tried(
            *(slot(slot=n) for n in (32764, 0xFFFF, 1 << 16, 2 << 16)), slot(slot=32763)
        ),
        "slot id, plain": tried(
            *(slot_v1(slot=n) for n in (32764, 1 << 16, 2 << 16)), before=_PLAIN
        ),
        "slot wraps": tried(
            slot(guest_phys_addr=_TOP - PAGE), slot(guest_phys_addr=_TOP - 8 * PAGE)
        ),
        "slot too big": tried(slot(flags=0, memory_size=PAGE << 31, guest_phys_addr=0)),
        "slot at the end of addresses": tried(
            slot(flags=0, guest_phys_addr=f"top-{RAM_PAGES * PAGE}"),
            slot(flags=0, slot=1, guest_phys_addr="top"),
        ),
        "slot deleted": tried(delete, slot(), delete, delete),
        "slot again": tried(slot(), slot(), slot(flags=0), slot(guest_phys_addr=0)),
        "slot shared again": tried(
            *(slot(flags=0), slot(flags=0), slot(flags=1), slot(), slot(flags=0, memory_size=PAGE)),
            *(slot(flags=0, userspace_addr="arena+0x1000"), slot(flags=0, guest_phys_addr=0)),
        ),
        "slot overlaps": tried(
            *(slot(pages=4), slot(slot=1, pages=4, guest_memfd_offset=4 * PAGE)),
            *(slot(slot=1, guest_phys_addr=GPA + 3 * PAGE, pages=4, guest_memfd_offset=4 * PAGE),),
            *(slot(slot=1, guest_phys_addr=GPA + 4 * PAGE, pages=4, guest_memfd_offset=4 * PAGE),),
        ),
        "slot moved onto another": tried(
            *(slot(flags=0), slot(slot=1, flags=0, guest_phys_addr=0)),
            slot(slot=1, flags=0, guest_phys_addr=GPA + PAGE),
        ),
        "slot binds a page twice": tried(
            *(slot(pages=4), slot(slot=1, guest_phys_addr=0, pages=4, guest_memfd_offset=3 * PAGE)),
            *(slot(slot=1, guest_phys_addr=0, pages=4, guest_memfd_offset=4 * PAGE),),
        ),
        "slot of a foreign gmem": tried(vm("two"), gmem("theirs", vm="two"), slot(gmem="theirs")),
        "slot of a closed gmem": tried(close("gmem"), slot(), gmem("again"), slot()),
        "slot survives its gmem": tried(slot(), close("gmem"), delete, gmem(), slot()),
        "slot in a dead range": tried(
            slot(), attributes(), start(), update(), delete, slot(), update()
        ),
        "slot with pad": tried(slot(pad1=1, pad2=[1])),
    }
    for name, fd in _BAD_FDS.items():
        if name != "gmem":
            out[f"slot gmem {name}"] = tried(slot(guest_memfd=fd), slot())
    return out


def _memory() -> dict[str, Script]:
    out = {
        "gmem null": [*_BARE, ioctl("vm", "KVM_CREATE_GUEST_MEMFD")],
        "gmem sizes": [
            *_BARE,
            *(gmem(size=n) for n in (0, 1, PAGE + 1, 1 << 63, _TOP - PAGE, 1 << 40, PAGE)),
        ],
        "gmem flags": [
            *_BARE,
            *(gmem(flags=1 << bit) for bit in (0, 1, 2, 63)),
            gmem(flags=1, size=1),
        ],
        "gmem reserved": [*_BARE, gmem(reserved=[1, 2])],
        "gmem on a plain vm": [*_PLAIN, gmem(), gmem(flags=1)],
        "gmem mmap": [*_BARE, gmem(), mmap("gmem", PAGE), mmap("vm", PAGE), mmap("kvm", PAGE)],
        "vcpu mmap": [
            *(*_READY, vcpu()),
            *(mmap("vcpu0", size, at) for size, at in ((PAGE, 0), (3 * PAGE, 0), (0, 0))),
        ],
        "attributes null": [*_BARE, ioctl("vm", "KVM_SET_MEMORY_ATTRIBUTES")],
        "attributes flags": [*_BARE, attributes(flags=1), attributes(flags=1 << 63)],
        "attributes bits": [*_BARE, *(attributes(attributes=1 << bit) for bit in range(64))],
        "attributes size": [
            *_BARE,
            *(attributes(size=n) for n in (0, 1, PAGE - 1, _TOP - PAGE, _TOP - GPA)),
        ],
        "attributes address": [
            *_BARE,
            *(attributes(address=at) for at in (1, _TOP - PAGE, _TOP - RAM_PAGES * PAGE, 1 << 60)),
        ],
        "attributes on a plain vm": [*_PLAIN, attributes(), attributes(attributes=0)],
        "attributes before INIT2": [
            *_BARE,
            attributes(),
            init2(),
            gmem(),
            slot(),
            start(),
            update(),
        ],
        "attributes in pieces": launch(
            attributes(attributes=0),
            *(attributes(address=GPA + n * PAGE, size=PAGE) for n in (0, 1, 3, 4, 7)),
            *(update(0, 8), update(3, 8), update(7)),
        ),
        "fallocate on others": [
            *launch(started=False),
            *(fallocate(fd, 1, 0, PAGE) for fd in ("kvm", "vm", "vcpu0", "nothing")),
        ],
    }
    for name, modes in {
        "preallocate": (1,),
        "punch": (3,),
        "other modes": (0, 2, 4, 8, 9, 0x10, 0x11, 0x13, 0x41),
    }.items():
        out[f"fallocate {name}"] = [
            *(*_BARE, gmem()),
            *(
                fallocate("gmem", mode, at, size)
                for mode in modes
                for at in (0, 1, 8 * PAGE, (1 << 63) - PAGE)
                for size in (0, 1, PAGE)
            ),
        ]
    return out


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


def _vcpu() -> dict[str, Script]:
    ready = [*_READY, vcpu()]
    out = {
        "vcpu ids": [
            *_READY,
            *(vcpu(f"v{n}", n) for n in ("ids", 1 << 32, _TOP - 1, "ids-1", 0, 0)),
        ],
        "vcpu before INIT2": [*_BARE, vcpu(), run(), ioctl("vcpu0", "KVM_GET_REGS", {})],
        "run before INIT2, now": [*_BARE, vcpu(), run(immediate_exit=1), run(immediate_exit=1)],
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
            *_READY,
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
        "boot id": [
            *(*_READY, ioctl("vm", "KVM_SET_BOOT_CPU_ID", 1), ioctl("vm", "KVM_CREATE_IRQCHIP")),
            *(vcpu(), vcpu("ap", 1), ioctl("vm", "KVM_SET_BOOT_CPU_ID", 0)),
            *(ioctl("ap", "KVM_GET_MP_STATE", {}), ioctl("vcpu0", "KVM_GET_MP_STATE", {})),
        ],
    }
    out["mp_state without irqchip"] = [
        *ready,
        *(ioctl("vcpu0", "KVM_SET_MP_STATE", {"mp_state": n}) for n in (*range(11), 77)),
    ]
    out["mp_state with irqchip"] = [*_READY, ioctl("vm", "KVM_CREATE_IRQCHIP"), vcpu()]
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


def _faults() -> dict[str, Case]:
    three = launch(update(0, 3), update(0, 3), finish())
    retried = [*_READY, start(), start(), gmem(), slot(), attributes(), update(), finish()]
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


def _all() -> dict[str, Case]:
    groups = (_devices, _entry, _init2, _start, _update, _finish, _slots, _memory, _vcpu)
    plain = {name: Case(script) for group in groups for name, script in group().items()}
    return {**plain, **_faults(), **{n: Case(s, o) for n, (s, o) in FOUND.items()}}


CASES: dict[str, Case] = _all()
"""Every kept case by name."""
