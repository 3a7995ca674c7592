"""vCPU ioctls and KVM_RUN's way to the entry (kernel-snp-abi 1.3, 1.5, 4.5, 6.3)."""

from __future__ import annotations

import errno
import mmap
import threading

import pytest

from kvmlaunch.errors import MissingCapability
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import ARGUMENT, ffi, ioctl_name, lib

from .driver import PAGE, RW, Driver, Guest, launched, simulated, struct
from .one_vcpu import EFAULT, EINVAL, OK, Machine


@pytest.mark.parametrize("request_number", [0xAE00, 0xAE41, 0x1234, 0xC0105300])
def test_unknown_vcpu_ioctl_is_einval(machine, request_number):
    assert machine.ioctl(machine.vcpu, request_number) == EINVAL


@pytest.mark.parametrize(
    "name",
    [
        *("REGS", "SREGS", "SREGS2", "DEBUGREGS", "XCRS", "FPU", "XSAVE"),
        *("MP_STATE", "VCPU_EVENTS", "MSRS", "CPUID2"),
    ],
)
@pytest.mark.parametrize("verb", ["GET", "SET"])
def test_null_is_efault(machine, verb, name):
    assert machine.call(f"KVM_{verb}_{name}") == EFAULT


@pytest.mark.parametrize(
    "name", ["REGS", "SREGS", "SREGS2", "DEBUGREGS", "XCRS", "FPU", "XSAVE", "VCPU_EVENTS"]
)
def test_what_was_set_is_got_back(machine, name):
    request = getattr(lib, f"KVM_GET_{name}")
    first = machine.get(machine.vcpu, request)
    machine.ok(machine.call(f"KVM_SET_{name}", first))
    second = machine.get(machine.vcpu, request)
    assert bytes(ffi.buffer(second)) == bytes(ffi.buffer(first))
    assert ARGUMENT[ioctl_name(request)].startswith("kvm_")


# SREGS


@pytest.mark.parametrize(
    "fields",
    [
        {"efer": 0x400},
        {"efer": 0x500, "cr0": 0x11},
        {"cr0": 0x80000000},
        {"cr0": 0x20000011},
        {"cr0": 1 << 32 | 1},
        {"cr4": 1 << 63},
        {"efer": 0x100, "cr0": 0x80000011, "cr4": 0x20},
        {"efer": 0x500, "cr0": 0x80000011, "cr4": 0},
        {"efer": 0x500, "cr0": 0x80000011, "cr4": 0x20, "cr3": 1 << 36},
        {"apic_base": 0xFEE00901},
        {"apic_base": 0xFEE00400},
    ],
)
@pytest.mark.parametrize("name", ["SREGS", "SREGS2"])
def test_impossible_sregs_are_einval_and_change_nothing(machine, name, fields):
    request = getattr(lib, f"KVM_GET_{name}")
    before = machine.get(machine.vcpu, request)
    wrong = machine.get(machine.vcpu, request)
    for field, value in fields.items():
        setattr(wrong, field, value)
    assert machine.call(f"KVM_SET_{name}", wrong) == EINVAL
    assert bytes(ffi.buffer(machine.get(machine.vcpu, request))) == bytes(ffi.buffer(before))


def test_64_bit_code_segment_outside_long_mode_is_einval(machine):
    sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS)
    sregs.cs.l = 1
    assert machine.call("KVM_SET_SREGS", sregs) == EINVAL


# kvm_is_valid_sregs() of 6.12.117 asks kvm_valid_efer(): each bit needs its feature in CPUID
# 0x80000001 (LM EDX 29, NX EDX 20, SVM ECX 2). The 6.18.44 that was tried takes them all.
@pytest.mark.parametrize(
    ("profile", "ecx", "edx", "efer", "works"),
    [
        ("6.12", 0, 0, 0x500, False),
        ("6.12", 0, 1 << 29, 0x500, True),
        ("6.12", 0, 1 << 29, 0xD00, False),
        ("6.12", 0, 1 << 29 | 1 << 20, 0xD00, True),
        ("6.12", 0, 1 << 29, 0x1500, False),
        ("6.12", 1 << 2, 1 << 29, 0x1500, False),  # no nested SVM on this host
        ("6.18", 0, 0, 0x1D00, True),
    ],
)
def test_long_mode_sregs_need_cpuid_on_6_12(profile, ecx, edx, efer, works):
    with simulated(profile) as platform:
        machine = Machine(platform)
        machine.ok(machine.set_cpuid((0x80000001, 0, 0, 0, 0, ecx, edx)))
        sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS)
        sregs.efer, sregs.cr0, sregs.cr4, sregs.cr3 = efer, 0x80000011, 0x20, 0x1000
        assert machine.call("KVM_SET_SREGS", sregs) == (OK if works else EINVAL)


