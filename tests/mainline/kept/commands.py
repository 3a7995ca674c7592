"""Kept cases: KVM_MEMORY_ENCRYPT_OP, INIT2 and SNP_LAUNCH_START (svm/sev.c)."""

from __future__ import annotations

from kvmlaunch.uapi import lib
from tests.mainline.kept.common import (
    ADDRESSES,
    BAD_FDS,
    BARE,
    HOST,
    PLAIN,
    READY,
)
from tests.mainline.script import (
    PAGE,
    Script,
    attributes,
    close,
    finish,
    gmem,
    init2,
    ioctl,
    launch,
    open_sev,
    sev,
    slot,
    start,
    update,
    vcpu,
    vm,
)

__all__ = ["entry", "init2_cases", "sev_cases", "start_cases"]


_DEBUG_SWAP = 5


def entry() -> dict[str, Script]:
    """KVM_MEMORY_ENCRYPT_OP itself."""
    out = {
        "encrypt op null": [*BARE, ioctl("vm", "KVM_MEMORY_ENCRYPT_OP")],
        "encrypt op null on a plain vm": [*PLAIN, ioctl("vm", "KVM_MEMORY_ENCRYPT_OP")],
        "encrypt op in a read-only page": [
            *(*BARE, {**init2(), "at": "rom"}, init2()),
            *({**start(), "at": "rom+0x100"}, start()),
        ],
        "register region": [
            *(
                *BARE,
                ioctl("vm", "KVM_MEMORY_ENCRYPT_REG_REGION", {"addr": "arena", "size": PAGE}),
            ),
            *(ioctl("vm", "KVM_MEMORY_ENCRYPT_UNREG_REGION", {"addr": "arena", "size": PAGE}),),
        ],
    }
    nowhere = [address for address in ADDRESSES.values() if address]
    out["encrypt op nowhere"] = [
        *(*BARE, *({**init2(), "at": address} for address in nowhere), init2()),
        *(ioctl("vm", "KVM_MEMORY_ENCRYPT_OP", address) for address in nowhere),
    ]
    others = [n for n in (*range(27), 99, 103, 104, 105, 1 << 31) if n != lib.KVM_SEV_INIT2]
    commands = [sev("vm", command, error=7) for command in others]
    out["command before INIT2"] = [*BARE, *commands]
    out["command after FINISH"] = launch(update(), finish(), *commands, init2())
    # KVM_SEV_INIT and KVM_SEV_ES_INIT make a plain VM an SEV guest: see sev_cases().
    out["command on a plain vm"] = [*PLAIN, *commands[2:]]
    return out


def init2_cases() -> dict[str, Script]:
    out = {
        "INIT2 twice": [*READY, init2()],
        "INIT2 on a plain vm": [*PLAIN, init2()],
        "INIT2 after a vcpu": [*BARE, vcpu(), init2(), ioctl("vcpu0", "KVM_GET_REGS", {})],
        "INIT2 retried": [*BARE, init2(flags=1), init2(), start()],
        "INIT2 keeps the word": [*BARE, {**init2(), "error": 5}, {**init2(flags=1), "error": 6}],
        "INIT2 without sev_fd": [*BARE, {**init2(), "sev_fd": -1}],
        "INIT2 with padding": [*BARE, init2(pad1=1, pad2=[1, 2])],
    }
    out["INIT2 flags"] = [*BARE, *(init2(flags=1 << bit) for bit in range(32)), init2()]
    unknown = [bit for bit in range(64) if bit != _DEBUG_SWAP]
    out["INIT2 features"] = [*BARE, *(init2(vmsa_features=1 << bit) for bit in unknown), init2()]
    out["INIT2 debug swap"] = [*BARE, init2(vmsa_features=1 << _DEBUG_SWAP)]
    for version in (1, 2):
        refused = [init2(ghcb_version=n) for n in (3, 0xFFFF)]
        out[f"INIT2 ghcb version {version}"] = [*BARE, *refused, init2(ghcb_version=version)]
    data = [sev("vm", "KVM_SEV_INIT2", address) for address in ADDRESSES.values()]
    out["INIT2 data nowhere"] = [*BARE, *data, init2()]
    return out


