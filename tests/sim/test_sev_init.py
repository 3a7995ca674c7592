"""KVM_MEMORY_ENCRYPT_OP's entry and INIT2 (kernel-snp-abi 3.0-3.2, 3.7)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import address_of, ffi, lib

from .driver import Driver, FrozenPage, Guest, simulated, struct

MARK = 0xABCD1234
EINVAL = (-1, errno.EINVAL)


@pytest.fixture
def new():
    with simulated() as platform:
        yield Guest(platform, init=False)


def copied_back(guest, command, data=0):
    """Whether the entry writes kvm_sev_cmd back: a read-only one then gives EFAULT."""
    cmd = struct("kvm_sev_cmd", id=command, data=data, sev_fd=guest.sev_fd)
    frozen = FrozenPage(bytes(ffi.buffer(cmd)))
    result = guest.ioctl(guest.vm, lib.KVM_MEMORY_ENCRYPT_OP, frozen.address)
    return result == (-1, errno.EFAULT)


# entry


def test_null_command_is_0_whatever_the_vm(new):
    assert new.ioctl(new.vm, lib.KVM_MEMORY_ENCRYPT_OP, 0) == (0, 0)
    assert new.ioctl(new.create_vm(0), lib.KVM_MEMORY_ENCRYPT_OP, 0) == (0, 0)


def test_unreadable_command_is_efault(new):
    assert new.ioctl(new.vm, lib.KVM_MEMORY_ENCRYPT_OP, 8) == (-1, errno.EFAULT)


@pytest.mark.parametrize("command", [*range(23), 50, 99])
def test_old_command_after_init2_is_eperm_without_copy_back(new, command):
    new.ok(new.init2()[0])
    assert new.sev(new.vm, command, error=MARK) == ((-1, errno.EPERM), MARK)
    assert not copied_back(new, command)


# 10, 14 and 19 have names, but no case in sev_mem_enc_ioctl().
@pytest.mark.parametrize("command", [10, 14, 19, 23, 50, 99, 103, 104, 0xFFFFFFFF])
def test_unknown_command_before_init2_is_einval_without_copy_back(new, command):
    assert new.sev(new.vm, command, error=MARK) == (EINVAL, MARK)
    assert not copied_back(new, command)


@pytest.mark.parametrize("command", [103, 0x80000000])
def test_unknown_command_after_init2_is_einval(new, command):
    new.ok(new.init2()[0])
    assert new.sev(new.vm, command, error=MARK) == (EINVAL, MARK)


@pytest.mark.parametrize("command", [0, 1])
def test_legacy_init_on_snp_type_is_einval_with_copy_back(new, command):
    assert new.sev(new.vm, command, error=MARK) == (EINVAL, MARK)
    assert copied_back(new, command)


@pytest.mark.parametrize("command", [*range(2, 10), 11, 12, 15, 16, 17, 18, 20, 21])
def test_legacy_command_before_init2_is_enotty_with_copy_back(new, command):
    assert new.sev(new.vm, command, error=MARK) == ((-1, errno.ENOTTY), MARK)
    assert copied_back(new, command)


def test_receive_update_data_before_init2_is_einval_with_copy_back(new):
    # sev_receive_update_data() has an errno of its own for a VM that isn't SEV.
    assert new.sev(new.vm, lib.KVM_SEV_RECEIVE_UPDATE_DATA, error=MARK) == (EINVAL, MARK)
    assert copied_back(new, lib.KVM_SEV_RECEIVE_UPDATE_DATA)


@pytest.mark.parametrize("command", [22, 100, 101, 102])
def test_handled_command_that_fails_is_copied_back(command):
    with simulated() as platform:
        guest = Guest(platform, init=False)
        guest.add_vcpu()
        assert copied_back(guest, command)
        other = Guest(platform)
        assert command == 22 or copied_back(other, command)
        other.ok(other.start()[0])
        assert command == 22 or copied_back(other, command)


# INIT2


def test_init2_when_good_is_0_and_leaves_error_alone(new):
    assert new.init2(error=MARK) == ((0, 0), MARK)


def test_init2_again_is_eperm(new):
    new.ok(new.init2()[0])
    assert new.init2(error=MARK) == ((-1, errno.EPERM), MARK)


def test_init2_on_default_vm_is_einval_before_its_struct_is_read(new):
    vm = new.create_vm(0)
    assert new.sev(vm, lib.KVM_SEV_INIT2, 8, error=MARK) == (EINVAL, MARK)


def test_init2_with_unreadable_struct_is_efault_before_vcpus_are_counted(new):
    new.add_vcpu()
    assert new.sev(new.vm, lib.KVM_SEV_INIT2, 0) == ((-1, errno.EFAULT), 0)


def test_init2_with_vcpu_is_einval(new):
    new.add_vcpu()
    assert new.init2(error=MARK) == (EINVAL, MARK)


@pytest.mark.parametrize("bit", range(32))
def test_init2_with_flag_is_einval(new, bit):
    assert new.init2(flags=1 << bit) == (EINVAL, 0)


@pytest.mark.parametrize("profile", ["6.12", "6.18"])
@pytest.mark.parametrize("bit", range(64))
def test_init2_features_are_those_of_the_attribute(profile, bit):
    mask = {"6.12": 0x20, "6.18": 0x220}[profile]
    with simulated(profile) as platform:
        result, _ = Guest(platform, init=False).init2(vmsa_features=1 << bit)
        assert result == ((0, 0) if mask >> bit & 1 else EINVAL)


@pytest.mark.parametrize(
    ("profile", "version", "works"),
    [
        ("6.12", 0, True),
        ("6.12", 1, True),
        ("6.12", 2, True),
        ("6.12", 3, False),
        ("6.18", 0, True),
        ("6.18", 1, False),
        ("6.18", 2, True),
        ("7.0", 1, False),
        ("7.0", 0xFFFF, False),
    ],
)
def test_init2_ghcb_version_by_profile(profile, version, works):
    with simulated(profile) as platform:
        result, _ = Guest(platform, init=False).init2(ghcb_version=version)
        assert result == ((0, 0) if works else EINVAL)


def test_init2_after_failure_may_be_tried_again(new):
    assert new.init2(flags=1)[0] == EINVAL
    assert new.init2()[0] == (0, 0)


def test_init2_does_not_need_a_sev_fd_and_copies_back(new):
    assert new.sev(new.vm, lib.KVM_SEV_INIT2, struct("kvm_sev_init"), 99)[0] == (0, 0)


def test_init2_with_read_only_command_is_efault_though_it_was_done(new):
    init = struct("kvm_sev_init")
    assert copied_back(new, lib.KVM_SEV_INIT2, address_of(init))
    assert new.init2()[0] == (-1, errno.EPERM)


def test_init2_when_asids_run_out_is_ebusy_until_a_vm_ends(new):
    driver = Driver(new.platform)
    vms = []
    while True:
        vm = driver.create_vm(4, new.kvm)
        result, _ = driver.sev(vm, lib.KVM_SEV_INIT2, struct("kvm_sev_init"))
        if result != (0, 0):
            break
        vms.append(vm)
    assert result == (-1, errno.EBUSY)
    assert len(vms) > 10
    driver.platform.close(vms.pop())
    assert driver.sev(vm, lib.KVM_SEV_INIT2, struct("kvm_sev_init"))[0] == (0, 0)


# 3.7


def test_req_certs_on_6_18_is_unknown(new):
    with simulated("6.18") as platform:
        guest = Guest(platform)
        command = lib.KVM_SEV_SNP_ENABLE_REQ_CERTS
        assert guest.sev(guest.vm, command, error=MARK) == (EINVAL, MARK)


def test_req_certs_on_7_0_needs_snp_and_no_vcpu():
    with simulated("7.0") as platform:
        command = lib.KVM_SEV_SNP_ENABLE_REQ_CERTS
        guest = Guest(platform, init=False)
        assert guest.sev(guest.vm, command)[0] == EINVAL
        guest.ok(guest.init2()[0])
        assert guest.sev(guest.vm, command)[0] == (0, 0)
        guest.add_vcpu()
        assert guest.sev(guest.vm, command)[0] == EINVAL
