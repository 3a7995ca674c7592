"""VMSA to CPU and back, and the states that no processor enters."""

from __future__ import annotations

import random

import pytest

from kvmlaunch.abi.reset import kvm_untouched, qemu_reset
from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import Vmsa, diff
from kvmlaunch.softcpu import Halt, InvalidState
from kvmlaunch.softcpu.engine import GPR_NAMES
from tests.softcpu.model import FLAT_CODE64, Guest, vmsa
from tests.softcpu.tables import LONG


def full_state() -> Vmsa:
    """Every register that the CPU keeps has a value of its own."""
    rng = random.Random(1)
    words = {name: rng.getrandbits(64) for name in GPR_NAMES}
    words.update(
        (name, rng.getrandbits(47))
        for name in ["lstar", "cstar", "sysenter_esp", "sysenter_eip", "kernel_gs_base"]
    )
    segments = {
        name: Segment(rng.getrandbits(16), 0xC93, rng.getrandbits(32), rng.getrandbits(40))
        for name in ("es", "ss", "ds", "fs", "gs")
    }
    tables = {
        name: Segment(0, 0, rng.getrandbits(16), rng.getrandbits(47)) for name in ("gdtr", "idtr")
    }
    return vmsa(
        snp=True,
        **words,
        **segments,
        **tables,
        **LONG,
        cs=FLAT_CODE64,
        ldtr=Segment(0x50, 0x82, 0x1FF, 0x123456),
        tr=Segment(0x38, 0x8B, 0x67, 0xFFFF800000001000),
        cr2=0x123,
        cr3=0x10000,
        rip=0xFFFFFFFF81000000,
        rflags=0x40ED7 & ~0x28,
        star=0x0023001000000000,
        sfmask=0x47700,
        sysenter_cs=0x10,
        tsc_aux=3,
        xcr0=3,
        g_pat=0x0407050600070106,
        spec_ctrl=1,
        xss=0,
        dbgctl=1,
        dr0=1,
        dr1=2,
        dr2=3,
        dr3=4,
        dr6=0xFFFF0FF1,
        dr7=0x455,
        mxcsr=0x1FBF,
        x87_fcw=0x27F,
        x87_fsw=0x3922,
        x87_ftw=0xC3F0,
        x87_fop=0x123,
        x87_rip=0x1234,
        x87_dp=0x5678,
        x87_cs=8,
        x87_ds=16,
        fpreg_x87=rng.randbytes(80),
        fpreg_xmm=rng.randbytes(256),
        fpreg_ymm=rng.randbytes(256),
        pkru=5,
        reserved=((0x670, b"\x01"),),
    )


def test_save_when_nothing_ran_returns_what_was_loaded() -> None:
    guest = Guest(snp=True)
    state = full_state()
    assert guest.cpu.load(state) is None
    assert diff(guest.cpu.save(), state) == []


@pytest.mark.parametrize(
    "state",
    [
        qemu_reset(0xFFFFFFF0, signature=0x800F12, sev_features=1),
        kvm_untouched(sev_features=1),
        vmsa(snp=True, tr=Segment(0, 0, 0, 0)),
        vmsa(snp=True, tr=Segment(0, 0x83, 0xFFFF, 0)),
    ],
    ids=["qemu", "kvm", "no TSS", "16-bit TSS"],
)
def test_save_when_reset_state_returns_it(state: Vmsa) -> None:
    guest = Guest(snp=True)
    assert guest.cpu.load(state) is None
    assert diff(guest.cpu.save(), state) == []


def test_load_when_saved_state_goes_to_another_cpu_it_continues() -> None:
    """As AP creation does with any VMSA page."""
    guest = Guest(snp=True)
    # inc eax; stc; hlt; adc eax,0; fld1; hlt
    cpu = guest.start(bytes.fromhex("40 f9 d9e8 f4 83d000 d8c0 dd1d00500000 f4"))
    assert cpu.run(1000) == Halt()
    other = guest.machine.new_cpu()
    assert other.load(Vmsa.decode(cpu.save().encode())) is None
    assert other.run(1000) == Halt()
    assert other.read("rax") == 2, "carry and counter came along"
    assert guest.memory.main[0x5000:0x5008] == b"\0\0\0\0\0\0\0\x40", "1.0 + 1.0"
    assert cpu.read("rax") == 1


