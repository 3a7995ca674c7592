"""One record per measured page, the same for a prediction and for a launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvmlaunch.abi.digest import DIGEST_SIZE
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.hashing import RECORD_SIZE

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["PageRecord", "RecordBatch"]


@dataclass(frozen=True)
class PageRecord:
    """What one page adds to the launch digest.

    Attributes:
        seq: position in the launch, from 0.
        gpa: guest physical address in PAGE_INFO.
        type: page type.
        contents: PAGE_INFO.CONTENTS, 48 bytes (zeros where none is measured).
        digest: launch digest after this page, 48 bytes.
        origin: ``FILE+0xOFFSET``, or ``kvmlaunch:WHAT``.
        label: what the page is for.
        vcpu: index of the vCPU whose VMSA this is; None for other pages, and for a VMSA
            that no vCPU starts from.
    """

    seq: int
    gpa: int
    type: PageType
    contents: bytes
    digest: bytes
    origin: str
    label: str
    vcpu: int | None = None

    def to_event(self) -> dict[str, Any]:
        """The record as an event of schema kvmlaunch.log/1."""
        event: dict[str, Any] = {"event": "page", "seq": self.seq}
        if self.type is PageType.VMSA:
            event["event"] = "vmsa"
            event["vcpu"] = self.vcpu
        event["gpa"] = f"{self.gpa:#x}"
        event["type"] = self.type.name
        event["contents"] = self.contents.hex()
        event["digest"] = self.digest.hex()
        event["origin"] = self.origin
        if self.type is not PageType.VMSA:
            event["label"] = self.label
        return event

    def __str__(self) -> str:
        return (
            f"{self.seq:6} {self.gpa:#014x} {self.type.name:<10} {self.contents.hex()[:16]} "
            f"{self.digest.hex()[:16]} {self.label} ({self.origin})"
        )


@dataclass(frozen=True)
class RecordBatch:
    """Records of successive pages of one type that were hashed in one go.

    Attributes:
        seq, gpa: of the first.
        type, label, vcpu: see `PageRecord`.
        found: ``RECORD_SIZE`` bytes per page, see `kvmlaunch.hashing`.
        origins: see `kvmlaunch.images.PageRange.origin_runs`.
    """

    seq: int
    gpa: int
    type: PageType
    found: bytes
    origins: tuple[tuple[str, int | None, int], ...]
    label: str
    vcpu: int | None = None

    def __len__(self) -> int:
        return len(self.found) // RECORD_SIZE

    @property
    def digest(self) -> bytes:
        """Launch digest after the last of them, 48 bytes."""
        return self.found[-DIGEST_SIZE:]

    @cached_property
    def records(self) -> list[PageRecord]:
        """They themselves."""
        found = self.found
        return [
            PageRecord(
                self.seq + n,
                self.gpa + n * PAGE_SIZE,
                self.type,
                found[n * RECORD_SIZE : n * RECORD_SIZE + DIGEST_SIZE],
                found[n * RECORD_SIZE + DIGEST_SIZE : (n + 1) * RECORD_SIZE],
                origin,
                self.label,
                self.vcpu,
            )
            for n, origin in enumerate(self._origins())
        ]

    def _origins(self) -> Iterator[str]:
        for origin, offset, pages in self.origins:
            for n in range(pages):
                yield origin if offset is None else f"{origin}+{offset + n * PAGE_SIZE:#x}"
