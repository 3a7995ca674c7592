"""apply_state(): what is written, in which form, and that the kernel then has it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from kvmlaunch.abi.vmsa import Segment, Vmsa
from kvmlaunch.errors import MissingCapability
from kvmlaunch.kvm import Vcpu, apply_state
from kvmlaunch.kvm.descriptor import struct_to_dict
from kvmlaunch.kvm.system import CpuidLeaf
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import ffi
from tests.host import require_kvm
from tests.kvm.machines import Captured, Machine, machine, recorded

_PAT = 0x0007040600070406
_CODE, _DATA, _LDT, _TSS = 0x9B, 0x93, 0x82, 0x8B

_LEGACY = ("ax", "bx", "cx", "dx", "si", "di", "sp", "bp")

# Real mode, valid anywhere, and no two fields alike.
_STATE = Vmsa(
    cs=Segment(0xF000, _CODE, 0xFFFF, 0xF0000),
    ds=Segment(0x1000, _DATA, 0xFFFF, 0x10000),
    es=Segment(0x2000, _DATA, 0xFFFF, 0x20000),
    fs=Segment(0x3000, _DATA, 0xFFFF, 0x30000),
    gs=Segment(0x4000, _DATA, 0xFFFF, 0x40000),
    ss=Segment(0x5000, _DATA, 0xFFFF, 0x50000),
    ldtr=Segment(0, _LDT, 0xFFFF, 0),
    tr=Segment(0, _TSS, 0xFFFF, 0),
    gdtr=Segment(limit=0x7F, base=0x6000),
    idtr=Segment(limit=0x3FF, base=0x7000),
    cr0=0x10,
    cr2=0x1234,
    dr6=0xFFFF0FF0,
    dr7=0x400,
    dr0=0x100,
    dr1=0x101,
    dr2=0x102,
    dr3=0x103,
    rflags=0x2,
    rip=0xFFF0,
    **{f"r{name}": 0x1000 + n for n, name in enumerate(_LEGACY)},
    **{f"r{n}": 0x2000 + n for n in range(8, 16)},
    g_pat=_PAT,
    star=0x1122334400000000,
    lstar=0x3333,
    sfmask=0x47700,
    kernel_gs_base=0x5555,
    sysenter_cs=0x10,
    sysenter_esp=0x7777,
    sysenter_eip=0x8888,
    xcr0=1,
    mxcsr=0x1F80,
    x87_fcw=0x37F,
    x87_fsw=0x3800,
    x87_ftw=0x81,
    x87_fop=0x123,
    x87_rip=0x9999,
    x87_dp=0xAAAA,
    fpreg_x87=bytes(range(1, 81)),
    fpreg_xmm=bytes(range(256)),
)
_REGS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12"),
    *("r13", "r14", "r15", "rip", "rflags"),
)
_MSRS = {
    0x277: "g_pat",
    0xC0000081: "star",
    0xC0000082: "lstar",
    0xC0000084: "sfmask",
    0xC0000102: "kernel_gs_base",
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
}
_PKRU_LEAF = {"function": 0xD, "index": 9, "flags": 1, "eax": 8, "ebx": 2688, "ecx": 0, "edx": 0}


def _capture(
    state: Vmsa, cpuid: tuple[CpuidLeaf, ...] = (), *, bsp: bool = True, msrs_taken: int = 2**31
) -> Captured:
    captured = Captured()
    captured.msrs_taken = msrs_taken
    platform: Any = captured
    apply_state(Vcpu(platform, 3, 0), state, cpuid, bsp=bsp)
    return captured


def _sregs(state: Vmsa, *, bsp: bool = True) -> Any:
    return _capture(state, bsp=bsp).args["KVM_SET_SREGS"]


def _xsave(state: Vmsa, cpuid: tuple[CpuidLeaf, ...] = ()) -> bytes:
    return bytes(ffi.buffer(_capture(state, cpuid).args["KVM_SET_XSAVE"]))


# On a kernel.


@pytest.fixture(params=["kvm", "sim"])
def made(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with ExitStack() as stack:
        platform: Any = require_kvm() if request.param == "kvm" else SimPlatform()
        yield machine(platform, stack)


@pytest.fixture
def applied(made: Machine) -> Machine:
    apply_state(made.vcpu, _STATE, made.kvm.supported_cpuid(), bsp=True)
    return made


def test_registers_when_applied_read_back_equal(applied: Machine) -> None:
    assert applied.vcpu.get_regs() == {name: getattr(_STATE, name) for name in _REGS}


@pytest.mark.parametrize("name", ["cs", "ds", "es", "fs", "gs", "ss"])
def test_segment_when_applied_reads_back_equal(applied: Machine, name: str) -> None:
    segment = applied.vcpu.get_sregs()[name]
    wanted = getattr(_STATE, name)
    got = (segment["selector"], segment["base"], segment["limit"], segment["type"], segment["s"])
    assert got == (wanted.selector, wanted.base, wanted.limit, wanted.attrib & 0xF, 1)


@pytest.mark.parametrize(("table", "field"), [("gdt", "gdtr"), ("idt", "idtr")])
def test_table_when_applied_reads_back_equal(applied: Machine, table: str, field: str) -> None:
    got, wanted = applied.vcpu.get_sregs()[table], getattr(_STATE, field)
    assert (got["base"], got["limit"]) == (wanted.base, wanted.limit)


def test_control_registers_when_applied_read_back_equal(applied: Machine) -> None:
    sregs = applied.vcpu.get_sregs()
    assert [sregs[name] for name in ("cr0", "cr2", "cr3")] == [0x10, 0x1234, 0]


def test_debug_registers_when_applied_read_back_equal(applied: Machine) -> None:
    got = applied.vcpu.get_debugregs()
    assert (got["db"], got["dr6"], got["dr7"]) == ([0x100, 0x101, 0x102, 0x103], 0xFFFF0FF0, 0x400)


def test_msrs_when_applied_read_back_equal(applied: Machine) -> None:
    wanted = {index: getattr(_STATE, name) for index, name in _MSRS.items()}
    assert applied.vcpu.get_msrs(list(wanted)) == wanted


def test_xcr0_when_applied_reads_back_equal(applied: Machine) -> None:
    assert applied.vcpu.get_xcrs() == {0: 1}


def test_xcr0_when_the_state_lacks_x87_stays_as_it_was(made: Machine) -> None:
    apply_state(made.vcpu, _STATE.replace(xcr0=0), made.kvm.supported_cpuid(), bsp=True)
    assert made.vcpu.get_xcrs() == {0: 1}


def test_fpu_when_applied_reads_back_equal(applied: Machine) -> None:
    """The kernel's own decoding of the XSAVE area that was written."""
    fpu = applied.vcpu.get_fpu()
    fields = ("fcw", "fsw", "ftwx", "last_opcode", "last_ip", "last_dp")
    assert [fpu[name] for name in fields] == [0x37F, 0x3800, 0x81, 0x123, 0x9999, 0xAAAA]
    assert b"".join(fpu["xmm"]) == _STATE.fpreg_xmm
    low, high = _STATE.fpreg_x87[:64], _STATE.fpreg_x87[64:]
    assert [register[:10] for register in fpu["fpr"]] == [
        low[n * 8 : n * 8 + 8] + high[n * 2 : n * 2 + 2] for n in range(8)
    ]


