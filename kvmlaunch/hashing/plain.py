"""The backend for installations without the compiled extension."""

from __future__ import annotations

from kvmlaunch.abi.digest import DIGEST_SIZE, sha384
from kvmlaunch.abi.page import PAGE_SIZE, Buffer
from kvmlaunch.hashing.hasher import RECORD_SIZE, Hasher

__all__ = ["PlainHasher"]


class PlainHasher(Hasher):
    """Page by page, over hashlib. ``threads`` is ignored."""

    name = "hashlib"

    def _contents(self, data: memoryview, out: memoryview, threads: int) -> None:
        for number, at in enumerate(range(0, data.nbytes, PAGE_SIZE)):
            to = number * DIGEST_SIZE
            out[to : to + DIGEST_SIZE] = sha384(data[at : at + PAGE_SIZE])

    def _chain(
        self,
        digest: bytearray,
        info: bytes,
        gpa: int,
        contents: Buffer,
        npages: int,
        out: memoryview | None,
    ) -> None:
        same = len(contents) == DIGEST_SIZE
        current = bytes(digest)
        for number in range(npages):
            at = 0 if same else number * DIGEST_SIZE
            page = contents[at : at + DIGEST_SIZE]
            current = _step(current, page, info, gpa + number * PAGE_SIZE)
            if out is not None:
                to = number * RECORD_SIZE
                out[to : to + RECORD_SIZE] = bytes(page) + current
        digest[:] = current

    def _records(
        self,
        digest: bytearray,
        info: bytes,
        gpa: int,
        data: memoryview,
        out: memoryview,
        threads: int,
    ) -> None:
        current = bytes(digest)
        for number, at in enumerate(range(0, data.nbytes, PAGE_SIZE)):
            page = sha384(data[at : at + PAGE_SIZE])
            current = _step(current, page, info, gpa + at)
            to = number * RECORD_SIZE
            out[to : to + RECORD_SIZE] = page + current
        digest[:] = current


def _step(current: bytes, contents: Buffer, info: bytes, gpa: int) -> bytes:
    """SHA-384 of PAGE_INFO, see `kvmlaunch.abi.digest`."""
    return sha384(b"".join((current, contents, info, gpa.to_bytes(8, "little"))))
