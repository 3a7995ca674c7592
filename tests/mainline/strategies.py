"""Random scripts: launches that are mostly right, so that they get far, with things gone wrong.

A launch is drawn whole, with its sizes, states and pages; then steps are dropped, doubled,
swapped and strewn in, and arguments replaced, each rarely. Everything shrinks to fewer steps
and to the usual arguments. What only the machine can do (running a guest) isn't drawn.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from kvmlaunch.uapi import lib
from tests.mainline.kept import Case
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
from tests.mainline.states import states

__all__ = ["cases"]

Draw = Any

_TOP = 1 << 64
_END = f"arena+{ARENA_PAGES * PAGE - 8:#x}"
_SCRIPTS_WITH_ORDERS = 3  # one of so many
_CHECKED = st.sampled_from(
    [
        *(lib.KVM_CAP_MEMORY_ATTRIBUTES, lib.KVM_CAP_GUEST_MEMFD, lib.KVM_CAP_READONLY_MEM),
        *(lib.KVM_CAP_SYNC_REGS, lib.KVM_CAP_X86_SMM, lib.KVM_CAP_NR_MEMSLOTS, 9999),
    ]
)
_FPU = ("KVM_SET_FPU", "KVM_SET_XSAVE", "KVM_GET_FPU", "KVM_GET_XSAVE")

_addresses = st.sampled_from([0, 8, "guard", "kernel", _END, "rom", "arena+0x10123"])
_bits = st.integers(0, 15).map(lambda bit: 1 << bit)
_pages = st.integers(0, RAM_PAGES + 1)
_counts = st.sampled_from([1, 1, 1, 2, 3, RAM_PAGES, 0])
_types = st.sampled_from([1, 1, 1, 3, 4, 5, 6, 2, 0, 7])
_policies = st.sampled_from(
    [0x30000, 0xB0000, 0x30007, 0x20000, 0x10000, 0x70000, 0x130000, 0x30200]
)


def rarely(draw: Draw, usual: Any, other: st.SearchStrategy[Any], one_in: int = 24) -> Any:
    """``usual``, but one time in so many what ``other`` draws."""
    return draw(other) if draw(st.integers(0, one_in - 1)) == one_in - 1 else usual


@st.composite
def cases(draw: Draw) -> Case:
    """A script and, for some, orders for the firmware."""
    script = draw(_launches("vm", "sev"))
    if draw(st.integers(0, 7)) == 7:
        script = _interleaved(draw, script, draw(_launches("two", "sev2")))
    script = [open_kvm(), *playable(script)]
    orders: tuple[str, ...] = ()
    if draw(st.integers(0, _SCRIPTS_WITH_ORDERS - 1)) == _SCRIPTS_WITH_ORDERS - 1:
        orders = tuple(draw(st.lists(_orders, min_size=1, max_size=2)))
    return Case(script, orders)


def playable(script: Script) -> Script:
    """The script without what limits.NOT_PLAYED names."""
    ran = {step["fd"] for step in script if step["op"] == "run"}
    return [s for s in script if s.get("fd") not in ran or s.get("request") not in _FPU]


@st.composite
def _launches(draw: Draw, name: str, sev_name: str) -> Script:
    names = _Names(name, sev_name, draw(st.integers(0, 3)))
    steps = [open_sev(sev_name, draw(st.sampled_from([2, 2, 2, 0])))]
    steps.append(vm(name, rarely(draw, 4, st.sampled_from([0, 1, 5]))))
    steps.append(_init2(draw, names))
    if draw(st.integers(0, 3)) == 3:
        steps.append(draw(_irqchips(names)))
    steps += _memory(draw, names)
    for number, vcpu_name in enumerate(names.vcpus):
        number = rarely(draw, number, st.sampled_from([0, 7, "ids", "ids-1"]))
        steps.append(vcpu(vcpu_name, number, name))
        steps += draw(st.lists(states(vcpu_name), max_size=3))
    steps.append(_start(draw, names))
    steps += [_update(draw, names) for _ in range(draw(st.integers(0, 4)))]
    steps.append(_finish(draw, names))
    steps += draw(st.lists(_noise(names), max_size=4))
    return _mutated(draw, steps, names)


class _Names:
    """Descriptors of one launch."""

    def __init__(self, vm: str, sev: str, vcpus: int) -> None:
        self.vm = vm
        self.sev = sev
        self.gmem = f"{vm}.gmem"
        self.vcpus = [f"{vm}.vcpu{n}" for n in range(vcpus)]

    def sev_fd(self, draw: Draw) -> Any:
        others = [-1, "fd:kvm", f"fd:{self.vm}", f"fd:{self.gmem}", "fd:sev", "fd:sev2"]
        return rarely(draw, f"fd:{self.sev}", st.sampled_from(others), 40)

    def any_fd(self, draw: Draw) -> str:
        return str(draw(st.sampled_from([self.sev, self.gmem, self.vm, "kvm", *self.vcpus])))


def _init2(draw: Draw, names: _Names) -> Step:
    fields: dict[str, Any] = {}
    version = rarely(draw, 0, st.integers(1, 3), 8)
    if version:
        fields["ghcb_version"] = version
    if rarely(draw, False, st.just(True)):
        fields[draw(st.sampled_from(["flags", "vmsa_features"]))] = draw(
            st.sampled_from([1, 2, 64])
        )
    return _awry(draw, init2(names.vm, **fields))


def _start(draw: Draw, names: _Names) -> Step:
    step = start(names.vm, names.sev_fd(draw), policy=rarely(draw, 0x30000, _policies, 8))
    if rarely(draw, False, st.just(True)):
        step["data"]["flags"] = draw(_bits)
    return _awry(draw, step)


def _update(draw: Draw, names: _Names) -> Step:
    page, count = draw(_pages), draw(_counts)
    step = update(page, count, names.vm, names.sev_fd(draw), type=draw(_types))
    fields = step["data"]
    fields["uaddr"] = rarely(draw, fields["uaddr"], _addresses)
    fields["len"] = rarely(draw, fields["len"], st.sampled_from([1, PAGE + 1, 0, 64 * PAGE]), 40)
    if rarely(draw, False, st.just(True), 60):
        fields["flags"] = draw(_bits)
    return _awry(draw, step)


def _finish(draw: Draw, names: _Names) -> Step:
    step = finish(names.vm, names.sev_fd(draw))
    if rarely(draw, False, st.just(True), 10):
        places = {"id_block_uaddr": "arena", "id_auth_uaddr": "arena+0x1000", "id_block_en": 1}
        place = draw(st.sampled_from(["id_block_uaddr", "id_auth_uaddr"]))
        places[place] = rarely(draw, places[place], _addresses, 3)
        step["data"].update(places)
        step["data"]["auth_key_en"] = draw(st.integers(0, 1))
    if rarely(draw, False, st.just(True), 10):
        step["data"]["host_data"] = [draw(st.integers(0, 255))] * 32
    if rarely(draw, False, st.just(True)):
        step["data"]["flags"] = draw(_bits)
    return _awry(draw, step)


def _awry(draw: Draw, step: Step) -> Step:
    """A command with, rarely, its structs in the wrong place or a word before the call."""
    kind = rarely(draw, "", st.sampled_from(["error", "data", "at", "data_at"]), 16)
    if kind == "error":
        return {**step, "error": draw(st.integers(1, 40))}
    if kind == "data":
        return {**step, "data": draw(_addresses)}
    return {**step, kind: draw(_addresses)} if kind else step


def _memory(draw: Draw, names: _Names) -> Script:
    size = rarely(draw, RAM_PAGES * PAGE, st.sampled_from([PAGE, 64 * PAGE, 0, 1]), 16)
    steps = [gmem(names.gmem, size, names.vm)]
    fields: dict[str, Any] = {}
    if draw(st.integers(0, 5)) == 5:
        count = draw(st.integers(1, RAM_PAGES))
        fields = {"memory_size": count * PAGE, "guest_memfd_offset": draw(_pages) * PAGE}
    steps.append(slot(names.vm, names.gmem, **{**fields, **_slot_fault(draw)}))
    if draw(st.integers(0, 7)) == 7:
        steps.append(draw(_more_slots(names)))
    area: dict[str, Any] = {}
    if draw(st.integers(0, 5)) == 5:
        area = {"address": GPA + draw(_pages) * PAGE, "size": draw(st.integers(0, 9)) * PAGE}
    steps.append(attributes(names.vm, **area))
    return steps


def _slot_fault(draw: Draw) -> dict[str, Any]:
    faults: dict[str, st.SearchStrategy[Any]] = {
        "slot": st.sampled_from([1, 32763, 32764, 1 << 16]),
        "flags": st.sampled_from([0, 1, 2, 5, 6, 8]),
        "guest_phys_addr": st.sampled_from(
            [GPA + PAGE, 0, 1, _TOP - PAGE, "top", f"top-{8 * PAGE}"]
        ),
        "memory_size": st.sampled_from([0, 1, PAGE, PAGE << 31]),
        "userspace_addr": st.sampled_from([0, "arena+1", "kernel", _TOP - PAGE]),
        "guest_memfd": st.sampled_from([-1, "fd:kvm", "fd:vm", "fd:vm.gmem", "fd:two.gmem"]),
        "guest_memfd_offset": st.sampled_from([1, PAGE, _TOP - PAGE]),
    }
    name = rarely(draw, "", st.sampled_from(sorted(faults)), 10)
    return {name: draw(faults[name])} if name else {}


@st.composite
def _more_slots(draw: Draw, names: _Names) -> Step:
    first, count = draw(_pages), draw(st.integers(1, 4))
    place = {"guest_phys_addr": GPA + first * PAGE, "memory_size": count * PAGE}
    if draw(st.booleans()):
        return slot_v1(names.vm, slot=1, flags=draw(st.sampled_from([0, 1, 2])), **place)
    offset = draw(_pages) * PAGE
    return slot(names.vm, names.gmem, slot=1, guest_memfd_offset=offset, **place)


@st.composite
def _irqchips(draw: Draw, names: _Names) -> Step:
    if draw(st.booleans()):
        return ioctl(names.vm, "KVM_CREATE_IRQCHIP")
    split = {"cap": lib.KVM_CAP_SPLIT_IRQCHIP, "args": [24]}
    return ioctl(names.vm, "KVM_ENABLE_CAP", split)


@st.composite
def _capabilities(draw: Draw, names: _Names) -> Step:
    """KVM_ENABLE_CAP; the quirk of CR0.CD and NW shows in the VMSA."""
    name = draw(st.sampled_from(["DISABLE_QUIRKS2", "EXIT_HYPERCALL", "MAX_VCPU_ID", "VM_TYPES"]))
    values = [0, 1, 2, 3, 1 << 40, *(["ids", "ids+1"] if name == "MAX_VCPU_ID" else [1 << 12])]
    value = draw(st.sampled_from(values))
    fields = {"cap": getattr(lib, f"KVM_CAP_{name}"), "args": [value]}
    return ioctl(names.vm, "KVM_ENABLE_CAP", {**fields, "flags": rarely(draw, 0, st.just(1))})


@st.composite
def _noise(draw: Draw, names: _Names) -> Step:
    """A step that belongs nowhere."""
    name, page, count = names.vm, draw(_pages), draw(st.integers(1, 4))
    area = {"address": GPA + page * PAGE, "size": count * PAGE}
    kinds = [
        lambda: attributes(name, attributes=draw(st.sampled_from([0, 8, 1])), **area),
        lambda: fallocate(names.gmem, 3, page * PAGE, count * PAGE),
        lambda: fallocate(names.gmem, 1, page * PAGE, count * PAGE),
        lambda: slot(name, names.gmem, memory_size=0, flags=0),
        lambda: slot(name, names.gmem, **_slot_fault(draw)),
        lambda: draw(_more_slots(names)),
        lambda: close(names.any_fd(draw)),
        lambda: open_sev(names.sev),
        lambda: gmem(names.gmem, vm=name),
        lambda: vcpu(f"{name}.late", draw(st.integers(0, 9)), name),
        lambda: run(draw(st.sampled_from(names.vcpus or ["none"])), immediate_exit=1),
        lambda: sev(name, draw(st.integers(2, 110)), draw(_addresses), names.sev_fd(draw)),
        lambda: _init2(draw, names),
        lambda: _start(draw, names),
        lambda: _update(draw, names),
        lambda: _finish(draw, names),
        lambda: draw(states(draw(st.sampled_from(names.vcpus or ["none"])))),
        lambda: ioctl(name, "KVM_SET_BOOT_CPU_ID", draw(st.integers(0, 2))),
        lambda: draw(_irqchips(names)),
        lambda: draw(_capabilities(names)),
        lambda: ioctl(name, "KVM_CHECK_EXTENSION", draw(_CHECKED)),
        lambda: ioctl(
            draw(st.sampled_from(names.vcpus or ["none"])),
            "KVM_PRE_FAULT_MEMORY",
            {"gpa": area["address"], "size": draw(st.sampled_from([PAGE, area["size"], 1, 0]))},
        ),
        lambda: ioctl(
            draw(st.sampled_from(names.vcpus or ["none"])),
            "KVM_SET_GUEST_DEBUG",
            {"control": draw(st.sampled_from([0, 1, 3]))},
        ),
        lambda: write(f"arena+{page * PAGE:#x}", cpuid_page()),
        lambda: write(f"arena+{page * PAGE:#x}", bytes([draw(st.integers(0, 255))]) * 64),
    ]
    return kinds[draw(st.integers(0, len(kinds) - 1))]()


def _mutated(draw: Draw, steps: Script, names: _Names) -> Script:
    """Some steps dropped, doubled or swapped, and some that belong nowhere."""
    out: Script = []
    for step in steps:
        what = draw(st.integers(0, 47))
        if what == 0:
            continue
        if what == 47:
            out.append(step)
        if what == 46 and out:
            out.insert(-1, step)
            continue
        if what in (44, 45):
            out.append(draw(_noise(names)))
        out.append(step)
    return out


def _interleaved(draw: Draw, left: Script, right: Script) -> Script:
    out: Script = []
    left, right = list(left), list(right)
    while left and right:
        out.append(left.pop(0) if draw(st.booleans()) else right.pop(0))
    return [*out, *left, *right]


_NTH = st.sampled_from(["", "@2", "@3", "@5", "@2+"])
_STATUS = st.sampled_from([0x1, 0x2, 0x7, 0xB, 0x10, 0x16, 0x1A])
_COMMANDS = st.sampled_from(
    [
        "SNP_LAUNCH_UPDATE",
        "SNP_LAUNCH_UPDATE",
        "SNP_GCTX_CREATE",
        "SNP_LAUNCH_START",
        "SNP_ACTIVATE",
        "SNP_LAUNCH_FINISH",
    ]
)
_orders = st.one_of(
    st.builds(lambda name, status, nth: f"{name}:fw={status:#x}{nth}", _COMMANDS, _STATUS, _NTH),
    st.builds(lambda nth: f"SNP_PAGE_RECLAIM:fail{nth}", _NTH),
    st.builds(lambda nth: f"CPUID:correct=0x40000000.eax{nth}", _NTH),
)
