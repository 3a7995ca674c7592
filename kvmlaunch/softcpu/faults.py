"""What stops an instruction half-way, inside the package. Owners see events instead."""

from __future__ import annotations

from .events import NestedFault

__all__ = [
    "AC",
    "BP",
    "DB",
    "DF",
    "GP",
    "MC",
    "NP",
    "PAGE_NOT_VALIDATED",
    "PF",
    "SS_FAULT",
    "TS",
    "UD",
    "VC",
    "VC_NESTED_FAULT",
    "GuestFault",
    "HostFault",
    "MmioFault",
    "WatchFault",
]

DB, BP, UD, DF, TS, NP, SS_FAULT, GP, PF = 1, 3, 6, 8, 10, 11, 12, 13, 14
AC, MC, VC = 17, 18, 29

VC_NESTED_FAULT = 0x400
"""#VC error code of an access to an emulated device."""
PAGE_NOT_VALIDATED = 0x404
"""#VC error code of an access to a private page that was not validated."""


class GuestFault(Exception):
    """An exception for the guest. `address`: CR2 of a #PF."""

    def __init__(self, vector: int, error_code: int | None = None, address: int = 0) -> None:
        super().__init__(vector, error_code)
        self.vector = vector
        self.error_code = error_code
        self.address = address


class HostFault(Exception):
    """A nested page fault for the hypervisor."""

    def __init__(self, event: NestedFault) -> None:
        super().__init__(event)
        self.event = event


class MmioFault(Exception):
    """An access of a plain guest to a device; `gpa` is that of the page."""

    def __init__(self, gpa: int, write: bool) -> None:
        super().__init__(gpa, write)
        self.gpa = gpa
        self.write = write


class WatchFault(Exception):
    """An access to a page where the owner watches data."""

    def __init__(self, write: bool) -> None:
        super().__init__(write)
        self.write = write
