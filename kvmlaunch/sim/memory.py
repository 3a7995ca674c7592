"""System physical memory of the simulated host, by system physical address (SPA).

Regions are buffers that somebody else owns (a guest_memfd, say); `alloc` gives pages of the
host's own. Nothing here knows the RMP: `page` is what the hardware sees, not what software
may touch. Memory is anonymous and lazily backed, so its size costs nothing until written.
"""

from __future__ import annotations

import bisect
import mmap

from kvmlaunch.abi.page import PAGE_SIZE

__all__ = ["FIRST_SPA", "REGION_ALIGN", "PhysicalMemory"]

FIRST_SPA = 0x1_0000_0000
"""Lowest SPA in use: everything below 4 GiB stays a hole, so that a GPA rarely passes for one."""
REGION_ALIGN = 2 << 20
"""Alignment of region bases, so that 2 MiB pages are possible."""

_ARENA_PAGES = (2 << 20) // PAGE_SIZE
_ZERO_PAGE = bytes(PAGE_SIZE)


class PhysicalMemory:
    """The physical address space. Addresses are never given to a second region."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._views: dict[int, memoryview] = {}
        self._next_base = FIRST_SPA
        self._arena = range(0)
        self._allocated: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}

    def map_region(self, buffer: mmap.mmap | bytearray) -> int:
        """Give `buffer` a contiguous range of addresses; return its base (2 MiB aligned).

        The buffer is used in place. An mmap can't be closed before `unmap_region`.
        """
        view = memoryview(buffer)
        if view.readonly or not len(view) or len(view) % PAGE_SIZE:
            raise ValueError(f"a region is writable and whole pages, not {len(view)} bytes")
        base = self._next_base
        end = base + len(view)
        self._next_base = -(-end // REGION_ALIGN) * REGION_ALIGN
        self._bases.append(base)  # bases only grow: the list stays sorted
        self._views[base] = view
        return base

    def unmap_region(self, base: int) -> None:
        """Take the region at `base` out of the address space.

        Views that `page` gave keep working, and keep the buffer, until they are dropped.
        """
        try:
            self._views.pop(base).release()
        except KeyError:
            raise ValueError(f"no region starts at SPA {base:#x}") from None
        del self._bases[bisect.bisect_left(self._bases, base)]

    def alloc(self, npages: int = 1) -> int:
        """Return the SPA of `npages` contiguous pages of host memory, all zero."""
        if npages < 1:
            raise ValueError(f"can't allocate {npages} pages")
        size = npages * PAGE_SIZE
        if again := self._free.get(npages):
            spa = again.pop()
            for page in range(spa, spa + size, PAGE_SIZE):
                self.page(page)[:] = _ZERO_PAGE
        elif npages > _ARENA_PAGES:
            spa = self.map_region(mmap.mmap(-1, size))
        else:
            if len(self._arena) < size:
                base = self.map_region(mmap.mmap(-1, _ARENA_PAGES * PAGE_SIZE))
                self._arena = range(base, base + _ARENA_PAGES * PAGE_SIZE)
            spa = self._arena.start
            self._arena = self._arena[size:]
        self._allocated[spa] = npages
        return spa

    def free(self, spa: int, npages: int = 1) -> None:
        """Give back what `alloc` returned; `npages` must be that of the allocation."""
        if self._allocated.get(spa) != npages:
            raise ValueError(f"{npages} pages at SPA {spa:#x} are not an allocation")
        del self._allocated[spa]
        self._free.setdefault(npages, []).append(spa)

    def page(self, spa: int) -> memoryview:
        """Return the page at `spa` (page aligned): 4096 writable bytes, no copy."""
        if spa % PAGE_SIZE:
            raise ValueError(f"SPA {spa:#x} is not page aligned")
        at = bisect.bisect_right(self._bases, spa) - 1
        if at >= 0:
            base = self._bases[at]
            found = self._views[base][spa - base : spa - base + PAGE_SIZE]
            if len(found):
                return found
        raise ValueError(f"no memory at SPA {spa:#x}")

    def __repr__(self) -> str:
        regions = ", ".join(f"{base:#x}+{len(self._views[base]):#x}" for base in self._bases)
        return f"<PhysicalMemory {regions or 'empty'}>"
