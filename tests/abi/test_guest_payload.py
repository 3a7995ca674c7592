"""Payloads of guest messages (snp-firmware-abi 8.4)."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.guest_message import SecretKey
from kvmlaunch.abi.guest_payload import (
    KeyRequest,
    KeyResponse,
    KeySelect,
    ReportRequest,
    ReportResponse,
    TscInfoRequest,
    TscInfoResponse,
)
from kvmlaunch.errors import FormatError
from tests.messages import key_req, report_req

SECRET = hashlib.sha256(b"derived").digest()
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
FIELDS, VMPL, SVN = 0x1020304050607080, 0x11223344, 0x55667788
TCB, MIT = 0x99AABBCCDDEEFF00, 0x0123456789ABCDEF

# (value, its bytes), laid out by hand.
PAIRS = [
    (ReportRequest(b"R" * 64, VMPL, 2), report_req(b"R" * 64, VMPL, 2)),
    (
        ReportResponse(0x27, b"A" * 1184, 0x4A0),
        b"\x27\0\0\0\xa0\x04\0\0" + bytes(24) + b"A" * 1184,
    ),
    (
        KeyRequest(True, 2, FIELDS, VMPL, SVN, TCB, MIT),
        key_req(0b101, FIELDS, VMPL, SVN, TCB, MIT),
    ),
    (KeyResponse(0x16, SecretKey(SECRET)), b"\x16\0\0\0" + bytes(28) + SECRET),
    (TscInfoRequest(), bytes(128)),
    (
        TscInfoResponse(1, TCB, MIT, SVN),
        (b"\x01" + bytes(7) + TCB.to_bytes(8, "little") + MIT.to_bytes(8, "little"))
        + SVN.to_bytes(4, "little")
        + bytes(100),
    ),
]
IDS = [type(value).__name__ for value, _ in PAIRS]
RESERVED = [
    *[(ReportRequest, 0x60, at, 1) for at in (0x45, 0x47, 0x48, 0x5F)],
    (ReportRequest, 0x60, 0x44, 4),
    *[(ReportResponse, 0x4C0, at, 1) for at in (0x08, 0x1F)],
    *[(KeyRequest, size, at, 1) for size in (0x20, 0x30) for at in (1, 3, 4, 7)],
    (KeyRequest, 0x20, 0, 8),
    *[(KeyRequest, 0x30, at, 1) for at in (0x28, 0x2F)],
    *[(KeyResponse, 0x40, at, 1) for at in (0x04, 0x1F)],
    *[(TscInfoRequest, 0x80, at, 1) for at in (0, 0x7F)],
    *[(TscInfoResponse, 0x80, at, 1) for at in (0x04, 0x07, 0x1C, 0x7F)],
]
SIZES = {
    ReportRequest: (0x5F, 0x61),
    ReportResponse: (0x4BF, 0x4C1),
    KeyRequest: (0x1F, 0x21, 0x28, 0x31),
    KeyResponse: (0x3F, 0x41),
    TscInfoRequest: (0x7F, 0x81),
    TscInfoResponse: (0x7F, 0x81),
}


@pytest.mark.parametrize(("value", "raw"), PAIRS, ids=IDS)
def test_encode_when_compared_with_bytes_by_hand_is_equal(value: Any, raw: bytes) -> None:
    encoded = value.encode(2) if isinstance(value, KeyRequest) else value.encode()
    assert encoded == raw


@pytest.mark.parametrize(("value", "raw"), PAIRS, ids=IDS)
def test_decode_of_bytes_by_hand_gives_the_value(value: Any, raw: bytes) -> None:
    assert type(value).decode(raw) == value


def test_key_request_of_version_1_is_32_bytes() -> None:
    request = KeyRequest(False, 1, 0x3F, VMPL, SVN, TCB)
    assert request.encode() == key_req(0b010, 0x3F, VMPL, SVN, TCB)
    assert KeyRequest.decode(request.encode()) == request


def test_key_request_of_version_1_with_mit_vector_is_format_error() -> None:
    with pytest.raises(FormatError, match="version 2"):
        KeyRequest(launch_mit_vector=1).encode()


@pytest.mark.parametrize(("kind", "size", "at", "value"), RESERVED)
def test_decode_with_reserved_bit_is_format_error(
    kind: Any, size: int, at: int, value: int
) -> None:
    raw = bytearray(size)
    kind.decode(raw)
    raw[at] = value
    with pytest.raises(FormatError):
        kind.decode(raw)


@pytest.mark.parametrize(("kind", "size"), [(k, n) for k, sizes in SIZES.items() for n in sizes])
def test_decode_of_wrong_size_is_format_error(kind: Any, size: int) -> None:
    with pytest.raises(FormatError, match=kind.TYPE.name):
        kind.decode(bytes(size))


@pytest.mark.parametrize("kind", SIZES)
@given(raw=st.binary(max_size=0x60) | st.sampled_from([0x30, 0x40, 0x60, 0x80]).map(bytes))
def test_decode_of_arbitrary_bytes_raises_format_error_only(kind: Any, raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        kind.decode(raw)


@given(
    st.builds(
        KeyRequest,
        use_vmrk=st.booleans(),
        key_sel=st.integers(0, 3),
        fields=U64,
        vmpl=U32,
        guest_svn=U32,
        tcb_version=U64,
        launch_mit_vector=U64,
    )
)
def test_decode_of_encode_of_any_key_request_is_identity(request: KeyRequest) -> None:
    assert KeyRequest.decode(request.encode(2)) == request


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ReportRequest(bytes(63)), "report_data"),
        (lambda: ReportRequest(vmpl=1 << 32), "vmpl"),
        (lambda: ReportRequest(key_sel=4), "key_sel"),
        (lambda: ReportResponse(1 << 32), "status"),
        (lambda: ReportResponse(0, bytes(1183)), "report"),
        (lambda: ReportResponse(report_size=1 << 32), "report_size"),
        (lambda: KeyRequest(key_sel=4), "key_sel"),
        (lambda: KeyRequest(fields=1 << 64), "fields"),
        (lambda: KeyRequest(vmpl=-1), "vmpl"),
        (lambda: KeyRequest(guest_svn=1 << 32), "guest_svn"),
        (lambda: KeyRequest(tcb_version=1 << 64), "tcb_version"),
        (lambda: KeyRequest(launch_mit_vector=1 << 64), "launch_mit_vector"),
        (lambda: KeyResponse(1 << 32), "status"),
        (lambda: TscInfoResponse(1 << 32), "status"),
        (lambda: TscInfoResponse(0, 1 << 64), "guest_tsc_scale"),
        (lambda: TscInfoResponse(0, 0, 1 << 64), "guest_tsc_offset"),
        (lambda: TscInfoResponse(0, 0, 0, 1 << 32), "tsc_factor"),
    ],
)
def test_value_that_does_not_fit_names_the_field(make: Any, name: str) -> None:
    with pytest.raises(FormatError, match=f"^{name} "):
        make()


def test_key_select_has_the_references_numbers() -> None:
    # snp-firmware-abi.md 8.4
    numbers = {key.name: int(key) for key in KeySelect}
    assert numbers == {"AUTO": 0, "VCEK": 1, "VLEK": 2, "RESERVED": 3}


@pytest.mark.parametrize("show", [repr, str])
def test_key_response_when_shown_hides_the_key(show: Any) -> None:
    text = show(KeyResponse(0, SecretKey(SECRET)))
    assert "status=0" in text
    assert SECRET.hex() not in text
    assert repr(SECRET)[2:-1] not in text


def test_key_response_when_pickled_is_type_error() -> None:
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(KeyResponse(0, SecretKey(SECRET)))


@pytest.mark.parametrize("raw", [bytes(32) + SECRET + b"x", b"\xff" * 32 + SECRET])
def test_traceback_of_a_bad_key_response_has_no_key_byte(raw: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        KeyResponse.decode(raw)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack
    own = [f.locals or {} for f in frames if f.filename.endswith("/guest_payload.py")]
    assert own
    text = "\n".join(text for values in own for text in values.values())
    assert repr(SECRET)[2:-1] not in text
