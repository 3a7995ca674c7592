"""Derived keys: conditions, and that a key depends on its inputs and on nothing else
(snp-firmware-abi 8.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmlaunch.abi.tcb import Tcb
from kvmlaunch.sim.firmware_profiles import FirmwareProfile
from tests.idblock import id_auth, id_block
from tests.messages import KEY_REQ, key_req, opened, sealed, word

from .rig import POLICY, Rig

OK = 0
PARAM = 0x16
INVALID_KEY = 0x27
MASK_CHIP_KEY = 2
HASHSTICK = b"V" * 432
VMRK = 1  # ROOT_KEY_SELECT
VCEK, VLEK, RESERVED = 1 << 1, 2 << 1, 3 << 1  # KEY_SEL
POLICY_BIT, IMAGE, FAMILY, MEASUREMENT, SVN, TCB, MIT = (1 << n for n in range(7))
TCB_VALUE = 0x7308000000000003  # the profile's


def derive(rig: Rig, gctx: int, payload: bytes = b"", vmpck: int = 0) -> tuple[int, bytes]:
    """STATUS and key."""
    payload = payload or key_req()
    guest = rig.psp.context(gctx)
    message = sealed(
        guest.vmpck[vmpck],
        payload,
        seqno=guest.msg_count[vmpck] + 1,
        msg_vmpck=vmpck,
        msg_type=KEY_REQ,
        msg_version=1 if len(payload) == 0x20 else 2,
    )
    status, page = rig.request(gctx, message)
    assert status == OK
    _, answer = opened(guest.vmpck[vmpck], page)
    assert answer[4:0x20] == bytes(28)
    assert (word(answer, 0, 4) != 0) == (answer[0x20:] == bytes(32))
    return word(answer, 0, 4), answer[0x20:]


def key_of(rig: Rig, gctx: int, payload: bytes = b"", vmpck: int = 0) -> bytes:
    status, key = derive(rig, gctx, payload, vmpck)
    assert status == OK
    return key


class Guest:
    """A launched guest whose properties can be chosen one by one."""

    def __init__(
        self,
        *,
        policy: int = POLICY,
        page: bytes = b"",
        block: bool = True,
        author: bool = False,
        host_data: bytes = bytes(32),
        rig: Rig | None = None,
        asid: int = 1,
        **ids: Any,
    ) -> None:
        self.rig = rig or Rig(FirmwareProfile(report_version=5, mit_vector=6))
        gctx = self.rig.activated(asid, policy)
        self.rig.psp.launch_update(gctx, self.rig.pre_guest(0, page, asid), 1)
        raw, auth = None, None
        if block:
            changed = bytearray(id_block(self.rig.psp.launch_digest(gctx), policy))
            for at, value in ids.items():
                start = {"family": 0x30, "image": 0x40}[at]
                changed[start : start + 16] = value
            raw = bytes(changed)
            auth = id_auth(raw, author=author)
        status = self.rig.psp.launch_finish(
            gctx, id_block=raw, id_auth=auth, auth_key_en=author, host_data=host_data
        )
        assert status == OK
        self.gctx = gctx

    def key(self, payload: bytes = b"", vmpck: int = 0) -> bytes:
        return key_of(self.rig, self.gctx, payload, vmpck)


# Conditions


@pytest.mark.parametrize(
    ("payload", "want"),
    [
        # The ID block's SVN is 7.
        (key_req(fields=SVN, svn=7), OK),
        (key_req(fields=SVN, svn=8), PARAM),
        (key_req(fields=0, svn=8), OK),
        (key_req(fields=TCB, tcb=TCB_VALUE), OK),
        (key_req(fields=TCB, tcb=TCB_VALUE - 1), OK),
        (key_req(fields=TCB, tcb=TCB_VALUE + 1), PARAM),
        (key_req(fields=TCB, tcb=0x7309000000000000), PARAM),
        (key_req(fields=TCB, tcb=0x7400000000000000), PARAM),
        (key_req(fields=0, tcb=TCB_VALUE + 1), OK),
        # The launch's mitigation vector is 6.
        (key_req(fields=MIT, mit=6), OK),
        (key_req(fields=MIT, mit=2), OK),
        (key_req(fields=MIT, mit=1), PARAM),
        (key_req(fields=0, mit=1), OK),
        (key_req(fields=MIT), PARAM),
        (key_req(fields=1 << 7, mit=0), PARAM),
        (key_req(VMRK, fields=SVN, svn=8), PARAM),
    ],
)
def test_field_beyond_what_the_guest_has_is_invalid_param(payload: bytes, want: int) -> None:
    guest = Guest()
    assert derive(guest.rig, guest.gctx, payload)[0] == want


def test_tcb_is_compared_with_the_committed_one() -> None:
    rig = Rig(FirmwareProfile(committed_tcb=Tcb(bootloader=2, snp=8, microcode=0x73)))
    gctx = rig.finished()
    assert derive(rig, gctx, key_req(fields=TCB, tcb=TCB_VALUE))[0] == PARAM
    rig.psp.commit()
    assert derive(rig, gctx, key_req(fields=TCB, tcb=TCB_VALUE))[0] == OK


@pytest.mark.parametrize(
    ("select", "loaded", "vcek_dis", "masked", "want"),
    [
        (0, False, False, False, OK),
        (0, True, True, False, OK),
        (0, False, True, False, INVALID_KEY),
        (VCEK, True, False, False, OK),
        (VCEK, True, True, False, INVALID_KEY),
        (VLEK, True, False, False, OK),
        (VLEK, False, False, False, INVALID_KEY),
        (RESERVED, True, False, False, INVALID_KEY),
        (0, False, False, True, INVALID_KEY),
        (VLEK, True, False, True, INVALID_KEY),
        (VMRK, False, True, True, OK),
        (VMRK | VLEK, False, False, False, OK),
    ],
)
def test_root_that_may_not_be_used_is_invalid_key(
    select: int, loaded: bool, vcek_dis: bool, masked: bool, want: int
) -> None:
    rig = Rig()
    if loaded:
        rig.psp.vlek_load(HASHSTICK)
    if masked:
        rig.psp.config(0, MASK_CHIP_KEY)
    assert derive(rig, rig.finished(vcek_dis=vcek_dis), key_req(select))[0] == want


def test_bad_field_comes_before_bad_key() -> None:
    rig = Rig()
    gctx = rig.finished()
    assert derive(rig, gctx, key_req(RESERVED, fields=SVN, svn=1))[0] == PARAM


# Inputs


def test_same_inputs_give_the_same_key() -> None:
    guest = Guest()
    first = guest.key()
    assert guest.key() == first
    assert guest.key(key_req(VCEK)) == first
    assert guest.key(vmpck=0, payload=key_req(svn=3, tcb=5)) == first
    # Another guest of the same owner, on the same chip and on one that is its twin.
    assert Guest(rig=guest.rig, asid=2).key() == first
    assert Guest().key() == first


def test_vmpck_that_asks_does_not_matter() -> None:
    guest = Guest()
    assert guest.key(key_req(vmpl=3), vmpck=0) == guest.key(key_req(vmpl=3), vmpck=3)


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("vmpl", key_req(vmpl=1)),
        ("root", key_req(VMRK)),
        ("policy", key_req(fields=POLICY_BIT)),
        ("image", key_req(fields=IMAGE)),
        ("family", key_req(fields=FAMILY)),
        ("measurement", key_req(fields=MEASUREMENT)),
        ("svn 0", key_req(fields=SVN)),
        ("svn 5", key_req(fields=SVN, svn=5)),
        ("svn 6", key_req(fields=SVN, svn=6)),
        ("tcb 0", key_req(fields=TCB)),
        ("tcb 2", key_req(fields=TCB, tcb=2)),
        ("tcb 3", key_req(fields=TCB, tcb=3)),
        ("mit 0", key_req(fields=MIT, mit=0)),
        ("mit 2", key_req(fields=MIT, mit=2)),
    ],
)
def test_each_choice_gives_a_key_of_its_own(name: str, payload: bytes) -> None:
    guest = Guest()
    plain = guest.key()
    chosen = guest.key(payload)
    assert chosen != plain
    others = (key_req(vmpl=2), key_req(fields=POLICY_BIT | IMAGE), key_req(fields=SVN, svn=7))
    assert len({plain, chosen, *map(guest.key, others)}) == 5


def test_message_version_does_not_matter() -> None:
    guest = Guest()
    assert guest.key(key_req(mit=0)) == guest.key()


CHANGES: dict[str, tuple[int, Callable[[], Guest]]] = {
    "policy": (POLICY_BIT, lambda: Guest(policy=POLICY | 1 << 19)),
    "image": (IMAGE, lambda: Guest(image=b"x" * 16)),
    "family": (FAMILY, lambda: Guest(family=b"x" * 16)),
    "measurement": (MEASUREMENT, lambda: Guest(page=b"x")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_property_matters_only_where_it_is_selected(name: str) -> None:
    bit, make = CHANGES[name]
    guest, other = Guest(), make()
    rest = 0xF & ~bit
    assert guest.key(key_req(fields=rest)) == other.key(key_req(fields=rest))
    assert guest.key(key_req(fields=bit)) != other.key(key_req(fields=bit))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guest(host_data=b"x" * 32),
        lambda: Guest(block=False),
        lambda: Guest(author=True),
    ],
    ids=["host data", "no ID key", "author key"],
)
def test_host_data_and_owner_always_matter(make: Callable[[], Guest]) -> None:
    assert Guest().key() != make().key()


def test_reported_tcb_matters_as_it_makes_the_vcek() -> None:
    guest = Guest()
    before, vmrk = guest.key(), guest.key(key_req(VMRK))
    guest.rig.psp.config(0x7307000000000003, 0)
    assert guest.key() != before
    assert guest.key(key_req(VMRK)) == vmrk


def test_vlek_is_another_root() -> None:
    guest = Guest()
    before = guest.key()
    guest.rig.psp.vlek_load(HASHSTICK)
    assert guest.key() == guest.key(key_req(VLEK)) != before
    assert guest.key(key_req(VCEK)) == before


def test_vmrk_is_the_guests_own() -> None:
    rig = Rig()
    keys = [key_of(rig, rig.finished(asid), key_req(VMRK)) for asid in (1, 2)]
    assert keys[0] != keys[1]


def test_chip_matters_unless_the_root_is_the_vmrk() -> None:
    here, there = Guest(), Guest()
    there.rig.draws = 40  # the chip secret is drawn next
    assert here.key() != there.key()
    assert here.key(key_req(VMRK)) == there.key(key_req(VMRK))