def test_mxcsr_when_applied_reads_back_equal(applied: Machine) -> None:
    """By XSAVE, since KVM_GET_FPU leaves it out."""
    assert struct.unpack_from("<I", applied.vcpu.get_xsave(), 24) == (0x1F80,)


def test_ymm_when_applied_reads_back_equal(made: Machine) -> None:
    state = _STATE.replace(xcr0=7, fpreg_ymm=bytes(range(255, -1, -1)))
    apply_state(made.vcpu, state, made.kvm.supported_cpuid(), bsp=True)
    assert made.vcpu.get_xsave()[576:832] == state.fpreg_ymm


def test_calls_when_recorded_are_sets_only_and_cpuid_comes_first() -> None:
    with SimPlatform() as sim, ExitStack() as stack:
        platform, names = recorded(sim)
        made = machine(platform, stack)
        cpuid = made.kvm.supported_cpuid()
        names.clear()
        apply_state(made.vcpu, _STATE, cpuid, bsp=True)
        seen = list(names)
    assert seen == [
        "KVM_SET_CPUID2",
        "KVM_SET_SREGS",
        "KVM_SET_REGS",
        "KVM_SET_XCRS",
        "KVM_SET_XSAVE",
        "KVM_SET_DEBUGREGS",
        "KVM_SET_MSRS",
    ]


# Segments.

