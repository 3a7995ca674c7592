"""VM ioctls outside memory and encryption (kernel-snp-abi 1.2, 1.4)."""

from __future__ import annotations

import errno
import os

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import Driver, Guest, launched, simulated, struct


def enable(driver, vm, cap, arg=0, flags=0):
    args = struct("kvm_enable_cap", cap=cap, flags=flags)
    args.args[0] = arg
    return driver.ioctl(vm, lib.KVM_ENABLE_CAP, args)


def cap(driver, fd, name):
    return driver.ok(driver.ioctl(fd, lib.KVM_CHECK_EXTENSION, getattr(lib, f"KVM_CAP_{name}")))


@pytest.mark.parametrize("request_number", [0xAE00, 0xAE80, 0xAEFF, 0x1234, 0xC0105300])
def test_unknown_vm_ioctl_is_enotty(driver, vm, request_number):
    assert driver.ioctl(vm, request_number) == (-1, errno.ENOTTY)


@pytest.mark.parametrize(
    ("name", "default", "snp"),
    [
        ("SYNC_REGS", 7, 0),
        ("READONLY_MEM", 1, 0),
        ("MEMORY_ATTRIBUTES", 0, 8),
        ("GUEST_MEMFD", 0, 1),
        ("X86_SMM", 1, 0),
        ("NR_MEMSLOTS", 32764, 32764),
    ],
)
def test_vm_scoped_capability_on_6_12(driver, vm, name, default, snp):
    guest = Guest(driver.platform)
    assert (cap(driver, vm, name), cap(driver, guest.vm, name)) == (default, snp)


def test_smm_capability_before_init2_is_1(driver):
    assert cap(driver, Guest(driver.platform, init=False).vm, "X86_SMM") == 1


def test_guest_memfd_capabilities_on_6_18():
    with simulated("6.18") as platform:
        driver = Driver(platform)
        vm, guest = driver.create_vm(0), Guest(platform)
        assert (cap(driver, vm, "GUEST_MEMFD"), cap(driver, vm, "GUEST_MEMFD_FLAGS")) == (1, 3)
        assert cap(driver, guest.vm, "GUEST_MEMFD_FLAGS") == 1


@pytest.mark.parametrize("number", [0, 3, 999])
def test_enable_unknown_cap_is_einval(driver, vm, number):
    assert enable(driver, vm, number) == (-1, errno.EINVAL)


def test_enable_cap_with_flags_is_einval(driver, vm):
    result = enable(driver, vm, lib.KVM_CAP_EXIT_HYPERCALL, 1 << 12, flags=1)
    assert result == (-1, errno.EINVAL)


def test_enable_cap_null_is_efault(driver, vm):
    assert driver.ioctl(vm, lib.KVM_ENABLE_CAP, 0) == (-1, errno.EFAULT)


@pytest.mark.parametrize(
    ("name", "arg", "code"),
    [
        ("EXIT_HYPERCALL", 1 << 12, 0),
        ("EXIT_HYPERCALL", 0, 0),
        ("EXIT_HYPERCALL", 1, errno.EINVAL),
        ("DISABLE_QUIRKS2", 1 << 1, 0),
        ("DISABLE_QUIRKS2", 1 << 40, errno.EINVAL),
        ("X86_USER_SPACE_MSR", 7, 0),
        ("X86_USER_SPACE_MSR", 8, errno.EINVAL),
        ("MAX_VCPU_ID", 4097, errno.EINVAL),
        ("MAX_VCPU_ID", 0, 0),
        ("MAX_VCPU_ID", 4, 0),
        ("X86_APIC_BUS_CYCLES_NS", 0, errno.EINVAL),
        ("X86_APIC_BUS_CYCLES_NS", 10, errno.ENXIO),
        ("SPLIT_IRQCHIP", 24, 0),
        ("SPLIT_IRQCHIP", 4097, errno.EINVAL),
    ],
)
def test_enable_cap_argument(driver, vm, name, arg, code):
    result = enable(driver, vm, getattr(lib, f"KVM_CAP_{name}"), arg)
    assert result == ((-1, code) if code else (0, 0))


