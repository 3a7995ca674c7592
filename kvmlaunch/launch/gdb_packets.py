"""GDB remote serial protocol: packets out of a byte stream, and back into one.

Source: the GDB manual, appendix "GDB Remote Serial Protocol".
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["INTERRUPT", "MAX_PACKET", "Packet", "PacketReader", "encode"]

MAX_PACKET = 0x4000
"""Bytes that a packet may have in either direction."""

_ESCAPE, _XOR = 0x7D, 0x20
_SPECIAL = frozenset(b"#$}*")


class Packet(NamedTuple):
    """A packet's payload, unescaped; ``ok`` is whether its checksum fits."""

    data: bytes
    ok: bool = True


INTERRUPT = Packet(b"\x03")
"""Ctrl-C: a byte outside of packets."""


class PacketReader:
    """Takes bytes as they come; what is no packet is dropped."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that are complete now."""
        self._buffer += data
        found = []
        while True:
            packet = self._next()
            if packet is None:
                break
            found.append(packet)
        if len(self._buffer) > 2 * MAX_PACKET:
            self._buffer.clear()
        return found

    def _next(self) -> Packet | None:
        buffer = self._buffer
        while buffer and buffer[0] not in b"$\x03":
            del buffer[0]
        if not buffer:
            return None
        if buffer[0] == 3:
            del buffer[0]
            return INTERRUPT
        end = buffer.find(b"#")
        if end < 0 or len(buffer) < end + 3:
            return None
        body, digits = bytes(buffer[1:end]), bytes(buffer[end + 1 : end + 3])
        del buffer[: end + 3]
        try:
            ok = int(digits, 16) == sum(body) & 0xFF
        except ValueError:
            ok = False
        return Packet(_unescape(body), ok)


def encode(data: bytes) -> bytes:
    """A packet with this payload."""
    body = bytearray()
    for byte in data:
        body += bytes((_ESCAPE, byte ^ _XOR)) if byte in _SPECIAL else bytes((byte,))
    return b"$" + body + b"#%02x" % (sum(body) & 0xFF)


def _unescape(body: bytes) -> bytes:
    if _ESCAPE not in body:
        return body
    found, escaped = bytearray(), False
    for byte in body:
        if escaped or byte != _ESCAPE:
            found.append(byte ^ _XOR if escaped else byte)
        escaped = byte == _ESCAPE and not escaped
    return bytes(found)
