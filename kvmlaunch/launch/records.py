"""One record per measured page, the same for a prediction and for a launch."""

from __future__ import annotations

from dataclasses import dataclass

from kvmlaunch.abi.page import PageType

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PageRecord"]


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
