"""The guest's page tables: linear address to GPA, C-bit and rights.

Long mode with 4 levels, PAE, and 32-bit tables with 4 MiB pages. With paging off, in 32-bit
tables, for instruction fetches and for page tables themselves all accesses of an SNP guest are
private.

Sources: AMD APM volume 2, 5.3-5.6 (translation, protection) and 15.34.5 (C-bit).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .engine import FETCH, READ, WRITE
from .faults import GP, PF, GuestFault
from .options import CpuOptions
from .pages import Pages

__all__ = ["Walker"]

_P, _W, _U, _A, _D, _PS = 1, 2, 4, 0x20, 0x40, 0x80
_NX = 1 << 63
_LINEAR_32 = 0xFFFFFFFF
_PG, _WP = 1 << 31, 1 << 16
_PSE, _PAE, _SMEP, _SMAP = 1 << 4, 1 << 5, 1 << 20, 1 << 21
_LMA, _NXE = 1 << 10, 1 << 11
_AC = 1 << 18

# Bits of a #PF error code.
_PRESENT, _WRITE, _USER, _RESERVED, _FETCH = 1, 2, 4, 8, 16


class _Leaf(NamedTuple):
    """The entry that maps a page."""

    gpa: int
    entry: int
    access: int
    """W, U and NX of all levels together."""
    table: Any
    slot: int
    table_gpa: int


class Walker:
    """Translates for one guest."""

    def __init__(self, pages: Pages, options: CpuOptions) -> None:
        self._pages = pages
        self._snp = options.snp
        self._c_bit = 1 << options.c_bit if options.snp else 0
        width = (1 << options.physical_bits) - 1
        self._address = width & ~0xFFF & ~self._c_bit
        self._reserved = ((1 << 52) - 1) & ~width & ~self._c_bit

    def walk(
        self,
        linear: int,
        kind: int,
        user: bool,
        vmpl: int,
        cr0: int,
        cr3: int,
        cr4: int,
        efer: int,
        flags: int,
    ) -> tuple[int, bool, int]:
        """Translate the page at a linear address for one kind of access.

        Returns GPA, whether it is private, and the rights: those that accesses of this
        privilege have, but no WRITE to a page that isn't dirty yet.

        Raises:
            GuestFault: #PF, its address is `linear`, or #GP.
            HostFault: a page table is out of reach.
        """
        long = efer & _LMA
        if not long:
            linear &= _LINEAR_32
        if not cr0 & _PG:
            return linear, self._snp, READ | WRITE | FETCH
        wide = long or cr4 & _PAE
        error = (_WRITE if kind == WRITE else 0) | (_USER if user else 0)
        if kind == FETCH and ((efer & _NXE and wide) or cr4 & _SMEP):
            error |= _FETCH
        if long:
            if linear + (1 << 47) & 0xFFFF000000000000:
                raise GuestFault(GP, 0)
            leaf = self._walk_wide(linear, error, vmpl, cr3, (39, 30, 21, 12), efer)
        elif wide:
            leaf = self._walk_wide(linear, error, vmpl, cr3, (30, 21, 12), efer)
        else:
            leaf = self._walk_32(linear, error, vmpl, cr3, cr4)
        entry, access = leaf.entry, leaf.access

        rights = READ | (WRITE if access & _W else 0) | (0 if access & _NX else FETCH)
        if user:
            if not access & _U:
                rights = 0
        else:
            if not cr0 & _WP:
                rights |= WRITE
            if access & _U:
                if cr4 & _SMEP:
                    rights &= ~FETCH
                if cr4 & _SMAP and not flags & _AC:
                    rights &= FETCH
        if not rights & kind:
            raise GuestFault(PF, error | _PRESENT, linear)

        if kind == WRITE:
            if entry & (_A | _D) != _A | _D:
                self._mark(leaf.table, leaf.slot, leaf.table_gpa, vmpl, entry | _A | _D)
        else:
            if not entry & _A:
                self._mark(leaf.table, leaf.slot, leaf.table_gpa, vmpl, entry | _A)
            if not entry & _D:
                rights &= ~WRITE
        if not self._c_bit:
            return leaf.gpa, False, rights
        if not wide or entry & self._c_bit:
            return leaf.gpa, True, rights
        if kind == FETCH:
            # From the private page, although the C-bit is off: no data access may share this.
            return leaf.gpa, True, FETCH
        return leaf.gpa, False, rights & ~FETCH

    def _walk_wide(
        self, linear: int, error: int, vmpl: int, cr3: int, shifts: tuple[int, ...], efer: int
    ) -> _Leaf:
        """Tables with 8-byte entries."""
        address, reserved = self._address, self._reserved
        if not efer & _NXE:
            reserved |= _NX
        access, nx = _W | _U, 0
        legacy = len(shifts) == 3
        table_gpa = cr3 & (0xFFFFF000 if legacy else address)
        first = cr3 >> 3 & 0x1FC if legacy else 0
        for shift in shifts:
            table = self._pages.table(table_gpa, vmpl, True)
            index = (linear >> shift & 0x1FF) + first
            first = 0
            entry = table[index]
            if not entry & _P:
                raise GuestFault(PF, error, linear)
            bad, last = reserved, shift == 12
            pointer = legacy and shift == 30  # a PDPE of legacy PAE: no rights, no A bit
            if pointer:
                bad |= 0x1E6 | 0xFFF << 52
            elif legacy:
                bad |= 0x7FF << 52
            if entry & _PS and not last and not pointer:
                last = True
                bad |= _PS if shift == 39 else (1 << shift) - 1 & ~0x1FFF
            if entry & bad:
                raise GuestFault(PF, error | _PRESENT | _RESERVED, linear)
            if not pointer:
                access &= entry
                nx |= entry & _NX
                if last:
                    mask = (1 << shift) - 1
                    gpa = (entry & address & ~mask) | (linear & mask & ~0xFFF)
                    return _Leaf(gpa, entry, access | nx, table, index, table_gpa)
                if not entry & _A:
                    self._mark(table, index, table_gpa, vmpl, entry | _A)
            table_gpa = entry & address
        raise AssertionError("the last level ends the walk")

    def _walk_32(self, linear: int, error: int, vmpl: int, cr3: int, cr4: int) -> _Leaf:
        """Tables with 4-byte entries."""
        table_gpa, access = cr3 & 0xFFFFF000, _W | _U
        for shift in (22, 12):
            table = self._pages.table(table_gpa, vmpl, False)
            index = linear >> shift & 0x3FF
            entry = table[index]
            if not entry & _P:
                raise GuestFault(PF, error, linear)
            access &= entry
            if shift == 12:
                return _Leaf(entry & 0xFFFFF000, entry, access, table, index, table_gpa)
            if entry & _PS and cr4 & _PSE:
                if entry & 1 << 21:
                    raise GuestFault(PF, error | _PRESENT | _RESERVED, linear)
                gpa = (entry & 0xFFC00000) | (entry >> 13 & 0xFF) << 32 | (linear & 0x3FF000)
                return _Leaf(gpa, entry, access, table, index, table_gpa)
            if not entry & _A:
                self._mark(table, index, table_gpa, vmpl, entry | _A)
            table_gpa = entry & 0xFFFFF000
        raise AssertionError("the last level ends the walk")

    def _mark(self, table: Any, index: int, table_gpa: int, vmpl: int, entry: int) -> None:
        """Set the A or D bit, if this VMPL may write the table."""
        self._pages.check_table_write(table_gpa, vmpl)
        table[index] = entry
