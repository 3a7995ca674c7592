"""Kept cases: SNP_LAUNCH_UPDATE and SNP_LAUNCH_FINISH (svm/sev.c, guest_memfd.c)."""

from __future__ import annotations

from tests.mainline.kept.common import (
    ADDRESSES,
    BAD_FDS,
    BARE,
    GFN,
    PLAIN,
    READY,
    TOP,
)
from tests.mainline.script import (
    ARENA_PAGES,
    GPA,
    PAGE,
    RAM_PAGES,
    Script,
    attributes,
    close,
    cpuid_page,
    fallocate,
    finish,
    gmem,
    init2,
    ioctl,
    launch,
    open_kvm,
    open_sev,
    run,
    sev,
    slot,
    start,
    update,
    vcpu,
    vm,
    write,
)

__all__ = ["finish_cases", "update_cases"]


def update_cases() -> dict[str, Script]:
    last = RAM_PAGES - 1
    out = {
        "UPDATE before INIT2": [*BARE, update()],
        "UPDATE before START": launch(update(), started=False),
        "UPDATE on a plain vm": [*PLAIN, update()],
        "UPDATE without a slot": [*READY, start(), attributes(), update()],
        "UPDATE in a slot without gmem": [
            *(*READY, start(), attributes(), slot(flags=0, guest_memfd=0), update()),
        ],
        "UPDATE below the slot": launch(update(gfn_start=GFN - 1)),
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
    out["UPDATE length too long"] = launch(update(len=TOP - PAGE), finish())
    out["UPDATE gfn"] = launch(*(update(gfn_start=gfn) for gfn in (0, 1 << 52, TOP - 1)))
    out["UPDATE flags"] = launch(*(update(flags=1 << bit) for bit in range(16)), update())
    data = [sev("vm", "KVM_SEV_SNP_LAUNCH_UPDATE", address) for address in ADDRESSES.values()]
    out["UPDATE data nowhere"] = launch(*data, update())
    sources = [{**update(uaddr=address), "error": 3} for address in ADDRESSES.values()]
    out["UPDATE source nowhere"] = launch(*sources, update())
    zeros = [update(page, type=3, uaddr=address) for page, address in enumerate(ADDRESSES.values())]
    out["UPDATE source nowhere, but zero"] = launch(*zeros, finish())
    bad = [{**update(sev_fd=fd), "error": 9} for fd in BAD_FDS.values()]
    out["UPDATE sev_fd wrong"] = launch(*bad, update(), finish())
    return out


def finish_cases() -> dict[str, Script]:
    block = {"id_block_en": 1, "id_block_uaddr": "arena", "id_auth_uaddr": "arena+0x2000"}
    out = {
        "FINISH before INIT2": [*BARE, finish()],
        "FINISH on a plain vm": [*PLAIN, finish()],
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
    data = [sev("vm", "KVM_SEV_SNP_LAUNCH_FINISH", address) for address in ADDRESSES.values()]
    out["FINISH data nowhere"] = launch(*data, finish())
    # Without a vCPU a FINISH that failed can be tried again.
    blocks = [finish(**{**block, "id_block_uaddr": address}) for address in ADDRESSES.values()]
    auths = [finish(**{**block, "id_auth_uaddr": address}) for address in ADDRESSES.values()]
    out["FINISH block nowhere"] = launch(*blocks, *auths, finish(), vcpus=0)
    for name in ("guard", "kernel"):
        nowhere = {**block, "id_block_uaddr": ADDRESSES[name]}
        out[f"FINISH block {name}"] = launch(finish(**nowhere), finish())
    bad = [{**finish(sev_fd=fd), "error": 9} for fd in BAD_FDS.values()]
    out["FINISH sev_fd wrong"] = launch(*bad, finish())
    for name, fd in BAD_FDS.items():
        out[f"FINISH sev_fd {name}, no vcpus"] = launch({**finish(sev_fd=fd), "error": 9}, vcpus=0)
    return out