# __cr4_reserved_bits(): before SET_CPUID2 only what KVM itself lacks is refused, then also what
# the guest's table lacks. LA57 (bit 12) and VMX (13) Milan has not.
@pytest.mark.parametrize(
    ("bit", "before", "after", "with_feature"),
    [
        (18, OK, EINVAL, (1, 0, 0, 0, 0, 1 << 26, 0)),  # OSXSAVE
        (20, OK, EINVAL, (7, 0, 1, 0, 1 << 7, 0, 0)),  # SMEP
        (22, OK, EINVAL, (7, 0, 1, 0, 0, 1 << 3, 0)),  # PKE
        (12, EINVAL, EINVAL, None),
        (13, EINVAL, EINVAL, None),
        (9, OK, OK, None),  # OSFXSR needs nothing
    ],
)
def test_cr4_bits_follow_cpuid(machine, bit, before, after, with_feature):
    sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS)
    sregs.cr4 = 1 << bit
    assert machine.call("KVM_SET_SREGS", sregs) == before
    machine.ok(machine.set_cpuid((0, 0, 0, 7, 0, 0, 0)))
    assert machine.call("KVM_SET_SREGS", sregs) == after
    if with_feature:
        machine.ok(machine.set_cpuid(with_feature))
        assert machine.call("KVM_SET_SREGS", sregs) == OK


def test_cr8_that_is_too_big_is_ignored(machine):
    sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS)
    for cr8, kept in ((5, 5), (0x17, 5), (1 << 63, 5), (0xF, 0xF)):
        sregs.cr8 = cr8
        machine.ok(machine.call("KVM_SET_SREGS", sregs))
        assert machine.get(machine.vcpu, lib.KVM_GET_SREGS).cr8 == kept


@pytest.mark.parametrize(
    ("number", "rip", "cr0", "wakes"),
    [
        (0, 0xFFF0, 0x10, True),
        (0, 0xFFF1, 0x10, False),
        (0, 0xFFF0, 0x11, False),
        (1, 0xFFF0, 0x10, False),
    ],
)
def test_first_vcpu_that_is_reset_by_its_registers_runs(number, rip, cr0, wakes):
    """__set_sregs_common(): older user space doesn't say so by KVM_SET_MP_STATE."""
    with simulated() as platform:
        machine = Machine(platform, split=True)
        if number:
            machine.vcpu = machine.ok(machine.ioctl(machine.vm, lib.KVM_CREATE_VCPU, number))
        halted = struct("kvm_mp_state", mp_state=lib.KVM_MP_STATE_HALTED)
        machine.ok(machine.call("KVM_SET_MP_STATE", halted))
        machine.ok(machine.call("KVM_SET_REGS", struct("kvm_regs", rip=rip)))
        sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS)
        sregs.cr0 = cr0
        machine.ok(machine.call("KVM_SET_SREGS", sregs))
        state = machine.get(machine.vcpu, lib.KVM_GET_MP_STATE).mp_state
        assert (state == lib.KVM_MP_STATE_RUNNABLE) is wakes


def test_x2apic_base_needs_cpuid(machine):
    sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS)
    sregs.apic_base = 0xFEE00D00
    assert machine.call("KVM_SET_SREGS", sregs) == EINVAL
    machine.ok(machine.set_cpuid((1, 0, 0, 0, 0, 1 << 21, 0)))
    assert machine.call("KVM_SET_SREGS", sregs) == OK


@pytest.mark.parametrize("flags", [2, 1 << 63, 1])
def test_sregs2_flags_without_pae_paging_are_einval(machine, flags):
    sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS2)
    sregs.flags = flags
    assert machine.call("KVM_SET_SREGS2", sregs) == EINVAL


