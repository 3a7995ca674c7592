"""Kept cases: slots, attributes, guest_memfd (kvm_main.c, guest_memfd.c)."""

from __future__ import annotations

from kvmlaunch.uapi import lib
from tests.mainline.kept.common import (
    BAD_FDS,
    BARE,
    PLAIN,
    READY,
    TOP,
)
from tests.mainline.script import (
    GPA,
    PAGE,
    RAM_PAGES,
    Script,
    Step,
    attributes,
    close,
    fallocate,
    gmem,
    init2,
    ioctl,
    launch,
    mmap,
    slot,
    slot_v1,
    start,
    update,
    vcpu,
    vm,
)

__all__ = ["logs_and_zones", "memory", "slots"]

_NO_SLOTS = (5, 32764, 0xFFFF, 1 << 16, 2 << 16)


def logs_and_zones() -> dict[str, Script]:
    """The dirty log, coalesced MMIO, and other small VM ioctls."""

    def get(slot: int = 0, bitmap: str | int = "arena") -> Step:
        return ioctl("vm", "KVM_GET_DIRTY_LOG", {"slot": slot, "dirty_bitmap": bitmap})

    def clear(slot: int = 0, first: int = 0, pages: int = RAM_PAGES) -> Step:
        log = {"slot": slot, "first_page": first, "num_pages": pages, "dirty_bitmap": "arena"}
        return ioctl("vm", "KVM_CLEAR_DIRTY_LOG", log)

    def manual(options: int, **more: int) -> Step:
        cap = lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        return ioctl("vm", "KVM_ENABLE_CAP", {"cap": cap, "args": [options], **more})

    def zone(name: str, **fields: int) -> Step:
        return ioctl("vm", f"KVM_{name}_COALESCED_MMIO", {"addr": 0x1000, "size": 8, **fields})

    numbers = [step(slot=slot) for slot in _NO_SLOTS for step in (get, clear)]
    ranges = [clear(first=first, pages=n) for first in (0, 1, 64) for n in (0, 1, 8, 9)]
    return {
        "dirty log": [
            *(*PLAIN, get(), slot_v1(flags=1), get(), get(bitmap=8), get(bitmap="kernel")),
            *(clear(), *ranges, *numbers, slot_v1(), get()),
        ],
        "dirty log of an snp vm": [*READY, slot_v1(flags=1), get(), clear(), *numbers],
        "dirty log by hand": [
            *(*PLAIN, *(manual(options) for options in (2, 4, 0, 1)), manual(1, flags=1)),
            *(slot_v1(flags=1), get(), manual(3), slot_v1(flags=0), slot_v1(flags=1), get()),
            *(clear(), get()),
        ],
        "coalesced zones": [
            *(*PLAIN, zone("REGISTER"), zone("REGISTER", pio=1), zone("REGISTER", pio=2)),
            *(zone("UNREGISTER"), zone("UNREGISTER"), zone("UNREGISTER", pio=2)),
            *(ioctl("vm", f"KVM_{name}_COALESCED_MMIO", 8) for name in ("REGISTER", "UNREGISTER")),
        ],
        "mmu pages": [
            *PLAIN,
            *(ioctl("vm", "KVM_SET_NR_MMU_PAGES", n) for n in (0, 63, 64, TOP - 1)),
        ],
        "set clock": [
            *(*PLAIN, ioctl("vm", "KVM_SET_CLOCK", 8), ioctl("vm", "KVM_GET_CLOCK", 8)),
            *(ioctl("vm", "KVM_SET_CLOCK", {"flags": 1 << bit}) for bit in range(32)),
        ],
    }


