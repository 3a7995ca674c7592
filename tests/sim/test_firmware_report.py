"""Attestation reports of the simulated firmware (snp-firmware-abi 8.1)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from kvmlaunch.abi.report import SigningKey
from kvmlaunch.abi.tcb import Product, Tcb
from kvmlaunch.sim.firmware_profiles import FirmwareProfile, firmware_profile
from tests.idblock import AUTHOR_KEY, ID_KEY, V1, id_auth, id_block
from tests.messages import opened, report_req, sealed, word

from .rig import POLICY, Rig

pytestmark = pytest.mark.usefixtures("few_rsa_keys")

OK = 0
PARAM = 0x16
INVALID_KEY = 0x27
AUTO, VCEK, VLEK, RESERVED = range(4)
MASK_CHIP_ID, MASK_CHIP_KEY = 1, 2
HASHSTICK = b"V" * 432


def get(
    rig: Rig, gctx: int, payload: bytes | None = None, seqno: int = 1, vmpck: int = 0
) -> tuple[int, bytes]:
    """STATUS and report."""
    key = rig.psp.context(gctx).vmpck[vmpck]
    payload = report_req() if payload is None else payload
    status, page = rig.request(gctx, sealed(key, payload, seqno=seqno, msg_vmpck=vmpck))
    assert status == OK
    _, answer = opened(key, page)
    status = word(answer, 0, 4)
    # REPORT_SIZE: only what is there.
    assert word(answer, 4, 4) == (0 if status else 0x4A0)
    assert answer[8:0x20] == bytes(24)
    if status:
        assert answer[0x20:] == bytes(0x4A0)
    return status, answer[0x20:]


def report_of(rig: Rig, gctx: int | None = None, **options: int) -> bytes:
    """The report of a guest, which must be given."""
    status, report = get(rig, rig.finished() if gctx is None else gctx, report_req(**options))
    assert status == OK
    return report


def verify(certificate: bytes, report: bytes) -> None:
    """Raises InvalidSignature."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    r, s = (word(report, at, 72) for at in (0x2A0, 0x2A0 + 72))
    assert report[0x2A0 + 144 :] == bytes(512 - 144)
    key.verify(encode_dss_signature(r, s), report[:0x2A0], ec.ECDSA(hashes.SHA384()))


def signed_by(report: bytes) -> int:
    return word(report, 0x48, 4) >> 2 & 7


# Fields


def expected(version: int) -> dict[tuple[int, int], bytes]:
    """What the report of `rich_guest` holds, by (offset, end)."""
    le = int.to_bytes
    fields = {
        (0x000, 0x004): le(version, 4, "little"),
        (0x004, 0x008): le(7, 4, "little"),
        (0x008, 0x010): le(POLICY, 8, "little"),
        (0x010, 0x020): b"F" * 16,
        (0x020, 0x030): b"I" * 16,
        (0x030, 0x034): le(2, 4, "little"),
        (0x034, 0x038): le(1, 4, "little"),
        (0x038, 0x040): bytes.fromhex("0300000000000873"),
        (0x040, 0x048): le(1, 8, "little"),
        (0x048, 0x04C): le(1, 4, "little"),
        (0x050, 0x090): b"D" * 64,
        (0x090, 0x0C0): V1,
        (0x0C0, 0x0E0): b"H" * 32,
        (0x0E0, 0x110): hashlib.sha384(ID_KEY).digest(),
        (0x110, 0x140): hashlib.sha384(AUTHOR_KEY).digest(),
        (0x140, 0x160): b"\x06" * 32,
        (0x160, 0x180): b"\xff" * 32,
        (0x180, 0x188): bytes.fromhex("0200000000000872"),
        (0x1A0, 0x1E0): b"SIMULATED".ljust(64, b"\0"),
        (0x1E0, 0x1E8): bytes.fromhex("0200000000000872"),
        (0x1E8, 0x1EB): bytes([33, 56, 1]),
        (0x1EC, 0x1EF): bytes([21, 55, 1]),
        (0x1F0, 0x1F8): bytes.fromhex("0300000000000873"),
    }
    if version >= 3:
        fields[0x188, 0x18B] = bytes([0x19, 0x01, 0x01])
    if version >= 5:
        fields[0x1F8, 0x200] = fields[0x200, 0x208] = le(5, 8, "little")
    return fields


def rich_guest(version: int) -> tuple[Rig, int]:
    """A guest with everything that a report can show."""
    profile = FirmwareProfile(
        api_minor=56,
        build=33,
        committed_version=(1, 55, 21),
        committed_tcb=Tcb(bootloader=2, snp=8, microcode=0x72),
        report_version=version,
        mit_vector=5,
    )
    rig = Rig(profile)
    gctx = rig.activated()
    assert rig.psp.launch_update(gctx, rig.pre_guest(0), 1) == OK
    block = id_block()
    auth = id_auth(block, author=True)
    finished = rig.psp.launch_finish(
        gctx, id_block=block, id_auth=auth, auth_key_en=True, host_data=b"H" * 32
    )
    assert finished == OK
    return rig, gctx