_ATTRIBUTES = ("type", "s", "dpl", "present", "avl", "l", "db", "g", "unusable")


@pytest.mark.parametrize(
    ("attrib", "expected"),
    [
        (0x000, (0, 0, 0, 0, 0, 0, 0, 0, 1)),
        (0x001, (1, 0, 0, 0, 0, 0, 0, 0, 1)),
        (0x008, (8, 0, 0, 0, 0, 0, 0, 0, 1)),
        (0x010, (0, 1, 0, 0, 0, 0, 0, 0, 1)),
        (0x020, (0, 0, 1, 0, 0, 0, 0, 0, 1)),
        (0x040, (0, 0, 2, 0, 0, 0, 0, 0, 1)),
        (0x080, (0, 0, 0, 1, 0, 0, 0, 0, 0)),
        (0x100, (0, 0, 0, 0, 1, 0, 0, 0, 1)),
        (0x200, (0, 0, 0, 0, 0, 1, 0, 0, 1)),
        (0x400, (0, 0, 0, 0, 0, 0, 1, 0, 1)),
        (0x800, (0, 0, 0, 0, 0, 0, 0, 1, 1)),
        (0xA9B, (0xB, 1, 0, 1, 0, 1, 0, 1, 0)),
        (0xC93, (3, 1, 0, 1, 0, 0, 1, 1, 0)),
        (0xFFF, (0xF, 1, 3, 1, 1, 1, 1, 1, 0)),
        (0xF000, (0, 0, 0, 0, 0, 0, 0, 0, 1)),
    ],
    ids=lambda value: f"{value:#x}" if isinstance(value, int) else "",
)
@pytest.mark.parametrize("name", ["cs", "ldtr"])
def test_segment_attributes_when_converted_are_exact(
    name: str, attrib: int, expected: tuple[int, ...]
) -> None:
    sregs = _sregs(_STATE.replace(**{name: Segment(8, attrib, 0xFFFFF, 0x123456789)}))
    segment = struct_to_dict(sregs.ldt if name == "ldtr" else sregs.cs)
    assert tuple(segment[field] for field in _ATTRIBUTES) == expected


def test_segment_when_converted_keeps_selector_limit_and_base() -> None:
    cs = _sregs(_STATE.replace(cs=Segment(0xFFF8, _CODE, 0xFFFFFFFF, 2**64 - 1))).cs
    assert (cs.selector, cs.limit, cs.base) == (0xFFF8, 0xFFFFFFFF, 2**64 - 1)


def test_segments_when_converted_go_each_to_its_own_place() -> None:
    sregs = _sregs(_STATE.replace(ldtr=Segment(0x60, base=6), tr=Segment(0x70, base=7)))
    names = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr")
    assert [getattr(sregs, name).selector for name in names] == [
        *(0xF000, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x60, 0x70)
    ]
    assert [getattr(sregs, name).base for name in names] == [
        *(0xF0000, 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 6, 7)
    ]


def test_table_limit_when_above_16_bits_is_cut() -> None:
    sregs = _sregs(_STATE.replace(gdtr=Segment(limit=0x12345, base=1)))
    assert (sregs.gdt.limit, sregs.gdt.base) == (0x2345, 1)


def test_efer_when_it_has_svme_is_written_without() -> None:
    assert _sregs(_STATE.replace(efer=0x1D01)).efer == 0xD01


@pytest.mark.parametrize(("bsp", "apic_base"), [(True, 0xFEE00900), (False, 0xFEE00800)])
def test_apic_base_when_written_marks_the_bsp_only(bsp: bool, apic_base: int) -> None:
    assert _sregs(_STATE, bsp=bsp).apic_base == apic_base


def test_control_registers_when_written_are_the_states() -> None:
    state = _STATE.replace(cr0=0x80050033, cr2=2, cr3=0x8000000003000, cr4=0x20)
    sregs = _sregs(state)
    assert [sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8] == [
        *(0x80050033, 2, 0x8000000003000, 0x20, 0)
    ]


# XSAVE (APM volume 4, figure "XSAVE format").