def slots() -> dict[str, Script]:
    ready = [*READY, gmem()]

    def tried(*steps: Step, before: Script = ready) -> Script:
        return [*before, *steps]

    delete = slot(memory_size=0, flags=0)
    out = {
        "slot null": tried(ioctl("vm", "KVM_SET_USER_MEMORY_REGION2")),
        "slot v1 null": tried(ioctl("vm", "KVM_SET_USER_MEMORY_REGION")),
        "slot v1": tried(slot_v1(), slot_v1(flags=1), slot_v1(flags=2), slot_v1(flags=4)),
        "slot read-only": tried(slot(flags=2), slot(flags=6)),
        "slot read-only, plain": tried(slot(flags=2), before=PLAIN),
        "slot gmem, plain": tried(gmem(), slot(), slot(flags=0), before=PLAIN),
        "slot with log": tried(slot(flags=1), slot(flags=5)),
        "slot wrong flags": tried(*(slot(flags=1 << bit) for bit in range(3, 32))),
        "slot unaligned": tried(
            slot(memory_size=1), slot(guest_phys_addr=1), slot(userspace_addr="arena+1")
        ),
        "slot user address": tried(
            *(
                slot(slot=n, userspace_addr=at)
                for n, at in enumerate((0, PAGE, "kernel", TOP - PAGE))
            )
        ),
        "slot offset": tried(
            *(slot(guest_memfd_offset=at) for at in (1, PAGE, RAM_PAGES * PAGE, TOP - PAGE)),
            slot(pages=RAM_PAGES - 1, guest_memfd_offset=PAGE),
        ),
        "slot id": tried(
            *(slot(slot=n) for n in (32764, 0xFFFF, 1 << 16, 2 << 16)), slot(slot=32763)
        ),
        "slot id, plain": tried(
            *(slot_v1(slot=n) for n in (32764, 1 << 16, 2 << 16)), before=PLAIN
        ),
        "slot wraps": tried(slot(guest_phys_addr=TOP - PAGE), slot(guest_phys_addr=TOP - 8 * PAGE)),
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
    bad = [slot(guest_memfd=fd) for name, fd in BAD_FDS.items() if name != "gmem"]
    out["slot gmem wrong"] = tried(*bad, slot())
    return out


def memory() -> dict[str, Script]:
    out = {
        "gmem null": [*BARE, ioctl("vm", "KVM_CREATE_GUEST_MEMFD")],
        "gmem sizes": [
            *BARE,
            *(gmem(size=n) for n in (0, 1, PAGE + 1, 1 << 63, TOP - PAGE, 1 << 40, PAGE)),
        ],
        "gmem flags": [
            *BARE,
            *(gmem(flags=1 << bit) for bit in (0, 1, 2, 63)),
            gmem(flags=1, size=1),
        ],
        "gmem reserved": [*BARE, gmem(reserved=[1, 2])],
        "gmem on a plain vm": [*PLAIN, gmem(), gmem(flags=1)],
        "gmem mmap": [*BARE, gmem(), mmap("gmem", PAGE), mmap("vm", PAGE), mmap("kvm", PAGE)],
        "vcpu mmap": [
            *(*READY, vcpu()),
            *(mmap("vcpu0", size, at) for size, at in ((PAGE, 0), (3 * PAGE, 0), (0, 0))),
        ],
        "attributes null": [*BARE, ioctl("vm", "KVM_SET_MEMORY_ATTRIBUTES")],
        "attributes flags": [*BARE, attributes(flags=1), attributes(flags=1 << 63)],
        "attributes bits": [*BARE, *(attributes(attributes=1 << bit) for bit in range(64))],
        "attributes size": [
            *BARE,
            *(attributes(size=n) for n in (0, 1, PAGE - 1, TOP - PAGE, TOP - GPA)),
        ],
        "attributes address": [
            *BARE,
            *(attributes(address=at) for at in (1, TOP - PAGE, TOP - RAM_PAGES * PAGE, 1 << 60)),
        ],
        "attributes on a plain vm": [*PLAIN, attributes(), attributes(attributes=0)],
        "attributes before INIT2": [
            *BARE,
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
            *(*BARE, gmem()),
            *(
                fallocate("gmem", mode, at, size)
                for mode in modes
                for at in (0, 1, 8 * PAGE, (1 << 63) - PAGE)
                for size in (0, 1, PAGE)
            ),
        ]
    return out
