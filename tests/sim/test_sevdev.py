"""/dev/sev (kernel-snp-abi 1.7)."""

from __future__ import annotations

import errno
import os

import pytest

from kvmlaunch.uapi import address_of, ffi, lib

from .driver import Driver, Memory, simulated, struct

MARK = 0xABCD1234
EINVAL = (-1, errno.EINVAL)
EIO = (-1, errno.EIO)
OK = (0, 0)


@pytest.fixture
def sev(driver):
    return driver.open_sev()


def issue(driver, fd, command, data=0):
    """SEV_ISSUE_CMD: (result, error word)."""
    address = data if isinstance(data, int) else address_of(data)
    args = struct("sev_issue_cmd", cmd=command, data=address, error=MARK)
    return driver.ioctl(fd, lib.SEV_ISSUE_CMD, args), args.error


def test_other_request_is_einval(driver, sev):
    assert driver.ioctl(sev, lib.KVM_GET_API_VERSION) == EINVAL


def test_unreadable_argument_is_efault(driver, sev):
    assert driver.ioctl(sev, lib.SEV_ISSUE_CMD, 0) == (-1, errno.EFAULT)


@pytest.mark.parametrize("command", [13, 14, 0xFFFFFFFF])
def test_unknown_command_is_einval_and_not_copied_back(driver, sev, command):
    assert issue(driver, sev, command) == (EINVAL, MARK)


def test_snp_status_says_what_kvm_needs(driver, sev):
    status = struct("sev_user_data_snp_status")
    assert issue(driver, sev, lib.SNP_PLATFORM_STATUS, status) == (OK, 0)
    assert (status.api_major, status.api_minor) >= (1, 51)
    assert (status.state, status.rmp_word & 1, status.guest_count) == (1, 1, 0)
    assert status.current_tcb_version == status.reported_tcb_version != 0


def test_snp_status_with_read_only_device_works(driver):
    status = struct("sev_user_data_snp_status")
    fd = driver.open_sev(os.O_RDONLY)
    assert issue(driver, fd, lib.SNP_PLATFORM_STATUS, status) == (OK, 0)


def test_snp_status_null_is_einval_and_unwritable_efault(driver, sev):
    assert issue(driver, sev, lib.SNP_PLATFORM_STATUS, 0) == (EINVAL, MARK)
    result, _ = issue(driver, sev, lib.SNP_PLATFORM_STATUS, 8)
    assert result == (-1, errno.EFAULT)


def test_status_when_firmware_fails_is_eio_with_its_word():
    with simulated(faults=["SNP_PLATFORM_STATUS:fw=0x1"]) as platform:
        driver = Driver(platform)
        status = struct("sev_user_data_snp_status")
        assert issue(driver, driver.open_sev(), lib.SNP_PLATFORM_STATUS, status) == (EIO, 1)


def test_legacy_status_is_initialised(driver, sev):
    status = struct("sev_user_data_status")
    assert issue(driver, sev, lib.SEV_PLATFORM_STATUS, status) == (OK, 0)
    assert status.state == 1


@pytest.mark.parametrize("name", ["SEV_FACTORY_RESET", "SEV_PEK_GEN", "SEV_PEK_CSR", "SEV_PDH_GEN"])
def test_legacy_command_needs_write(driver, sev, name):
    command = getattr(lib, name)
    assert issue(driver, driver.open_sev(os.O_RDONLY), command) == ((-1, errno.EPERM), MARK)
    assert issue(driver, sev, command)[0] == EIO


def test_commit_is_allowed_without_write(driver):
    assert issue(driver, driver.open_sev(os.O_RDONLY), lib.SNP_COMMIT) == (OK, 0)


@pytest.mark.parametrize("name", ["SNP_SET_CONFIG", "SNP_VLEK_LOAD"])
def test_config_order_is_null_then_permission_then_memory(driver, sev, name):
    command = getattr(lib, name)
    reader = driver.open_sev(os.O_RDONLY)
    assert issue(driver, reader, command, 0) == (EINVAL, MARK)
    assert issue(driver, reader, command, 8) == ((-1, errno.EPERM), MARK)
    assert issue(driver, sev, command, 8) == ((-1, errno.EFAULT), MARK)


def test_set_config_shows_in_status(driver, sev):
    config = struct("sev_user_data_snp_config", reported_tcb=0, mask_word=3)
    assert issue(driver, sev, lib.SNP_SET_CONFIG, config) == (OK, 0)
    status = struct("sev_user_data_snp_status")
    driver.ok(issue(driver, sev, lib.SNP_PLATFORM_STATUS, status)[0])
    assert status.mask_word & 3 == 3


@pytest.mark.parametrize("wrong", [{"len": 15}, {"len": 0}, {"vlek_wrapped_version": 1}])
def test_vlek_load_with_wrong_header_is_einval(driver, sev, wrong):
    load = struct("sev_user_data_snp_vlek_load", **{"len": 16, **wrong})
    assert issue(driver, sev, lib.SNP_VLEK_LOAD, load) == (EINVAL, MARK)


def test_vlek_load_with_unreadable_blob_is_efault(driver, sev):
    load = struct("sev_user_data_snp_vlek_load", len=16, vlek_wrapped_address=8)
    assert issue(driver, sev, lib.SNP_VLEK_LOAD, load) == ((-1, errno.EFAULT), MARK)


def test_vlek_load_reaches_firmware():
    with simulated(faults=["SNP_VLEK_LOAD:fw=0x3"]) as platform:
        driver = Driver(platform)
        blob = Memory(4096)
        load = struct("sev_user_data_snp_vlek_load", len=16, vlek_wrapped_address=blob.address)
        assert issue(driver, driver.open_sev(), lib.SNP_VLEK_LOAD, load) == (EIO, 3)


def test_get_id2_as_length_query_then_with_room(driver, sev):
    query = struct("sev_user_data_get_id2")
    assert issue(driver, sev, lib.SEV_GET_ID2, query) == (EIO, lib.SEV_RET_INVALID_LEN)
    assert query.length == 64
    room = ffi.new("uint8_t[64]")
    query.address = address_of(room)
    assert issue(driver, sev, lib.SEV_GET_ID2, query) == (OK, 0)


def test_ordered_errno_of_device_command_comes_first():
    with simulated(faults=["SNP_COMMIT:errno=EBUSY@2"]) as platform:
        driver = Driver(platform)
        sev = driver.open_sev()
        assert issue(driver, sev, lib.SNP_COMMIT) == (OK, 0)
        assert issue(driver, sev, lib.SNP_COMMIT) == ((-1, errno.EBUSY), MARK)
        assert issue(driver, sev, lib.SNP_COMMIT) == (OK, 0)
