"""Port I/O and MMIO through the GHCB (x86.c: kvm_fast_pio, kvm_sev_es_string_io, ..._mmio_...)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmlaunch.abi.ghcb import GhcbError, ioio_size
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim import exits, io_bus
from kvmlaunch.sim.ghcb import Ghcb, ScratchArea
from kvmlaunch.sim.uaccess import refuse

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["mmio_read", "mmio_write", "port_io"]

_IN, _STRING = 1 << 0, 1 << 2
_INT_MAX = (1 << 31) - 1
_U64 = (1 << 64) - 1
_MMIO_PIECE = 8
_KEPT_BELOW = 4  # bytes: shorter items leave the rest of RAX as it is


def port_io(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """io_interception()."""
    size, port = ioio_size(ghcb.info_1), ghcb.info_1 >> 16 & 0xFFFF
    is_in = bool(ghcb.info_1 & _IN)
    if ghcb.info_1 & _STRING:
        return _string(vcpu, ghcb, size, port, is_in=is_in)
    run, registers = vcpu.run, ghcb.registers
    data = bytes(size) if is_in else registers["rax"].to_bytes(8, "little")[:size]
    if not is_in and io_bus.write(vcpu, port, data, pio=True):
        return 1
    exits.put_io_data(run, data)
    exits.io(run, is_in=is_in, port=port, size=size, count=1)

    def complete() -> int:
        if is_in:
            old = registers["rax"].to_bytes(8, "little") if size < _KEPT_BELOW else bytes(8)
            value = exits.io_data(run, size) + old[size:]
            registers["rax"] = int.from_bytes(value, "little")
        return 1

    vcpu.running.complete = complete
    return 0


def _string(vcpu: Vcpu, ghcb: Ghcb, size: int, port: int, *, is_in: bool) -> int:
    """sev_es_string_io(): as many exits as the data page needs."""
    if ghcb.info_2 * size > _INT_MAX:
        refuse(errno.EINVAL)
    if not ghcb.info_2:
        return 1
    area = _scratch(vcpu, ghcb, ghcb.info_2 * size, sync=is_in)
    if area is None:
        return 1
    return _StringIo(vcpu, area, size, port, ghcb.info_2, is_in).go_on()


class _StringIo:
    """kvm_sev_es_ins() and kvm_sev_es_outs(), between their exits."""

    def __init__(
        self, vcpu: Vcpu, area: ScratchArea, size: int, port: int, count: int, is_in: bool
    ) -> None:
        self._vcpu = vcpu
        self._area = area
        self._size = size
        self._port = port
        self._left = count
        self._is_in = is_in
        self._at = 0

    def go_on(self) -> int:
        run = self._vcpu.run
        count = min(PAGE_SIZE // self._size, self._left)
        length = count * self._size
        data = bytes(length) if self._is_in else self._area.read(self._at, length)

        def complete() -> int:
            if self._is_in:
                self._area.write(self._at, exits.io_data(run, length))
            self._at += length
            self._left -= count
            return self.go_on() if self._left else 1

        if not self._is_in and self._in_kernel(data):
            return complete()
        exits.put_io_data(run, data)
        exits.io(run, is_in=self._is_in, port=self._port, size=self._size, count=count)
        self._vcpu.running.complete = complete
        return 0

    def _in_kernel(self, data: bytes) -> bool:
        """emulator_pio_in_out(): once the kernel took an item, it takes or drops the others."""
        for at in range(0, len(data), self._size):
            item = data[at : at + self._size]
            if not io_bus.write(self._vcpu, self._port, item, pio=True):
                return at > 0
        return True


def mmio_read(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """SVM_VMGEXIT_MMIO_READ."""
    return _mmio(vcpu, ghcb, is_write=False)


def mmio_write(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """SVM_VMGEXIT_MMIO_WRITE."""
    return _mmio(vcpu, ghcb, is_write=True)


def _mmio(vcpu: Vcpu, ghcb: Ghcb, *, is_write: bool) -> int:
    size = ghcb.info_2
    if not size:
        return 1
    if size > _MMIO_PIECE and vcpu.vm.sev.ghcb_version >= 2:
        return ghcb.refuse(GhcbError.INVALID_INPUT)
    area = _scratch(vcpu, ghcb, size, sync=not is_write)
    if area is None:
        return 1
    done = _in_kernel(vcpu, area, ghcb.info_1, size, is_write=is_write)
    if done == size:
        return 1
    return _mmio_piece(vcpu, area, ghcb.info_1, done, size - done, is_write=is_write)


def _in_kernel(vcpu: Vcpu, area: ScratchArea, gpa: int, size: int, *, is_write: bool) -> int:
    """vcpu_mmio_read() and vcpu_mmio_write(): how many bytes are done here, from the first on."""
    done = 0
    while done < size:
        count = min(size - done, _MMIO_PIECE)
        if is_write:
            data = area.read(done, count)
            if not io_bus.write(vcpu, gpa + done & _U64, data, pio=False):
                break
        else:
            answer = vcpu.apic.read_mmio(gpa + done & _U64, count)
            if answer is None:
                break
            area.write(done, answer)
        done += count
    return done


def _mmio_piece(
    vcpu: Vcpu, area: ScratchArea, gpa: int, at: int, left: int, *, is_write: bool
) -> int:
    """The bytes from ``at`` on, by user space."""
    size = min(left, _MMIO_PIECE)
    data = area.read(at, size) if is_write else None
    exits.mmio(vcpu.run, gpa + at & _U64, size, data)

    def complete() -> int:
        # KVM doesn't remember here that it was a write: what user space left in the data
        # goes back to the scratch area, and the next piece is announced as a read.
        area.write(at, exits.mmio_data(vcpu.run, size))
        if left <= _MMIO_PIECE:
            return 1
        return _mmio_piece(vcpu, area, gpa, at + size, left - size, is_write=False)

    vcpu.running.complete = complete
    return 0


def _scratch(vcpu: Vcpu, ghcb: Ghcb, size: int, *, sync: bool) -> ScratchArea | None:
    area = ghcb.open_scratch(size, vcpu.vm.sev.ghcb_version, sync=sync)
    assert vcpu.sev_es is not None
    vcpu.sev_es.scratch = area
    return area
