"""Read what a page log (schema kvmlaunch.log/1) says of a launch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmlaunch.abi.digest import DIGEST_SIZE, LaunchDigest
from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.launch.pagelog import SCHEMA

__all__ = ["LoggedLaunch", "read_log"]

_LONGEST = 1 << 20


@dataclass(frozen=True)
class LoggedLaunch:
    """A launch that a log holds to its end: ``digest`` (48 bytes), ``policy``, ``pages``."""

    digest: bytes
    policy: int
    pages: int


def read_log(path: str) -> LoggedLaunch:
    """Read a log, and compute the launch digest of its pages once more.

    Raises ImageError: no such log, one that ends before the launch does, or one whose digests
    don't follow from its pages, with the line.
    """
    policy: int | None = None
    chain, pages = LaunchDigest(), 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
                try:
                    event = _event(line)
                    kind = event.get("event")
                    if policy is None:
                        policy = _header(event)
                    elif kind in ("page", "vmsa"):
                        _add(chain, event)
                        pages += 1
                    elif kind == "finish":
                        _check(chain, _digest(event))
                        return LoggedLaunch(chain.value, policy, pages)
                except FormatError as error:
                    raise ImageError(path, f"line {number}: {error.rule}") from None
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None
    if policy is None:
        raise ImageError(path, f"is no page log (schema {SCHEMA})")
    raise ImageError(path, "ends before the launch does: it has no finish event")


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        raise FormatError("is not JSON") from None
    if not isinstance(event, dict):
        raise FormatError("is not an event")
    return event


def _header(event: dict[str, Any]) -> int:
    if event.get("event") != "header" or event.get("schema") != SCHEMA:
        raise FormatError(f"is not the header of a page log (schema {SCHEMA})")
    return _number(event, "policy")


def _add(chain: LaunchDigest, event: dict[str, Any]) -> None:
    try:
        kind = PageType[str(event.get("type"))]
    except KeyError:
        raise FormatError(f"there is no page type {event.get('type')!r}") from None
    chain.update_contents(kind, _number(event, "gpa"), _hash(event, "contents"))
    _check(chain, _digest(event))


def _check(chain: LaunchDigest, found: bytes) -> None:
    if found != chain.value:
        raise FormatError(f"digest {found.hex()} doesn't follow from the pages: {chain.hex()}")


def _digest(event: dict[str, Any]) -> bytes:
    return _hash(event, "digest")


def _hash(event: dict[str, Any], name: str) -> bytes:
    try:
        value = bytes.fromhex(event[name])
    except (KeyError, TypeError, ValueError):
        value = b""
    if len(value) != DIGEST_SIZE:
        raise FormatError(f"{name} is not {2 * DIGEST_SIZE} hex digits")
    return value


def _number(event: dict[str, Any], name: str) -> int:
    try:
        value = int(event[name], 16)
    except (KeyError, TypeError, ValueError):
        value = -1
    if not 0 <= value < 1 << 64:
        raise FormatError(f"{name} is not a hex number of 64 bits")
    return value
