"""IGVM files built byte by byte from the format's documents, not by code under test."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SNP, TDX, VBS, NATIVE = 2, 3, 1, 0
KVM_GPA = 0xFFFFFFFFF000
Payload = bytes | Callable[[int], bytes]
"""A header's bytes, or what makes them when it's known where the file's data begins."""
Header = tuple[int, Payload]


def platform(
    mask: int = 1, kind: int = SNP, *, vtl: int = 0, version: int = 1, border: int = 0
) -> Header:
    return 0x001, struct.pack("<IBBHQ", mask, vtl, kind, version, border)


def policy(word: int = 0x30000, mask: int = 1, reserved: int = 0) -> Header:
    return 0x101, struct.pack("<QII", word, mask, reserved)


def at(offset: int | None, base: int) -> int:
    """File offset of an offset in the file's data; None is no data."""
    return 0 if offset is None else base + offset


def page(
    gpa: int,
    data: int | None = None,
    *,
    flags: int = 0,
    kind: int = 0,
    mask: int = 1,
    reserved: int = 0,
) -> Header:
    """PAGE_DATA; ``data`` is an offset in the file's data."""
    return 0x302, lambda base: struct.pack(
        "<QIIIHH", gpa, mask, at(data, base), flags, kind, reserved
    )


def area(index: int, size: int = 0x1000, data: int | None = None) -> Header:
    return 0x301, lambda base: struct.pack("<QII", size, index, at(data, base))


def insert(gpa: int, index: int, mask: int = 1) -> Header:
    return 0x303, struct.pack("<QII", gpa, mask, index)


def parameter(kind: int, index: int, offset: int = 0) -> Header:
    return kind, struct.pack("<II", index, offset)


def context(gpa: int, data: int | None, vcpu: int = 0, mask: int = 1, reserved: int = 0) -> Header:
    return 0x304, lambda base: struct.pack("<QIIHH", gpa, mask, at(data, base), vcpu, reserved)


def required(gpa: int, size: int, mask: int = 1, flags: int = 0, reserved: int = 0) -> Header:
    return 0x305, struct.pack("<QIIII", gpa, mask, size, flags, reserved)


def error_range(gpa: int, size: int, mask: int = 1) -> Header:
    return 0x30D, struct.pack("<QII", gpa, mask, size)


def igvm(
    headers: Sequence[Header],
    data: bytes = b"",
    *,
    version: int = 1,
    gap: int = 0,
    padding: bytes = b"\0",
    length: int | None = None,
    **fields: Any,
) -> bytes:
    """A file; ``fields`` override those of the fixed header, ``length`` the first header's."""
    fixed = 24 if version != 2 else 32
    sizes = [len(p(0) if callable(p) else p) for _, p in headers]
    variable = sum(8 + -(-size // 8) * 8 for size in sizes)
    base = fixed + gap + variable
    body = b""
    for number, (kind, payload) in enumerate(headers):
        raw = payload(base) if callable(payload) else payload
        told = len(raw) if length is None or number else length
        body += struct.pack("<II", kind, told) + raw + padding * (-len(raw) % 8)
    words = {
        "magic": 0x4D564749,
        "version": version,
        "offset": fixed + gap,
        "size": variable,
        "total": base + len(data),
        "checksum": 0,
        "architecture": 0,
        "page_size": 4096,
        **fields,
    }
    count = fixed // 4
    head = struct.pack(f"<{count}I", *list(words.values())[:count])
    image = bytearray(head + bytes(gap) + body + data)
    if "checksum" not in fields:
        first = words["offset"]
        covered = bytes(image[:fixed]) + bytes(image[first : first + words["size"]])
        struct.pack_into("<I", image, 20, zlib.crc32(covered))
    return bytes(image)


def vmsa(**fields: int) -> bytes:
    """A VMSA in real mode at 0x1000: SEV_FEATURES 1 and what KVM would set itself."""
    raw = bytearray(4096)
    values = {
        0x3B0: 1,  # sev_features
        0x3E8: 1,  # xcr0
        0xD0: 0x1000,  # efer
        0x148: 0x40,  # cr4
        0x158: 0x10,  # cr0
        0x160: 0x400,  # dr7
        0x168: 0xFFFF0FF0,  # dr6
        0x170: 2,  # rflags
        0x178: 0x1000,  # rip
        0x318: fields.get("rbx", 0),
        0x1F8: fields.get("rax", 0),
    }
    values[0x3B0] = fields.get("sev_features", 1)
    for offset, value in values.items():
        struct.pack_into("<Q", raw, offset, value)
    for offset in (0x00, 0x20, 0x30, 0x40, 0x50):  # es, ss, ds, fs, gs
        struct.pack_into("<HHIQ", raw, offset, 0, 0x93, 0xFFFF, 0)
    struct.pack_into("<HHIQ", raw, 0x10, 0, 0x9B, 0xFFFF, 0)  # cs
    struct.pack_into("<HHIQ", raw, 0x60, 0, 0, 0xFFFF, 0)  # gdtr
    struct.pack_into("<HHIQ", raw, 0x70, 0, 0x82, 0xFFFF, 0)  # ldtr
    struct.pack_into("<HHIQ", raw, 0x80, 0, 0, 0xFFFF, 0)  # idtr
    struct.pack_into("<HHIQ", raw, 0x90, 0, 0x8B, 0xFFFF, 0)  # tr
    raw[0xCA] = fields.get("vmpl", 0)
    struct.pack_into("<Q", raw, 0x268, 0x0007040600070406)  # g_pat
    struct.pack_into("<I", raw, 0x408, 0x1F80)  # mxcsr
    struct.pack_into("<H", raw, 0x410, 0x37F)  # x87_fcw
    return bytes(raw)


def pattern(seed: int) -> bytes:
    """A page that no other seed has."""
    return bytes((n * 3 + seed * 31 + 1) & 0xFF for n in range(4096))


def framed(kind: int, raw: bytes) -> bytes:
    """A header with its type and length."""
    return struct.pack("<II", kind, len(raw)) + raw + bytes(-len(raw) % 8)


def write(path: Path, *headers: Header, data: bytes = b"") -> Path:
    """A file for SNP with these headers."""
    path.write_bytes(igvm([platform(), *headers], data))
    return path


def write_large(path: Path, pages: int) -> None:
    """An IGVM file of so many pages, no two alike."""
    start = igvm([platform()])[24:]
    base = 24 + len(start) + 32 * pages
    head = struct.pack("<IIIIII", 0x4D564749, 1, 24, base - 24, base + pages * 4096, 0)
    body = start + b"".join(
        framed(0x302, struct.pack("<QIIIHH", (256 + n) * 4096, 1, base + n * 4096, 0, 0, 0))
        for n in range(pages)
    )
    crc = zlib.crc32(body, zlib.crc32(head))
    with path.open("wb") as file:
        file.write(head[:20] + struct.pack("<I", crc) + body)
        for n in range(pages):
            file.write(n.to_bytes(4, "little") * 1024)
