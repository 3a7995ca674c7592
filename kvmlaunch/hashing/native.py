"""The backends in C. Importing this needs the compiled extension."""

from __future__ import annotations

from kvmlaunch.abi.digest import DIGEST_SIZE
from kvmlaunch.abi.page import PAGE_SIZE, Buffer
from kvmlaunch.hashing._ext import ffi, lib
from kvmlaunch.hashing.hasher import Hasher

__all__ = ["NativeHasher", "native_hashers"]


class NativeHasher(Hasher):
    """One instruction set of csrc/hashing.c, by its index there."""

    def __init__(self, index: int, name: str) -> None:
        self._index = index
        self.name = name

    def _contents(self, data: memoryview, out: memoryview, threads: int) -> None:
        lib.kl_hash_contents(
            self._index,
            ffi.from_buffer(data),
            data.nbytes // PAGE_SIZE,
            ffi.from_buffer(out),
            threads,
        )

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
        records = ffi.NULL if out is None else ffi.from_buffer(out)
        lib.kl_hash_chain(
            self._index,
            ffi.from_buffer(digest),
            info,
            gpa,
            ffi.from_buffer(contents),
            npages,
            0 if same else DIGEST_SIZE,
            records,
        )

    def _records(
        self,
        digest: bytearray,
        info: bytes,
        gpa: int,
        data: memoryview,
        out: memoryview,
        threads: int,
    ) -> None:
        lib.kl_hash_pages(
            self._index,
            ffi.from_buffer(digest),
            info,
            gpa,
            ffi.from_buffer(data),
            data.nbytes // PAGE_SIZE,
            ffi.from_buffer(out),
            threads,
        )


def native_hashers() -> list[Hasher]:
    """What this processor can do, best first."""
    found: list[Hasher] = []
    while (name := lib.kl_hash_backend(len(found))) != ffi.NULL:
        found.append(NativeHasher(len(found), ffi.string(name).decode()))
    return found
