"""/dev/kvm, and the platform's own file descriptor rules (kernel-snp-abi 1.1, 1.4, 1.6)."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from kvmlaunch.errors import FormatError
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import ffi, lib

from .driver import ANONYMOUS, PAGE, RW, Driver, Guest, Memory, launched, simulated, struct

ENTRY = ffi.sizeof("struct kvm_cpuid_entry2")


@pytest.fixture
def kvm(driver):
    return driver.open_kvm()


def cpuid(nent):
    buffer = ffi.new("char[]", 8 + 256 * ENTRY)
    header = ffi.cast("struct kvm_cpuid2 *", buffer)
    header.nent = nent
    return buffer, header


def test_open_other_path_is_enoent(driver):
    assert driver.platform.open("/dev/null", os.O_RDWR) == (-1, errno.ENOENT)


def test_fds_when_opened_are_high_and_lowest_free_is_reused(driver):
    first, second = driver.open_kvm(), driver.open_kvm()
    assert (first, second) == (10000, 10001)
    driver.platform.close(first)
    assert driver.open_kvm() == first


def test_closed_fd_is_ebadf(driver, kvm):
    driver.platform.close(kvm)
    assert driver.platform.close(kvm) == (-1, errno.EBADF)
    assert driver.ioctl(kvm, lib.KVM_GET_API_VERSION) == (-1, errno.EBADF)
    assert driver.platform.fallocate(kvm, 1, 0, PAGE) == (-1, errno.EBADF)
    assert driver.platform.mmap(kvm, PAGE, RW, mmap.MAP_SHARED) == (-1, errno.EBADF)


def test_real_fd_number_is_ebadf(driver):
    assert driver.ioctl(1, lib.KVM_GET_API_VERSION) == (-1, errno.EBADF)


def test_api_version_is_12(driver, kvm):
    assert driver.ioctl(kvm, lib.KVM_GET_API_VERSION) == (12, 0)


@pytest.mark.parametrize("name", ["KVM_GET_API_VERSION", "KVM_GET_VCPU_MMAP_SIZE"])
def test_argument_where_none_belongs_is_einval(driver, kvm, name):
    assert driver.ioctl(kvm, getattr(lib, name), 1) == (-1, errno.EINVAL)


def test_vcpu_mmap_size_is_three_pages(driver, kvm):
    assert driver.ioctl(kvm, lib.KVM_GET_VCPU_MMAP_SIZE) == (12288, 0)


@pytest.mark.parametrize("name", ["KVM_CREATE_VCPU", "KVM_RUN", "SEV_ISSUE_CMD"])
def test_unknown_system_ioctl_is_einval(driver, kvm, name):
    assert driver.ioctl(kvm, getattr(lib, name)) == (-1, errno.EINVAL)


@pytest.mark.parametrize("vm_type", [1, 5, 31, 32, 36, 1 << 32 | 4, (1 << 64) - 1])
def test_create_vm_of_unsupported_type_is_einval(driver, kvm, vm_type):
    assert driver.ioctl(kvm, lib.KVM_CREATE_VM, vm_type) == (-1, errno.EINVAL)


@pytest.mark.parametrize("vm_type", [0, 2, 3, 4])
def test_create_vm_of_offered_type_gives_fd(driver, kvm, vm_type):
    assert driver.ioctl(kvm, lib.KVM_CREATE_VM, vm_type).ret >= 10000


@pytest.mark.parametrize(
    ("cap", "value"),
    [
        ("VM_TYPES", 0x1D),
        ("NR_MEMSLOTS", 32764),
        ("MAX_VCPUS", 1024),
        ("MAX_VCPU_ID", 4096),
        ("SYNC_REGS", 7),
        ("READONLY_MEM", 1),
        ("EXIT_HYPERCALL", 0x1000),
        ("MEMORY_ATTRIBUTES", 8),
        ("GUEST_MEMFD", 1),
        ("PRE_FAULT_MEMORY", 1),
        ("XSAVE2", 4096),
        ("SYS_ATTRIBUTES", 1),
        ("GUEST_MEMFD_FLAGS", 0),
    ],
)
def test_capability_on_6_12_has_value(driver, kvm, cap, value):
    number = getattr(lib, f"KVM_CAP_{cap}")
    assert driver.ioctl(kvm, lib.KVM_CHECK_EXTENSION, number) == (value, 0)


def test_unknown_capability_is_zero(driver, kvm):
    assert driver.ioctl(kvm, lib.KVM_CHECK_EXTENSION, 99999) == (0, 0)


@pytest.mark.parametrize("nent", [0, 1])
def test_supported_cpuid_without_room_is_e2big(driver, kvm, nent):
    keep, header = cpuid(nent)
    assert driver.ioctl(kvm, lib.KVM_GET_SUPPORTED_CPUID, header) == (-1, errno.E2BIG)
    assert header.nent == nent
    del keep


def test_supported_cpuid_with_absurd_room_is_clamped_and_counted(driver, kvm):
    keep, header = cpuid(0xFFFFFFFF)
    assert driver.ioctl(kvm, lib.KVM_GET_SUPPORTED_CPUID, header) == (0, 0)
    assert 1 <= header.nent <= 256
    functions = {header.entries[n].function for n in range(header.nent)}
    assert {0, 1, 0xD, 0x80000008, 0x8000001F} <= functions
    del keep


def test_supported_cpuid_null_is_efault(driver, kvm):
    assert driver.ioctl(kvm, lib.KVM_GET_SUPPORTED_CPUID, 0) == (-1, errno.EFAULT)


def test_emulated_cpuid_without_room_is_e2big(driver, kvm):
    keep, header = cpuid(0)
    assert driver.ioctl(kvm, lib.KVM_GET_EMULATED_CPUID, header) == (-1, errno.E2BIG)
    del keep


@pytest.mark.parametrize("name", ["KVM_GET_MSR_INDEX_LIST", "KVM_GET_MSR_FEATURE_INDEX_LIST"])
def test_msr_list_without_room_is_e2big_and_says_how_many(driver, kvm, name):
    words = ffi.new("uint32_t[]", 256)
    assert driver.ioctl(kvm, getattr(lib, name), words) == (-1, errno.E2BIG)
    count = words[0]
    assert count > 0
    assert words[1] == 0
    assert driver.ioctl(kvm, getattr(lib, name), words) == (0, 0)
    assert words[0] == count
    assert all(words[1 : count + 1])


def test_feature_msrs_when_one_is_unknown_stop_there(driver, kvm):
    buffer = ffi.new("char[]", 8 + 3 * 16)
    header = ffi.cast("struct kvm_msrs *", buffer)
    header.nmsrs = 3
    header.entries[0].index, header.entries[1].index = 0xC0011029, 0xDEAD
    assert driver.ioctl(kvm, lib.KVM_GET_MSRS, header) == (1, 0)
    assert header.entries[0].data == 2


def attribute(driver, kvm, group, attr, *, addr=None, request=None):
    value = ffi.new("uint64_t *")
    address = int(ffi.cast("uintptr_t", value)) if addr is None else addr
    args = struct("kvm_device_attr", group=group, attr=attr, addr=address)
    request = lib.KVM_GET_DEVICE_ATTR if request is None else request
    return driver.ioctl(kvm, request, args), value[0]


@pytest.mark.parametrize(
    ("profile", "features", "policy", "certs"),
    [
        ("6.12", 0x20, None, None),
        ("6.18", 0x220, None, None),
        ("7.0", 0x220, 0x1BFFFF, 1),
    ],
)
def test_sev_attributes_by_profile(profile, features, policy, certs):
    with simulated(profile) as platform:
        driver = Driver(platform)
        kvm = driver.open_kvm()
        assert attribute(driver, kvm, 1, 0) == ((0, 0), features)
        for attr, expected in ((1, policy), (2, certs)):
            result, value = attribute(driver, kvm, 1, attr)
            if expected is None:
                assert result == (-1, errno.ENXIO)
            else:
                assert (result, value) == ((0, 0), expected)


def test_device_attr_order_is_struct_then_value_then_address(driver, kvm):
    assert driver.ioctl(kvm, lib.KVM_GET_DEVICE_ATTR, 0) == (-1, errno.EFAULT)
    assert attribute(driver, kvm, 7, 0, addr=0)[0] == (-1, errno.ENXIO)
    assert attribute(driver, kvm, 1, 0, addr=0)[0] == (-1, errno.EFAULT)


def test_has_device_attr_when_address_is_bad_is_still_0(driver, kvm):
    request = lib.KVM_HAS_DEVICE_ATTR
    assert attribute(driver, kvm, 1, 0, addr=0, request=request)[0] == (0, 0)
    assert attribute(driver, kvm, 9, 0, addr=0, request=request)[0] == (-1, errno.ENXIO)


def test_anonymous_mmap_is_real_memory(driver):
    address = driver.ok(driver.platform.mmap(-1, PAGE, RW, ANONYMOUS))
    assert bytes(ffi.buffer(ffi.cast("char *", address), PAGE)) == bytes(PAGE)
    assert driver.platform.munmap(address, PAGE) == (0, 0)


@pytest.mark.parametrize("opened", ["/dev/kvm", "/dev/sev"])
def test_mmap_of_device_is_enodev(driver, opened):
    fd = driver.ok(driver.platform.open(opened, os.O_RDWR))
    assert driver.platform.mmap(fd, PAGE, RW, mmap.MAP_SHARED) == (-1, errno.ENODEV)


def test_open_fds_names_what_is_open(driver):
    kvm, sev = driver.open_kvm(), driver.open_sev()
    assert driver.platform.open_fds == (kvm, sev)
    driver.platform.close(kvm)
    assert driver.platform.open_fds == (sev,)


def test_shutdown_twice_with_everything_open_leaves_nothing():
    platform = SimPlatform()
    guest = launched(platform)
    guest.mmap_run(guest.vcpus[0])
    platform.shutdown()
    assert platform.open_fds == ()
    platform.shutdown()


def test_vm_fd_closed_while_vcpu_and_memfd_are_open_keeps_vm_alive():
    with simulated() as platform:
        guest = launched(platform)
        before = platform.launch_digest(guest.vm)
        platform.close(guest.vm)
        assert before is not None
        assert guest.ioctl(guest.vcpus[0], lib.KVM_GET_REGS, struct("kvm_regs")) == (0, 0)
        assert guest.platform.fallocate(guest.gmem, 1, 0, PAGE) == (0, 0)


def test_guest_count_when_vms_end_goes_back_to_zero():
    with simulated() as platform:
        guest = launched(platform)
        status = struct("sev_user_data_snp_status")
        address = int(ffi.cast("uintptr_t", status))
        issue = struct("sev_issue_cmd", cmd=lib.SNP_PLATFORM_STATUS, data=address)
        assert guest.ioctl(guest.sev_fd, lib.SEV_ISSUE_CMD, issue) == (0, 0)
        assert status.guest_count == 1
        for fd in (*guest.vcpus, guest.gmem, guest.vm):
            platform.close(fd)
        assert guest.ioctl(guest.sev_fd, lib.SEV_ISSUE_CMD, issue) == (0, 0)
        assert status.guest_count == 0


def test_platform_names_itself():
    with simulated("6.18") as platform:
        assert (platform.name, platform.profile) == ("sim", "6.18")


def test_platform_of_unknown_profile_is_format_error():
    with pytest.raises(FormatError, match=r"6\.12, 6\.18, 7\.0"):
        SimPlatform("5.4")


def test_peephole_before_start_is_empty(driver):
    guest = Guest(driver.platform)
    assert driver.platform.launch_digest(guest.vm) is None
    assert list(driver.platform.measured_pages(guest.vm)) == []


def test_user_memory_unmapped_is_efault(driver, kvm):
    memory = Memory(PAGE)
    assert driver.ioctl(kvm, lib.KVM_GET_MSRS, memory.address + 2**46) == (-1, errno.EFAULT)
