"""A segment register as the VMCB and the VMSA hold it (16 bytes).

Source: AMD APM volume 2, tables B-2 and B-4; Linux `struct vmcb_seg`.
"""

from __future__ import annotations

from ._check import exact_size, uint
from .page import Buffer
from .record import Record

__all__ = ["SEGMENT_FIELDS", "SEGMENT_SIZE", "Segment", "VmsaField"]


class VmsaField(Record):
    """One line of the field table; offset and size in bytes."""

    name: str
    offset: int
    size: int


SEGMENT_FIELDS = (
    VmsaField("selector", 0, 2),
    VmsaField("attrib", 2, 2),
    VmsaField("limit", 4, 4),
    VmsaField("base", 8, 8),
)
"""Layout of a segment register inside its 16 bytes."""

SEGMENT_SIZE = 16


class Segment(Record):
    """A segment register, 16 bytes.

    `attrib` is the VMCB's packed form: type 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, D/B 10, G 11.
    `limit` is in bytes, `base` an address.
    """

    selector: int = 0
    attrib: int = 0
    limit: int = 0
    base: int = 0

    def __post_init__(self) -> None:
        """Refuse a value that is too large."""
        for field in SEGMENT_FIELDS:
            uint(field.name, getattr(self, field.name), field.size * 8)

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        parts = (getattr(self, f.name).to_bytes(f.size, "little") for f in SEGMENT_FIELDS)
        return b"".join(parts)

    @classmethod
    def decode(cls, buf: Buffer) -> Segment:
        """Read 16 bytes."""
        raw = exact_size("a segment", buf, SEGMENT_SIZE)
        return cls(
            *(int.from_bytes(raw[f.offset : f.offset + f.size], "little") for f in SEGMENT_FIELDS)
        )

    def __repr__(self) -> str:
        """Return an expression with the parts that are not 0."""
        parts = ((f.name, getattr(self, f.name)) for f in SEGMENT_FIELDS)
        return f"Segment({', '.join(f'{name}={part:#x}' for name, part in parts if part)})"