def test_max_vcpu_id_when_set_limits_create_vcpu(driver, vm):
    assert enable(driver, vm, lib.KVM_CAP_MAX_VCPU_ID, 4) == (0, 0)
    assert driver.ioctl(vm, lib.KVM_CREATE_VCPU, 4) == (-1, errno.EINVAL)
    assert driver.ioctl(vm, lib.KVM_CREATE_VCPU, 3).ret >= 0
    assert enable(driver, vm, lib.KVM_CAP_MAX_VCPU_ID, 8) == (-1, errno.EINVAL)
    assert enable(driver, vm, lib.KVM_CAP_MAX_VCPU_ID, 4) == (0, 0)


@pytest.mark.parametrize("vcpu_id", [4096, 1 << 32, (1 << 64) - 1])
def test_create_vcpu_beyond_id_limit_is_einval(driver, vm, vcpu_id):
    assert driver.ioctl(vm, lib.KVM_CREATE_VCPU, vcpu_id) == (-1, errno.EINVAL)


def test_create_vcpu_twice_is_eexist_even_after_close(driver, vm):
    fd = driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 4095))
    assert driver.ioctl(vm, lib.KVM_CREATE_VCPU, 4095) == (-1, errno.EEXIST)
    driver.platform.close(fd)
    assert driver.ioctl(vm, lib.KVM_CREATE_VCPU, 4095) == (-1, errno.EEXIST)


def test_create_vcpu_number_1025_is_einval_before_eexist(driver, vm):
    for vcpu_id in range(1024):
        driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, vcpu_id))
    assert driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0) == (-1, errno.EINVAL)


def test_irqchip_after_vcpu_is_einval_and_split_eexist(driver, vm):
    driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
    assert driver.ioctl(vm, lib.KVM_CREATE_IRQCHIP) == (-1, errno.EINVAL)
    assert enable(driver, vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24) == (-1, errno.EEXIST)
    assert enable(driver, vm, lib.KVM_CAP_SPLIT_IRQCHIP, 4097) == (-1, errno.EINVAL)


@pytest.mark.parametrize("first", ["split", "full"])
def test_second_irqchip_is_eexist(driver, vm, first):
    def split():
        return enable(driver, vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24)

    def full():
        return driver.ioctl(vm, lib.KVM_CREATE_IRQCHIP)

    assert (split if first == "split" else full)() == (0, 0)
    driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
    assert full() == (-1, errno.EEXIST)
    assert split() == (-1, errno.EEXIST)


def test_pit_needs_pic(driver, vm):
    config = struct("kvm_pit_config")
    assert driver.ioctl(vm, lib.KVM_CREATE_PIT2, config) == (-1, errno.ENOENT)
    driver.ok(driver.ioctl(vm, lib.KVM_CREATE_IRQCHIP))
    assert driver.ioctl(vm, lib.KVM_CREATE_PIT2, config) == (0, 0)
    assert driver.ioctl(vm, lib.KVM_CREATE_PIT2, config) == (-1, errno.EEXIST)


