from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.kvm_sync import not_carried, sregs_round_trip, synced
from kvmlaunch.abi.reset import BSP_EIP, kvm_untouched, qemu_reset
from kvmlaunch.abi.vmsa import VMSA_FIELDS, FieldDiff, Segment, Vmsa, diff
from kvmlaunch.errors import FormatError

from . import vectors

START = kvm_untouched(sev_features=1)
LONG_MODE = START.replace(
    cr0=0x80000011, cr4=0x60, efer=0x1500, cs=Segment(8, 0xA9B, 0xFFFFFFFF, 0), cr3=0x1000
)


def test_synced_of_untouched_vcpu_is_itself() -> None:
    assert synced(START, sev_features=1) == START


def test_synced_of_qemu_state_is_itself() -> None:
    # QEMU's VMSA is made by these very ioctls
    wanted = qemu_reset(BSP_EIP, signature=0x800F12, sev_features=1)
    assert synced(wanted, sev_features=0) == wanted


def test_synced_of_long_mode_is_itself() -> None:
    assert synced(LONG_MODE, sev_features=1) == LONG_MODE


@pytest.mark.parametrize(
    ("wanted", "name", "value"),
    # kernel-snp-abi.md 5.2, 5.4
    [
        ({"cr4": 0}, "cr4", 0x40),
        ({"efer": 0}, "efer", 0x1000),
        ({"cr0": 0x60000010}, "cr0", 0x10),
        ({"dr7": 0}, "dr7", 0),
        # __set_regs: rflags | X86_EFLAGS_FIXED
        ({"rflags": 0}, "rflags", 2),
        # SET_XCRS refuses a value without bit 0: the reset value stays
        ({"xcr0": 0}, "xcr0", 1),
        ({"xcr0": 7}, "xcr0", 7),
        # svm_set_segment: cpl = SS.DPL
        ({"ss": Segment(attrib=0xF3)}, "cpl", 3),
        ({"cpl": 3}, "cpl", 0),
        ({"cs": Segment(attrib=0xF09B)}, "cs.attrib", 0x9B),
        # struct kvm_dtable: base u64, limit u16
        ({"gdtr": Segment(1, 2, 0x1FFFF, 3)}, "gdtr", Segment(0, 0, 0xFFFF, 3)),
        ({"idtr": Segment(1, 2, 0x1FFFF, 3)}, "idtr", Segment(0, 0, 0xFFFF, 3)),
        # svm_set_msr: (u32)data; BTF and bits 5:2 are dropped
        ({"sysenter_esp": 5 << 32 | 7}, "sysenter_esp", 7),
        ({"sysenter_eip": 5 << 32 | 7}, "sysenter_eip", 7),
        ({"dbgctl": 0x3F}, "dbgctl", 1),
        ({"dbgctl": 2}, "dbgctl", 0),
    ],
)
def test_synced_changes_field_as_kvm_does(wanted: dict[str, Any], name: str, value: object) -> None:
    assert synced(START.replace(**wanted), sev_features=1).get(name) == value


@pytest.mark.parametrize(
    "name",
    # kernel-snp-abi.md 5.2, item 3 and below; s_cet.. and LBR: nothing sets them on 6.12
    [
        *("tsc_aux", "dr0", "dr1", "dr2", "dr3"),
        *("dr0_addr_mask", "dr1_addr_mask", "dr2_addr_mask", "dr3_addr_mask"),
        *("virtual_tom", "vintr_ctrl", "guest_exit_info_1", "guest_exit_info_2"),
        *("guest_exit_int_info", "guest_nrip", "guest_exit_code"),
        *("pl0_ssp", "pl1_ssp", "pl2_ssp", "pl3_ssp", "u_cet", "event_inj", "tlb_id", "pcpu_id"),
        *("cpl", "vmpl", "cr2", "x87_ds", "x87_cs", "guest_tsc_scale", "guest_tsc_offset"),
        *("reg_prot_nonce", "s_cet", "ssp", "isst_addr"),
        *("br_from", "br_to", "last_excp_from", "last_excp_to"),
    ],
)
def test_synced_drops_field_without_an_ioctl(name: str) -> None:
    assert synced(START.with_field(name, 1), sev_features=1).get(name) == 0


@pytest.mark.parametrize(
    "name",
    [
        *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip", "r8", "r9", "r10"),
        *("r11", "r12", "r13", "r14", "r15", "cr3", "xss", "pkru", "dr6", "g_pat"),
        *("star", "lstar", "cstar", "sfmask", "kernel_gs_base", "spec_ctrl"),
        *("sysenter_cs", "sysenter_esp", "sysenter_eip"),
        *("mxcsr", "x87_fcw", "x87_fsw", "x87_ftw", "x87_fop", "x87_dp", "x87_rip"),
    ],
)
def test_synced_keeps_field_that_an_ioctl_sets(name: str) -> None:
    assert synced(START.with_field(name, 0x41), sev_features=1).get(name) == 0x41


