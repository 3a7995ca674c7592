"""SNP_GUEST_REQUEST: order of checks, sequence numbers, refusals (snp-firmware-abi 8.4, 8.5)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch.sim.firmware_profiles import FirmwareProfile
from tests.messages import (
    HEADER_SIZE,
    KEY_REQ,
    KEY_RSP,
    REPORT_REQ,
    REPORT_RSP,
    TSC_REQ,
    TSC_RSP,
    key_req,
    opened,
    report_req,
    sealed,
    word,
)

from .rig import NOWHERE, Rig

# Status codes, snp-firmware-abi 10.
OK = 0x00
PLATFORM = 0x01
GUEST_STATE = 0x02
ADDRESS = 0x09
TAG = 0x0B
GUEST = 0x10
PARAM = 0x16
PAGE_SIZE = 0x19
PAGE_STATE = 0x1A
SEQUENCE = 0x1D

UNTOUCHED = b"\xee" * 4096
# The rig's VMPCKs.
VMPCK = tuple(bytes([n]) * 32 for n in range(1, 5))
REPORT = report_req()
GOOD = sealed(VMPCK[0], REPORT)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def gctx(rig: Rig) -> int:
    return rig.finished()


def ask(
    rig: Rig, gctx: int, payload: bytes, *, vmpck: int = 0, seqno: int = 1, **fields: int
) -> tuple[int, dict[str, int], bytes]:
    """Status, header and payload of the answer; empty where there is none."""
    message = sealed(VMPCK[vmpck], payload, seqno=seqno, msg_vmpck=vmpck, **fields)
    status, page = rig.request(gctx, message)
    if page == UNTOUCHED:
        return status, {}, b""
    return status, *opened(VMPCK[vmpck], page)


# The command.


def test_guest_request_checks_in_order() -> None:
    rig = Rig(init=False)
    call = rig.psp.guest_request
    assert call(NOWHERE + 8, NOWHERE, NOWHERE) == PARAM
    assert call(NOWHERE, NOWHERE, NOWHERE) == PLATFORM
    rig.psp.init()
    assert call(NOWHERE, NOWHERE, NOWHERE) == GUEST
    launching = rig.activated()
    assert call(launching, NOWHERE, NOWHERE) == PAGE_STATE
    large = rig.memory.map_region(bytearray(2 << 20))
    rig.rmp.rmpupdate(large, assigned=True, immutable=True, page_size=1)
    assert call(launching, NOWHERE, large) == PAGE_SIZE
    response = rig.firmware_page()
    assert call(launching, NOWHERE, response) == GUEST_STATE
    rig.psp.launch_finish(launching, id_block=None, id_auth=None)
    assert call(launching, NOWHERE, response) == ADDRESS


@pytest.mark.parametrize("which", [0, 1, 2])
def test_guest_request_with_unaligned_page_is_invalid_param(
    rig: Rig, gctx: int, which: int
) -> None:
    pages = [gctx, rig.memory.alloc(), rig.firmware_page()]
    pages[which] += 1
    assert rig.psp.guest_request(*pages) == PARAM


@pytest.mark.parametrize(
    "make", [lambda rig: rig.memory.alloc(), lambda rig: rig.created(), lambda rig: rig.pre_guest()]
)
def test_guest_request_into_page_of_another_state_is_invalid_page_state(
    rig: Rig, gctx: int, make: Callable[[Rig], int]
) -> None:
    page = make(rig)
    before = rig.contents(page)
    assert rig.psp.guest_request(gctx, rig.memory.alloc(), page) == PAGE_STATE
    assert rig.contents(page) == before


def test_guest_request_on_order_fails_before_anything_else() -> None:
    rig = Rig(fault=lambda name: 0x77 if name == "SNP_GUEST_REQUEST" else None)
    gctx = rig.finished()
    assert rig.request(gctx, GOOD) == (0x77, UNTOUCHED)
    assert rig.psp.context(gctx).msg_count == [0, 0, 0, 0]


def test_guest_request_leaves_what_lies_behind_the_answer(rig: Rig, gctx: int) -> None:
    status, page = rig.request(gctx, GOOD)
    assert status == OK
    assert page[HEADER_SIZE + 0x4C0 :] == UNTOUCHED[HEADER_SIZE + 0x4C0 :]


# Header and tag.


def flips(message: bytes) -> list[tuple[int, int]]:
    """(bit, status) for every bit that firmware must not let pass (8.4: the tag's reach)."""
    size_refused = {0, 1, 2, 3, 12, 13, 14, 15}  # no multiple of 16, or out of the page
    found = []
    for at in range(len(message)):
        for bit in range(8):
            status = TAG
            if at in range(0x30, 0x34):  # ALGO, HDR_VERSION, HDR_SIZE
                status = PARAM
            elif at in (0x36, 0x37):
                status = PARAM if (at - 0x36) * 8 + bit in size_refused else TAG
            elif at == 0x3C:
                status = PARAM if bit > 1 else TAG
            if at not in range(0x10, 0x20) and at not in range(0x28, 0x30):
                found.append((8 * at + bit, status))
    return found


def flipped(message: bytes, bit: int) -> bytes:
    changed = bytearray(message)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_is_refused_with_its_status(rig: Rig, gctx: int) -> None:
    request, response = rig.memory.alloc(), rig.firmware_page()
    wrong = []
    for bit, want in flips(GOOD):
        rig.memory.page(request)[: len(GOOD)] = flipped(GOOD, bit)
        status = rig.psp.guest_request(gctx, request, response)
        if (status, rig.contents(response)) != (want, bytes(4096)):
            wrong.append((hex(bit // 8), bit % 8, status))
    assert wrong == []
    # None of them counted.
    assert rig.request(gctx, GOOD)[0] == OK


@pytest.mark.parametrize("at", [0x10, 0x1F, 0x28, 0x2F])
def test_flipped_bit_in_bytes_that_the_tag_leaves_out_passes(rig: Rig, gctx: int, at: int) -> None:
    assert rig.request(gctx, flipped(GOOD, 8 * at))[0] == OK


@pytest.mark.parametrize(
    "fields",
    [
        {"algo": 0},
        {"algo": 2},
        {"hdr_version": 0},
        {"hdr_version": 2},
        {"hdr_size": 0x40},
        {"msg_size": 0},
        {"msg_size": 0x58},
        {"msg_size": 4016},
        {"msg_vmpck": 4},
        {"msg_vmpck": 0xFF},
    ],
)
def test_bad_header_is_invalid_param_before_the_tag_is_looked_at(
    rig: Rig, gctx: int, fields: dict[str, int]
) -> None:
    message = sealed(bytes(32), REPORT, **fields)
    assert rig.request(gctx, message) == (PARAM, UNTOUCHED)


def test_wrong_tag_is_bad_measurement_before_the_number_is_looked_at(rig: Rig, gctx: int) -> None:
    assert rig.request(gctx, sealed(bytes(32), REPORT, seqno=9)) == (TAG, UNTOUCHED)


@pytest.mark.parametrize("vmpck", range(4))
def test_key_is_that_of_msg_vmpck(rig: Rig, gctx: int, vmpck: int) -> None:
    status, header, _ = ask(rig, gctx, report_req(vmpl=3), vmpck=vmpck)
    assert (status, header["msg_vmpck"]) == (OK, vmpck)
    other = sealed(VMPCK[vmpck], REPORT, seqno=3, msg_vmpck=(vmpck + 1) % 4)
    assert rig.request(gctx, other)[0] == TAG


# Sequence.


def test_numbers_go_up_by_two(rig: Rig, gctx: int) -> None:
    for seqno in (1, 3, 5):
        status, header, _ = ask(rig, gctx, REPORT, seqno=seqno)
        assert (status, header["seqno"]) == (OK, seqno + 1)


@pytest.mark.parametrize("seqno", [0, 1, 2, 4, 5, 1 << 32, 2**64 - 1])
def test_number_out_of_sequence_is_aead_oflow_and_counts_for_nothing(
    rig: Rig, gctx: int, seqno: int
) -> None:
    assert ask(rig, gctx, REPORT)[0] == OK
    assert ask(rig, gctx, REPORT, seqno=seqno) == (SEQUENCE, {}, b"")
    assert ask(rig, gctx, REPORT, seqno=3)[0] == OK


def test_each_vmpck_counts_for_itself(rig: Rig, gctx: int) -> None:
    assert ask(rig, gctx, REPORT, seqno=1)[0] == OK
    assert ask(rig, gctx, REPORT, seqno=3)[0] == OK
    assert ask(rig, gctx, report_req(vmpl=1), vmpck=1, seqno=3)[0] == SEQUENCE
    assert ask(rig, gctx, report_req(vmpl=1), vmpck=1, seqno=1)[0] == OK


def test_each_guest_counts_for_itself(rig: Rig, gctx: int) -> None:
    other = rig.finished(asid=2)
    keys = rig.psp.context(other).vmpck
    assert ask(rig, gctx, REPORT)[0] == OK
    assert rig.request(other, sealed(keys[0], REPORT))[0] == OK


def test_last_number_that_leaves_room_for_an_answer_works(rig: Rig, gctx: int) -> None:
    counts = rig.psp.context(gctx).msg_count
    counts[0] = 2**64 - 4
    status, header, _ = ask(rig, gctx, REPORT, seqno=2**64 - 3)
    assert (status, header["seqno"]) == (OK, 2**64 - 2)
    assert ask(rig, gctx, REPORT, seqno=2**64 - 1) == (SEQUENCE, {}, b"")


# Type, version, size.

KINDS = [
    (REPORT_REQ, 1, REPORT, REPORT_RSP, 0x4C0),
    (KEY_REQ, 1, key_req(), KEY_RSP, 0x40),
    (TSC_REQ, 1, bytes(128), TSC_RSP, 0x80),
]


@pytest.mark.parametrize(("kind", "version", "payload", "answer", "size"), KINDS)
def test_answer_has_its_type_version_and_size(
    rig: Rig, gctx: int, kind: int, version: int, payload: bytes, answer: int, size: int
) -> None:
    status, header, got = ask(rig, gctx, payload, msg_type=kind, msg_version=version)
    assert (status, word(got, 0, 4)) == (OK, 0)
    want = {"algo": 1, "hdr_version": 1, "hdr_size": 0x60, "seqno": 2, "msg_vmpck": 0}
    want |= {"msg_type": answer, "msg_version": version, "msg_size": size}
    assert {name: header[name] for name in want} == want


@pytest.mark.parametrize(
    ("kind", "version", "payload"),
    [
        *[(kind, 0, payload) for kind, _, payload, _, _ in KINDS],
        *[(kind, 2, payload) for kind, _, payload, _, _ in KINDS],
        *[(kind, 1, payload + bytes(16)) for kind, _, payload, _, _ in KINDS],
        *[(kind, 1, payload[:-16]) for kind, _, payload, _, _ in KINDS],
        *[(kind, 1, REPORT) for kind in (0, 1, 2, 4, 6, 7, 0x10, 0x12, 0x13, 0xFF)],
        (KEY_REQ, 2, key_req(mit=0)),  # no mitigation vectors before report version 5
    ],
)
def test_unknown_type_version_or_size_is_invalid_param_and_counts_for_nothing(
    rig: Rig, gctx: int, kind: int, version: int, payload: bytes
) -> None:
    answer = ask(rig, gctx, payload, msg_type=kind, msg_version=version)
    assert answer == (PARAM, {}, b"")
    assert ask(rig, gctx, REPORT)[0] == OK


def test_number_out_of_sequence_comes_before_unknown_type(rig: Rig, gctx: int) -> None:
    assert ask(rig, gctx, REPORT, seqno=3, msg_type=0xFF)[0] == SEQUENCE


# Payloads: the status is in the answer, the command succeeds and counts.


@pytest.mark.parametrize(
    ("kind", "payload", "size"),
    [
        (REPORT_REQ, report_req(vmpl=4), 0x4C0),
        (REPORT_REQ, report_req(key_sel=4), 0x4C0),
        (REPORT_REQ, REPORT[:-1] + b"\x01", 0x4C0),
        (KEY_REQ, key_req(vmpl=4), 0x40),
        (KEY_REQ, key_req(select=8), 0x40),
        (KEY_REQ, key_req(fields=1 << 6), 0x40),
        (KEY_REQ, key_req(fields=1 << 63), 0x40),
        (TSC_REQ, bytes(127) + b"\x01", 0x80),
    ],
)
def test_bad_payload_is_answered_with_invalid_param(
    rig: Rig, gctx: int, kind: int, payload: bytes, size: int
) -> None:
    status, _, got = ask(rig, gctx, payload, msg_type=kind)
    assert status == OK
    assert got == b"\x16" + bytes(size - 1)
    assert ask(rig, gctx, REPORT, seqno=1)[0] == SEQUENCE
    assert ask(rig, gctx, REPORT, seqno=3)[0] == OK


@pytest.mark.parametrize("kind", [REPORT_REQ, KEY_REQ])
@pytest.mark.parametrize(
    ("vmpck", "vmpl", "want"),
    [(0, 0, 0), (0, 3, 0), (1, 0, PARAM), (1, 1, 0), (3, 2, PARAM), (3, 3, 0)],
)
def test_vmpl_below_the_vmpck_is_answered_with_invalid_param(
    rig: Rig, gctx: int, kind: int, vmpck: int, vmpl: int, want: int
) -> None:
    payload = report_req(vmpl=vmpl) if kind == REPORT_REQ else key_req(vmpl=vmpl)
    status, _, got = ask(rig, gctx, payload, vmpck=vmpck, msg_type=kind)
    assert (status, word(got, 0, 4)) == (OK, want)


# TSC information.


@pytest.mark.parametrize(
    ("desired", "scale"),
    # the profile's 2 GHz; 8.32 fixed point
    [(0, 1 << 32), (2_000_000, 1 << 32), (1_000_000, 1 << 31), (3_000_000, 3 << 31)],
)
def test_tsc_info_is_scale_offset_and_factor(desired: int, scale: int) -> None:
    rig = Rig(FirmwareProfile(tsc_factor=123))
    gctx = rig.activated(desired_tsc_khz=desired)
    rig.psp.launch_finish(gctx, id_block=None, id_auth=None)
    _, _, got = ask(rig, gctx, bytes(128), msg_type=TSC_REQ)
    assert (word(got, 0, 4), word(got, 8), word(got, 0x10), word(got, 0x18, 4)) == (
        0,
        scale,
        0,
        123,
    )


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 255), st.integers(0, 3), st.integers(0, 3))
def test_arbitrary_pages_and_payloads_never_raise(
    raw: bytes, kind: int, version: int, vmpck: int
) -> None:
    rig = Rig()
    gctx = rig.finished()
    assert rig.request(gctx, raw)[0] in (PARAM, TAG)
    payload = raw.ljust(-len(raw) % 16 + len(raw), b"\0")
    fields = {"msg_type": kind, "msg_version": version, "msg_vmpck": vmpck}
    assert rig.request(gctx, sealed(VMPCK[vmpck], payload, **fields))[0] in (OK, PARAM)
