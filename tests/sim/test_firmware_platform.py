"""Secure processor: commands about the platform and pages, and ordered faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmlaunch.abi.tcb import Tcb
from kvmlaunch.sim.firmware import SecureProcessor
from kvmlaunch.sim.firmware_profiles import FirmwareProfile
from kvmlaunch.sim.rmp import RmpEntry

from .rig import POLICY, Rig

# Status codes, snp-firmware-abi 10.
OK = 0x00
PLATFORM = 0x01
PARAM = 0x16
PAGE_SIZE = 0x19
PAGE_STATE = 0x1A

# Faults: every command, before anything else.

COMMANDS: dict[str, Callable[[SecureProcessor], int]] = {
    "SNP_INIT": lambda psp: psp.init(),
    "SNP_PLATFORM_STATUS": lambda psp: psp.platform_status().status,
    "SNP_CONFIG": lambda psp: psp.config(0, 4),
    "SNP_COMMIT": lambda psp: psp.commit(),
    "SNP_VLEK_LOAD": lambda psp: psp.vlek_load(b""),
    "SNP_DF_FLUSH": lambda psp: psp.df_flush(),
    "SNP_PAGE_RECLAIM": lambda psp: psp.page_reclaim(8),
    "SNP_GCTX_CREATE": lambda psp: psp.gctx_create(8),
    "SNP_LAUNCH_START": lambda psp: psp.launch_start(8, 0),
    "SNP_ACTIVATE": lambda psp: psp.activate(8, 0),
    "SNP_DECOMMISSION": lambda psp: psp.decommission(8),
    "SNP_GUEST_STATUS": lambda psp: psp.guest_status(8).status,
    "SNP_LAUNCH_UPDATE": lambda psp: psp.launch_update(8, 8, 0),
    "SNP_LAUNCH_FINISH": lambda psp: psp.launch_finish(8, id_block=None, id_auth=None),
}


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("status", [0, 0x8003])
@pytest.mark.parametrize("name", COMMANDS)
def test_command_with_an_ordered_fault_gives_its_status(name: str, status: int, init: bool) -> None:
    """Arguments are bad, so that any check of the command's own would show."""
    faults: dict[str, int] = {}
    rig = Rig(fault=faults.get, init=init)
    faults[name] = status
    assert COMMANDS[name](rig.psp) == status


# Platform.


def test_init_twice_is_invalid_platform_state() -> None:
    assert Rig().psp.init() == PLATFORM


def test_platform_status_before_init_is_uninitialised() -> None:
    status = Rig(init=False).psp.platform_status()
    assert (status.status, status.state, status.is_rmp_initialized) == (0, 0, False)


def test_platform_status_after_init_has_versions_and_tcb() -> None:
    status = Rig(FirmwareProfile(build=9)).psp.platform_status()
    assert (status.api_major, status.api_minor, status.build, status.state) == (1, 55, 9, 1)
    # Milan: boot loader 3 in byte 0, SNP 8 in byte 6, microcode 115 in byte 7.
    assert status.current_tcb == status.reported_tcb == 0x7308000000000003


def test_platform_status_counts_guests_from_start_to_decommission() -> None:
    rig = Rig()
    gctx = rig.created()
    assert rig.psp.platform_status().guest_count == 0
    rig.psp.launch_start(gctx, POLICY)
    assert rig.psp.platform_status().guest_count == 1
    rig.psp.decommission(gctx)
    assert rig.psp.platform_status().guest_count == 0


def test_config_sets_reported_tcb_and_masks() -> None:
    rig = Rig()
    assert rig.psp.config(0x7307000000000003, 3) == OK
    status = rig.psp.platform_status()
    assert status.reported_tcb == 0x7307000000000003
    assert (status.mask_chip_id, status.mask_chip_key) == (True, True)


def test_config_zero_tcb_means_committed() -> None:
    rig = Rig()
    rig.psp.config(0x7307000000000003, 1)
    assert rig.psp.config(0, 0) == OK
    assert rig.psp.platform_status().reported_tcb == 0x7308000000000003
    assert not rig.psp.platform_status().mask_chip_id


@pytest.mark.parametrize("tcb", [0x7308000000000004, 0x7309000000000000, 0x7400000000000000])
def test_config_reported_above_committed_in_one_part_is_invalid_param(tcb: int) -> None:
    rig = Rig()
    assert rig.psp.config(tcb, 0) == PARAM
    assert rig.psp.platform_status().reported_tcb == 0x7308000000000003


def test_config_checks_in_order() -> None:
    rig = Rig(init=False)
    assert rig.psp.config(0, 4) == PARAM
    assert rig.psp.config(1 << 63, 0) == PLATFORM


def test_commit_raises_committed_and_reported_to_current() -> None:
    rig = Rig(FirmwareProfile(committed_tcb=Tcb(snp=1)))
    assert rig.psp.platform_status().reported_tcb == 1 << 48
    assert rig.psp.config(0x7308000000000003, 0) == PARAM
    assert rig.psp.commit() == OK
    assert rig.psp.config(0x7308000000000003, 0) == OK


def test_vlek_load_shows_in_platform_status() -> None:
    rig = Rig()
    assert not rig.psp.platform_status().vlek_en
    assert rig.psp.vlek_load(bytes(432)) == OK
    assert rig.psp.platform_status().vlek_en


def test_vlek_load_checks_in_order() -> None:
    rig = Rig(init=False)
    assert rig.psp.vlek_load(bytes(431)) == PARAM
    assert rig.psp.vlek_load(bytes(432)) == PLATFORM


def test_df_flush_before_init_is_invalid_platform_state() -> None:
    assert Rig(init=False).psp.df_flush() == PLATFORM


# Pages.


@pytest.mark.parametrize("asid", [0, 1])
def test_page_reclaim_of_immutable_page_lets_the_host_have_it_back(asid: int) -> None:
    rig = Rig()
    spa = rig.memory.alloc()
    rig.rmp.make_private(spa, 0, asid, immutable=True)
    assert rig.psp.page_reclaim(spa) == OK
    assert rig.state(spa) == "Reclaim"
    assert rig.rmp.make_shared(spa) == 0


def test_page_reclaim_of_a_large_page_wants_its_size_in_bit_0() -> None:
    rig = Rig()
    spa = rig.large_pre_guest()
    assert rig.psp.page_reclaim(spa) == PAGE_SIZE
    assert rig.psp.page_reclaim(spa | 1) == OK
    assert rig.state(spa + 0x1000) == "Reclaim"


@pytest.mark.parametrize(
    "entry",
    [
        RmpEntry(),
        RmpEntry(assigned=True),
        RmpEntry(assigned=True, immutable=True, vmsa=True),
        RmpEntry(assigned=True, asid=1),
        RmpEntry(assigned=True, asid=1, validated=True),
    ],
)
def test_page_reclaim_in_another_state_is_invalid_page_state(entry: RmpEntry) -> None:
    rig = Rig()
    spa = rig.memory.alloc()
    rig.rmp.store(spa, entry)
    assert rig.psp.page_reclaim(spa) == PAGE_STATE
    assert rig.rmp.lookup(spa) == entry


def test_page_reclaim_checks_in_order() -> None:
    rig = Rig(init=False)
    spa = rig.memory.alloc()
    assert rig.psp.page_reclaim(spa + 8) == PARAM
    assert rig.psp.page_reclaim(spa + 0x1001) == PARAM  # a large page, unaligned
    assert rig.psp.page_reclaim(spa) == PLATFORM
    rig.psp.init()
    assert rig.psp.page_reclaim(spa | 1) == PAGE_STATE  # and the size differs
