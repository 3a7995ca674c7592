"""SevDevice on the simulated host."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from kvmlaunch.errors import FirmwareError, FormatError, IoctlError, IoctlPermissionError
from kvmlaunch.kvm import SevDevice, SevStatus, SnpStatus
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Call, Recorder, Result, ffi, lib
from tests.kvm.machines import started

_STICK = bytes(range(216)) * 2


def _device(faults: Sequence[str] = (), **options: Any) -> SevDevice:
    return SevDevice.open(SimPlatform(faults=faults, **options))


@pytest.fixture
def device() -> Iterator[SevDevice]:
    with _device() as opened:
        yield opened


class _Answering:
    """A /dev/sev that fills the data of each command with the given bytes."""

    name = "fake"
    profile = ""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        command = ffi.cast("struct sev_issue_cmd *", arg)
        ffi.memmove(ffi.cast("char *", command.data), self.data, len(self.data))
        return Result(0, 0)


def _answering(data: bytes) -> SevDevice:
    fake: Any = _Answering(data)
    return SevDevice(fake, 3, "/dev/sev")


def test_platform_status_when_read_has_each_field_from_its_place() -> None:
    raw = bytes([1, 55, 2, 0x01, 0x01, 0, 0, 29, 3, 0, 0, 0])
    status = _answering(raw).platform_status()
    assert status == SevStatus(1, 55, 2, flags=0x101, build=29, guest_count=3)


@pytest.mark.parametrize(
    ("flags", "owned", "es_configured"),
    [(0, False, False), (1, True, False), (0x100, False, True), (0xFFFFFEFE, False, False)],
)
def test_platform_status_when_flags_are_set_names_them(
    flags: int, owned: bool, es_configured: bool
) -> None:
    status = SevStatus(1, 55, 1, flags, 0, 0)
    assert (status.owned, status.es_configured) == (owned, es_configured)


def _raw_snp_status(rmp: int = 0, mask: int = 0) -> bytes:
    words = [24, mask, 3]
    head = bytes([1, 55, 1, rmp]) + b"".join(word.to_bytes(4, "little") for word in words)
    return head + (0x1122334455667788).to_bytes(8, "little") + (0x99).to_bytes(8, "little")


def test_snp_status_when_read_has_each_field_from_its_place() -> None:
    status = _answering(_raw_snp_status(rmp=1, mask=0b101)).snp_platform_status()
    assert status == SnpStatus(
        api_major=1,
        api_minor=55,
        state=1,
        rmp_initialized=True,
        build_id=24,
        mask_chip_id=True,
        mask_chip_key=False,
        vlek_enabled=True,
        guest_count=3,
        current_tcb=0x1122334455667788,
        reported_tcb=0x99,
    )


@pytest.mark.parametrize(
    ("rmp", "mask", "flags"),
    [
        (1, 0, (True, False, False, False)),
        (0, 1, (False, True, False, False)),
        (0, 2, (False, False, True, False)),
        (0, 4, (False, False, False, True)),
        (0xFE, 0xFFFFFFF8, (False, False, False, False)),
    ],
)
def test_snp_status_when_bits_are_set_reads_each_from_its_own(
    rmp: int, mask: int, flags: tuple[bool, ...]
) -> None:
    status = _answering(_raw_snp_status(rmp, mask)).snp_platform_status()
    assert flags == (
        status.rmp_initialized,
        status.mask_chip_id,
        status.mask_chip_key,
        status.vlek_enabled,
    )


def test_snp_status_when_shown_says_version_state_and_tcb() -> None:
    assert str(_answering(_raw_snp_status()).snp_platform_status()) == (
        "SNP firmware 1.55 build 24, initialised, 3 guests, "
        "TCB 0x1122334455667788 (reported 0x0000000000000099)"
    )


def test_snp_status_when_the_simulated_host_is_up_is_initialised(device: SevDevice) -> None:
    status = device.snp_platform_status()
    assert (status.state, status.rmp_initialized) == (1, True)
    assert (status.mask_chip_id, status.mask_chip_key, status.vlek_enabled) == (False,) * 3


def test_snp_status_when_a_guest_is_launched_counts_it() -> None:
    with SimPlatform() as sim, ExitStack() as stack:
        _, sev = started(sim, stack)
        assert sev.snp_platform_status().guest_count == 1


def test_statuses_when_compared_agree_on_the_version(device: SevDevice) -> None:
    sev, snp = device.platform_status(), device.snp_platform_status()
    assert (sev.api_major, sev.api_minor) == (snp.api_major, snp.api_minor)


@pytest.mark.parametrize(
    ("chip_id", "chip_key"), [(True, False), (False, True), (True, True), (False, False)]
)
def test_config_when_masks_are_set_shows_in_the_status(
    device: SevDevice, chip_id: bool, chip_key: bool
) -> None:
    device.set_config(mask_chip_id=True, mask_chip_key=True)
    device.set_config(mask_chip_id=chip_id, mask_chip_key=chip_key)
    status = device.snp_platform_status()
    assert (status.mask_chip_id, status.mask_chip_key) == (chip_id, chip_key)


def test_config_when_reported_tcb_is_set_shows_in_the_status(device: SevDevice) -> None:
    lower = device.snp_platform_status().current_tcb & 0xFF
    device.set_config(reported_tcb=lower)
    assert device.snp_platform_status().reported_tcb == lower


def test_config_when_reported_tcb_is_too_high_is_refused_by_firmware(device: SevDevice) -> None:
    with pytest.raises(FirmwareError) as caught:
        device.set_config(reported_tcb=2**64 - 1)
    assert (caught.value.ioctl, caught.value.errno) == ("SNP_SET_CONFIG", errno.EIO)
    assert caught.value.fw_error == lib.SEV_RET_INVALID_PARAM


def test_commit_when_called_sends_no_data() -> None:
    calls: list[Call] = []
    with SevDevice.open(Recorder(SimPlatform(), calls.append)) as device:
        device.commit()
    assert calls[1].sent == {"cmd": lib.SNP_COMMIT, "data": 0, "error": 0}


def test_vlek_when_loaded_shows_in_the_status(device: SevDevice) -> None:
    device.load_vlek(_STICK)
    assert device.snp_platform_status().vlek_enabled


def test_vlek_when_loaded_is_sent_with_its_length_and_address() -> None:
    seen: list[tuple[int, int, bytes]] = []

    class _Reading(_Answering):
        def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
            command = ffi.cast("struct sev_issue_cmd *", arg)
            load = ffi.cast("struct sev_user_data_snp_vlek_load *", command.data)
            stick = bytes(ffi.buffer(ffi.cast("char *", load.vlek_wrapped_address), 432))
            seen.append((load.len, load.vlek_wrapped_version, stick))
            return Result(0, 0)

    fake: Any = _Reading(b"")
    SevDevice(fake, 3, "/dev/sev").load_vlek(_STICK)
    assert seen == [(16, 0, _STICK)]


@pytest.mark.parametrize("size", [0, 431, 433])
def test_vlek_when_its_size_is_wrong_is_format_error(device: SevDevice, size: int) -> None:
    with pytest.raises(FormatError, match=f"432 bytes, not {size}"):
        device.load_vlek(bytes(size))


_CALLS = {
    "SEV_PLATFORM_STATUS": lambda device: device.platform_status(),
    "SNP_PLATFORM_STATUS": lambda device: device.snp_platform_status(),
    "SNP_SET_CONFIG": lambda device: device.set_config(),
    "SNP_COMMIT": lambda device: device.commit(),
    "SNP_VLEK_LOAD": lambda device: device.load_vlek(_STICK),
}
_FIRMWARE = {
    "SEV_PLATFORM_STATUS": "SNP_PLATFORM_STATUS",
    "SNP_PLATFORM_STATUS": "SNP_PLATFORM_STATUS",
    "SNP_SET_CONFIG": "SNP_CONFIG",
    "SNP_COMMIT": "SNP_COMMIT",
    "SNP_VLEK_LOAD": "SNP_VLEK_LOAD",
}


@pytest.mark.parametrize("command", _CALLS)
def test_command_when_firmware_refuses_is_firmware_error_with_both_words(command: str) -> None:
    with _device([f"{_FIRMWARE[command]}:fw=0x20"]) as device, pytest.raises(FirmwareError) as info:
        _CALLS[command](device)
    error = info.value
    assert (error.ioctl, error.errno) == (command, errno.EIO)
    assert error.fw_error == lib.SEV_RET_RMP_INIT_REQUIRED
    assert str(error).startswith(f"{command} ret=-5 fw_error=32 '")


@pytest.mark.parametrize("command", _CALLS)
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENODEV], ids=["EINVAL", "ENODEV"])
def test_command_when_snp_is_not_initialised_says_so(command: str, number: int) -> None:
    faults = [f"{command}:errno={number}"]
    with _device(faults) as device, pytest.raises(IoctlError) as info:
        _CALLS[command](device)
    assert type(info.value) is IoctlError
    assert (info.value.errno, info.value.fw_error) == (number, 0)
    assert "SNP is not initialised" in str(info.value)


@pytest.mark.parametrize("command", ["SNP_SET_CONFIG", "SNP_VLEK_LOAD"])
def test_command_when_device_is_open_for_reading_only_is_permission_error(command: str) -> None:
    sim = SimPlatform()
    fd = sim.open("/dev/sev", os.O_RDONLY).ret
    with SevDevice(sim, fd, "/dev/sev") as device, pytest.raises(IoctlPermissionError) as info:
        _CALLS[command](device)
    assert (info.value.ioctl, info.value.errno) == (command, errno.EPERM)


def test_error_when_firmware_was_not_called_keeps_the_word() -> None:
    class _NotCalled(_Answering):
        def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
            ffi.cast("struct sev_issue_cmd *", arg).error = 0xFFFFFFFF
            return Result(-1, errno.EBUSY)

    fake: Any = _NotCalled(b"")
    with pytest.raises(IoctlError) as info:
        SevDevice(fake, 3, "/dev/sev").commit()
    assert type(info.value) is IoctlError
    assert (info.value.errno, info.value.fw_error) == (errno.EBUSY, 0xFFFFFFFF)
