"""Random vCPU state: what lands in a VMSA, and what KVM refuses."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.mainline.script import Step, ioctl

__all__ = ["states"]

Draw = Any

_words = st.one_of(
    st.sampled_from([0, 1, 0x1000, 0xFFF0, 1 << 31, 1 << 32, 1 << 47, 1 << 63, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
_canonical = st.sampled_from([0, 0x1000, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000])
_bytes = st.integers(0, 255)
_bit = st.integers(0, 1)

_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r15", "rip", "rflags")
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_APIC = 0xFEE00900
_MODES: dict[str, dict[str, int]] = {
    "real": {"cr0": 0x10},
    "reset": {"cr0": 0x60000010},
    "protected": {"cr0": 0x11},
    "paging": {"cr0": 0x80000011, "cr3": 0x2000},
    "pae": {"cr0": 0x80000011, "cr4": 0x20, "cr3": 0x2000},
    "long": {"cr0": 0x80000011, "cr4": 0x20, "cr3": 0x2000, "efer": 0x500},
}
_VMSA_MSRS = (
    *(0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102, 0xC0000100, 0xC0000101),
    *(0x174, 0x175, 0x176, 0x1D9, 0x277, 0xC0000080, 0xDA0),
)


@st.composite
def states(draw: Draw, fd: str) -> Step:
    """An ioctl on a vCPU that sets, or shows, some of its state."""
    kinds = (
        (_regs, 3),
        (_sregs, 4),
        (_debugregs, 2),
        (_xcrs, 2),
        (_fpu, 2),
        (_xsave, 2),
        (_msrs, 3),
        (_cpuid, 3),
        (_mp_state, 1),
        (_events, 1),
        (_shown, 2),
    )
    weighted = [make for make, weight in kinds for _ in range(weight)]
    request, arg, more = weighted[draw(st.integers(0, len(weighted) - 1))](draw)
    return ioctl(fd, request, arg, **more)


Made = tuple[str, dict[str, Any], dict[str, Any]]


def _regs(draw: Draw) -> Made:
    names = draw(st.lists(st.sampled_from(_GENERAL), max_size=5, unique=True))
    return "KVM_SET_REGS", {name: draw(_words) for name in names}, {}


def _sregs(draw: Draw) -> Made:
    fields: dict[str, Any] = {"apic_base": _APIC, **_MODES[draw(st.sampled_from(sorted(_MODES)))]}
    fields["cs"] = _segment(draw, 0xB, long=fields.get("efer", 0) >> 10)
    for name in draw(st.lists(st.sampled_from(_SEGMENTS), max_size=3, unique=True)):
        if name != "cs":
            fields[name] = _segment(draw, 0x3)
    for name in draw(st.lists(st.sampled_from(["gdt", "idt"]), max_size=2, unique=True)):
        fields[name] = {"base": draw(_canonical), "limit": draw(st.integers(0, 0xFFFF))}
    if draw(st.integers(0, 3)) == 3:
        name = draw(st.sampled_from(["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"]))
        bit = 1 << draw(st.integers(0, 63))
        fields[name] = fields.get(name, 0) ^ bit
    if draw(st.integers(0, 3)) == 3:
        if draw(st.integers(0, 3)) == 3:
            fields["flags"] = draw(st.integers(0, 3))
        return "KVM_SET_SREGS2", fields, {}
    return "KVM_SET_SREGS", fields, {}


def _segment(draw: Draw, kind: int, *, long: int = 0) -> dict[str, int]:
    out = {"limit": 0xFFFFFFFF, "type": kind, "present": 1, "s": 1, "g": 1, "l": long}
    for name, values in (
        ("base", _canonical),
        ("limit", st.sampled_from([0, 0xFFFF, 0xFFFFF, 0x100000, 0xFFFFFFFF])),
        ("selector", st.integers(0, 0xFFFF)),
        ("type", st.integers(0, 15)),
        ("dpl", st.integers(0, 3)),
        ("db", _bit),
        ("s", _bit),
        ("g", _bit),
        ("avl", _bit),
        ("present", _bit),
        ("unusable", _bit),
    ):
        if draw(st.integers(0, 5)) == 5:
            out[name] = draw(values)
    return out


def _debugregs(draw: Draw) -> Made:
    fields: dict[str, Any] = {"dr6": draw(st.sampled_from([0xFFFF0FF0, 0, 0xFFFF0FF1, 1 << 32]))}
    fields["dr7"] = draw(st.sampled_from([0x400, 0x400, 0x400, 0, 0x401, 1 << 32]))
    fields["db"] = [draw(_canonical)] * 4
    if draw(st.integers(0, 7)) == 7:
        fields["flags"] = 1
    return "KVM_SET_DEBUGREGS", fields, {}


def _xcrs(draw: Draw) -> Made:
    value = draw(st.sampled_from([1, 3, 7, 0, 5, 0x207, 0xE7]))
    number = draw(st.sampled_from([1, 1, 1, 0, 17]))
    return "KVM_SET_XCRS", {"nr_xcrs": number, "xcrs": [{"value": value}]}, {}


def _fpu(draw: Draw) -> Made:
    fields: dict[str, Any] = {
        "fcw": draw(st.sampled_from([0x37F, 0, 0x27F])),
        "fsw": draw(st.sampled_from([0, 0x3800])),
        "ftwx": draw(_bytes),
        "last_opcode": draw(st.integers(0, 0x7FF)),
        "last_ip": draw(_words),
        "last_dp": draw(_words),
        "mxcsr": draw(st.sampled_from([0x1F80, 0, 0xFFFF])),
        "fpr": [[draw(_bytes)] * 16] * 8,
        "xmm": [[draw(_bytes)] * 16] * 16,
    }
    return "KVM_SET_FPU", fields, {}


def _xsave(draw: Draw) -> Made:
    """Legacy area, then the header at word 128: XSTATE_BV and XCOMP_BV."""
    region = {
        "0": draw(st.sampled_from([0x37F, 0x37F, 0])),
        "6": draw(st.sampled_from([0x1F80, 0x1F80, 0, 0xFFFF, 1 << 18])),
        "8": draw(st.integers(0, 0xFFFFFFFF)),
        "40": draw(st.integers(0, 0xFFFFFFFF)),
        "144": draw(st.integers(0, 0xFFFFFFFF)),
        "128": draw(st.sampled_from([3, 0, 1, 2, 7, 4, 0x207, 0x200, 8])),
        "129": 0,
    }
    if draw(st.integers(0, 7)) == 7:
        region[draw(st.sampled_from(["129", "130", "131", "132", "143"]))] = 1
    return "KVM_SET_XSAVE", {"region": region}, {}


def _msrs(draw: Draw) -> Made:
    entries = []
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.sampled_from(_VMSA_MSRS))
        usual = st.sampled_from([0, 1, 0x3F, 0x1000, 0x0007040600070406, 0x500, 0x1000_0000])
        entries.append({"index": index, "data": draw(st.one_of(usual, _words))})
    request = draw(st.sampled_from(["KVM_SET_MSRS", "KVM_SET_MSRS", "KVM_GET_MSRS"]))
    return request, {"nmsrs": len(entries)}, {"entries": entries}


def _cpuid(draw: Draw) -> Made:
    entries = [{"function": 0x80000000, "eax": 0x80000021}]
    widths = draw(st.sampled_from([0x3030, 0x3028, 0x302B, 0x3034, 0x3930, 0x2028, 0]))
    entries.append({"function": 0x80000008, "eax": widths})
    if draw(st.booleans()):
        given = draw(st.sampled_from([7, 3, 0x207, 0xFF]))
        entries.append({"function": 0xD, "flags": 1, "eax": given, "ebx": 0x340, "ecx": 0x340})
    if draw(st.booleans()):
        entries.append(
            {"function": 0x8000001F, "eax": 0x1B, "ebx": draw(st.sampled_from([39, 47, 51]))}
        )
    request = draw(st.sampled_from(["KVM_SET_CPUID2"] * 4 + ["KVM_GET_CPUID2"]))
    count = draw(st.sampled_from([len(entries)] * 6 + [0, 1, 257]))
    return request, {"nent": count}, {"entries": entries, "room": 4}


def _mp_state(draw: Draw) -> Made:
    return "KVM_SET_MP_STATE", {"mp_state": draw(st.integers(0, 10))}, {}


def _events(draw: Draw) -> Made:
    fields: dict[str, Any] = {"flags": draw(st.sampled_from([0, 1, 2, 4, 8, 0x10, 0x20, 0x40]))}
    fields["exception"] = {"injected": draw(_bit), "nr": draw(st.sampled_from([14, 2, 13, 32]))}
    return "KVM_SET_VCPU_EVENTS", fields, {}


def _shown(draw: Draw) -> Made:
    names = ("REGS", "SREGS", "SREGS2", "DEBUGREGS", "XCRS", "FPU", "XSAVE", "MP_STATE")
    return f"KVM_GET_{draw(st.sampled_from(names))}", {}, {}
