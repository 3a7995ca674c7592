"""Events of the GHCB page: what KVM refuses, and what it answers (svm/sev.c of 6.12)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.softcpu import VmgExit
from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Memory, struct
from .scripted import (
    GHCB_GPA,
    IN_BUFFER,
    INFO_1,
    INFO_2,
    INVALID_EVENT,
    INVALID_INPUT,
    MISSING_INPUT,
    RAX,
    RBX,
    RCX,
    RDX,
    SHARED_PAGE,
    VALID,
    Rig,
    answered,
    asks,
    register_ghcb,
)

OK = (0, 0)
EINVAL = (-1, errno.EINVAL)


# What is checked of every event


REQUIRED = [
    (0x37, 0, "rax"),
    (0x6F, 0, "rcx"),
    (0x72, 0, "rax rcx"),
    (0x7B, 0x3F80010, "rax"),
    (0x7B, 0x3F80014, "scratch"),
    (0x7B, 0x3F80015, "scratch"),
    (0x7C, 0, "rcx"),
    (0x7C, 1, "rcx rax rdx"),
    (0x81, 0, "rax cpl"),
    (0x8A, 0, "rax rcx rdx"),
    (0x8B, 0, "rax rcx"),
    (0x80000001, SHARED_PAGE, "scratch"),
    (0x80000002, SHARED_PAGE, "scratch"),
    (0x80000010, 0, "scratch"),
    (0x80000013, 0, "rax"),
    (0x80000013, 1, "rax"),
]


@pytest.mark.parametrize(
    ("code", "info_1", "given", "missing"),
    [
        (code, info_1, [f for f in fields.split() if f != missing], missing)
        for code, info_1, fields in REQUIRED
        for missing in fields.split()
    ],
)
def test_event_without_an_input_is_refused(code, info_1, given, missing):
    fields = {name: IN_BUFFER if name == "scratch" else 0 for name in given}
    rig = answered(asks({"code": code, "info_1": info_1, **fields}))
    assert rig.error == (2, MISSING_INPUT)


@pytest.mark.parametrize("bit", [114, 115, 116])
def test_event_without_code_or_infos_is_refused(bit):
    rig = asks({"code": 0x8000FFFD})
    request = rig.request

    def without(**fields):
        request(**fields)
        bitmap = int.from_bytes(rig.shared(VALID, 16), "little") & ~(1 << bit)
        rig.put(VALID, bitmap.to_bytes(16, "little"))

    rig.request = without
    assert answered(rig).error == (2, MISSING_INPUT)


def test_event_with_another_usage_is_refused_before_anything_else():
    rig = asks({"code": 0x12345})
    request = rig.request

    def other(**fields):
        request(**fields)
        rig.put(0xFFC, b"\x01\0\0\0")

    rig.request = other
    assert answered(rig).error == (2, 2)


@pytest.mark.parametrize(
    "code",
    [0, 0x78, 0x6D, 0x400, 0x80000000, 0x80000014, 0x80000015, 0x80000017, 0x80000018, 1 << 40],
)
def test_event_that_kvm_does_not_know_is_refused(code):
    assert answered(asks({"code": code})).error == (2, INVALID_EVENT)


def test_event_when_answered_clears_both_infos_and_returns_four_registers():
    rig = answered(asks({"code": 0x89, "info_1": 5, "info_2": 6, "rax": 7}))
    assert rig.error == (0, 0)
    assert [rig.field(offset) for offset in (RAX, RBX, RCX, RDX)] == [7, 0, 0, 0]
    valid = {offset for offset in range(0, 0x3F0, 8) if rig.is_valid(offset)}
    assert valid == {RAX, RBX, RCX, RDX, INFO_1, INFO_2}


def test_event_when_not_registered_fails_the_run():
    def script(cpu):
        rig.request(0x8000FFFD)
        cpu.ghcb = GHCB_GPA
        yield VmgExit(GHCB_GPA)

    rig = Rig(script)
    assert (rig.enter(), rig.run.exit_reason) == (EINVAL, lib.KVM_EXIT_UNKNOWN)
    # sev_es_sync_from_ghcb() was there before.
    assert rig.shared(VALID, 16) == bytes(16)


def test_event_when_another_page_is_registered_fails_the_run():
    def script(cpu):
        yield from register_ghcb(cpu)
        yield VmgExit(SHARED_PAGE)

    assert Rig(script).enter() == EINVAL


@pytest.mark.parametrize("gpa", [0, 0x40000000])
def test_event_when_there_is_no_page_goes_on(gpa):
    def script(cpu):
        yield VmgExit(gpa)

    rig = Rig(script)
    low = Memory(PAGE)
    region = {"memory_size": PAGE, "userspace_addr": low.address}
    rig.guest.ok(rig.guest.set_region(slot=1, guest_phys_addr=0, **region))
    answered(rig)


# Instructions

GP_0 = ("exception", 13, 0)


def cpuid_table(rig, *leaves):
    entries = [
        dict(zip(("function", "index", "flags", *"abcd"), leaf, strict=True)) for leaf in leaves
    ]
    entries = [
        {**{k: v for k, v in e.items() if len(k) > 1}, **{f"e{k}x": e[k] for k in "abcd"}}
        for e in entries
    ]
    table = ffi.new("struct kvm_cpuid2 *", {"nent": len(entries), "entries": entries})
    rig.guest.ok(rig.guest.ioctl(rig.vcpus[0], lib.KVM_SET_CPUID2, table))


def test_cpuid_answers_from_the_vcpus_table():
    rig = asks({"code": 0x72, "rax": 0x4, "rcx": 2})
    cpuid_table(rig, (4, 1, 1, 9, 9, 9, 9), (4, 2, 1, 0x11, 0x22, 0x33, 0x44))
    answered(rig)
    assert [rig.field(offset) for offset in (RAX, RBX, RCX, RDX)] == [0x11, 0x22, 0x33, 0x44]


def test_cpuid_when_the_leaf_is_unknown_answers_zeros():
    rig = answered(asks({"code": 0x72, "rax": 0x1234, "rcx": 0}))
    assert [rig.field(offset) for offset in (RAX, RBX, RCX, RDX)] == [0, 0, 0, 0]


# get_out_of_range_cpuid_entry(): not with AMD's vendor, nor where the range has the leaf's number.
VENDORS = {"Intel": b"GenuntelineI", "AMD": b"AuthcAMDenti", "Hygon": b"HygouinenGen"}  # B, C, D


@pytest.mark.parametrize(
    ("vendor", "leaf", "redirected"),
    [
        ("Intel", 0x1234, True),
        ("Intel", 0x3, False),
        ("Intel", 0x80000002, False),
        ("Intel", 0x80000003, True),
        ("Intel", 0x40000101, True),
        ("Intel", 0x40000011, False),
        ("Intel", 0xC0000001, True),
        ("AMD", 0x1234, False),
        ("Hygon", 0x1234, False),
    ],
)
def test_cpuid_leaf_beyond_its_range_is_the_last_basic_one_unless_the_cpu_is_amds(
    vendor, leaf, redirected
):
    rig = asks({"code": 0x72, "rax": leaf, "rcx": 2})
    name = [int.from_bytes(VENDORS[vendor][at : at + 4], "little") for at in (0, 4, 8)]
    cpuid_table(
        rig,
        (0, 0, 0, 4, *name),
        (4, 1, 1, 9, 9, 9, 9),
        (4, 2, 1, 0x11, 0x22, 0x33, 0x44),
        (0x40000000, 0, 0, 0x40000012, 0, 0, 0),
        (0x80000000, 0, 0, 0x80000002, 0, 0, 0),
    )
    answered(rig)
    wanted = [0x11, 0x22, 0x33, 0x44] if redirected else [0, 0, 0, 0]
    assert [rig.field(offset) for offset in (RAX, RBX, RCX, RDX)] == wanted


def test_cpuid_leaf_d_needs_xcr0():
    rig = answered(asks({"code": 0x72, "rax": 0xD, "rcx": 0}))
    assert rig.error == (2, MISSING_INPUT)


def test_cpuid_leaf_d_with_bits_above_eax_does_not_need_xcr0():
    """KVM looks at all of RAX here, and at EAX when it answers."""
    rig = asks({"code": 0x72, "rax": 1 << 32 | 0xD, "rcx": 1 << 32})
    cpuid_table(rig, (0xD, 0, 1, 7, 0, 0x340, 0))
    assert answered(rig).error == (0, 0)
    assert rig.field(RAX) == 7


def test_cpuid_leaf_d_has_the_size_for_the_guests_xcr0():
    rig = asks({"code": 0x72, "rax": 0xD, "rcx": 0, "xcr0": 7})
    cpuid_table(rig, (0xD, 0, 1, 7, 0, 0x340, 0))
    answered(rig)
    # Legacy area and header are 0x240 bytes, AVX has 0x100 more.
    assert rig.field(RBX) == 0x340


def test_xcr0_stays_until_the_guest_gives_another():
    leaf = {"code": 0x72, "rax": 0xD, "rcx": 0}
    for between, size in (({"code": 0x89}, 0x340), ({"code": 0x89, "xcr0": 0}, 0x240)):
        # Bit 32 of RAX, so that XCR0 need not be given again.
        rig = asks({**leaf, "xcr0": 7}, between, {**leaf, "rax": 1 << 32 | 0xD})
        cpuid_table(rig, (0xD, 0, 1, 7, 0, 0x340, 0))
        answered(rig)
        assert rig.field(RBX) == size


@pytest.mark.parametrize("code", [0x27, 0x76, 0x89])
def test_instruction_that_kvm_does_nothing_for_goes_on(code):
    assert answered(asks({"code": code})).error == (0, 0)


def test_rdtsc_has_no_handler():
    rig = asks({"code": 0x6E})
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_INTERNAL_ERROR)
    internal = rig.run.internal
    assert (internal.suberror, internal.ndata, list(internal.data)[:2]) == (4, 2, [0x6E, 0])


def test_rdtscp_is_an_invalid_opcode():
    rig = answered(asks({"code": 0x87}))
    assert rig.machine.cpus[0].injected == [("exception", 6, None)]


# amd_pmu_refresh(): PerfMonV2 (0x80000022 EAX 0) gives the number, at most the host's six;
# PerfCtrExtCore (0x80000001 ECX 23) means six, nothing four. 6.12 masks no bits of ECX.
CORE = (0x80000001, 0, 0, 0, 0, 1 << 23, 0)


@pytest.mark.parametrize(
    ("leaves", "last"),
    [
        ([], 3),
        ([CORE], 5),
        ([CORE, (0x80000022, 0, 0, 1, 2, 0, 0)], 1),
        ([(0x80000022, 0, 0, 1, 0xF, 0, 0)], 5),
        ([(0x80000022, 0, 0, 0, 2, 0, 0)], 3),
    ],
)
def test_rdpmc_reads_counters_that_exist(leaves, last):
    for counter, wanted in ((0, []), (last, []), (last + 1, [GP_0]), (0x40000000, [GP_0])):
        rig = asks({"code": 0x6F, "rcx": counter, "rax": 7, "rdx": 7})
        cpuid_table(rig, *leaves)
        answered(rig)
        assert rig.machine.cpus[0].injected == wanted
        assert (rig.field(RAX), rig.field(RDX)) == ((7, 7) if wanted else (0, 0))


@pytest.mark.parametrize(
    ("cpl", "cr4", "wanted"), [(3, 0, True), (1, 0, True), (3, 1 << 8, False), (0, 0, False)]
)
def test_rdpmc_by_user_code_needs_cr4_pce(cpl, cr4, wanted):
    def script(cpu):
        cpu.write("cr4", cr4)
        yield from register_ghcb(cpu)
        rig.request(0x6F, rcx=0, cpl=cpl)
        yield VmgExit(GHCB_GPA)

    rig = Rig(script)
    answered(rig)
    assert rig.machine.cpus[0].injected == ([GP_0] if wanted else [])


@pytest.mark.parametrize("code", [0x8A, 0x8B])
@pytest.mark.parametrize(("quirk_off", "wanted"), [(False, []), (True, [("exception", 6, None)])])
def test_monitor_and_mwait_are_nothing_unless_the_quirk_is_off(code, quirk_off, wanted):
    rig = asks({"code": code, "rax": 0, "rcx": 0, "rdx": 0})
    if quirk_off:
        cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_DISABLE_QUIRKS2)
        cap.args[0] = lib.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
        rig.guest.ok(rig.guest.ioctl(rig.guest.vm, lib.KVM_ENABLE_CAP, cap))
    answered(rig)
    assert rig.machine.cpus[0].injected == wanted


GP = 1 << 31 | 3 << 8 | 13
EFER, APIC_BASE, TSC_AUX, UNKNOWN_MSR = 0xC0000080, 0x1B, 0xC0000103, 0x12345


def test_msr_read_gives_both_halves():
    rig = answered(asks({"code": 0x7C, "rcx": APIC_BASE}))
    # Enabled, BSP, at its usual place.
    assert (rig.field(RAX), rig.field(RDX)) == (0xFEE00900, 0)


def test_msr_write_is_kept():
    write = {"code": 0x7C, "info_1": 1, "rcx": TSC_AUX, "rax": 0x1234, "rdx": 0}
    rig = answered(asks(write, {"code": 0x7C, "rcx": TSC_AUX}))
    assert (rig.field(RAX), rig.error) == (0x1234, (0, 0))


@pytest.mark.parametrize("index", [UNKNOWN_MSR, EFER, 0xC0010130])
def test_msr_read_that_kvm_refuses_is_gp(index):
    rig = answered(asks({"code": 0x7C, "rcx": index}))
    assert rig.error == (1, GP)


def test_msr_write_that_kvm_refuses_is_gp():
    rig = answered(asks({"code": 0x7C, "info_1": 1, "rcx": UNKNOWN_MSR, "rax": 0, "rdx": 0}))
    assert rig.error == (1, GP)


def test_msr_write_to_one_that_the_guest_has_for_itself_fails_the_run():
    rig = asks({"code": 0x7C, "info_1": 1, "rcx": EFER, "rax": 0, "rdx": 0})
    assert rig.enter() == EINVAL


# Hypercalls

MAP_GPA_RANGE = 12


def vmmcall(nr, cpl=0, **registers):
    return {"code": 0x81, "rax": nr, "cpl": cpl, **registers}


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (vmmcall(1), 0),
        (vmmcall(11), 0),
        (vmmcall(10), -95),
        (vmmcall(3), -1000),
        (vmmcall(3, cpl=3), -1),
        (vmmcall(MAP_GPA_RANGE, rbx=0x1001, rcx=1, rdx=0), -22),
        (vmmcall(MAP_GPA_RANGE, rbx=0x1000, rcx=0, rdx=0), -22),
        (vmmcall(MAP_GPA_RANGE, rbx=0x1000, rcx=(1 << 64) - 1, rdx=0), -22),
    ],
)
def test_hypercall_in_the_kernel_is_answered_in_rax(request_, answer):
    rig = answered(asks(request_))
    assert rig.field(RAX) == answer % (1 << 64)


def test_hypercall_map_gpa_range_without_the_exit_is_unknown():
    rig = answered(asks(vmmcall(MAP_GPA_RANGE, rbx=0x1000, rcx=1, rdx=16), hypercalls=False))
    assert rig.field(RAX) == -1000 % (1 << 64)


def test_hypercall_map_gpa_range_exits_and_returns_what_user_space_says():
    rig = asks(vmmcall(MAP_GPA_RANGE, rbx=0x5000, rcx=3, rdx=0x10))
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HYPERCALL)
    hypercall = rig.run.hypercall
    assert (hypercall.nr, list(hypercall.args)[:3], hypercall.flags) == (12, [0x5000, 3, 16], 1)
    hypercall.ret = 0x77
    assert answered(rig).field(RAX) == 0x77


# Events of the hypervisor's own


def test_hv_features_are_snp_and_ap_creation():
    assert answered(asks({"code": 0x8000FFFD})).error == (0, 3)


def test_jump_table_when_set_can_be_read_again():
    rig = answered(
        asks(
            {"code": 0x80000005, "info_1": 0, "info_2": 0x9F000},
            {"code": 0x80000005, "info_1": 1},
        )
    )
    assert rig.error == (0, 0x9F000)


def test_jump_table_request_that_is_unknown_is_refused():
    assert answered(asks({"code": 0x80000005, "info_1": 2})).error == (2, INVALID_INPUT)


def test_termination_by_the_page_shows_the_pages_gpa():
    rig = asks({"code": 0x8000FFFE, "info_1": 0x25})
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_SYSTEM_EVENT)
    event = rig.run.system_event
    assert (event.type, event.ndata, event.data[0]) == (6, 1, GHCB_GPA)


def test_unsupported_event_fails_the_run():
    assert asks({"code": 0x8000FFFF, "info_1": 0x404}).enter() == EINVAL


def test_nmi_waits_until_the_guest_is_done_with_the_last_one():
    def script(cpu):
        yield from register_ghcb(cpu)
        cpu.ghcb = GHCB_GPA
        rig.request(0x89)
        yield VmgExit(GHCB_GPA)
        seen.append(list(cpu.injected))
        rig.request(0x80000003)
        yield VmgExit(GHCB_GPA)
        seen.append(list(cpu.injected))

    seen = []
    rig = Rig(script)
    for _ in range(2):
        rig.guest.ok(rig.guest.ioctl(rig.vcpus[0], lib.KVM_NMI))
    answered(rig)
    assert [len(injected) for injected in seen] == [1, 2]


def test_reset_hold_without_an_apic_exits_and_returns_without_a_sipi():
    rig = asks({"code": 0x80000004})
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_AP_RESET_HOLD)
    assert answered(rig).error == (0, 0)
