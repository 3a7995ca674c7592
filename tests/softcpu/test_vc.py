"""What an SNP guest sees of intercepts: #VC by error code, or an exit to the hypervisor."""

from __future__ import annotations

import struct

import pytest

from kvmlaunch.abi.vmsa import SEV_FEATURES
from kvmlaunch.softcpu import Halt, Pause, VmgExit
from tests.softcpu.model import Guest
from tests.softcpu.tables import (
    CODE32,
    CODE64,
    HANDLER,
    TR,
    TSS_AT,
    USER64,
    frame32,
    frame64,
    gate32,
    gate64,
    start_long,
    start_protected,
)

VC = 29
RF = 1 << 16
HLT = b"\xf4"
DEBUG_SWAP = 1 << SEV_FEATURES["debug_swap"]

# code, registers, #VC error code
NON_AUTOMATIC = {
    "CPUID": ("0fa2", {}, 0x72),
    "RDPMC": ("0f33", {}, 0x6F),
    "INVD": ("0f08", {}, 0x76),
    "WBINVD": ("0f09", {}, 0x89),
    "MONITOR": ("0f01c8", {}, 0x8A),
    "MWAIT": ("0f01c9", {}, 0x8B),
    "VMMCALL": ("0f01d9", {}, 0x81),
    "VMRUN": ("0f01d8", {}, 0x80),
    "VMLOAD": ("0f01da", {}, 0x82),
    "VMSAVE": ("0f01db", {}, 0x83),
    "STGI": ("0f01dc", {}, 0x84),
    "CLGI": ("0f01dd", {}, 0x85),
    "OUT imm8": ("e610", {}, 0x7B),
    "IN dx": ("ec", {"rdx": 0x3F8}, 0x7B),
    "IN with prefix": ("66ed", {"rdx": 0x3F8}, 0x7B),
    "OUTS": ("6e", {}, 0x7B),
    "REP INS": ("f36c", {"rcx": 3, "rdi": 0x5000}, 0x7B),
    "RDMSR": ("0f32", {"rcx": 0x1B}, 0x7C),
    "WRMSR": ("0f30", {"rcx": 0x1B}, 0x7C),
    "RDMSR TSC": ("0f32", {"rcx": 0x10}, 0x7C),
    "RDMSR out of range": ("0f32", {"rcx": 0x12345678}, 0x7C),
    "MOV from DR7": ("0f21f8", {}, 0x27),
    "MOV to DR7": ("0f23f8", {"rax": 0x400}, 0x37),
}
cases = pytest.mark.parametrize(
    ("code", "registers", "error"), NON_AUTOMATIC.values(), ids=NON_AUTOMATIC
)


@cases
def test_vc_when_protected_mode_has_a_frame_of_four(
    code: str, registers: dict[str, int], error: int
) -> None:
    guest = Guest(snp=True)
    start_protected(guest, bytes.fromhex(code), rflags=0x203, **registers)
    gate32(guest, VC)
    guest.put(HANDLER, HLT)
    before = guest.cpu.save()
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rsp") == 0x8000 - 16
    assert frame32(guest, 4) == (error, 0x1000, CODE32, 0x203 | RF)
    assert guest.cpu.read("rip") == HANDLER + 1
    for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi"):
        assert guest.cpu.read(name) == getattr(before, name), "the instruction did nothing"


@cases
def test_vc_when_long_mode_has_a_frame_of_six(
    code: str, registers: dict[str, int], error: int
) -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex(code), rflags=2, **registers)
    gate64(guest, VC)
    guest.put(HANDLER, HLT)
    ss = guest.cpu.save().ss.selector
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rsp") == 0x8000 - 48
    assert frame64(guest, 6) == (error, 0x1000, CODE64, RF | 2, 0x8000, ss)


def test_vc_when_in_ring_3_takes_the_kernels_stack() -> None:
    guest = Guest(snp=True)
    start_long(guest, b"\x0f\xa2", tr=TR, rsp=0x7000, **USER64)
    gate64(guest, VC)
    guest.put(TSS_AT + 4, struct.pack("<Q", 0x9000))
    guest.put(HANDLER, HLT)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rsp") == 0x9000 - 48
    assert frame64(guest, 5)[0] == 0x72
    assert frame64(guest, 5)[4] == 0x7000


def test_vc_when_unknown_code_is_privileged_the_fault_comes_first() -> None:
    guest = Guest(snp=True)
    start_long(guest, b"\x0f\x32", tr=TR, **USER64)  # RDMSR in ring 3
    gate64(guest, 13)
    guest.put(TSS_AT + 4, struct.pack("<Q", 0x9000))
    guest.put(HANDLER, HLT)
    assert guest.cpu.run(1000) == Halt()
    assert frame64(guest, 2) == (0, 0x1000)


def test_vc_when_handler_answers_goes_on() -> None:
    guest = Guest(snp=True)
    start_protected(guest, bytes.fromhex("0fa2 0fa2 f4"))
    gate32(guest, VC)
    guest.put(HANDLER, bytes.fromhex("83c404 83042402 40 cf"))  # drop code, skip 2, inc eax, iret
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rax") == 2
    assert guest.cpu.read("rsp") == 0x8000


def test_hlt_when_snp_is_automatic() -> None:
    guest = Guest(snp=True)
    assert guest.run(bytes.fromhex("f4 90")) == Halt()
    assert guest.cpu.read("rip") == 0x1001


@pytest.mark.parametrize("wanted", [True, False])
def test_pause_when_asked_for_is_an_event(wanted: bool) -> None:
    guest = Guest(snp=True, exit_on_pause=wanted)
    event = guest.run(bytes.fromhex("f390 f4"))
    assert event == (Pause() if wanted else Halt())
    assert guest.cpu.read("rip") == (0x1002 if wanted else 0x1003)