# kvm_vcpu_ioctl_x86_get_sregs2(): only with PAE paging, without long mode.
def test_sregs2_have_pdptrs_with_pae_paging(machine):
    sregs = machine.get(machine.vcpu, lib.KVM_GET_SREGS2)
    assert sregs.flags == 0
    sregs.cr0, sregs.cr4, sregs.flags = 0x80000011, 0x20, lib.KVM_SREGS2_FLAGS_PDPTRS_VALID
    sregs.pdptrs = [1, 2, 3, 4]
    machine.ok(machine.call("KVM_SET_SREGS2", sregs))
    again = machine.get(machine.vcpu, lib.KVM_GET_SREGS2)
    assert (again.flags, list(again.pdptrs)) == (1, [1, 2, 3, 4])
    sregs.cr4, sregs.flags = 0, 0
    machine.ok(machine.call("KVM_SET_SREGS2", sregs))
    again = machine.get(machine.vcpu, lib.KVM_GET_SREGS2)
    assert (again.flags, list(again.pdptrs)) == (0, [0] * 4)


# DEBUGREGS, XCRS


@pytest.mark.parametrize("fields", [{"flags": 1}, {"dr6": 1 << 32}, {"dr7": 1 << 32}])
def test_wrong_debugregs_are_einval(machine, fields):
    assert machine.call("KVM_SET_DEBUGREGS", struct("kvm_debugregs", **fields)) == EINVAL


def xcrs(value, number=1, flags=0, xcr=0):
    args = struct("kvm_xcrs", nr_xcrs=number, flags=flags)
    args.xcrs[0].xcr, args.xcrs[0].value = xcr, value
    return args


@pytest.mark.parametrize(
    ("value", "result"), [(1, OK), (0, EINVAL), (3, EINVAL), (7, EINVAL), (5, EINVAL)]
)
def test_xcr0_without_cpuid_is_x87_only(machine, value, result):
    assert machine.call("KVM_SET_XCRS", xcrs(value)) == result


@pytest.mark.parametrize(
    ("value", "result"), [(3, OK), (7, OK), (5, EINVAL), (1 << 62 | 1, EINVAL)]
)
def test_xcr0_with_leaf_0xd_is_what_the_leaf_allows(machine, value, result):
    machine.ok(machine.set_cpuid((0xD, 0, 1, 0x7, 0, 0, 0)))
    assert machine.call("KVM_SET_XCRS", xcrs(value)) == result


@pytest.mark.parametrize("args", [{"number": 17}, {"flags": 1}])
def test_wrong_xcrs_header_is_einval(machine, args):
    assert machine.call("KVM_SET_XCRS", xcrs(1, **args)) == EINVAL


def test_other_xcr_is_ignored(machine):
    assert machine.call("KVM_SET_XCRS", xcrs(0, xcr=1)) == OK


# XSAVE


@pytest.mark.parametrize(
    ("offset", "data"), [(512, b"\0" * 7 + b"\x80"), (520, b"\1"), (528, b"\1"), (24, b"\xff" * 4)]
)
def test_impossible_xsave_is_einval(machine, offset, data):
    area = struct("kvm_xsave")
    image = bytearray(PAGE)
    image[512] = 3
    image[offset : offset + len(data)] = data
    ffi.buffer(area)[:] = image
    assert machine.call("KVM_SET_XSAVE", area) == EINVAL


# MP_STATE, LAPIC


@pytest.mark.parametrize("state", [1, 2, 3, 4, 9, 5, 6, 255])
def test_mp_state_without_lapic_is_runnable_only(machine, state):
    assert machine.call("KVM_SET_MP_STATE", struct("kvm_mp_state", mp_state=state)) == EINVAL
    assert machine.call("KVM_SET_MP_STATE", struct("kvm_mp_state")) == OK


@pytest.mark.parametrize(
    ("state", "reported"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 0), (9, 9), (5, None), (255, None)]
)
def test_mp_state_with_lapic(state, reported):
    with simulated() as platform:
        machine = Machine(platform, split=True)
        result = machine.call("KVM_SET_MP_STATE", struct("kvm_mp_state", mp_state=state))
        assert result == (EINVAL if reported is None else OK)
        expected = 0 if reported is None else reported
        assert machine.get(machine.vcpu, lib.KVM_GET_MP_STATE).mp_state == expected


def test_lapic_needs_an_irqchip(machine):
    lapic = struct("kvm_lapic_state")
    assert machine.call("KVM_GET_LAPIC", lapic) == EINVAL
    assert machine.call("KVM_SET_LAPIC", lapic) == EINVAL


