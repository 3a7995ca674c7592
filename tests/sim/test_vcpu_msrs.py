"""KVM_GET_MSRS, KVM_SET_MSRS and KVM_SET_CPUID2 (kernel-snp-abi 1.3, 5.4)."""

from __future__ import annotations

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import launched, simulated, struct
from .one_vcpu import E2BIG, EINVAL, ENTRY, OK, Machine
from .plain_vm import Vm


def msrs(*entries):
    keep = ffi.new("char[]", 8 + 16 * max(1, len(entries)))
    header = ffi.cast("struct kvm_msrs *", keep)
    header.nmsrs = len(entries)
    for at, (index, data) in enumerate(entries):
        header.entries[at].index, header.entries[at].data = index, data
    return keep, header


STAR, LSTAR, TSC_AUX, UNKNOWN = 0xC0000081, 0xC0000082, 0xC0000103, 0xDEADBEEF


def test_msr_batch_when_one_is_unknown_stops_there(machine):
    keep, header = msrs((STAR, 1), (UNKNOWN, 2), (LSTAR, 3))
    assert machine.call("KVM_SET_MSRS", header) == (1, 0)
    keep, header = msrs((STAR, 9), (LSTAR, 9), (UNKNOWN, 9))
    assert machine.call("KVM_GET_MSRS", header) == (2, 0)
    # kvm_do_msr_access() zeroes what can't be read.
    assert [header.entries[n].data for n in range(3)] == [1, 0, 0]
    del keep


@pytest.mark.parametrize(
    ("index", "value"),
    [(0xC0000080, 1 << 40), (0x277, 0x02), (0x1D9, 0x40), (0xDA0, 1 << 8), (0x1B, 0x1)],
)
def test_impossible_msr_value_stops_the_batch(machine, index, value):
    keep, header = msrs((index, value))
    assert machine.call("KVM_SET_MSRS", header) == OK
    del keep


@pytest.mark.parametrize(
    ("bit", "kept"),
    [(3, 0), (6, 0), (8, 0), (18, 1 << 18), (24, 1 << 24), (0, None), (19, None), (63, None)],
)
def test_hwcr_takes_few_bits_and_keeps_fewer(machine, bit, kept):
    """hwcr_msr_test: bits 3, 6 and 8 are dropped, 18 and 24 kept, others refused."""
    keep, header = msrs((0xC0010015, 1 << bit))
    assert machine.call("KVM_SET_MSRS", header) == (int(kept is not None), 0)
    keep, header = msrs((0xC0010015, 9))
    machine.call("KVM_GET_MSRS", header)
    assert header.entries[0].data == (kept or 0)
    del keep


@pytest.mark.parametrize(
    ("index", "value"), [(0xCE, 1 << 31), (0x9E, 0x30000), (0x34, 0), (0x1FC, 0)]
)
def test_msr_that_user_space_may_write_has_its_value_at_reset(machine, index, value):
    """PLATFORM_INFO (with CPUID faulting), SMBASE, SMI_COUNT and POWER_CTL."""
    keep, header = msrs((index, 9))
    assert machine.call("KVM_GET_MSRS", header) == (1, 0)
    assert header.entries[0].data == value
    keep, header = msrs((index, 0xFF00))
    assert machine.call("KVM_SET_MSRS", header) == (1, 0)
    del keep


@pytest.mark.parametrize(
    ("index", "readable", "reason"),
    [
        (0xCE, 1, lib.KVM_EXIT_HLT),
        (0xCE, 0, lib.KVM_EXIT_SHUTDOWN),
        (0x9E, 1, lib.KVM_EXIT_SHUTDOWN),
        (0x34, 1, lib.KVM_EXIT_HLT),
    ],
)
def test_guest_reads_platform_info_if_it_may_and_smbase_never(index, readable, reason):
    vm = Vm(bytes.fromhex("0f32 f4"), code32=True)
    cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_MSR_PLATFORM_INFO)
    cap.args[0] = readable
    vm.ok(vm.ioctl(vm.vm, lib.KVM_ENABLE_CAP, cap))
    vm.set_regs(rcx=index)
    assert vm.enter() == ((0, 0), reason)


@pytest.mark.parametrize("index", [0xCE, 0x9E, 0x34])
def test_guest_writes_none_of_platform_info_smbase_and_smi_count(index):
    vm = Vm(bytes.fromhex("0f30 f4"), code32=True)
    vm.set_regs(rcx=index)
    assert vm.enter() == ((0, 0), lib.KVM_EXIT_SHUTDOWN)


@pytest.mark.parametrize("count", [256, 257, 0xFFFFFFFF])
def test_big_msr_batch_is_e2big(machine, count):
    keep, header = msrs()
    header.nmsrs = count
    assert machine.call("KVM_GET_MSRS", header) == E2BIG
    assert machine.call("KVM_SET_MSRS", header) == E2BIG
    del keep


