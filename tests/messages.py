"""Guest messages and reports taken apart and put together by hand (snp-firmware-abi 8.1, 8.4)."""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER_SIZE = 0x60
# (offset, size)
HEADER = {
    "authtag": (0x00, 16),
    "seqno": (0x20, 8),
    "algo": (0x30, 1),
    "hdr_version": (0x31, 1),
    "hdr_size": (0x32, 2),
    "msg_type": (0x34, 1),
    "msg_version": (0x35, 1),
    "msg_size": (0x36, 2),
    "msg_vmpck": (0x3C, 1),
}
KEY_REQ, KEY_RSP, REPORT_REQ, REPORT_RSP, TSC_REQ, TSC_RSP = 3, 4, 5, 6, 0x11, 0x12


def sealed(key: bytes, payload: bytes, *, seqno: int = 1, **fields: int) -> bytes:
    """A message; `fields` by the names of HEADER replace what a good one has."""
    values = {
        "seqno": seqno,
        "algo": 1,
        "hdr_version": 1,
        "hdr_size": HEADER_SIZE,
        "msg_type": REPORT_REQ,
        "msg_version": 1,
        "msg_size": len(payload),
        **fields,
    }
    header = bytearray(HEADER_SIZE)
    for name, value in values.items():
        at, size = HEADER[name]
        header[at : at + size] = value.to_bytes(size, "little")
    iv = seqno.to_bytes(8, "little") + bytes(4)
    sealed = AESGCM(key).encrypt(iv, payload, bytes(header[0x30:]))
    header[:16] = sealed[-16:]
    return bytes(header) + sealed[:-16]


def opened(key: bytes, message: bytes) -> tuple[dict[str, int], bytes]:
    """Header by the names of HEADER, and payload. Raises InvalidTag."""
    places = HEADER.items()
    header = {n: int.from_bytes(message[at : at + size], "little") for n, (at, size) in places}
    iv = message[0x20:0x28] + bytes(4)
    payload = message[HEADER_SIZE : HEADER_SIZE + header["msg_size"]]
    return header, AESGCM(key).decrypt(iv, payload + message[:16], message[0x30:HEADER_SIZE])


def report_req(data: bytes = b"R" * 64, vmpl: int = 0, key_sel: int = 0) -> bytes:
    words = vmpl.to_bytes(4, "little") + key_sel.to_bytes(4, "little")
    return (data + words).ljust(0x60, b"\0")


def key_req(
    select: int = 0,
    fields: int = 0,
    vmpl: int = 0,
    svn: int = 0,
    tcb: int = 0,
    mit: int | None = None,
) -> bytes:
    """Version 1, or 2 with `mit`."""
    words = ((select, 8), (fields, 8), (vmpl, 4), (svn, 4), (tcb, 8))
    raw = b"".join(value.to_bytes(size, "little") for value, size in words)
    return raw if mit is None else raw + mit.to_bytes(8, "little") + bytes(8)


def word(buf: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(buf[at : at + size], "little")
