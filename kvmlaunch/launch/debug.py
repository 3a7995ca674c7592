"""Stopping and going on: between the threads of a run and a debugger."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol

from kvmlaunch.errors import IoctlError, KvmLaunchError, MissingCapability
from kvmlaunch.kvm import Vcpu
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.registers import read_registers, write_registers
from kvmlaunch.uapi import lib

__all__ = ["SIGTRAP", "Debugger", "Stop", "Target", "target_of"]

_PAGE = 4096
_LAST_ADDRESS = (1 << 64) - 1
_DEBUG_REGISTERS = 4
_POLL_SECONDS = 0.2


class Target(Protocol):
    """A guest that stands still, as :class:`kvmlaunch.uapi.Inspector` has it."""

    def registers(self, vcpu: int) -> Mapping[str, int] | None:
        """Registers by name; None for a vCPU without state."""

    def set_registers(self, vcpu: int, values: Mapping[str, int]) -> bool:
        """Change registers; False, and nothing is changed, where one of them can't be."""

    def read_memory(self, vcpu: int, linear: int, size: int) -> bytes:
        """Guest memory, as far as it goes."""

    def write_memory(self, vcpu: int, linear: int, data: bytes) -> bool:
        """Change guest memory."""

    def set_breakpoints(self, places: Collection[int]) -> bool | None:
        """Where to stop; False if it can't be done."""

    def resume(self, steps: Collection[int]) -> None:
        """The vCPUs will go on, those in ``steps`` for one instruction."""


def target_of(guest: Guest) -> Target:
    """What a debugger can work on. Raises MissingCapability where the host doesn't let it."""
    inspector = guest.inspector
    if inspector is not None:
        return inspector
    if guest.state is not None:
        raise MissingCapability(
            "access to a protected guest", "--gdb (use --platform sim, or --vm-type plain)"
        )
    return _KvmTarget(guest)


