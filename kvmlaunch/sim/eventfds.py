"""ioeventfd and irqfd: eventfds that guest writes signal, and that raise interrupts (eventfd.c)."""

from __future__ import annotations

import errno
import os
import select
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmlaunch.sim.uaccess import Eventfd, copy_in, refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vm import Vm

__all__ = ["Ioeventfds", "Irqfds"]

_PIO, _CCW = lib.KVM_IOEVENTFD_FLAG_PIO, lib.KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY
_IRQ_FLAGS = lib.KVM_IRQFD_FLAG_DEASSIGN | lib.KVM_IRQFD_FLAG_RESAMPLE


@dataclass(frozen=True)
class _Place:
    """What a write must be like; ``value`` is None where any will do."""

    bus: int
    address: int
    length: int
    value: int | None

    def takes(self, bus: int, address: int, data: bytes) -> bool:
        """ioeventfd_in_range()."""
        if (bus, address) != (self.bus, self.address):
            return False
        if not self.length:
            return True
        value = int.from_bytes(data, "little")
        return len(data) == self.length and self.value in (None, value)

    def collides(self, other: _Place) -> bool:
        """ioeventfd_check_collision()."""
        if (self.bus, self.address) != (other.bus, other.address):
            return False
        if not self.length or not other.length:
            return True
        any_value = None in (self.value, other.value)
        return self.length == other.length and (any_value or self.value == other.value)


class Ioeventfds:
    """Places of one VM whose writes end in the kernel, with a signal."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._places: dict[_Place, Eventfd] = {}
        self.waiting: list[Eventfd] = []
        """To be signalled, once user space sees what the guest has written before."""

    def command(self, arg: int) -> int:
        """KVM_IOEVENTFD."""
        given = copy_in(self._vm.host.user, "kvm_ioeventfd", arg)
        if given.flags & lib.KVM_IOEVENTFD_FLAG_DEASSIGN:
            return self._deassign(given)
        return self._assign(given)

    def write(self, bus: int, address: int, data: bytes) -> bool:
        """A guest's write; ``bus`` is 0 for memory, KVM_IOEVENTFD_FLAG_PIO for ports."""
        for place, event in self._places.items():
            if place.takes(bus, address, data):
                self.waiting.append(event)
                return True
        return False

    def signal(self) -> None:
        """Wake those who wait for what was written."""
        for event in self.waiting:
            _signal(event.fd)
        self.waiting.clear()

    def close(self) -> None:
        """The VM is gone."""
        self.signal()
        for event in self._places.values():
            os.close(event.fd)
        self._places.clear()

    def _assign(self, given: Any) -> int:
        if given.len not in (0, 1, 2, 4, 8) or given.addr + given.len >> 64:
            refuse(errno.EINVAL)
        matches = given.flags & lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        if given.flags & ~lib.KVM_IOEVENTFD_VALID_FLAG_MASK or (matches and not given.len):
            refuse(errno.EINVAL)
        event = self._vm.host.user.eventfd(given.fd)
        place = _place(given)
        if any(place.collides(other) for other in self._places):
            os.close(event.fd)
            refuse(errno.EEXIST)
        self._places[place] = event
        return 0

    def _deassign(self, given: Any) -> int:
        event = self._vm.host.user.eventfd(given.fd)
        os.close(event.fd)
        place = _place(given)
        found = self._places.get(place)
        if found is None or found.id != event.id:
            refuse(errno.ENOENT)
        self.signal()  # what waits may be for this one
        del self._places[place]
        os.close(found.fd)
        return 0


def _signal(fd: int) -> None:
    """eventfd_signal(), which doesn't wait where a counter is full."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if poll.poll(0):
        os.eventfd_write(fd, 1)


def _place(given: Any) -> _Place:
    bus = _PIO if given.flags & _PIO else given.flags & _CCW
    matches = given.flags & lib.KVM_IOEVENTFD_FLAG_DATAMATCH
    return _Place(bus, given.addr, given.len, given.datamatch if matches else None)


class _Irqfd(NamedTuple):
    event: Eventfd
    gsi: int


class Irqfds:
    """Eventfds of one VM that raise interrupts. A thread of its own waits for them.

    An eventfd that everybody else has closed stays here until the VM ends; the kernel sees it go.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._by_fd: dict[int, _Irqfd] = {}
        self._epoll: select.epoll | None = None
        self._stop = -1

    def command(self, arg: int) -> int:
        """KVM_IRQFD."""
        vm = self._vm
        given = copy_in(vm.host.user, "kvm_irqfd", arg)
        if given.flags & ~_IRQ_FLAGS:
            refuse(errno.EINVAL)
        if given.flags & lib.KVM_IRQFD_FLAG_DEASSIGN:
            return self._deassign(given)
        resample = given.flags & lib.KVM_IRQFD_FLAG_RESAMPLE
        if not vm.irq.in_kernel or (resample and not vm.irq.pic):
            refuse(errno.EINVAL)
        if resample:
            refuse(errno.ENOSYS)  # no IOAPIC is simulated that acknowledges
        event = vm.host.user.eventfd(_signed(given.fd))
        if any(irqfd.event.id == event.id for irqfd in self._by_fd.values()):
            os.close(event.fd)
            refuse(errno.EBUSY)
        self._by_fd[event.fd] = _Irqfd(event, given.gsi)
        self._watch(event.fd)
        return 0

    def close(self) -> None:
        """The VM's descriptor is gone: the thread ends."""
        for fd in list(self._by_fd):
            self._remove(fd)
        if self._epoll is not None:
            os.eventfd_write(self._stop, 1)
            self._epoll = None

    def _deassign(self, given: Any) -> int:
        event = self._vm.host.user.eventfd(_signed(given.fd))
        os.close(event.fd)
        for fd, irqfd in list(self._by_fd.items()):
            if (irqfd.event.id, irqfd.gsi) == (event.id, given.gsi):
                self._remove(fd)
        return 0

    def _remove(self, fd: int) -> None:
        # The eventfd lives on, and so would its place in the epoll.
        assert self._epoll is not None
        self._epoll.unregister(fd)
        os.close(fd)
        del self._by_fd[fd]

    def _watch(self, fd: int) -> None:
        if self._epoll is None:
            self._epoll = select.epoll()
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            self._epoll.register(self._stop, select.EPOLLIN)
            args = (self._epoll, self._stop)
            threading.Thread(target=self._wait, args=args, name="irqfd", daemon=True).start()
        self._epoll.register(fd, select.EPOLLIN)

    def _wait(self, epoll: select.epoll, stop: int) -> None:
        host = self._vm.host
        with epoll:
            while True:
                ready = [fd for fd, _ in epoll.poll()]
                if stop in ready:
                    os.close(stop)
                    return
                with host.gate.stopped(), host.lock:
                    for fd in ready:
                        self._inject(fd)

    def _inject(self, fd: int) -> None:
        """irqfd_inject(): up and down again. Under the host's lock."""
        irqfd = self._by_fd.get(fd)
        if irqfd is None:
            return
        try:
            os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return  # its owner was faster
        self._vm.host.user.has_written()
        self._vm.irq.raise_line(self._vm, irqfd.gsi, 1)
        self._vm.irq.raise_line(self._vm, irqfd.gsi, 0)


def _signed(fd: int) -> int:
    return fd - (1 << 32) if fd >> 31 else fd
