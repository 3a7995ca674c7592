"""KVM_MEMORY_ENCRYPT_OP's entry and INIT2 (kernel-snp-abi 3.0-3.2, 3.7)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import address_of, ffi, lib

from .driver import Driver, FrozenPage, Guest, simulated, struct

MARK = 0xABCD1234
EINVAL = (-1, errno.EINVAL)

# From KVM_SEV_LAUNCH_START on: but for KVM_SEV_LAUNCH_UPDATE_VMSA, of SEV-ES alone, and
# KVM_SEV_RECEIVE_UPDATE_DATA, with an errno of its own.
LEGACY = [2, 3, *range(5, 10), 11, 12, 15, 16, 17, 18, 20, 21]


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


@pytest.mark.parametrize("command", [*LEGACY, lib.KVM_SEV_LAUNCH_UPDATE_VMSA])
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


# SEV and SEV-ES (sev.c: sev_guest_init, sev_guest_init2, __sev_guest_init)

SEV, SEV_ES = 2, 3
ENOSYS = (-1, errno.ENOSYS)
ENOTTY = (-1, errno.ENOTTY)


@pytest.fixture
def make():
    with simulated() as platform:
        yield lambda vm_type: Guest(platform, init=False, vm_type=vm_type)


@pytest.mark.parametrize("vm_type", [SEV, SEV_ES])
def test_init2_of_sev_types_works_once(make, vm_type):
    guest = make(vm_type)
    assert guest.init2(error=MARK) == ((0, 0), MARK)
    assert guest.init2(error=MARK) == (EINVAL, MARK)


@pytest.mark.parametrize("vm_type", [SEV, SEV_ES])
def test_init2_of_sev_types_with_vcpu_flag_or_unreadable_struct_fails(make, vm_type):
    guest = make(vm_type)
    assert guest.sev(guest.vm, lib.KVM_SEV_INIT2, 0)[0] == (-1, errno.EFAULT)
    assert guest.init2(flags=1)[0] == EINVAL
    guest.add_vcpu()
    assert guest.init2()[0] == EINVAL


def taken_by_init2(profile, field, values):
    """SEV types and values of one field that INIT2 takes."""
    with simulated(profile) as platform:
        return {
            (vm_type, value)
            for vm_type in (SEV, SEV_ES)
            for value in values
            if Guest(platform, init=False, vm_type=vm_type).init2(**{field: value})[0].ret == 0
        }


@pytest.mark.parametrize("profile", ["6.12", "6.18"])
def test_init2_features_of_sev_types_lack_secure_tsc(profile):
    bits = [1 << bit for bit in range(64)]
    assert taken_by_init2(profile, "vmsa_features", bits) == {(SEV_ES, 1 << 5)}


@pytest.mark.parametrize("profile", ["6.12", "6.18"])
def test_init2_ghcb_version_is_for_sev_es_where_1_is_good(profile):
    good = {(SEV, 0), (SEV_ES, 0), (SEV_ES, 1), (SEV_ES, 2)}
    assert taken_by_init2(profile, "ghcb_version", range(4)) == good


@pytest.mark.parametrize("command", [0, 1])
def test_old_init_is_for_a_plain_vm_once_and_without_vcpus(make, command):
    plain = make(0)
    assert plain.sev(plain.vm, command, error=MARK) == ((0, 0), MARK)
    assert plain.sev(plain.vm, command, error=MARK) == (EINVAL, MARK)
    typed = make(SEV)
    assert typed.sev(typed.vm, command)[0] == EINVAL
    late = make(0)
    late.add_vcpu()
    assert late.sev(late.vm, command)[0] == EINVAL


@pytest.mark.parametrize("command", [*LEGACY, lib.KVM_SEV_RECEIVE_UPDATE_DATA])
def test_launch_of_sev_guest_is_not_simulated(make, command):
    guest = make(SEV)
    expected = EINVAL if command == lib.KVM_SEV_RECEIVE_UPDATE_DATA else ENOTTY
    assert guest.sev(guest.vm, command)[0] == expected
    guest.ok(guest.init2()[0])
    assert guest.sev(guest.vm, command)[0] == ENOSYS


def test_update_vmsa_is_of_sev_es_alone(make):
    for vm_type, expected in ((SEV, ENOTTY), (SEV_ES, ENOSYS)):
        guest = make(vm_type)
        guest.ok(guest.init2()[0])
        assert guest.sev(guest.vm, lib.KVM_SEV_LAUNCH_UPDATE_VMSA)[0] == expected


@pytest.mark.parametrize("vm_type", [SEV, SEV_ES])
def test_snp_commands_on_sev_guests_are_enotty(make, vm_type):
    guest = make(vm_type)
    guest.ok(guest.init2()[0])
    assert guest.start()[0] == ENOTTY
    assert guest.finish()[0] == ENOTTY
    assert guest.update_pages()[0] == EINVAL


def test_run_of_sev_types_is_einval_before_init2_and_enosys_after(make):
    for vm_type in (SEV, SEV_ES):
        guest = make(vm_type)
        assert guest.ioctl(guest.add_vcpu(), lib.KVM_RUN) == EINVAL
        guest = make(vm_type)
        guest.ok(guest.init2()[0])
        assert guest.ioctl(guest.add_vcpu(), lib.KVM_RUN) == ENOSYS


@pytest.mark.parametrize(
    ("vm_type", "expected"),
    [(0, (1, 7, 1, 0)), (SEV, (1, 7, 1, 0)), (SEV_ES, (0, 0, 0, 0)), (4, (0, 0, 0, 8))],
)
def test_capabilities_of_each_type(make, vm_type, expected):
    # x86.h: kvm_arch_has_readonly_mem(); x86.c: kvm_sync_valid_fields(); svm_has_emulated_msr().
    guest = make(vm_type)
    if vm_type:
        guest.ok(guest.init2()[0])
    names = ("READONLY_MEM", "SYNC_REGS", "X86_SMM", "MEMORY_ATTRIBUTES")
    got = [
        guest.ok(guest.ioctl(guest.vm, lib.KVM_CHECK_EXTENSION, getattr(lib, f"KVM_CAP_{name}")))
        for name in names
    ]
    assert tuple(got) == expected


def test_asids_of_sev_and_sev_es_run_out_apart(make):
    # Leaf 0x8000001F of Milan: 509 ASIDs, of which 100 is the lowest of SEV without ES.
    def fill(vm_type):
        count = 0
        while (result := (guest := make(vm_type)).init2()[0]) == (0, 0):
            count += 1
        assert result == (-1, errno.EBUSY)
        guest.ok(guest.platform.close(guest.vm))
        return count

    assert fill(SEV_ES) == 99
    assert make(4).init2()[0] == (-1, errno.EBUSY)
    assert fill(SEV) == 410