def test_lapic_with_irqchip_keeps_what_is_set():
    with simulated() as platform:
        machine = Machine(platform, split=True)
        lapic = struct("kvm_lapic_state")
        lapic.regs[0x20] = b"\x01"
        assert machine.call("KVM_SET_LAPIC", lapic) == OK
        assert machine.get(machine.vcpu, lib.KVM_GET_LAPIC).regs[0x20] == b"\x01"


@pytest.mark.parametrize(("split", "result"), [(False, OK), (True, OK)])
def test_interrupt_takes_a_vector(split, result):
    with simulated() as platform:
        machine = Machine(platform, split=split)
        assert machine.call("KVM_INTERRUPT", struct("kvm_interrupt", irq=0x20)) == result
        assert machine.call("KVM_INTERRUPT", struct("kvm_interrupt", irq=256)) == EINVAL


def test_interrupt_with_full_irqchip_is_enxio():
    with simulated() as platform:
        driver = Driver(platform)
        vm = driver.create_vm(0)
        driver.ok(driver.ioctl(vm, lib.KVM_CREATE_IRQCHIP))
        vcpu = driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
        args = struct("kvm_interrupt", irq=0x20)
        assert driver.ioctl(vcpu, lib.KVM_INTERRUPT, args) == (-1, errno.ENXIO)


@pytest.mark.parametrize("flags", [0x10, 0x20, 0x40, 1 << 31])
def test_vcpu_events_with_flags_nobody_enabled_are_einval(machine, flags):
    assert machine.call("KVM_SET_VCPU_EVENTS", struct("kvm_vcpu_events", flags=flags)) == EINVAL


@pytest.mark.parametrize("vector", [2, 32])
def test_vcpu_events_with_impossible_exception_are_einval(machine, vector):
    events = struct("kvm_vcpu_events")
    events.exception.injected, events.exception.nr = 1, vector
    assert machine.call("KVM_SET_VCPU_EVENTS", events) == EINVAL


def test_signal_mask_has_eight_bytes_or_none(machine):
    assert machine.call("KVM_SET_SIGNAL_MASK") == OK
    assert machine.call("KVM_SET_SIGNAL_MASK", struct("kvm_signal_mask", len=4)) == EINVAL


def test_translation_without_paging_is_the_address_itself(machine):
    args = struct("kvm_translation", linear_address=0x1234)
    assert machine.call("KVM_TRANSLATE", args) == OK
    assert (args.physical_address, args.valid) == (0x1234, 1)


def test_tsc_khz_of_vcpu(machine):
    assert machine.call("KVM_SET_TSC_KHZ", 1234567) == OK
    assert machine.call("KVM_GET_TSC_KHZ") == (1234567, 0)


@pytest.mark.parametrize("khz", [0x7FFFFFFF, 0xFFFFFFFF])
def test_tsc_khz_that_is_too_big_is_einval(machine, khz):
    """max_guest_tsc_khz: what KVM_GET_TSC_KHZ returns is an int."""
    assert machine.call("KVM_SET_TSC_KHZ", khz) == EINVAL
    assert machine.ioctl(machine.vm, lib.KVM_SET_TSC_KHZ, khz) == EINVAL
    for target in (machine.vcpu, machine.vm):
        assert machine.ioctl(target, lib.KVM_SET_TSC_KHZ, 0x7FFFFFFE) == OK


# PRE_FAULT


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 1, "size": PAGE},
        {"gpa": 1, "size": PAGE},
        {"size": 0},
        {"size": 1},
        {"gpa": (1 << 64) - PAGE, "size": 2 * PAGE},
    ],
)
def test_pre_fault_with_wrong_argument_is_einval(machine, fields):
    args = struct("kvm_pre_fault_memory", **fields)
    assert machine.call("KVM_PRE_FAULT_MEMORY", args) == EINVAL


def test_pre_fault_without_slot_is_enoent(machine):
    args = struct("kvm_pre_fault_memory", size=PAGE)
    assert machine.call("KVM_PRE_FAULT_MEMORY", args) == (-1, errno.ENOENT)
    assert args.size == PAGE


