"""Where people have a report: raw, as text, in a message's payload, or on a guest's console."""

from __future__ import annotations

import base64
import binascii
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from kvmlaunch.abi.guest_payload import ReportResponse
from kvmlaunch.abi.page import PAGE_SIZE, Buffer
from kvmlaunch.abi.report import REPORT_SIZE
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.launch.files import read_small
from kvmlaunch.launch.printed_report import PrintedReport

__all__ = ["decode_file", "find_report", "read_file"]

_Found = TypeVar("_Found")
_MOST = 4 << 20
_PAYLOAD_SIZE = len(ReportResponse().encode())
_MARKER = b"-----BEGIN ATTESTATION REPORT-----"
_HEX = re.compile(rb"(?:0x)?((?:[0-9a-f]{2})+)", re.IGNORECASE)


def find_report(data: Buffer) -> bytes:
    """Return the 1184 bytes of the report that ``data`` is or holds.

    Taken are the report; the payload of a MSG_REPORT_RSP, also with the zeros that fill it up
    to a page; hex (with or without 0x) or base64 of either; and a console on which a guest
    printed it (see `printed_report`).

    Raises:
        FormatError: none of these, or an answer without a report.
    """
    raw = bytes(data)
    if _MARKER in raw:
        printed = PrintedReport()
        printed.add(raw)
        return printed.report()
    found = _binary(raw)
    if found is None:
        text = b"".join(raw.split())
        found = _binary(_from_text(text))
    if found is None:
        raise FormatError(
            f"no attestation report: that is {REPORT_SIZE} bytes, raw, hex or base64, and this "
            f"is {len(raw)} bytes"
        )
    return found


def read_file(path: str) -> bytes:
    """Return what is in a file, or in standard input for ``-``; 4 MiB at most.

    Raises:
        ImageError: it can't be read, or is larger.
    """
    if path != "-":
        return read_small(path, _MOST)
    try:
        data = sys.stdin.buffer.read(_MOST + 1)
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None
    if len(data) > _MOST:
        raise ImageError(path, f"is larger than {_MOST} bytes")
    return data


def decode_file(path: str, decode: Callable[[bytes], _Found]) -> _Found:
    """Return what ``decode`` makes of a file, see `read_file`.

    Raises:
        ImageError: also where ``decode`` raises FormatError.
    """
    data = read_file(path)
    try:
        return decode(data)
    except FormatError as error:
        raise ImageError(path, error.rule, offset=error.offset) from None


def _from_text(text: bytes) -> bytes:
    if found := _HEX.fullmatch(text):
        return bytes.fromhex(found[1].decode("ascii"))
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _binary(raw: bytes) -> bytes | None:
    if len(raw) == REPORT_SIZE:
        return raw
    if not _PAYLOAD_SIZE <= len(raw) <= PAGE_SIZE or any(raw[_PAYLOAD_SIZE:]):
        return None
    answer = ReportResponse.decode(raw[:_PAYLOAD_SIZE])
    if answer.status:
        raise FormatError(f"the answer holds no report: its STATUS is {answer.status:#x}")
    if answer.report_size != REPORT_SIZE:
        raise FormatError(f"the answer's report has {answer.report_size} bytes, not {REPORT_SIZE}")
    return answer.report
