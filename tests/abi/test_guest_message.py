"""Header and encryption of guest messages (snp-firmware-abi 8.4, 8.6)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.guest_message import (
    AuthTagError,
    MessageHeader,
    MessageType,
    SecretKey,
    seal,
    unseal,
)
from kvmlaunch.errors import FormatError
from tests.messages import HEADER, opened, sealed

# snp-firmware-abi.md 8.6: a request and its answer
RAW_KEY = bytes(range(32))
KEY = SecretKey(RAW_KEY)
PAYLOAD = bytes(range(64)) + bytes(32)
REQUEST_TAG = "0f354f26b13f7433d3674d8eebcaf847"
REQUEST_HEADER = "0100000000000000" + "00" * 8 + "01016000" + "05016000" + "00" * 4 + "00" * 36
REQUEST_PAYLOAD = (
    "e22d803ca0aaea00420d0fc830cc86c4dc70dd3d68bd7d05560647e5013b996f"
    "ccddd2ea048788e8f0f437f862242ea7c0e4fcb7d1456ca0bbb1da492b891678"
    "bcafa49213c0f2445044cd48be94fd5eb5f3e8b761e80896f353185b4abd740d"
)
REQUEST_SHA256 = "37986d2e2816e933c1e342b05eac83a78b121d632b6090da8dff837967ad24aa"
ANSWER_PAYLOAD = bytes(4) + b"\xa0\x04\0\0" + bytes(24 + 1184)
ANSWER_TAG = "47a9095295820661bcb6412bd1b427cd"
ANSWER_START = "e66eeb605aa168bdadbd6e148c86f702510c68c0d6fb80134a76183a68817913"
ANSWER_SHA256 = "ccbe22ae639d0a4ffcbeb30588e94318a247d1b03458748a0d09eb013e8436bd"

HEADERS = st.builds(
    MessageHeader,
    msg_type=st.integers(0, 255),
    seqno=st.integers(0, 2**64 - 1),
    msg_vmpck=st.integers(0, 3),
    msg_version=st.integers(0, 255),
)


def test_seal_of_published_request_gives_its_bytes() -> None:
    message = seal(KEY, MessageHeader(MessageType.REPORT_REQ, 1), PAYLOAD)
    assert message[:16].hex() == REQUEST_TAG
    assert message[16:32] == bytes(16)
    assert message[0x20:0x60].hex() == REQUEST_HEADER
    assert message[0x60:].hex() == REQUEST_PAYLOAD
    assert hashlib.sha256(message).hexdigest() == REQUEST_SHA256


def test_unseal_of_published_request_gives_its_payload() -> None:
    message = bytes.fromhex(REQUEST_TAG + "00" * 16 + REQUEST_HEADER + REQUEST_PAYLOAD)
    assert unseal(KEY, message) == PAYLOAD
    assert unseal(KEY, message.ljust(4096, b"\xcc")) == PAYLOAD


def test_seal_of_published_answer_gives_its_bytes() -> None:
    message = seal(KEY, MessageHeader(MessageType.REPORT_RSP, 2), ANSWER_PAYLOAD)
    assert len(message) == 1312
    assert message[:16].hex() == ANSWER_TAG
    assert message[0x60:0x80].hex() == ANSWER_START
    assert hashlib.sha256(message).hexdigest() == ANSWER_SHA256


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("msg_type", 0x81),
        ("seqno", 0x8102030405060708),
        ("msg_vmpck", 0x83),
        ("msg_version", 0x84),
        ("msg_size", 0x8586),
        ("algo", 0x87),
        ("hdr_version", 0x88),
        ("hdr_size", 0x898A),
    ],
)
def test_header_encode_puts_field_at_its_offset(field: str, value: int) -> None:
    good = dict.fromkeys((f.name for f in dataclasses.fields(MessageHeader)), 0)
    good["authtag"] = bytes(16)
    offset, size = HEADER[field]
    want = bytearray(0x60)
    want[offset : offset + size] = value.to_bytes(size, "little")
    header = MessageHeader(**{**good, field: value})
    assert header.encode() == want
    assert MessageHeader.decode(bytes(want)) == header


def test_header_decode_skips_reserved_bytes() -> None:
    raw = bytearray(b"\xff" * 0x60)
    for offset, size in HEADER.values():
        raw[offset : offset + size] = bytes(size)
    assert MessageHeader.decode(raw).encode() == bytes(0x60)


@pytest.mark.parametrize(
    ("field", "bits"),
    [(name, 8 * size) for name, (_, size) in HEADER.items() if name != "authtag"],
)
def test_header_with_wide_value_names_the_field(field: str, bits: int) -> None:
    header = MessageHeader(MessageType.REPORT_REQ, 1)
    with pytest.raises(FormatError, match=f"^{field} "):
        dataclasses.replace(header, **{field: 1 << bits})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hdr_version": 0}, "HDR_VERSION"),
        ({"hdr_version": 2}, "HDR_VERSION"),
        ({"hdr_size": 0x50}, "HDR_SIZE"),
        ({"algo": 0}, "ALGO"),
        ({"algo": 2}, "ALGO"),
        ({"msg_size": 0}, "MSG_SIZE"),
        ({"msg_size": 0x58}, "MSG_SIZE"),
        ({"msg_size": 4000 + 16}, "MSG_SIZE"),
        ({"msg_vmpck": 4}, "MSG_VMPCK"),
    ],
)
def test_unseal_under_bad_header_is_format_error(fields: dict[str, int], says: str) -> None:
    message = sealed(RAW_KEY, PAYLOAD, **fields)
    with pytest.raises(FormatError, match=says) as caught:
        unseal(KEY, message.ljust(4096, b"\0"))
    assert not isinstance(caught.value, AuthTagError)


def test_unseal_of_largest_payload_works() -> None:
    payload = b"\x07" * 4000
    assert unseal(KEY, sealed(RAW_KEY, payload)) == payload


@pytest.mark.parametrize("size", [0, 0x5F])
def test_unseal_of_less_than_a_header_is_format_error(size: int) -> None:
    with pytest.raises(FormatError, match="96 bytes of header"):
        unseal(KEY, bytes(size))


def test_unseal_of_payload_that_is_cut_off_is_format_error() -> None:
    with pytest.raises(FormatError, match="MSG_SIZE says 96"):
        unseal(KEY, sealed(RAW_KEY, PAYLOAD)[:-1])


def test_unseal_with_another_key_is_auth_tag_error() -> None:
    with pytest.raises(AuthTagError, match="tag"):
        unseal(SecretKey(bytes(32)), sealed(RAW_KEY, PAYLOAD))


@given(HEADERS, st.binary(min_size=1, max_size=200))
def test_sealed_message_is_read_by_the_other_side(header: MessageHeader, data: bytes) -> None:
    payload = data.ljust(-len(data) % 16 + len(data), b"\0")
    message = seal(KEY, header, payload)
    fields, seen = opened(RAW_KEY, message)
    assert seen == payload
    assert fields["seqno"] == header.seqno
    assert unseal(KEY, message) == payload


def test_unseal_with_the_number_of_another_message_is_auth_tag_error() -> None:
    first, second = (sealed(RAW_KEY, PAYLOAD, seqno=n) for n in (1, 3))
    with pytest.raises(AuthTagError):
        unseal(KEY, first[:0x20] + second[0x20:0x28] + first[0x28:])


@given(st.binary(max_size=300))
def test_unseal_of_arbitrary_bytes_raises_format_error_only(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        unseal(KEY, raw)


@given(st.binary(max_size=0x60))
def test_header_decode_of_arbitrary_bytes_raises_format_error_only(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        header = MessageHeader.decode(raw)
        assert MessageHeader.decode(header.encode()) == header


def test_message_types_are_those_of_the_reference() -> None:
    # snp-firmware-abi.md 8.4
    names = ["CPUID", "KEY", "REPORT", "EXPORT", "IMPORT", "ABSORB", "VMRK", "ABSORB_NOMA"]
    names.append("TSC_INFO")
    pairs = [f"{name}_{kind}" for name in names for kind in ("REQ", "RSP")]
    assert [t.name for t in MessageType] == pairs
    assert [int(t) for t in MessageType] == list(range(1, 0x13))


# SecretKey.


SECRET = hashlib.sha256(b"secret").digest()


def shown(secret: bytes) -> list[str]:
    return [secret.hex(), repr(secret)[2:-1], str(int.from_bytes(secret, "big"))]


@pytest.mark.parametrize("show", [repr, str, "{}".format, "%s".__mod__])
def test_secret_key_when_shown_hides_its_bytes(show: object) -> None:
    text = show(SecretKey(SECRET))  # type: ignore[operator]
    assert text == "<SecretKey hidden>"


@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
def test_secret_key_when_pickled_or_copied_is_type_error(leave: object) -> None:
    with pytest.raises(TypeError, match="pickled"):
        leave(SecretKey(SECRET))  # type: ignore[operator]


def test_secret_key_when_equal_is_equal_and_not_to_bytes() -> None:
    assert SecretKey(SECRET) == SecretKey(SECRET)
    assert SecretKey(SECRET) != SecretKey(bytes(32))
    assert SecretKey(SECRET) != SECRET


@pytest.mark.parametrize("cut", [0, 31])
def test_secret_key_of_wrong_size_is_format_error(cut: int) -> None:
    with pytest.raises(FormatError, match="32"):
        SecretKey(SECRET[:cut])


def tracebacks(error: BaseException) -> str:
    """The frames inside kvmlaunch with their locals."""
    frames = traceback.TracebackException.from_exception(error, capture_locals=True).stack
    own = [f for f in frames if "/kvmlaunch/" in f.filename and "/tests/" not in f.filename]
    assert own
    # The locals are reprs: another repr would double their backslashes.
    return "\n".join([str(error), *(text for f in own for text in (f.locals or {}).values())])


@pytest.mark.parametrize(
    "fail",
    [
        lambda: unseal(SecretKey(SECRET), sealed(RAW_KEY, PAYLOAD)),
        lambda: unseal(SecretKey(SECRET), bytes(0x60)),
        lambda: seal(SecretKey(SECRET), MessageHeader(5, 1), bytes(1 << 16)),
        lambda: SecretKey(SECRET + b"x"),
        lambda: pickle.dumps(SecretKey(SECRET)),
    ],
    ids=["wrong key", "bad header", "too large", "wrong size", "pickle"],
)
def test_traceback_with_locals_has_no_key_byte(fail: object) -> None:
    with pytest.raises((FormatError, TypeError)) as caught:
        fail()  # type: ignore[operator]
    text = tracebacks(caught.value)
    assert not [form for form in shown(SECRET) if form in text]
