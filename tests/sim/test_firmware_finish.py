"""LAUNCH_FINISH: checks in the order of snp-firmware-abi 6.4, ID block, ID authentication."""

from __future__ import annotations

import base64
import hashlib
import struct
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kvmlaunch.sim.firmware import GuestState
from kvmlaunch.sim.firmware_profiles import FirmwareProfile
from kvmlaunch.sim.id_block_check import check_id_block, verify
from tests.abi import vectors
from tests.idblock import (
    AUTHOR_KEY,
    AUTHOR_PRIVATE,
    ID_KEY,
    ID_PRIVATE,
    V1,
    id_auth,
    id_block,
    number,
    public_key,
    sign,
)

from .rig import NOWHERE, POLICY, Rig

OK = 0x00
PLATFORM = 0x01
GUEST_STATE = 0x02
POLICY_FAILURE = 0x07
INACTIVE = 0x08
BAD_SIGNATURE = 0x0A
BAD_MEASUREMENT = 0x0B
GUEST = 0x10
PARAM = 0x16

# Order of P-384 (FIPS 186).
ORDER = (1 << 384) - 0x389CB27E0BC8D220A7E5F24DB74F58851313E695333AD68D


def launched(rig: Rig, **options: int) -> int:
    """A guest with one page, V1."""
    gctx = rig.activated(**options)
    assert rig.psp.launch_update(gctx, rig.pre_guest(0), 1, imi_page=bool(options)) == OK
    return gctx


def finish(rig: Rig, gctx: int, block: bytes | None, auth: bytes | None, **more: Any) -> int:
    return rig.psp.launch_finish(gctx, id_block=block, id_auth=auth, **more)


def test_launch_finish_without_id_block_runs_the_guest() -> None:
    rig = Rig()
    gctx = launched(rig)
    assert finish(rig, gctx, None, None, host_data=b"H" * 32, vcek_dis=True) == OK
    guest = rig.psp.context(gctx)
    assert guest.state == GuestState.RUNNING
    assert (guest.host_data, guest.vcek_dis) == (b"H" * 32, True)
    assert (guest.id_block_en, guest.author_key_en, guest.guest_svn) == (False, False, 0)
    assert guest.id_key_digest == guest.author_key_digest == bytes(48)
    assert rig.psp.launch_digest(gctx) == V1


def test_launch_finish_with_id_block_keeps_its_fields() -> None:
    rig = Rig()
    gctx = launched(rig)
    block = id_block()
    assert finish(rig, gctx, block, id_auth(block)) == OK
    guest = rig.psp.context(gctx)
    assert (guest.family_id, guest.image_id, guest.guest_svn) == (b"F" * 16, b"I" * 16, 7)
    assert guest.id_key_digest == hashlib.sha384(ID_KEY).digest()
    assert (guest.id_block_en, guest.author_key_en) == (True, False)
    assert guest.author_key_digest == bytes(48)


def test_launch_finish_with_author_key_keeps_its_digest() -> None:
    rig = Rig()
    gctx = launched(rig)
    block = id_block()
    assert finish(rig, gctx, block, id_auth(block, author=True), auth_key_en=True) == OK
    guest = rig.psp.context(gctx)
    assert guest.author_key_en
    assert guest.author_key_digest == hashlib.sha384(AUTHOR_KEY).digest()


def test_launch_finish_ignores_an_author_key_that_is_not_enabled() -> None:
    rig = Rig()
    gctx = launched(rig)
    block = id_block()
    auth = id_auth(block, author=True, id_key_sig=b"\xff" * 512, algo=struct.pack("<II", 1, 9))
    assert finish(rig, gctx, block, auth) == OK
    assert not rig.psp.context(gctx).author_key_en


def test_launch_finish_twice_is_invalid_guest_state() -> None:
    rig = Rig()
    gctx = rig.finished()
    assert finish(rig, gctx, None, None) == GUEST_STATE


def test_launch_finish_imi_is_invalid_guest_state() -> None:
    rig = Rig()
    assert finish(rig, launched(rig, imi_en=True), None, None) == GUEST_STATE


def test_launch_finish_checks_1_to_5_in_order() -> None:
    rig = Rig(init=False)
    assert finish(rig, NOWHERE, None, None, auth_key_en=True) == PARAM
    assert finish(rig, NOWHERE, None, None) == PLATFORM
    rig.psp.init()
    assert finish(rig, NOWHERE, None, None) == GUEST
    assert finish(rig, rig.created(), None, None) == GUEST_STATE  # and no ASID
    wrong = id_block(ld=bytes(48))
    assert finish(rig, rig.started(), wrong, bytes(4096)) == INACTIVE


@pytest.mark.parametrize(
    ("block", "auth", "more"),
    [
        (None, None, {"auth_key_en": True}),
        (id_block(), None, {}),
        (id_block()[:-1], bytes(4096), {}),
        (id_block(), bytes(4095), {}),
        (None, None, {"host_data": bytes(31)}),
    ],
)
def test_launch_finish_malformed_is_invalid_param(
    block: bytes | None, auth: bytes | None, more: dict[str, Any]
) -> None:
    rig = Rig()
    assert finish(rig, launched(rig), block, auth, **more) == PARAM