@pytest.mark.parametrize(
    ("field", "value", "offset", "size"),
    [
        ("x87_fcw", 0x1122, 0, 2),
        ("x87_fsw", 0x1122, 2, 2),
        ("x87_ftw", 0x99, 4, 1),
        ("x87_fop", 0x123, 6, 2),
        ("x87_rip", 0x1122334455667788, 8, 8),
        ("x87_dp", 0x1122334455667788, 16, 8),
        ("mxcsr", 0x1FA0, 24, 4),
    ],
)
def test_xsave_when_a_field_is_set_has_it_at_its_offset(
    field: str, value: int, offset: int, size: int
) -> None:
    area = _xsave(Vmsa(**{field: value}))
    expected = bytearray(4096)
    expected[offset : offset + size] = value.to_bytes(size, "little")
    expected[512] = 3
    assert area == bytes(expected)


@pytest.mark.parametrize(
    ("field", "offset", "components"),
    [("fpreg_xmm", 160, 3), ("fpreg_ymm", 576, 7)],
)
def test_xsave_when_vectors_are_set_has_them_at_their_offset(
    field: str, offset: int, components: int
) -> None:
    value = bytes(range(256))
    area = _xsave(Vmsa(**{field: value}))
    assert area[offset : offset + 256] == value
    assert struct.unpack_from("<Q", area, 512) == (components,)


def test_xsave_when_x87_registers_are_set_joins_their_halves() -> None:
    low, high = bytes(range(64)), bytes(range(200, 216))
    area = _xsave(Vmsa(fpreg_x87=low + high))
    for n in range(8):
        slot = area[32 + n * 16 : 48 + n * 16]
        assert slot == low[n * 8 : n * 8 + 8] + high[n * 2 : n * 2 + 2] + bytes(6)


@pytest.mark.parametrize("offset", [832, 2688])
def test_xsave_when_pkru_is_set_has_it_where_cpuid_says(offset: int) -> None:
    area = _xsave(Vmsa(pkru=0x55555554), ({**_PKRU_LEAF, "ebx": offset},))
    assert struct.unpack_from("<I", area, offset) == (0x55555554,)
    assert struct.unpack_from("<Q", area, 512) == (0x203,)


@pytest.mark.parametrize(
    "leaf",
    [None, {**_PKRU_LEAF, "eax": 0}, {**_PKRU_LEAF, "index": 8}, {**_PKRU_LEAF, "function": 7}],
    ids=["no leaf", "empty leaf", "another component", "another leaf"],
)
def test_xsave_when_pkru_is_set_without_cpuid_is_missing_capability(
    leaf: Mapping[str, int] | None,
) -> None:
    with pytest.raises(MissingCapability, match="PKRU"):
        _capture(Vmsa(pkru=4), (dict(leaf),) if leaf else ())


def test_xsave_when_pkru_is_0_needs_no_cpuid() -> None:
    assert _xsave(Vmsa())[512:520] == b"\x03" + bytes(7)


# MSRs.


@pytest.mark.parametrize(
    ("index", "field"),
    [*_MSRS.items(), (0xDA0, "xss"), (0x1D9, "dbgctl"), (0xC0000083, "cstar")],
    ids=lambda value: value if isinstance(value, str) else f"{value:#x}",
)
def test_msr_when_its_field_is_set_is_written(index: int, field: str) -> None:
    assert _capture(Vmsa(**{field: 0x11})).msrs[index] == 0x11


def test_msrs_when_all_fields_are_0_are_pat_alone() -> None:
    assert _capture(Vmsa()).msrs == {0x277: 0}


def test_msrs_when_kvm_takes_fewer_name_the_refused_one() -> None:
    with pytest.raises(MissingCapability, match=r"MSR 0xc0000082 \(lstar\)"):
        _capture(Vmsa(lstar=1, cstar=2), msrs_taken=1)


def test_cpuid_when_given_is_written_whole() -> None:
    leaves = ({**_PKRU_LEAF}, {**_PKRU_LEAF, "index": 2})
    table = _capture(Vmsa(), leaves).args["KVM_SET_CPUID2"]
    assert table.nent == 2


def test_cpuid_when_set_and_read_back_is_the_same(made: Machine) -> None:
    hypervisor = {"function": 0x40000000, "index": 0, "flags": 0}
    leaf = {**hypervisor, "eax": 0x40000001, "ebx": 2, "ecx": 3, "edx": 4}
    made.vcpu.set_cpuid([leaf])
    table = ffi.new("struct kvm_cpuid2 *", {"nent": 8, "entries": 8})
    made.vcpu.ioctl("KVM_GET_CPUID2", table)
    assert table.nent == 1
    assert struct_to_dict(table.entries[0]) == {**leaf, "padding": [0, 0, 0]}
