"""The page log: JSON Lines, schema kvmlaunch.log/1, whole lines only."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi.page import PAGE_SIZE, Buffer, PageType
from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.hashing import RECORD_SIZE
from kvmlaunch.images.plan import LaunchPlan
from kvmlaunch.images.source import forget
from kvmlaunch.launch.records import PageRecord, RecordBatch
from kvmlaunch.version import __version__

if TYPE_CHECKING:
    from kvmlaunch.uapi import Call

try:
    from kvmlaunch.hashing.lines import page_lines
except ImportError:  # the extension isn't there
    _NATIVE = False
else:
    _NATIVE = True

__all__ = ["LogError", "NullLog", "PageLog", "open_log"]

SCHEMA = "kvmlaunch.log/1"
_FLUSH_BYTES = 1 << 16
# What json.dumps makes of the event, in a quarter of the time; csrc/pagelog.c has the same.
_PAGE_LINE = (
    '{"event":"page","seq":%d,"gpa":"%#x","type":"%s","contents":"%s","digest":"%s",'
    '"origin":%s,"label":%s}\n'
)
_READ_BYTES = 8 << 20  # of a mapped file, in memory at a time
_HASHED_BYTES = 1 << 18  # copied first: from the cache SHA-256 is a quarter faster


class LogError(KvmLaunchError):
    """The log can't be written."""


class PageLog:
    """Writes events to a file, ``-`` for standard output.

    Buffered until flush(), which the launch calls at each step; if the disk is
    full the file is cut back to its last whole line. A context manager.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._buffer = bytearray()
        if path == "-":
            self._fd = os.dup(sys.stdout.fileno())
            return
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LogError(f"log {path}: {error.strerror}") from None

    def header(self, plan: LaunchPlan, *, platform: str, profile: str, vmsa_mode: str) -> None:
        """The first event: what is launched, and on which platform."""
        image = {"image": plan.image, "sha256": _sha256(plan.data)}
        self.start(image, plan.policy, platform=platform, profile=profile, vmsa_mode=vmsa_mode)

    def start(
        self,
        image: Mapping[str, Any],
        policy: int,
        *,
        platform: str,
        profile: str,
        vmsa_mode: str,
    ) -> None:
        """The first event, where no plan tells what ``image`` is."""
        self.write(
            {
                "event": "header",
                "schema": SCHEMA,
                "platform": platform,
                "profile": profile,
                **image,
                "policy": f"{policy:#x}",
                "vmsa_mode": vmsa_mode,
                "version": __version__,
            }
        )
        self.flush()

    def record(self, record: PageRecord) -> None:
        """A measured page or VMSA."""
        self._add(_line(record))

    def records(self, batch: RecordBatch) -> None:
        """Measured pages, or VMSAs, of one go."""
        if batch.type is PageType.VMSA or not _NATIVE:
            for record in batch.records:
                self.record(record)
            return
        label = encode_basestring_ascii(batch.label)
        seq, gpa, at = batch.seq, batch.gpa, 0
        for origin, offset, pages in batch.origins:
            found = memoryview(batch.found)[at : at + pages * RECORD_SIZE]
            name = encode_basestring_ascii(origin)
            self._add(page_lines(seq, gpa, batch.type.name, found, name, offset, label))
            seq, gpa, at = seq + pages, gpa + pages * PAGE_SIZE, at + pages * RECORD_SIZE

    def call(self, call: Call) -> None:
        """A system call of the launch."""
        event: dict[str, Any] = {
            "event": "ioctl",
            "name": call.name,
            "ret": call.ret,
            "errno": call.errno,
        }
        if call.fw_error is not None:
            event["fw_error"] = call.fw_error
        event["ns"] = call.ns
        if call.sent:
            event["sent"] = call.sent
        self.write(event)

    def finish(
        self,
        digest: bytes,
        pages: int,
        *,
        agrees: bool | None = None,
        predicted: bool = True,
        vm: int = 0,
    ) -> None:
        """The launch digest, ``predicted`` or only measured; ``vm`` counts from 0.

        ``agrees``: the host's firmware says the same (None: not asked).
        """
        event: dict[str, Any] = {"event": "finish", "digest": digest.hex(), "pages": pages}
        event["predicted"] = predicted
        if agrees is not None:
            event["host_agrees"] = agrees
        if vm:
            event["vm"] = vm
        self.write(event)

    def exit(self, vcpu: int, reason: str, detail: str) -> None:
        """An exit of the running guest; flushed at once, since the next step may hang."""
        self.write({"event": "exit", "vcpu": vcpu, "reason": reason, "detail": detail})
        self.flush()

    def write(self, event: Mapping[str, Any]) -> None:
        """Add one event."""
        self._add(_json_line(event))

    def _add(self, lines: Buffer) -> None:
        self._buffer += lines
        if len(self._buffer) >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the kernel. Raises LogError."""
        data, self._buffer = bytes(self._buffer), bytearray()
        done = 0
        try:
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError as error:
            self._cut(data[:done])
            raise LogError(f"log {self.path}: {error.strerror}") from None

    def _cut(self, written: bytes) -> None:
        """Drop the part of a line that still got onto a full disk."""
        partial = len(written) - (written.rfind(b"\n") + 1)
        if not partial:
            return
        try:
            # Counted from here: standard output may have held something before.
            os.ftruncate(self._fd, os.lseek(self._fd, -partial, os.SEEK_CUR))
        except OSError:
            return  # a pipe or a device keeps what it got

    def close(self) -> None:
        """Flush and close; nothing happens the second time."""
        if self._fd < 0:
            return
        try:
            self.flush()
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> PageLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _line(record: PageRecord) -> bytes:
    """The line of a record; a large image has very many of them."""
    if record.type is PageType.VMSA:
        return _json_line(record.to_event())
    line = _PAGE_LINE % (
        record.seq,
        record.gpa,
        record.type.name,
        record.contents.hex(),
        record.digest.hex(),
        encode_basestring_ascii(record.origin),
        encode_basestring_ascii(record.label),
    )
    return line.encode("ascii")


def _json_line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def _sha256(data: memoryview) -> str:
    found = hashlib.sha256()
    for at in range(0, len(data), _HASHED_BYTES):
        found.update(bytes(data[at : at + _HASHED_BYTES]))
        if not (at + _HASHED_BYTES) % _READ_BYTES:
            forget(data)
    forget(data)
    return found.hexdigest()


class NullLog:
    """A log that nobody wants."""

    def header(self, plan: LaunchPlan, *, platform: str, profile: str, vmsa_mode: str) -> None:
        """Nothing."""

    def record(self, record: PageRecord) -> None:
        """Nothing."""

    def records(self, batch: RecordBatch) -> None:
        """Nothing."""

    def call(self, call: Call) -> None:
        """Nothing."""

    def finish(self, digest: bytes, pages: int, *, agrees: bool | None = None) -> None:
        """Nothing."""

    def exit(self, vcpu: int, reason: str, detail: str) -> None:
        """Nothing."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def __enter__(self) -> NullLog:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing."""


def open_log(path: str | None) -> PageLog | NullLog:
    """The log at ``path`` (``-`` is standard output), or one that writes nothing."""
    return NullLog() if path is None else PageLog(path)