@pytest.mark.parametrize(("name", "size"), [("x87", 80), ("xmm", 256), ("ymm", 256)])
def test_synced_keeps_fpu_registers(name: str, size: int) -> None:
    wanted = START.with_field(f"fpreg_{name}", b"\x5a" * size)
    assert synced(wanted, sev_features=1) == wanted


def test_synced_drops_reserved_bytes() -> None:
    wanted = START.replace(reserved=((0x700, b"\x01"),))
    assert synced(wanted, sev_features=1) == START


def test_synced_takes_features_of_init2_not_of_the_state() -> None:
    assert synced(START.replace(sev_features=0xFF), sev_features=0x20).sev_features == 0x21


@pytest.mark.parametrize(
    ("wanted", "rule"),
    [
        ({"dr7": 0x401}, "dr7"),
        ({"dr6": 1 << 32}, "dr6"),
        ({"cr0": 0x80000010}, "PG without PE"),
        ({"cr0": 0x20000010}, "NW without CD"),
        ({"cr0": 1 << 32}, "above 32 bits"),
        ({"efer": 0x1400}, "LMA without"),
        ({"efer": 0x1500}, "LMA without"),
        ({"cr0": 0x80000011, "efer": 0x1100, "cr4": 0x20}, "lacks LMA"),
        ({"cr0": 0x80000011, "efer": 0x1500}, "lacks PAE"),
        ({"cs": Segment(attrib=0x29B)}, "L outside long mode"),
        ({"dbgctl": 0x40}, "dbgctl"),
    ],
)
def test_synced_of_state_that_kvm_refuses_is_format_error(
    wanted: dict[str, Any], rule: str
) -> None:
    with pytest.raises(FormatError, match=rule):
        synced(START.replace(**wanted), sev_features=1)


def test_synced_of_lme_without_paging_is_taken() -> None:
    assert synced(START.replace(efer=0x1100), sev_features=1).efer == 0x1100


def test_not_carried_names_fields_with_both_values() -> None:
    wanted = START.replace(tsc_aux=5, cr4=0)
    assert not_carried(wanted, sev_features=1) == [
        FieldDiff("cr4", 0x148, 0, 0x40),
        FieldDiff("tsc_aux", 0x2EC, 5, 0),
    ]


def test_not_carried_of_qemu_state_is_empty() -> None:
    wanted = qemu_reset(0x80B004, signature=0xA00F11, sev_features=1)
    assert not_carried(wanted, sev_features=1) == []


def test_sregs_round_trip_of_untouched_vcpu_gives_published_ec2_page() -> None:
    # EC2's flavour is an untouched vCPU after the round trip, on a kernel that measures no FPU
    vmsa = sregs_round_trip(START).replace(mxcsr=0, x87_fcw=0)
    assert hashlib.sha384(vmsa.encode()).hexdigest() == vectors.EC2_BSP


def test_sregs_round_trip_of_untouched_vcpu_changes_data_segments_only() -> None:
    found = diff(START, sregs_round_trip(START))
    assert [(d.name, d.a, d.b) for d in found] == [
        (f"{s}.attrib", 0x92, 0x93) for s in ("es", "ds", "fs", "gs")
    ]


def test_sregs_round_trip_makes_tr_busy() -> None:
    assert sregs_round_trip(Vmsa(tr=Segment(attrib=0x81))).tr.attrib == 0x83


def test_sregs_round_trip_leaves_absent_data_segment() -> None:
    assert sregs_round_trip(Vmsa(ds=Segment(attrib=0x12))).ds.attrib == 0x12


@pytest.mark.parametrize(("limit", "attrib"), [(0xFFFFF, 0x9B), (0x100000, 0x89B)])
def test_sregs_round_trip_makes_granularity_up_from_limit(limit: int, attrib: int) -> None:
    before = Vmsa(cs=Segment(attrib=0x9B, limit=limit))
    assert sregs_round_trip(before).cs.attrib == attrib


def test_sregs_round_trip_takes_ss_dpl_from_cpl() -> None:
    assert sregs_round_trip(Vmsa(cpl=3, ss=Segment(attrib=0x93))).ss.attrib == 0xF3


@given(st.data())
def test_synced_is_idempotent_on_any_state(data: st.DataObject) -> None:
    vmsa = Vmsa()
    for name in data.draw(st.lists(st.sampled_from(VMSA_FIELDS), max_size=8)):
        if isinstance(getattr(vmsa, name.name), int):
            value = data.draw(st.integers(0, (1 << name.size * 8) - 1))
            vmsa = vmsa.with_field(name.name, value)
    try:
        once = synced(vmsa, sev_features=1)
    except FormatError:
        return
    assert synced(once, sev_features=1) == once
