"""Secure processor: context, LAUNCH_START, ACTIVATE (snp-firmware-abi 7.3).

For two checks that follow one another, a call that breaks both gives the earlier status.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvmlaunch.abi.tcb import Product
from kvmlaunch.sim.firmware import GuestState, SecureProcessor
from kvmlaunch.sim.firmware_profiles import FirmwareProfile, firmware_profile

from .rig import NOWHERE, POLICY, Rig

# Status codes, snp-firmware-abi 10.
OK = 0x00
PLATFORM = 0x01
GUEST_STATE = 0x02
CONFIG = 0x03
POLICY_FAILURE = 0x07
ASID_OWNED = 0x0C
INVALID_ASID = 0x0D
DFFLUSH = 0x0F
GUEST = 0x10
ACTIVE = 0x12
PARAM = 0x16
PAGE_SIZE = 0x19
PAGE_STATE = 0x1A

SINGLE_SOCKET = POLICY | 1 << 20
TWO_SOCKETS = FirmwareProfile(sockets=2)

# GCTX_CREATE, DECOMMISSION, GUEST_STATUS.


def test_gctx_create_makes_a_context_page() -> None:
    rig = Rig()
    gctx = rig.created()
    assert rig.state(gctx) == "Context"
    assert rig.psp.guest_status(gctx) == (OK, 0, 0, GuestState.INIT, False)
    assert rig.psp.launch_digest(gctx) == bytes(48)
    assert rig.rmp.make_shared(gctx) != 0


def test_gctx_create_checks_in_order() -> None:
    rig = Rig(init=False)
    page = rig.firmware_page()
    assert rig.psp.gctx_create(page + 8) == PARAM
    assert rig.psp.gctx_create(NOWHERE) == PLATFORM
    rig.psp.init()
    assert rig.psp.gctx_create(NOWHERE) == PAGE_STATE
    assert rig.psp.gctx_create(rig.large_pre_guest()) == PAGE_STATE
    large = rig.memory.map_region(bytearray(2 << 20))
    rig.rmp.rmpupdate(large, assigned=True, immutable=True, page_size=1)
    assert rig.psp.gctx_create(large) == PAGE_SIZE


def test_gctx_create_on_a_context_is_invalid_page_state() -> None:
    rig = Rig()
    assert rig.psp.gctx_create(rig.created()) == PAGE_STATE


def test_decommission_makes_a_firmware_page_and_forgets_the_guest() -> None:
    rig = Rig()
    gctx = rig.finished()
    assert rig.psp.decommission(gctx) == OK
    assert rig.state(gctx) == "Firmware"
    assert rig.psp.guest_status(gctx).status == GUEST
    with pytest.raises(KeyError):
        rig.psp.launch_digest(gctx)


@pytest.mark.parametrize(
    "command", [SecureProcessor.decommission, lambda p, g: p.guest_status(g).status]
)
def test_decommission_and_guest_status_check_in_order(
    command: Callable[[SecureProcessor, int], int],
) -> None:
    rig = Rig(init=False)
    assert command(rig.psp, 8) == PARAM
    assert command(rig.psp, NOWHERE) == PLATFORM
    rig.psp.init()
    assert command(rig.psp, NOWHERE) == GUEST


def test_guest_status_follows_the_launch() -> None:
    rig = Rig()
    gctx = rig.activated(asid=5, policy=0xB0000)
    assert rig.psp.guest_status(gctx) == (OK, 0xB0000, 5, 1, False)
    rig.psp.launch_finish(gctx, id_block=None, id_auth=None, vcek_dis=True)
    assert rig.psp.guest_status(gctx) == (OK, 0xB0000, 5, 2, True)


# LAUNCH_START.


def test_launch_start_fills_the_context_from_random() -> None:
    rig = Rig()
    gctx = rig.started(desired_tsc_khz=1000)
    guest = rig.psp.context(gctx)
    assert guest.state == GuestState.LAUNCH
    assert guest.vmpck == (b"\x01" * 32, b"\x02" * 32, b"\x03" * 32, b"\x04" * 32)
    assert guest.vmrk == b"\x05" * 32
    assert guest.report_id == b"\x06" * 32
    assert guest.report_id_ma == b"\xff" * 32
    assert guest.desired_tsc_khz == 1000
    assert guest.launch_tcb == 0x7308000000000003


def test_launch_start_with_agent_takes_its_report_id() -> None:
    rig = Rig()
    agent = rig.started()
    guest = rig.started(POLICY | 1 << 18, ma_gctx=agent)
    assert rig.psp.context(guest).report_id_ma == b"\x06" * 32


def test_launch_start_checks_in_order() -> None:
    rig = Rig(init=False)
    assert rig.psp.launch_start(NOWHERE, 0, ma_gctx=8) == PARAM
    assert rig.psp.launch_start(NOWHERE, 0) == PLATFORM
    rig.psp.init()
    assert rig.psp.launch_start(NOWHERE, 0, ma_gctx=NOWHERE) == GUEST
    assert rig.psp.launch_start(rig.started(), 0, ma_gctx=NOWHERE) == GUEST_STATE
    assert rig.psp.launch_start(rig.created(), 0, ma_gctx=NOWHERE) == GUEST
    assert rig.psp.launch_start(rig.created(), 0) == POLICY_FAILURE


@pytest.mark.parametrize(
    "bad", [{"gosvw": bytes(15)}, {"desired_tsc_khz": 1 << 32}, {"ma_gctx": 0x1008}]
)
def test_launch_start_with_a_bad_field_is_invalid_param(bad: dict[str, int]) -> None:
    rig = Rig()
    assert rig.psp.launch_start(rig.created(), POLICY, **bad) == PARAM  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy",
    [
        0,
        1 << 16,  # bit 17 clear
        1 << 17,  # SMT forbidden, but on
        POLICY | 0x0138,  # ABI 1.56
        POLICY | 0x0200,  # ABI 2.0
        POLICY | 1 << 21,  # reserved in 1.55
        POLICY | 1 << 25,
        POLICY | 1 << 63,
    ],
)
def test_launch_start_policy_of_milan_155_is_policy_failure(policy: int) -> None:
    rig = Rig()
    gctx = rig.created()
    assert rig.psp.launch_start(gctx, policy) == POLICY_FAILURE
    assert rig.psp.context(gctx).state == GuestState.INIT
    assert rig.draws == 0


@pytest.mark.parametrize("flags", [0, 0x0137, 0x00FF, 1 << 18, 1 << 19, 1 << 20])
def test_launch_start_policy_of_milan_155_is_taken(flags: int) -> None:
    rig = Rig()
    assert rig.psp.launch_start(rig.created(), POLICY | flags) == OK


def test_launch_start_without_smt_takes_a_policy_without_smt() -> None:
    rig = Rig(FirmwareProfile(smt_enabled=False))
    assert rig.psp.launch_start(rig.created(), 1 << 17) == OK


NEWER = firmware_profile("Genoa", (1, 58))


@pytest.mark.parametrize(
    ("flag", "profile", "status"),
    [
        (21, NEWER, OK),
        (22, NEWER, POLICY_FAILURE),
        (22, replace(NEWER, mem_aes_256_xts=True), OK),
        (23, NEWER, POLICY_FAILURE),
        (23, replace(NEWER, rapl_disabled=True), OK),
        (24, NEWER, POLICY_FAILURE),
        (24, replace(NEWER, ciphertext_hiding=True), OK),
        (25, NEWER, OK),
        (26, NEWER, POLICY_FAILURE),
        (16, replace(NEWER, cxl_present=True), POLICY_FAILURE),
        (21, replace(NEWER, cxl_present=True), OK),
        (16, FirmwareProfile(cxl_present=True), OK),  # 1.55 knows nothing of it
    ],
)
def test_launch_start_policy_of_newer_firmware(
    flag: int, profile: FirmwareProfile, status: int
) -> None:
    rig = Rig(profile)
    assert rig.psp.launch_start(rig.created(), POLICY | 1 << flag) == status


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_launch_start_of_each_product_takes_the_default_policy(product: Product) -> None:
    rig = Rig(firmware_profile(product))
    assert rig.psp.launch_start(rig.created(), POLICY) == OK


@pytest.mark.parametrize(
    ("agent_policy", "policy"),
    [
        (POLICY, POLICY),  # no MIGRATE_MA
        (POLICY, SINGLE_SOCKET | 1 << 18),  # the agent lacks SINGLE_SOCKET
    ],
)
def test_launch_start_with_unfit_agent_is_policy_failure(agent_policy: int, policy: int) -> None:
    rig = Rig()
    agent = rig.started(agent_policy)
    assert rig.psp.launch_start(rig.created(), policy, ma_gctx=agent) == POLICY_FAILURE


def test_launch_start_with_an_agent_that_has_one_is_policy_failure() -> None:
    rig = Rig()
    policy = POLICY | 1 << 18
    agent = rig.started(policy, ma_gctx=rig.started())
    assert rig.psp.launch_start(rig.created(), policy, ma_gctx=agent) == POLICY_FAILURE


def test_repr_of_a_context_shows_no_key_and_no_id() -> None:
    rig = Rig()
    shown = repr(rig.psp.context(rig.started()))
    assert "LAUNCH" in shown
    for draw in range(1, 7):
        assert repr(bytes([draw]) * 4)[2:-1] not in shown


def test_repr_of_the_processor_says_simulated() -> None:
    assert repr(Rig().psp) == "<SecureProcessor SIMULATED Milan firmware 1.55.21 0 guests>"


# ACTIVATE.


def test_activate_checks_in_order() -> None:
    rig = Rig(TWO_SOCKETS, init=False)
    assert rig.psp.activate(8, 0) == PARAM
    assert rig.psp.activate(NOWHERE, 0) == PLATFORM
    rig.psp.init()
    assert rig.psp.activate(NOWHERE, 0) == GUEST
    rig.pre_guest(asid=9)
    assert rig.psp.activate(rig.created(), 9) == GUEST_STATE
    single = rig.started(SINGLE_SOCKET)
    assert rig.psp.activate(single, 9) == CONFIG
    assert rig.psp.activate(single, 0) == POLICY_FAILURE


@pytest.mark.parametrize("asid", [0, 100, 1 << 31])
def test_activate_out_of_range_is_invalid_asid(asid: int) -> None:
    rig = Rig()
    assert rig.psp.activate(rig.activated(), asid) == INVALID_ASID


@pytest.mark.parametrize("asid", [1, 99])
def test_activate_at_the_ends_of_the_range_works(asid: int) -> None:
    rig = Rig()
    assert rig.psp.activate(rig.started(), asid) == OK


def test_activate_asid_of_another_guest_is_asid_owned() -> None:
    rig = Rig()
    rig.activated(asid=1)
    active = rig.activated(asid=2)
    assert rig.psp.activate(rig.started(), 1) == ASID_OWNED
    assert rig.psp.activate(active, 1) == ASID_OWNED


def test_activate_twice_is_active() -> None:
    rig = Rig()
    gctx = rig.activated(asid=1)
    assert rig.psp.activate(gctx, 1) == ACTIVE
    assert rig.psp.activate(gctx, 2) == ACTIVE


def test_activate_asid_of_a_dead_guest_wants_df_flush() -> None:
    rig = Rig()
    rig.psp.decommission(rig.activated(asid=1))
    assert rig.psp.activate(rig.activated(asid=2), 1) == ACTIVE
    gctx = rig.started()
    assert rig.psp.activate(gctx, 1) == DFFLUSH
    assert rig.psp.df_flush() == OK
    assert rig.psp.activate(gctx, 1) == OK


def test_activate_after_finish_is_possible_once() -> None:
    rig = Rig()
    gctx = rig.finished()
    assert rig.psp.activate(gctx, 2) == ACTIVE