@pytest.mark.parametrize("prefix", ["f3", "f2"])
def test_vmgexit_when_taken_gives_the_ghcb_msr(prefix: str) -> None:
    guest = Guest(snp=True)
    # mov ecx,GHCB; mov eax,0x80000002; mov edx,0x12; wrmsr; vmgexit; rdmsr; hlt
    code = bytes.fromhex(f"b9300101c0 b802000080 ba12000000 0f30 {prefix}0f01d9 0f32 f4")
    assert guest.run(code) == VmgExit(0x12_8000_0002)
    assert guest.cpu.read("rip") == 0x1000 + 5 + 5 + 5 + 2 + 4
    guest.cpu.ghcb = 0xAAAAAAAA_BBBBBBBB
    assert guest.cpu.run(1000) == Halt()
    assert (guest.cpu.read("rdx"), guest.cpu.read("rax")) == (0xAAAAAAAA, 0xBBBBBBBB)


def read_msr(index: int, **changes: object) -> Guest:
    guest = Guest(snp=True)
    code = b"\xb9" + struct.pack("<I", index) + b"\x0f\x32\xf4"
    assert guest.run(code, **changes) == Halt()
    return guest


@pytest.mark.parametrize(
    ("index", "value", "changes"),
    [
        (0xC0010131, 0x7, {}),
        (0xC0010131, 0x87, {"sev_features": 1 | DEBUG_SWAP}),
        (0xC0000080, 0x1000, {}),
        (0x277, 0x0007040600070406, {}),
        (0x174, 0x10, {"sysenter_cs": 0x10}),
        (0x175, 0x1122334455, {"sysenter_esp": 0x1122334455}),
        (0xC0000081, 0x23001000000000, {"star": 0x23001000000000}),
        (0xC0000082, 0x1234, {"lstar": 0x1234}),
        (0xC0000084, 0x700, {"sfmask": 0x700}),
        (0xC0000102, 0x99, {"kernel_gs_base": 0x99}),
        (0xC0000103, 0x5, {"tsc_aux": 5}),
        (0xDA0, 0, {}),
    ],
)
def test_msr_when_native_is_read_without_the_hypervisor(
    index: int, value: int, changes: dict[str, int]
) -> None:
    guest = read_msr(index, **changes)
    assert guest.cpu.read("rdx") << 32 | guest.cpu.read("rax") == value


def test_msr_when_native_is_written_shows_in_the_vmsa() -> None:
    guest = Guest(snp=True)
    code = b""
    for index, value in ((0x277, 0x06), (0xC0000101, 0x1234), (0xC0000080, 0x901)):
        code += b"\xb9" + struct.pack("<I", index) + b"\xb8" + struct.pack("<I", value)
        code += b"\x31\xd2\x0f\x30"
    assert guest.run(code + HLT) == Halt()
    saved = guest.cpu.save()
    assert saved.g_pat == 0x06
    assert saved.gs.base == 0x1234
    assert saved.efer == 0x1901, "SVME stays"


@pytest.mark.parametrize(("index", "value"), [(0xC0010131, 0), (0x277, 2), (0xC0000080, 2)])
def test_msr_when_native_write_is_impossible_is_general_protection(index: int, value: int) -> None:
    guest = Guest(snp=True)
    code = b"\xb9" + struct.pack("<I", index) + b"\xb8" + struct.pack("<I", value) + b"\x0f\x30"
    start_protected(guest, code)
    gate32(guest, 13)
    guest.put(HANDLER, HLT)
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 2) == (0, 0x100A)


@pytest.mark.parametrize(("code", "error"), [("0f31", 0x6E), ("0f01f9", 0x87)])
@pytest.mark.parametrize("intercepted", [True, False])
def test_rdtsc_when_intercepted_is_vc_else_counts_ticks(
    code: str, error: int, intercepted: bool
) -> None:
    guest = Guest(snp=True, intercept_rdtsc=intercepted)
    start_protected(guest, bytes.fromhex(code) + HLT, tsc_aux=9, rcx=1)
    gate32(guest, VC)
    guest.put(HANDLER, HLT)
    assert guest.cpu.run(1000) == Halt()
    if intercepted:
        assert frame32(guest, 1) == (error,)
    else:
        assert 0 < guest.cpu.read("rax") <= guest.machine.ticks
        assert guest.cpu.read("rcx") == (9 if error == 0x87 else 1)


def test_debug_registers_when_swapped_are_the_guests() -> None:
    guest = Guest(snp=True)
    code = bytes.fromhex("b800040000 0f23f8 0f21fb f4")
    start_protected(guest, code, sev_features=1 | DEBUG_SWAP)
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rbx") == 0x400


@pytest.mark.parametrize("swapped", [True, False])
def test_single_step_when_db_is_intercepted_is_vc(swapped: bool) -> None:
    guest = Guest(snp=True)
    features = 1 | (DEBUG_SWAP if swapped else 0)
    start_protected(guest, b"\x40\x40", rflags=0x102, sev_features=features)
    for vector in (1, VC):
        gate32(guest, vector)
    guest.put(HANDLER, HLT)
    assert guest.cpu.run(1000) == Halt()
    assert frame32(guest, 2)[0] == (0x1001 if swapped else 0x41)


def test_cr8_when_written_is_kept() -> None:
    guest = Guest(snp=True)
    start_long(guest, bytes.fromhex("b805000000 440f22c0 440f20c3 f4"))
    assert guest.cpu.run(1000) == Halt()
    assert guest.cpu.read("rbx") == 5
    assert guest.cpu.read("cr8") == 5
