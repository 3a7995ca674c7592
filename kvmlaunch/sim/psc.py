"""Page state changes by list (sev.c: snp_begin_psc): ranges go to user space one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmlaunch.abi.ghcb import MAX_PSC_ENTRIES, PageOperation
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim import exits
from kvmlaunch.sim.ghcb import Ghcb, ScratchArea
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu
    from kvmlaunch.sim.vm import Vm

__all__ = ["attribute", "begin", "is_exit_enabled"]

_HEADER_SIZE = _ENTRY_SIZE = 8
_LARGE_PAGES = 512
_ERROR_GENERIC = 0x100 << 32
_ERROR_INVALID_HEADER = 1 << 32 | 1
_ERROR_INVALID_ENTRY = 1 << 32 | 2


def is_exit_enabled(vm: Vm) -> bool:
    """Whether user space takes KVM_HC_MAP_GPA_RANGE."""
    return bool(vm.hypercall_exits >> lib.KVM_HC_MAP_GPA_RANGE & 1)


def attribute(operation: int) -> int:
    """What MAP_GPA_RANGE is asked for."""
    private = operation == PageOperation.PRIVATE
    return int(lib.KVM_MAP_GPA_RANGE_ENCRYPTED if private else lib.KVM_MAP_GPA_RANGE_DECRYPTED)


def begin(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """The PSC event."""
    area = ghcb.open_scratch(_HEADER_SIZE, vcpu.vm.sev.ghcb_version, sync=True)
    if area is None:
        return 1
    assert vcpu.sev_es is not None
    vcpu.sev_es.scratch = area
    return _Change(vcpu, ghcb, area).go_on()


class _Entry(NamedTuple):
    """One 8-byte entry of the list."""

    cur_page: int
    gfn: int
    operation: int
    is_large: int

    @classmethod
    def decode(cls, word: int) -> _Entry:
        return cls(word & 0xFFF, word >> 12 & (1 << 40) - 1, word >> 52 & 0xF, word >> 56 & 1)

    @property
    def npages(self) -> int:
        return _LARGE_PAGES if self.is_large else 1


class _Change:
    """One list, until it is done. The guest may change it meanwhile: each word is read once."""

    def __init__(self, vcpu: Vcpu, ghcb: Ghcb, area: ScratchArea) -> None:
        self._vcpu = vcpu
        self._ghcb = ghcb
        self._area = area
        self._first = self._batch = 0
        self._max = (area.size - _HEADER_SIZE) // _ENTRY_SIZE

    def go_on(self) -> int:
        """snp_begin_psc(): the next range for user space, if there is one."""
        if not is_exit_enabled(self._vcpu.vm) or self._max > MAX_PSC_ENTRIES:
            return self._finish(_ERROR_GENERIC)
        index = self._word16(0)
        while True:
            last = self._word16(2)
            if last >= self._max:
                return self._finish(_ERROR_INVALID_HEADER)
            found = self._find(index, last)
            if isinstance(found, int):
                return self._finish(found)
            start, index, gfn, npages, is_large = found
            npages = self._merge(start, index, last, npages, is_large)
            if start.operation in (PageOperation.PRIVATE, PageOperation.SHARED):
                self._exit(start, gfn, npages)
                return 0
            # What isn't supported counts as done. The index isn't read back, as the list's
            # memory may have gone: then it would stay the same for ever.
            index = self._mark_batch_done()

    def _find(self, index: int, last: int) -> tuple[_Entry, int, int, int, bool] | int:
        """The next entry with work left: entry, index, GFN, pages, large; or the final answer."""
        while index <= last:
            entry = self._entry(index)
            if entry.cur_page > entry.npages or entry.gfn % entry.npages:
                return _ERROR_INVALID_ENTRY
            if entry.cur_page < entry.npages:
                # What is left of a 2 MiB entry is done in 4 KiB pages.
                large = bool(entry.is_large) and not entry.cur_page
                return (
                    entry,
                    index,
                    entry.gfn + entry.cur_page,
                    entry.npages - entry.cur_page,
                    large,
                )
            self._put16(0, self._word16(0) + 1 & 0xFFFF)
            index += 1
        return 0

    def _merge(self, start: _Entry, index: int, last: int, npages: int, is_large: bool) -> int:
        """Take the following entries into the range as far as they go on with it."""
        self._first, self._batch = index, 1
        while (index := index + 1) <= last:
            entry = self._entry(index)
            follows = entry.operation == start.operation and entry.gfn == start.gfn + npages
            if not follows or entry.cur_page or bool(entry.is_large) != is_large:
                break
            self._batch += 1
            npages += _LARGE_PAGES if is_large else 1
        return npages

    def _exit(self, start: _Entry, gfn: int, npages: int) -> None:
        size = (
            lib.KVM_MAP_GPA_RANGE_PAGE_SZ_2M if start.is_large else lib.KVM_MAP_GPA_RANGE_PAGE_SZ_4K
        )
        exits.hypercall(
            self._vcpu.run,
            (gfn * PAGE_SIZE, npages, attribute(start.operation) | size),
            flags=None,
            clear_ret=self._vcpu.vm.host.profile.hypercall_ret_cleared,
        )
        self._vcpu.running.complete = self._complete

    def _complete(self) -> int:
        """snp_complete_one_psc()."""
        if self._vcpu.run.hypercall.ret:
            return self._finish(_ERROR_GENERIC)
        self._mark_batch_done()
        return self.go_on()

    def _mark_batch_done(self) -> int:
        """__snp_complete_one_psc(): the index of the entry behind."""
        for index in range(self._first, self._first + self._batch):
            word = int.from_bytes(self._area.read(_offset(index), _ENTRY_SIZE), "little")
            word = word & ~0xFFF | _Entry.decode(word).npages
            self._area.write(_offset(index), word.to_bytes(_ENTRY_SIZE, "little"))
        behind = self._first + self._batch
        self._put16(0, behind)
        return behind

    def _finish(self, answer: int) -> int:
        self._ghcb.put("exit_info_2", answer)
        return 1

    def _entry(self, index: int) -> _Entry:
        return _Entry.decode(int.from_bytes(self._area.read(_offset(index), _ENTRY_SIZE), "little"))

    def _word16(self, offset: int) -> int:
        return int.from_bytes(self._area.read(offset, 2), "little")

    def _put16(self, offset: int, value: int) -> None:
        self._area.write(offset, value.to_bytes(2, "little"))


def _offset(index: int) -> int:
    return _HEADER_SIZE + _ENTRY_SIZE * index
