"""SNP_LAUNCH_START, row by row (kernel-snp-abi 3.3)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import lib

from .driver import POLICY, Guest, simulated, struct

MARK = 0xABCD1234
EINVAL = (-1, errno.EINVAL)
ENOTTY = (-1, errno.ENOTTY)
EIO = (-1, errno.EIO)


@pytest.fixture
def guest():
    with simulated() as platform:
        yield Guest(platform)


def test_start_when_good_is_0_and_error_is_firmwares(guest):
    assert guest.start(error=MARK) == ((0, 0), 0)
    assert guest.digest == bytes(48)


@pytest.mark.parametrize("vm_type", [0, 4])
def test_start_before_init2_is_enotty_before_its_struct_is_read(vm_type):
    with simulated() as platform:
        guest = Guest(platform, init=False, vm_type=vm_type)
        command = lib.KVM_SEV_SNP_LAUNCH_START
        assert guest.sev(guest.vm, command, 8, guest.sev_fd, MARK) == (ENOTTY, MARK)


def test_start_with_unreadable_struct_is_efault(guest):
    guest.ok(guest.start()[0])
    command = lib.KVM_SEV_SNP_LAUNCH_START
    result = guest.sev(guest.vm, command, 0, guest.sev_fd, MARK)
    assert result == ((-1, errno.EFAULT), MARK)


def test_start_twice_is_einval(guest):
    guest.ok(guest.start()[0])
    assert guest.start(error=MARK) == (EINVAL, MARK)


def test_start_after_finish_is_einval(guest):
    guest.ok(guest.start()[0])
    guest.ok(guest.finish()[0])
    assert guest.start() == (EINVAL, 0)


@pytest.mark.parametrize("bit", range(16))
def test_start_with_flag_is_einval(guest, bit):
    assert guest.start(flags=1 << bit, error=MARK) == (EINVAL, MARK)


# Bits that START takes besides 16 and 17, by kernel; firmware's answer comes after that.
EXTRA = {"6.12": {*range(16), 19}, "6.18": {*range(16), 19, 20}, "7.0": {*range(16), 19, 20}}


@pytest.mark.parametrize("profile", EXTRA)
@pytest.mark.parametrize("bit", [b for b in range(64) if b not in (16, 17)])
def test_start_policy_bit_refused_by_kernel_is_einval(profile, bit):
    with simulated(profile) as platform:
        result, error = Guest(platform).start(policy=POLICY | 1 << bit, error=MARK)
        if bit in EXTRA[profile]:
            assert error != MARK
        else:
            assert (result, error) == (EINVAL, MARK)


@pytest.mark.parametrize("profile", ["6.12", "6.18", "7.0"])
def test_start_without_bit_17_is_einval(profile):
    with simulated(profile) as platform:
        assert Guest(platform).start(policy=0x10000) == (EINVAL, 0)


@pytest.mark.parametrize(
    ("profile", "expected"), [("6.12", (EINVAL, MARK)), ("6.18", (EIO, 7)), ("7.0", (EIO, 7))]
)
def test_start_without_smt_bit_by_profile(profile, expected):
    with simulated(profile) as platform:
        assert Guest(platform).start(policy=0x20000, error=MARK) == expected


@pytest.mark.parametrize("sev_fd", [0, 99999, 0xFFFFFFFF])
def test_start_without_sev_fd_is_enotty_and_may_be_tried_again(guest, sev_fd):
    assert guest.start(sev_fd=sev_fd, error=MARK) == (ENOTTY, MARK)
    assert guest.start() == ((0, 0), 0)


def test_start_with_other_file_as_sev_fd_is_enotty(guest):
    assert guest.start(sev_fd=guest.kvm) == (ENOTTY, 0)


def test_start_with_closed_sev_fd_is_enotty(guest):
    guest.platform.close(guest.sev_fd)
    assert guest.start() == (ENOTTY, 0)


def test_start_with_read_only_sev_fd_works(guest):
    assert guest.start(sev_fd=guest.open_sev(flags=0)) == ((0, 0), 0)


def test_start_with_abi_above_firmwares_is_policy_failure_and_may_be_tried_again(guest):
    assert guest.start(policy=POLICY | 0xFF00, error=MARK) == (EIO, 7)
    assert guest.platform.launch_digest(guest.vm) is None
    assert guest.start() == ((0, 0), 0)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("SNP_GCTX_CREATE:fw=0x13", (ENOTTY, 0x13)),
        ("SNP_LAUNCH_START:fw=0x3", (EIO, 3)),
        ("SNP_ACTIVATE:fw=0xd", (EIO, 0xD)),
    ],
)
def test_start_when_firmware_refuses_cleans_up(fault, expected):
    with simulated(faults=[fault]) as platform:
        guest = Guest(platform)
        assert guest.start(error=MARK) == expected
        assert platform.launch_digest(guest.vm) is None
        assert guest.start() == ((0, 0), 0)


def test_start_when_decommission_fails_too_leaves_the_context():
    faults = ["SNP_LAUNCH_START:fw=0x3", "SNP_DECOMMISSION:fw=0x13"]
    with simulated(faults=faults) as platform:
        guest = Guest(platform)
        assert guest.start() == (EIO, 3)
        assert guest.start() == (EINVAL, 0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"flags": 1}, {"policy": 0}),
        ({"policy": 0}, {"sev_fd": 0}),
        ({"policy": 1 << 40 | POLICY}, {"sev_fd": 0}),
        ({"flags": 1}, {"sev_fd": 0}),
    ],
)
def test_start_with_two_faults_gives_the_earlier_one(guest, first, second):
    assert guest.start(**{**second, **first}) == (EINVAL, 0)


def test_start_needs_neither_memory_nor_vcpus(guest):
    args = struct("kvm_sev_snp_launch_start", policy=POLICY)
    args.pad1[0] = 1
    result = guest.sev(guest.vm, lib.KVM_SEV_SNP_LAUNCH_START, args, guest.sev_fd)
    assert result == ((0, 0), 0)