def test_msr_index_list_is_all_readable(machine):
    words = ffi.new("uint32_t[257]")
    words[0] = 256
    machine.ok(machine.ioctl(machine.kvm, lib.KVM_GET_MSR_INDEX_LIST, words))
    keep, header = msrs(*((words[n + 1], 0) for n in range(words[0])))
    assert machine.call("KVM_GET_MSRS", header).ret == words[0]
    del keep


def test_msrs_after_encryption_stop_at_what_the_guest_owns():
    with simulated() as platform:
        guest = launched(platform)
        guest.ok(guest.finish()[0])
        vcpu = guest.vcpus[0]
        keep, header = msrs((TSC_AUX, 0), (STAR, 0))
        assert guest.ioctl(vcpu, lib.KVM_GET_MSRS, header) == (1, 0)
        assert guest.ioctl(vcpu, lib.KVM_SET_MSRS, header) == (1, 0)
        keep, header = msrs((0xC0000080, 7))
        assert guest.ioctl(vcpu, lib.KVM_GET_MSRS, header) == (0, 0)
        assert header.entries[0].data == 0
        del keep


# svm_set_msr(): AMD has 32 bits of SYSENTER_ESP and _EIP; the upper half is kept aside unless the
# guest's vendor is AMD (guest_cpuid_is_intel_compatible(): no vendor is none of AMD's).
@pytest.mark.parametrize("index", [0x175, 0x176])
@pytest.mark.parametrize(
    ("vendor", "high"), [((0, 0, 0), 5), ((0x68747541, 0x444D4163, 0x69746E65), 0)]
)
def test_sysenter_msrs_keep_the_upper_half_for_intel_only(machine, index, vendor, high):
    machine.ok(machine.set_cpuid((0, 0, 0, 0, *vendor)))
    keep, header = msrs((index, 5 << 32 | 7))
    assert machine.call("KVM_SET_MSRS", header) == (1, 0)
    assert machine.call("KVM_GET_MSRS", header) == (1, 0)
    assert header.entries[0].data == high << 32 | 7
    del keep


# __kvm_set_msr(): addresses must be canonical (48 bits on Milan, 57 on Genoa); SYSENTER's are made
# so instead, and TSC_AUX has 32 bits, which only guests of another vendor are told.
@pytest.mark.parametrize("index", [0xC0000082, 0xC0000083, 0xC0000100, 0xC0000101, 0xC0000102])
@pytest.mark.parametrize(
    ("product", "value", "done"),
    [
        ("Milan", 0x7FFFFFFFFFFF, 1),
        ("Milan", 0x800000000000, 0),
        ("Milan", 0xFFFF800000000000, 1),
        ("Genoa", 0x800000000000, 1),
        ("Genoa", 1 << 56, 0),
    ],
)
def test_address_msr_must_be_canonical(index, product, value, done):
    with simulated(product=product) as platform:
        machine = Machine(platform)
        keep, header = msrs((index, value))
        assert machine.call("KVM_SET_MSRS", header) == (done, 0)
        del keep


def test_sysenter_address_is_made_canonical(machine):
    keep, header = msrs((0x175, 1 << 47 | 5))
    assert machine.call("KVM_SET_MSRS", header) == (1, 0)
    assert machine.call("KVM_GET_MSRS", header) == (1, 0)
    assert header.entries[0].data == 0xFFFF800000000005
    del keep


@pytest.mark.parametrize(
    ("vendor", "done"), [((0, 0, 0), 0), ((0x68747541, 0x444D4163, 0x69746E65), 1)]
)
def test_tsc_aux_has_32_bits(machine, vendor, done):
    machine.ok(machine.set_cpuid((0, 0, 0, 0, *vendor)))
    keep, header = msrs((TSC_AUX, 1 << 32 | 7))
    assert machine.call("KVM_SET_MSRS", header) == (done, 0)
    assert machine.call("KVM_GET_MSRS", header) == (1, 0)
    assert header.entries[0].data == (7 if done else 0)
    del keep


# set_msr_interception(): the guest has SYSENTER_ESP/EIP only if its vendor is AMD, XSS only if
# its CPUID has XSAVES (leaf 0xD, index 1, EAX bit 3).
@pytest.mark.parametrize(
    ("index", "leaf", "done"),
    [
        (0x176, (0, 0, 0, 0, 0, 0, 0), 1),
        (0x176, (0, 0, 0, 0, 0x68747541, 0x444D4163, 0x69746E65), 0),
        (0xDA0, (0xD, 1, 1, 0, 0, 0, 0), 1),
        (0xDA0, (0xD, 1, 1, 8, 0, 0, 0), 0),
    ],
)
def test_msr_after_encryption_is_readable_when_it_is_intercepted(index, leaf, done):
    with simulated() as platform:
        guest = launched(platform)
        machine = Machine.__new__(Machine)
        machine.platform, machine.vcpu = platform, guest.vcpus[0]
        machine.ok(machine.set_cpuid(leaf))
        guest.ok(guest.finish()[0])
        keep, header = msrs((index, 7))
        assert machine.call("KVM_GET_MSRS", header) == (done, 0)
        del keep