def test_pit_with_split_irqchip_is_enoent(driver, vm):
    enable(driver, vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    assert driver.ioctl(vm, lib.KVM_CREATE_PIT2, struct("kvm_pit_config")) == (-1, errno.ENOENT)


@pytest.mark.parametrize(
    ("request_name", "argument", "without", "with_split"),
    [
        ("KVM_IRQ_LINE", "kvm_irq_level", errno.ENXIO, 0),
        ("KVM_SET_GSI_ROUTING", "kvm_irq_routing", errno.EINVAL, 0),
        ("KVM_SIGNAL_MSI", "kvm_msi", errno.EINVAL, errno.EPERM),  # nobody is there to take it
    ],
)
def test_interrupt_calls_need_an_irqchip(driver, vm, request_name, argument, without, with_split):
    request = getattr(lib, request_name)
    assert driver.ioctl(vm, request, struct(argument)) == (-1, without)
    enable(driver, vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    assert driver.ioctl(vm, request, struct(argument)) == (-bool(with_split), with_split)


def test_boot_cpu_id_after_vcpu_is_ebusy(driver, vm):
    assert driver.ioctl(vm, lib.KVM_SET_BOOT_CPU_ID, 1) == (0, 0)
    driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
    assert driver.ioctl(vm, lib.KVM_SET_BOOT_CPU_ID, 1) == (-1, errno.EBUSY)


def test_boot_cpu_id_decides_who_is_runnable(driver, vm):
    enable(driver, vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    driver.ok(driver.ioctl(vm, lib.KVM_SET_BOOT_CPU_ID, 1))
    fds = [driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, n)) for n in (0, 1)]
    states = [driver.get(fd, lib.KVM_GET_MP_STATE).mp_state for fd in fds]
    assert states == [lib.KVM_MP_STATE_UNINITIALIZED, lib.KVM_MP_STATE_RUNNABLE]


@pytest.mark.parametrize(("profile", "after"), [("6.12", 0), ("6.18", errno.EINVAL)])
def test_tsc_khz_of_vm_after_vcpu_by_profile(profile, after):
    with simulated(profile) as platform:
        driver = Driver(platform)
        vm = driver.create_vm(0)
        assert driver.ioctl(vm, lib.KVM_SET_TSC_KHZ, 2500000) == (0, 0)
        assert driver.ioctl(vm, lib.KVM_GET_TSC_KHZ) == (2500000, 0)
        driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
        result = driver.ioctl(vm, lib.KVM_SET_TSC_KHZ, 2400000)
        assert result == ((-1, after) if after else (0, 0))


def test_tss_and_identity_addresses(driver, vm):
    assert driver.ioctl(vm, lib.KVM_SET_TSS_ADDR, 0xFFFBD000) == (0, 0)
    assert driver.ioctl(vm, lib.KVM_SET_TSS_ADDR, 0xFFFFFFFF) == (-1, errno.EINVAL)
    value = ffi.new("uint64_t *", 0xFFFBC000)
    assert driver.ioctl(vm, lib.KVM_SET_IDENTITY_MAP_ADDR, value) == (0, 0)
    assert driver.ioctl(vm, lib.KVM_SET_IDENTITY_MAP_ADDR, 0) == (-1, errno.EFAULT)
    driver.ok(driver.ioctl(vm, lib.KVM_CREATE_VCPU, 0))
    assert driver.ioctl(vm, lib.KVM_SET_IDENTITY_MAP_ADDR, 0) == (-1, errno.EINVAL)


def test_nr_mmu_pages_below_64_is_einval(driver, vm):
    assert driver.ioctl(vm, lib.KVM_SET_NR_MMU_PAGES, 63) == (-1, errno.EINVAL)
    assert driver.ioctl(vm, lib.KVM_SET_NR_MMU_PAGES, 64) == (0, 0)


def test_unsimulated_ioctl_is_enosys_which_no_kernel_says(driver, vm):
    assert driver.ioctl(vm, lib.KVM_GET_STATS_FD) == (-1, errno.ENOSYS)


def test_forked_child_gets_eio_on_parents_vm_and_vcpu(driver):
    guest = launched(driver.platform)
    child = os.fork()
    if not child:
        vm = guest.ioctl(guest.vm, lib.KVM_CHECK_EXTENSION, lib.KVM_CAP_USER_MEMORY)
        unknown = guest.ioctl(guest.vm, 0x1234)
        vcpu = guest.ioctl(guest.vcpus[0], lib.KVM_GET_REGS, 0)
        os._exit(0 if {vm, unknown, vcpu} == {(-1, errno.EIO)} else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["REG", "UNREG"])
def test_region_pinning_needs_init2(driver, name):
    request = getattr(lib, f"KVM_MEMORY_ENCRYPT_{name}_REGION")
    guest = Guest(driver.platform, init=False)
    region = struct("kvm_enc_region", addr=0x1000, size=0x1000)
    assert guest.ioctl(guest.vm, request, 0) == (-1, errno.EFAULT)
    assert guest.ioctl(guest.vm, request, region) == (-1, errno.ENOTTY)
    guest.ok(guest.init2()[0])
    expected = (0, 0) if name == "REG" else (-1, errno.EINVAL)
    assert guest.ioctl(guest.vm, request, region) == expected