@pytest.mark.parametrize(
    ("ld", "policy", "algo", "status"),
    [
        (bytes(48), 0, 0, BAD_MEASUREMENT),  # all wrong, down to
        (V1, 0, 0, POLICY_FAILURE),
        (V1, POLICY, 0, PARAM),
        (V1, POLICY, 2, PARAM),
        (V1, POLICY, 1, BAD_SIGNATURE),  # the signature alone
    ],
)
def test_launch_finish_id_block_status_tells_how_far_it_got(
    ld: bytes, policy: int, algo: int, status: int
) -> None:
    rig = Rig()
    gctx = launched(rig)
    auth = struct.pack("<I", algo).ljust(4096, b"\0")
    assert finish(rig, gctx, id_block(ld, policy), auth) == status
    assert rig.psp.context(gctx).state == GuestState.LAUNCH
    assert not rig.psp.context(gctx).id_block_en


def test_launch_finish_after_a_failure_can_be_repeated() -> None:
    rig = Rig()
    gctx = launched(rig)
    assert finish(rig, gctx, id_block(bytes(48)), bytes(4096)) == BAD_MEASUREMENT
    assert finish(rig, gctx, id_block(), id_auth(id_block())) == OK


@pytest.mark.parametrize("algo", [(1, 0), (1, 2), (2, 1), (0, 1)])
def test_launch_finish_key_algorithm_of_either_key_is_invalid_param(algo: tuple[int, int]) -> None:
    """Before both signatures, which are wrong too."""
    rig = Rig()
    auth = id_auth(
        id_block(),
        author=True,
        algo=struct.pack("<II", *algo),
        id_block_sig=bytes(512),
        id_key_sig=bytes(512),
    )
    assert finish(rig, launched(rig), id_block(), auth, auth_key_en=True) == PARAM


GOOD_SIGNATURE = sign(ID_PRIVATE, id_block())
R, S = GOOD_SIGNATURE[:72], GOOD_SIGNATURE[72:144]
QX, QY = ID_KEY[4:76], ID_KEY[76:148]


@pytest.mark.parametrize(
    "fields",
    [
        {"id_key": public_key(ID_PRIVATE, curve=1)},
        {"id_key": public_key(ID_PRIVATE, curve=0)},
        {"id_key": bytes(0x404)},
        {"id_key": ID_KEY[:4] + number(5) + QY},  # not on the curve
        {"id_key": ID_KEY[:4] + QX[:48] + b"\x01" + QX[49:] + QY},  # above the prime
        {"id_key": AUTHOR_KEY},
        {"id_block_sig": bytes(512)},
        {"id_block_sig": number(0) + S},
        {"id_block_sig": R + number(0)},
        {"id_block_sig": number(ORDER) + S},
        {"id_block_sig": R + number(ORDER)},
        {"id_block_sig": R[:71] + b"\x01" + S},  # all 72 bytes count
        {"id_block_sig": R + S[:71] + b"\x01"},
        {"id_block_sig": bytes([R[0] ^ 1]) + R[1:] + S},
        {"id_block_sig": R + bytes([S[0] ^ 0x80]) + S[1:]},
        {"id_block_sig": sign(ID_PRIVATE, id_block(version=2))},
    ],
)
def test_launch_finish_bad_id_key_or_signature_is_bad_signature(fields: dict[str, bytes]) -> None:
    rig = Rig()
    auth = id_auth(id_block(), author=False, **fields)
    assert finish(rig, launched(rig), id_block(), auth) == BAD_SIGNATURE


@pytest.mark.parametrize(
    "fields",
    [
        {"author_key": public_key(AUTHOR_PRIVATE, curve=1)},
        {"author_key": bytes(0x404)},
        {"author_key": ID_KEY},
        {"id_key_sig": bytes(512)},
        {"id_key_sig": sign(AUTHOR_PRIVATE, id_block())},
        {"id_key_sig": sign(AUTHOR_PRIVATE, ID_KEY[:-1])},
    ],
)
def test_launch_finish_bad_author_key_or_signature_is_bad_signature(
    fields: dict[str, bytes],
) -> None:
    rig = Rig()
    auth = id_auth(id_block(), author=True, **fields)
    assert finish(rig, launched(rig), id_block(), auth, auth_key_en=True) == BAD_SIGNATURE


@pytest.mark.parametrize(("check", "status"), [(False, OK), (True, PARAM)])
def test_launch_finish_id_block_version_2_depends_on_the_profile(check: bool, status: int) -> None:
    rig = Rig(FirmwareProfile(check_id_block_version=check))
    block = id_block(version=2)
    assert finish(rig, launched(rig), block, id_auth(block)) == status


def test_launch_finish_id_block_version_is_checked_after_the_policy() -> None:
    rig = Rig(FirmwareProfile(check_id_block_version=True))
    assert finish(rig, launched(rig), id_block(policy=0, version=2), bytes(4096)) == POLICY_FAILURE


def test_check_id_block_of_vector_b_signed_afresh_succeeds() -> None:
    """The block of virtee/sev's tests/id-block.rs; its keys aren't here."""
    block = base64.b64decode(vectors.ID_BLOCK_BASE64)
    status = check_id_block(
        block,
        id_auth(block, author=True),
        digest=bytes.fromhex(vectors.ID_BLOCK_LD),
        policy=POLICY,
        auth_key_en=True,
        check_version=True,
    )
    assert status == OK


@pytest.mark.parametrize(("block", "auth"), [(b"", bytes(4096)), (id_block(), b"")])
def test_check_id_block_of_another_size_raises(block: bytes, auth: bytes) -> None:
    with pytest.raises(ValueError, match="96 bytes and its authentication 4096"):
        check_id_block(block, auth, digest=V1, policy=0, auth_key_en=False, check_version=False)


def test_verify_a_fresh_signature_succeeds_for_that_message_only() -> None:
    private = ec.generate_private_key(ec.SECP384R1())
    signature = sign(private, b"message")
    assert verify(public_key(private), signature, b"message")
    assert not verify(public_key(private), signature, b"Message")