# kvm_vcpu_reset() and init_vmcb(): INIT zeroes EFER and the bases of FS and GS, and of what KVM
# keeps the number of SMIs; those of KVM itself are in test_pv_features.
@pytest.mark.parametrize(
    ("index", "value", "kept"),
    [
        *((index, 7, 7) for index in (0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102)),
        *((index, 7, 7) for index in (0x174, 0x175, 0x176, TSC_AUX)),
        (0x175, 5 << 32 | 7, 5 << 32 | 7),
        (0x1D9, 1, 1),
        (0x277, 0x0007040600070405, 0x0007040600070405),
        (0xC0000080, 1, 0),
        (0xC0000100, 7, 0),
        (0xC0000101, 7, 0),
        (0x34, 7, 0),
        (0x9E, 7, 7),
    ],
)
def test_msr_after_init_is_kept_unless_init_sets_it(machine, index, value, kept):
    keep, header = msrs((index, value))
    assert machine.call("KVM_SET_MSRS", header) == (1, 0)
    machine.platform._host.fds.get(machine.vcpu).vcpu.init_pending = True
    machine.get(machine.vcpu, lib.KVM_GET_MP_STATE)
    assert machine.call("KVM_GET_MSRS", header) == (1, 0)
    assert header.entries[0].data == kept
    del keep


# CPUID2


def test_cpuid_too_many_is_e2big(machine):
    header = struct("kvm_cpuid2", nent=257)
    assert machine.call("KVM_SET_CPUID2", header) == E2BIG


def test_cpuid_with_odd_virtual_width_is_einval(machine):
    assert machine.set_cpuid((0x80000008, 0, 0, 0x2F30, 0, 0, 0)) == EINVAL
    assert machine.set_cpuid((0x80000008, 0, 0, 0x3030, 0, 0, 0)) == OK


def test_get_cpuid_gives_the_table_or_e2big(machine):
    machine.ok(machine.set_cpuid((0, 0, 0, 1, 2, 3, 4), (1, 0, 0, 5, 6, 7, 8)))
    keep = ffi.new("char[]", 8 + 4 * ENTRY)
    header = ffi.cast("struct kvm_cpuid2 *", keep)
    header.nent = 1
    assert machine.call("KVM_GET_CPUID2", header) == E2BIG
    header.nent = 4
    assert machine.call("KVM_GET_CPUID2", header) == OK
    assert header.nent == 2
    # __kvm_update_cpuid_runtime(): APIC (EDX bit 9) follows the APIC base, which is enabled.
    assert (header.entries[1].function, header.entries[1].edx) == (1, 8 | 1 << 9)
    del keep


def test_get_cpuid_follows_cr4_and_xcr0(machine):
    leaves = ((1, 0, 0, 0, 0, 1 << 26, 0), (0xD, 0, 1, 7, 1, 0x340, 0), (0xD, 1, 1, 2, 1, 0, 0))
    machine.ok(machine.set_cpuid(*leaves))
    keep = ffi.new("char[]", 8 + 4 * ENTRY)
    header = ffi.cast("struct kvm_cpuid2 *", keep)
    header.nent = 4
    machine.ok(machine.call("KVM_GET_CPUID2", header))
    # Legacy area and header only: 0x240 bytes (APM 2, XSAVE area).
    assert [header.entries[n].ebx for n in (1, 2)] == [0x240, 0x240]
    assert header.entries[0].ecx == 1 << 26
    xcrs = struct("kvm_xcrs", nr_xcrs=1)
    xcrs.xcrs[0].value = 7
    machine.ok(machine.call("KVM_SET_XCRS", xcrs))
    sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS)
    sregs.cr4 = 1 << 18
    machine.ok(machine.call("KVM_SET_SREGS", sregs))
    machine.ok(machine.call("KVM_GET_CPUID2", header))
    assert [header.entries[n].ebx for n in (1, 2)] == [0x340, 0x340]
    assert header.entries[0].ecx == 1 << 26 | 1 << 27
    del keep


def test_cpuid_after_the_first_run_must_be_the_same():
    with simulated() as platform:
        machine = Machine(platform, vm_type=4)
        init = struct("kvm_sev_init")
        vm = machine.create_vm(4, machine.kvm)
        machine.ok(machine.sev(vm, lib.KVM_SEV_INIT2, init)[0])
        machine.vcpu = machine.ok(machine.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
        table = (0, 0, 0, 1, 2, 3, 4)
        assert machine.set_cpuid(table) == OK
        assert machine.set_cpuid() == OK
        assert machine.set_cpuid(table) == OK
        assert machine.call("KVM_RUN") == OK
        assert machine.set_cpuid(table) == OK
        assert machine.set_cpuid() == EINVAL
