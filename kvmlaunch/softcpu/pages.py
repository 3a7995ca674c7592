"""The pages behind GPAs: backing, and for private pages the rules of the RMP.

Source: AMD APM volume 2, 15.36.10 (RMP and VMPL access checks).
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

from .engine import FETCH, READ, WRITE
from .events import FaultReason, NestedFault
from .faults import PAGE_NOT_VALIDATED, VC, VC_NESTED_FAULT, GuestFault, HostFault, MmioFault
from .memory import Access, GuestMemory, Missing, RmpEntry
from .options import CpuOptions

__all__ = ["LARGE_PAGE", "Pages"]

LARGE_PAGE = 2 << 20
_MAX_TABLES = 4096
_ACCESS = {READ: Access.READ, WRITE: Access.WRITE, FETCH: Access.FETCH}
_RMP_READ, _RMP_WRITE, _RMP_USER, _RMP_SUPERVISOR = 1, 2, 4, 8


class Pages:
    """Pages of one guest, as one VMPL may use them."""

    def __init__(self, memory: GuestMemory, options: CpuOptions) -> None:
        self.memory = memory
        self._options = options
        self._tables: dict[tuple[int, int], Any] = {}

    def flush(self) -> None:
        """Forget where page tables are."""
        self._tables.clear()

    def use(self, gpa: int, private: bool, kind: int, user: bool, vmpl: int) -> int:
        """Return host address | rights of a page, for an access of that kind.

        Raises:
            HostFault, MmioFault, GuestFault: the page can't be used.
        """
        host = self.memory.resolve(gpa, private, kind == WRITE)
        if not isinstance(host, int):
            if host is Missing.ABSENT or private or (kind == FETCH and not self._options.snp):
                raise HostFault(NestedFault(gpa, _ACCESS[kind], private, FaultReason.ABSENT))
            if self._options.snp:
                raise GuestFault(VC, VC_NESTED_FAULT)
            raise MmioFault(gpa, kind == WRITE)
        if not private:
            if kind != WRITE and self.memory.write_protected(gpa):
                return host | READ | FETCH
            return host | READ | WRITE | FETCH
        entry = self.entry(gpa, kind)
        if not entry.validated:
            raise GuestFault(VC, PAGE_NOT_VALIDATED)
        perms = entry.perms[vmpl]
        rights = perms & (_RMP_READ | _RMP_WRITE)  # the numbers of READ and WRITE
        if perms & (_RMP_USER if user else _RMP_SUPERVISOR):
            rights |= FETCH
        if not rights & kind:
            raise HostFault(NestedFault(gpa, _ACCESS[kind], True, FaultReason.VMPL))
        return host | rights

    def entry(self, gpa: int, kind: int = READ) -> RmpEntry:
        """Return the RMP entry of a private page that is this guest's at this GPA.

        Raises:
            HostFault: it isn't.
        """
        entry = self.memory.rmp_lookup(gpa)
        if not entry.assigned:
            reason = FaultReason.NOT_ASSIGNED
        elif entry.asid != self._options.asid:
            reason = FaultReason.ASID
        elif entry.gpa != (gpa & -LARGE_PAGE if entry.page_size else gpa):
            reason = FaultReason.GPA
        elif entry.immutable:
            reason = FaultReason.IMMUTABLE
        else:
            return entry
        raise HostFault(NestedFault(gpa, _ACCESS[kind], True, reason))

    def table(self, gpa: int, vmpl: int, wide: bool) -> Any:
        """Return a page table as an array of numbers, 8 bytes each or 4.

        An SNP guest's page tables are private, whatever the C-bit says.
        """
        found = self._tables.get((gpa, vmpl))
        if found is None:
            host = self._use_table(gpa, READ, vmpl)
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            found = (
                (ctypes.c_uint64 * 512).from_address(host),
                (ctypes.c_uint32 * 1024).from_address(host),
            )
            self._tables[gpa, vmpl] = found
        return found[0] if wide else found[1]

    def check_table_write(self, gpa: int, vmpl: int) -> None:
        """Raise HostFault where this VMPL can't write a page table."""
        self._use_table(gpa, WRITE, vmpl)

    def _use_table(self, gpa: int, kind: int, vmpl: int) -> int:
        try:
            return self.use(gpa, self._options.snp, kind, False, vmpl) & ~0xFFF
        except HostFault as fault:
            event = dataclasses.replace(fault.event, walk=True)
        except MmioFault:
            # KVM can't emulate that either.
            event = NestedFault(gpa, _ACCESS[kind], False, FaultReason.ABSENT, walk=True)
        raise HostFault(event)