def sev_cases() -> dict[str, Script]:
    """SEV and SEV-ES guests, up to their launch, which isn't simulated."""
    out: dict[str, Script] = {}
    for vm_type in (lib.KVM_X86_SEV_VM, lib.KVM_X86_SEV_ES_VM):
        bare = [*HOST, vm(vm_type=vm_type)]
        unknown = [bit for bit in range(64) if bit != _DEBUG_SWAP]
        caps = [
            ioctl("vm", "KVM_CHECK_EXTENSION", getattr(lib, f"KVM_CAP_{name}"))
            for name in ("READONLY_MEM", "SYNC_REGS", "X86_SMM", "MEMORY_ATTRIBUTES")
        ]
        data = [sev("vm", "KVM_SEV_INIT2", address) for address in ADDRESSES.values()]
        out[f"INIT2 of type {vm_type}"] = [
            *(*bare, *caps, *data, *(init2(flags=1 << bit) for bit in range(32))),
            *(init2(vmsa_features=1 << bit) for bit in unknown),
            *(*(init2(ghcb_version=n) for n in (3, 0xFFFF)), init2(), init2(), *caps),
            *(start(), update(), finish(), sev("vm", "KVM_SEV_INIT"), sev("vm", "KVM_SEV_ES_INIT")),
        ]
        for version in (1, 2):
            script = [*bare, init2(ghcb_version=version), init2()]
            out[f"INIT2 of type {vm_type} with ghcb version {version}"] = script
        out[f"INIT2 of type {vm_type} after a vcpu"] = [*bare, vcpu(), init2()]
        out[f"command before INIT2 of type {vm_type}"] = [
            *bare,
            *(sev("vm", command, error=7) for command in range(22)),
        ]
    for command in ("KVM_SEV_INIT", "KVM_SEV_ES_INIT"):
        out[f"{command} of a plain vm"] = [
            *(*PLAIN, sev("vm", command, error=7), sev("vm", command), init2()),
            *(vm("late", vm_type=0), vcpu(vm="late"), sev("late", command)),
        ]
    return out


def start_cases() -> dict[str, Script]:
    out = {
        "START before INIT2": [*BARE, start(), init2(), start()],
        "START on a plain vm": [*PLAIN, start()],
        "START twice": [*READY, start(), start()],
        "START after FINISH": [*launch(finish(), start())],
        "START retried": [*READY, start(policy=0), start()],
        "START without slots": [*READY, start(), finish()],
        "START keeps the word": [*READY, {**start(policy=0), "error": 5}],
        "START writes the word": [*READY, {**start(), "error": 5}],
        "START gosvw": [
            *READY,
            start(gosvw=[1] * 16),
            gmem(),
            slot(),
            attributes(),
            update(type=5),
        ],
        "START with closed sev": [*READY, close("sev"), start(), open_sev(), start()],
    }
    known = (*range(16), 19)
    refused = [0x30000 ^ 1 << bit for bit in range(64) if bit not in known]
    out["START policies"] = [*READY, *(start(policy=policy) for policy in (0, *refused)), start()]
    for policy in (0x30037, 0x30137, 0x30138, 0x30200, 0x3FFFF, 0xB0000):
        out[f"START policy {policy:#x}"] = [*READY, start(policy=policy), start()]
    out["START flags"] = [*READY, *(start(flags=1 << bit) for bit in range(16)), start()]
    bad = [{**start(sev_fd=fd), "error": 9} for fd in BAD_FDS.values()]
    out["START sev_fd wrong"] = [*READY, gmem(), *bad, start()]
    data = [sev("vm", "KVM_SEV_SNP_LAUNCH_START", address) for address in ADDRESSES.values()]
    out["START data nowhere"] = [*READY, *data, start()]
    return out