class _KvmTarget:
    """A plain guest on a real kernel, by KVM_SET_GUEST_DEBUG and its debug registers."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._places: list[int] = []
        try:
            for control in (lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP, 0):
                guest.vcpus[0].set_guest_debug(control)
        except IoctlError as error:
            raise MissingCapability("KVM_SET_GUEST_DEBUG", "--gdb on this host") from error

    def registers(self, vcpu: int) -> Mapping[str, int] | None:
        """Registers by ioctl."""
        try:
            return read_registers(self._guest.vcpus[vcpu])
        except KvmLaunchError:
            return None

    def set_registers(self, vcpu: int, values: Mapping[str, int]) -> bool:
        """Change registers by ioctl."""
        return write_registers(self._guest.vcpus[vcpu], values)

    def read_memory(self, vcpu: int, linear: int, size: int) -> bytes:
        """What is mapped, page by page."""
        found = b""
        for view in self._views(vcpu, linear, size):
            if view is None:
                break
            found += view
        return found

    def write_memory(self, vcpu: int, linear: int, data: bytes) -> bool:
        """All or nothing."""
        views = self._views(vcpu, linear, len(data))
        if None in views:
            return False
        for view in views:
            assert view is not None
            view[:] = data[: len(view)]
            data = data[len(view) :]
        return True

    def _views(self, vcpu: int, linear: int, size: int) -> list[memoryview | None]:
        views: list[memoryview | None] = []
        while size > 0:
            count = min(size, _PAGE - linear % _PAGE)
            try:
                gpa = self._guest.vcpus[vcpu].translate(linear)
                views.append(None if gpa is None else self._guest.memory_view(gpa, count))
            except KvmLaunchError:
                views.append(None)
            linear, size = (linear + count) & _LAST_ADDRESS, size - count
        return views

    def set_breakpoints(self, places: Collection[int]) -> bool:
        """Debug registers, since not every KVM gives an exit for INT3: four at most."""
        if len(places) > _DEBUG_REGISTERS:
            return False
        self._places = list(places)
        return True

    def resume(self, steps: Collection[int]) -> None:
        """KVM_SET_GUEST_DEBUG for every vCPU."""
        dr7 = sum(2 << 2 * n for n in range(len(self._places)))
        registers = [*self._places, *[0] * (7 - len(self._places)), dr7]
        for index, vcpu in enumerate(self._guest.vcpus):
            control = lib.KVM_GUESTDBG_USE_HW_BP if self._places else 0
            control |= lib.KVM_GUESTDBG_SINGLESTEP if index in steps else 0
            control |= lib.KVM_GUESTDBG_ENABLE if control else 0
            vcpu.set_guest_debug(control, registers)


class Stop(NamedTuple):
    """Why the guest stands still: ``vcpu``, and ``signal`` as GDB numbers them.

    ``address`` is that of the next instruction (linear), where KVM stopped the guest for it.
    """

    vcpu: int
    signal: int
    address: int | None = None


SIGINT, SIGTRAP, SIGSEGV = 2, 5, 11


class Debugger:
    """Holds the vCPUs of a run, all together, until somebody lets them go.

    The run loop calls `attach`, `hold`, `hit`, `died`, `gone` and `end`; the other methods are
    the debugger's. A new one holds the guest before its first instruction.
    """

    def __init__(self, guest: Guest) -> None:
        """Raises MissingCapability where the host doesn't let it."""
        self.target = target_of(guest)
        self.vcpus = len(guest.vcpus)
        self.on_change: Callable[[], object] = lambda: None
        """Called, by any thread, when `stop` or `ended` may have changed."""
        self.ended: object = None
        """The outcome, once the run is over."""
        self.present = True
        """Whether somebody looks; set it to False when they leave."""
        self._changed = threading.Condition(threading.RLock())
        self._free: frozenset[int] = frozenset()
        self._held: set[int] = set()
        self._gone: set[int] = set()
        self._stop: Stop | None = Stop(0, SIGTRAP)
        self._kick: Callable[[int], object] = lambda vcpu: None
        self._kill: Callable[[], object] = lambda: None

    # The run loop's side

    def attach(self, kick: Callable[[int], object], kill: Callable[[], object]) -> None:
        """A run begins: ``kick`` makes a vCPU leave KVM_RUN, ``kill`` ends it all."""
        self._kick, self._kill = kick, kill

    def hold(self, index: int, vcpu: Vcpu) -> None:
        """Wait until this vCPU may run. It has no exit that isn't finished."""
        with self._changed:
            if index in self._free or self.ended is not None:
                return
            self._held.add(index)
            self._tell()
            while index not in self._free and self.ended is None:
                self._changed.wait(_POLL_SECONDS)
            self._held.discard(index)
            if self.ended is None:
                vcpu.clear_exit_request()

    def hit(self, index: int, address: int) -> None:
        """A breakpoint, or the end of a step, before the instruction at a linear address."""
        self._stop_for(Stop(index, SIGTRAP, address))

    def died(self, index: int, vcpu: Vcpu) -> None:
        """The guest has failed: a chance to look at it before the run is over."""
        if self.present:
            self._stop_for(Stop(index, SIGSEGV))
            self.hold(index, vcpu)

    def gone(self, index: int) -> None:
        """This vCPU doesn't come back."""
        with self._changed:
            self._gone.add(index)
            if self._held and self._free <= self._gone:
                # Those that could run have left, the others wait for the debugger.
                self._stop_for(Stop(min(self._held), SIGTRAP))
            self._tell()

    def end(self, outcome: object) -> None:
        """The run is over."""
        with self._changed:
            self.ended = outcome
            self._tell()

    def _stop_for(self, stop: Stop) -> None:
        with self._changed:
            if not self._free:
                return  # nobody wants to know, or somebody knows already
            self._stop = stop
            self._stop_others()

    def _stop_others(self) -> None:
        self._free = frozenset()
        for index in range(self.vcpus):
            if index not in self._held and index not in self._gone:
                self._kick(index)
        self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        self.on_change()

    # The debugger's side

    @property
    def stop(self) -> Stop | None:
        """Why all vCPUs stand still; None while one of them may run."""
        with self._changed:
            still = len(self._held | self._gone) == self.vcpus
            return self._stop if still and not self._free else None

    @property
    def is_running(self) -> bool:
        """Whether vCPUs were let go and nothing has stopped them since."""
        return bool(self._free)

    def interrupt(self) -> None:
        """Stop all vCPUs; `stop` says when they do."""
        with self._changed:
            if self._free:
                first = min(self._free - self._gone, default=0)
                self._stop = Stop(first, SIGINT)
                self._stop_others()

    def resume(self, run: Collection[int], steps: Collection[int] = ()) -> None:
        """Let vCPUs go, those in ``steps`` for one instruction."""
        with self._changed:
            self.target.resume(steps)
            self._stop = None
            self._free = frozenset(run) | frozenset(steps)
            self._changed.notify_all()

    def detach(self) -> None:
        """Let everything go, and stop nowhere."""
        self.target.set_breakpoints(())
        self.resume(range(self.vcpus))

    def kill(self) -> None:
        """End the run."""
        self._kill()

    def is_gone(self, index: int) -> bool:
        """Whether a vCPU has left the run."""
        return index in self._gone