def test_pre_fault_beyond_slot_is_success_with_the_rest():
    with simulated() as platform:
        guest = Guest(platform, init=False, vm_type=0)
        slot = {"guest_phys_addr": 0x100000, "memory_size": 2 * PAGE}
        guest.ok(guest.set_region(userspace_addr=guest.ram.address, **slot))
        vcpu = guest.add_vcpu()
        args = struct("kvm_pre_fault_memory", gpa=0x100000, size=4 * PAGE)
        assert guest.ioctl(vcpu, lib.KVM_PRE_FAULT_MEMORY, args) == OK
        assert (args.gpa, args.size) == (0x102000, 2 * PAGE)


# RUN


def test_run_with_argument_is_einval(machine):
    assert machine.call("KVM_RUN", 1) == EINVAL


def test_run_page_is_shared_by_all_mappings_and_outlives_the_fd(machine):
    first, second = machine.run_page(), machine.run_page()
    first.immediate_exit = 1
    assert second.immediate_exit == 1
    machine.platform.close(machine.vcpu)
    machine.platform.close(machine.vm)
    assert first.immediate_exit == 1


@pytest.mark.parametrize(("length", "offset"), [(0, 0), (4 * PAGE, 0), (PAGE, PAGE)])
def test_run_page_mapped_otherwise_is_einval(machine, length, offset):
    result = machine.platform.mmap(machine.vcpu, length, RW, mmap.MAP_SHARED, offset)
    assert result == EINVAL


def test_run_with_immediate_exit_is_eintr(machine):
    machine.run_page().immediate_exit = 1
    assert machine.call("KVM_RUN") == (-1, errno.EINTR)


@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
def test_run_with_unknown_sync_regs_is_einval_before_eintr(machine, field):
    run = machine.run_page()
    run.immediate_exit = 1
    setattr(run, field, 8)
    assert machine.call("KVM_RUN") == EINVAL


@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
def test_run_of_snp_vcpu_with_any_sync_regs_is_einval(field):
    with simulated() as platform:
        machine = Machine(platform, vm_type=4)
        setattr(machine.run_page(), field, 1)
        assert machine.call("KVM_RUN") == EINVAL


def test_run_before_init2_is_einval_but_immediate_exit_comes_first():
    with simulated() as platform:
        machine = Machine(platform, vm_type=4)
        assert machine.call("KVM_RUN") == EINVAL
        machine.run_page().immediate_exit = 1
        assert machine.call("KVM_RUN") == (-1, errno.EINTR)


def test_run_before_finish_is_fail_entry():
    with simulated() as platform:
        guest = launched(platform)
        run = guest.mmap_run(guest.vcpus[0])
        assert platform.run(guest.vcpus[0], run, None) == (0, 0, False, 1)
        assert run.exit_reason == lib.KVM_EXIT_FAIL_ENTRY
        assert run.fail_entry.hardware_entry_failure_reason == 0xFFFFFFFF


def no_engine(memory, options):
    raise MissingCapability("unicorn", "the software CPU")


@pytest.mark.parametrize("vm_type", [0, 4])
def test_run_without_an_engine_is_enosys(vm_type):
    with SimPlatform(machine=no_engine) as platform:
        if vm_type:
            guest = launched(platform)
            guest.ok(guest.finish()[0])
            vcpu = guest.vcpus[0]
        else:
            vcpu = Machine(platform).vcpu
        assert platform.run(vcpu, None, None) == (-1, errno.ENOSYS, False, 1)


def test_run_of_waiting_ap_with_immediate_exit_is_eintr():
    with simulated() as platform:
        machine = Machine(platform, split=True, vcpu_id=1)
        machine.run_page().immediate_exit = 1
        assert machine.call("KVM_RUN") == (-1, errno.EINTR)


def test_vcpus_of_many_threads_do_not_disturb_each_other():
    with SimPlatform(machine=no_engine) as platform:
        machine = Machine(platform)
        fds = [machine.ok(machine.ioctl(machine.vm, lib.KVM_CREATE_VCPU, n)) for n in range(1, 9)]
        wrong = []

        def work(number, fd):
            for _ in range(50):
                regs = machine.get(fd, lib.KVM_GET_REGS)
                if regs.rax not in (0, number):
                    wrong.append((number, regs.rax))
                regs.rax = number
                machine.ok(machine.ioctl(fd, lib.KVM_SET_REGS, regs))
                machine.ioctl(fd, lib.KVM_RUN)

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(fds, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