@pytest.mark.parametrize("version", [2, 3, 5])
def test_report_when_compared_with_bytes_by_hand_is_equal(version: int) -> None:
    rig, gctx = rich_guest(version)
    want = bytearray(0x2A0)
    for (start, end), value in expected(version).items():
        assert end - start == len(value)
        want[start:end] = value
    status, report = get(rig, gctx, report_req(b"D" * 64, vmpl=2))
    assert status == OK
    assert report[:0x2A0].hex(" ", 16) == want.hex(" ", 16)


def test_report_without_id_block_has_zeros_there() -> None:
    report = report_of(Rig())
    for start, end in ((0x004, 0x008), (0x010, 0x030), (0x0E0, 0x140)):
        assert report[start:end] == bytes(end - start)
    assert word(report, 0x48, 4) == 0


def test_report_with_agent_has_its_id() -> None:
    rig = Rig()
    agent = rig.started()
    gctx = rig.activated(policy=POLICY | 1 << 18, ma_gctx=agent)
    rig.psp.launch_finish(gctx, id_block=None, id_auth=None)
    report = report_of(rig, gctx)
    assert (report[0x140:0x160], report[0x160:0x180]) == (b"\x0c" * 32, b"\x06" * 32)


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        ({"smt_enabled": False}, 0),
        ({"rapl_disabled": True}, 0b01001),
        ({"ciphertext_hiding": True}, 0b10001),
        ({"tsme_enabled": True}, 0b00011),
        ({"ecc_enabled": True}, 0b00101),
        ({"alias_check_complete": True}, 0b100001),
        ({"alias_check_complete": True, "report_version": 2}, 0b000001),
    ],
)
def test_platform_info_is_what_the_platform_has_on(change: dict[str, bool], bits: int) -> None:
    rig = Rig(FirmwareProfile(**change))  # type: ignore[arg-type]
    gctx = rig.activated(policy=1 << 17 if not bits else POLICY)
    rig.psp.launch_finish(gctx, id_block=None, id_auth=None)
    assert word(report_of(rig, gctx), 0x40) == bits


@pytest.mark.parametrize(
    ("product", "cpu"), [("Milan", "190101"), ("Genoa", "191101"), ("Turin", "1a0201")]
)
def test_report_names_the_products_cpu(product: Product, cpu: str) -> None:
    report = report_of(Rig(firmware_profile(product)))
    assert report[0x188:0x18A].hex() == cpu[:4]


def test_report_of_turin_has_a_chip_id_of_8_bytes() -> None:
    report = report_of(Rig(firmware_profile("Turin")))
    assert report[0x1A0:0x1E0] == b"SIMULATE".ljust(64, b"\0")


def test_what_is_read_at_request_time_follows_the_platform() -> None:
    profile = FirmwareProfile(
        committed_tcb=Tcb(bootloader=2, snp=8, microcode=0x72), committed_version=(1, 54, 1)
    )
    rig = Rig(profile)
    gctx = rig.finished()
    _, before = get(rig, gctx)
    assert rig.psp.config(0x7108000000000002, 0) == OK
    _, lowered = get(rig, gctx, seqno=3)
    assert rig.psp.commit() == OK
    _, after = get(rig, gctx, seqno=5)
    reported, committed = slice(0x180, 0x188), slice(0x1E0, 0x1E8)
    assert word(before[reported], 0) == word(before[committed], 0) == 0x7208000000000002
    assert word(lowered[reported], 0) == 0x7108000000000002
    assert word(lowered[committed], 0) == 0x7208000000000002
    assert word(after[reported], 0) == word(after[committed], 0) == 0x7308000000000003
    assert (before[0x1EC:0x1EF], after[0x1EC:0x1EF]) == (bytes([1, 54, 1]), bytes([21, 55, 1]))
    changed = [at for at in range(0x2A0) if not before[at] == lowered[at] == after[at]]
    assert all(at in range(0x180, 0x188) or at in range(0x1E0, 0x1F0) for at in changed)


def test_launch_tcb_stays_that_of_the_launch() -> None:
    rig = Rig()
    gctx = rig.finished()
    rig.psp.profile = replace(rig.psp.profile, current_tcb=Tcb(bootloader=9, snp=9, microcode=200))
    report = report_of(rig, gctx)
    assert word(report, 0x38) == 0xC809000000000009
    assert word(report, 0x1F0) == 0x7308000000000003


# Signature and keys


def test_signature_is_the_vceks() -> None:
    rig = Rig()
    report = report_of(rig)
    chain = rig.psp.certificate_chain()
    assert chain is not None
    assert signed_by(report) == 0
    verify(chain.leaf, report)
    for at in (0x000, 0x090, 0x1A0, 0x29F):
        changed = bytearray(report)
        changed[at] ^= 1
        with pytest.raises(InvalidSignature):
            verify(chain.leaf, bytes(changed))