def test_rounding_mode_when_loaded_is_in_force() -> None:
    guest = Guest(snp=False)
    # cvtsd2si eax,[0x5000]: 1.5 is 2 to the nearest, 1 when truncated
    code = bytes.fromhex("f20f2d0500500000 f4")
    for mxcsr, expected in ((0x1F80, 2), (0x7F80, 1)):
        guest.start(code, mxcsr=mxcsr, cr4=0x600)
        guest.put(0x5000, b"\0\0\0\0\0\0\xf8\x3f")
        assert guest.cpu.run(1000) == Halt()
        assert guest.cpu.read("rax") == expected


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"efer": 0}, "EFER.SVME is 0"),
        ({"efer": 0x1002}, "EFER has reserved bits"),
        ({"cr0": 0x20000011}, "CR0.NW is 1 and CR0.CD is 0"),
        ({"cr0": 1 << 32 | 0x11}, "CR0 has bits above 31"),
        ({"cr0": 0x80000010}, "CR0.PG is 1 and CR0.PE is 0"),
        ({"cr4": 1 << 12}, "CR4 has LA57, PKE or CET, which this CPU lacks"),
        ({"cr4": 1 << 40}, "CR4 has reserved bits"),
        ({"cr3": 1 << 52}, "CR3 has bits above 51"),
        ({"dr6": 1 << 32}, "DR6 has bits above 31"),
        ({"dr7": 1 << 32}, "DR7 has bits above 31"),
        ({"efer": 0x1100, "cr0": 0x80000011}, "long mode without CR4.PAE"),
        (
            {**LONG, "cs": Segment(8, 0xE9B, 0xFFFFFFFF, 0)},
            "CS.L and CS.D are both 1",
        ),
        ({**LONG, "rflags": 0x20002}, "RFLAGS.VM in long mode"),
        ({"vmpl": 4}, "VMPL above 3"),
        ({"cpl": 4}, "CPL above 3"),
        ({"cr0": 0x10, "cpl": 3}, "CPL isn't 0 in real mode"),
        ({"sev_features": 0}, "SEV_FEATURES lacks SNPActive"),
        ({"sev_features": 0x5}, "SEV_FEATURES has features that this CPU lacks"),
    ],
)
def test_load_when_processor_would_refuse_is_invalid(changes: dict[str, object], rule: str) -> None:
    guest = Guest(snp=True)
    assert guest.cpu.load(vmsa(snp=True, **changes)) == InvalidState(rule)
    assert guest.cpu.run(1000) == InvalidState(rule)
    assert guest.cpu.load(vmsa(snp=True)) is None


def test_run_when_nothing_was_loaded_is_invalid() -> None:
    cpu = Guest(snp=True).cpu
    assert isinstance(cpu.run(1000), InvalidState)
    with pytest.raises(RuntimeError, match="no VMSA"):
        cpu.save()


def test_registers_when_written_are_read_back_and_used() -> None:
    guest = Guest(snp=False)
    cpu = guest.start(bytes.fromhex("01d8 f4"))
    for n, name in enumerate(GPR_NAMES):
        cpu.write(name, n + 1)
    cpu.write("cr2", 0x77)
    cpu.write("cr8", 3)
    assert cpu.read("cr8") == 3
    cpu.write("rflags", 0x202)
    assert [cpu.read(name) for name in GPR_NAMES] == list(range(1, 17))
    assert (cpu.read("cr2"), cpu.read("rflags")) == (0x77, 0x202)
    assert cpu.read("rbx") == 4
    cpu.write("rax", 1)
    assert cpu.run(1000) == Halt()
    assert cpu.read("rax") == 5
    for name in ("rxx", "dr4", "cr1"):
        with pytest.raises(KeyError):
            cpu.read(name)
    with pytest.raises(KeyError):
        cpu.write("cr0", 1)


def test_linear_memory_when_seen_by_a_debugger_follows_the_tables() -> None:
    guest = Guest(snp=True)
    cpu = guest.start(b"\xf4")
    assert cpu.read_linear(0x1000, 1) == b"\xf4"
    assert cpu.read_linear(0x1FFFFF, 2) is None
    assert cpu.write_linear(0x4FFE, b"abcd")
    assert guest.memory.main[0x4FFE:0x5002] == b"abcd"
    assert not cpu.write_linear(0x1FFFFF, b"ab")