def test_signature_of_another_host_is_not_this_ones() -> None:
    rigs = [Rig(), Rig()]
    rigs[1].draws = 40  # another chip secret
    reports = [report_of(rig) for rig in rigs]
    chain = rigs[0].psp.certificate_chain()
    assert chain is not None
    verify(chain.leaf, reports[0])
    with pytest.raises(InvalidSignature):
        verify(chain.leaf, reports[1])


def test_vcek_changes_with_the_reported_tcb_and_comes_back_with_it() -> None:
    rig = Rig()
    gctx = rig.finished()
    first = rig.psp.certificate_chain()
    rig.psp.config(0x7307000000000003, 0)
    second = rig.psp.certificate_chain()
    _, lowered = get(rig, gctx)
    rig.psp.config(0, 0)
    _, normal = get(rig, gctx, seqno=3)
    assert first is not None
    assert second is not None
    verify(second.leaf, lowered)
    verify(first.leaf, normal)
    assert rig.psp.certificate_chain() == first
    with pytest.raises(InvalidSignature):
        verify(first.leaf, lowered)


@pytest.mark.parametrize(
    ("key_sel", "loaded", "vcek_dis", "want"),
    # snp-firmware-abi.md 8.1: 0 VLEK if loaded, else VCEK; INVALID_KEY where there is none
    [
        (AUTO, False, False, SigningKey.VCEK),
        (AUTO, True, False, SigningKey.VLEK),
        (AUTO, True, True, SigningKey.VLEK),
        (AUTO, False, True, None),
        (VCEK, False, False, SigningKey.VCEK),
        (VCEK, True, False, SigningKey.VCEK),
        (VCEK, False, True, None),
        (VCEK, True, True, None),
        (VLEK, False, False, None),
        (VLEK, True, False, SigningKey.VLEK),
        (VLEK, True, True, SigningKey.VLEK),
        (RESERVED, False, False, None),
        (RESERVED, True, False, None),
    ],
)
def test_key_selection(key_sel: int, loaded: bool, vcek_dis: bool, want: SigningKey | None) -> None:
    rig = Rig()
    if loaded:
        assert rig.psp.vlek_load(HASHSTICK) == OK
    gctx = rig.finished(vcek_dis=vcek_dis)
    status, report = get(rig, gctx, report_req(key_sel=key_sel))
    if want is None:
        assert status == INVALID_KEY
        return
    chain = rig.psp.certificate_chain(want)
    assert chain is not None
    assert (status, signed_by(report)) == (OK, want)
    verify(chain.leaf, report)


def test_bad_vmpl_comes_before_bad_key() -> None:
    rig = Rig()
    gctx = rig.finished()
    assert get(rig, gctx, report_req(vmpl=0, key_sel=RESERVED), vmpck=1)[0] == PARAM
    assert get(rig, gctx, report_req(vmpl=4, key_sel=RESERVED), seqno=1)[0] == PARAM


def test_masked_chip_key_leaves_the_report_unsigned() -> None:
    rig = Rig()
    rig.psp.config(0, MASK_CHIP_KEY)
    report = report_of(rig)
    assert word(report, 0x48, 4) == 7 << 2 | 2
    assert report[0x2A0:] == bytes(512)
    assert report[0x1A0:0x1E0] != bytes(64)


def test_masked_chip_key_does_not_touch_the_vlek() -> None:
    rig = Rig()
    rig.psp.vlek_load(HASHSTICK)
    rig.psp.config(0, MASK_CHIP_KEY)
    report = report_of(rig)
    chain = rig.psp.certificate_chain(SigningKey.VLEK)
    assert chain is not None
    assert word(report, 0x48, 4) == 1 << 2 | 2
    verify(chain.leaf, report)


def test_masked_chip_key_and_vcek_dis_is_invalid_key() -> None:
    rig = Rig()
    rig.psp.config(0, MASK_CHIP_KEY)
    assert get(rig, rig.finished(vcek_dis=True))[0] == INVALID_KEY


def test_masked_chip_id_is_zero_in_a_signed_report() -> None:
    rig = Rig()
    rig.psp.config(0, MASK_CHIP_ID)
    report = report_of(rig)
    chain = rig.psp.certificate_chain()
    assert chain is not None
    assert report[0x1A0:0x1E0] == bytes(64)
    assert word(report, 0x48, 4) == 0
    verify(chain.leaf, report)


def test_other_hashstick_is_another_vlek() -> None:
    rig = Rig()
    rig.psp.vlek_load(HASHSTICK)
    old = rig.psp.certificate_chain(SigningKey.VLEK)
    rig.psp.vlek_load(b"W" * 432)
    assert old is not None
    with pytest.raises(InvalidSignature):
        verify(old.leaf, report_of(rig))


def test_report_except_for_its_signature_is_the_same_for_the_same_random() -> None:
    rig = Rig()
    first, second = report_of(Rig()), report_of(rig)
    assert first[:0x2A0] == second[:0x2A0]
    chain = rig.psp.certificate_chain()
    assert chain is not None
    verify(chain.leaf, first)
