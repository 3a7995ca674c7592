"""Looking inside a simulated guest: what no SNP host offers, and a simulated one can."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi import registers as names
from kvmlaunch.abi.ghcb import FIELDS
from kvmlaunch.abi.ghcb_text import EVENT_REGISTERS, describe_event, describe_msr
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.segment import Segment
from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.sim.rmp import RmpEntry
from kvmlaunch.softcpu import (
    Event,
    Halt,
    InvalidState,
    MsrRead,
    MsrWrite,
    NestedFault,
    Shutdown,
    SoftCpu,
    VmgExit,
    Vmmcall,
)
from kvmlaunch.uapi import lib
from kvmlaunch.uapi.inspection import TraceEvent

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu
    from kvmlaunch.sim.vm import Vm

__all__ = ["Inspector", "inspector_of"]

_BY_WRITE = frozenset((*names.GENERAL, "cr2"))
_VC, _PAGE_NOT_VALIDATED = 29, 0x404
_MAX_INSTRUCTION = 15


def inspector_of(vm: Vm) -> Inspector:
    """The VM's inspector, made when it is first wanted."""
    if vm.inspector is None:
        vm.inspector = Inspector(vm)
    return vm.inspector


class Inspector:
    """One VM from inside (:class:`kvmlaunch.uapi.inspection.Inspector`)."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._places: frozenset[int] = frozenset()
        self._steps: frozenset[int] = frozenset()
        self._passing: dict[int, int] = {}
        """vCPU -> where it went on: that instruction is no new one."""
        self._kinds: frozenset[str] = frozenset()
        self._sink: Callable[[TraceEvent], object] = lambda event: None

    # Registers and memory

    def registers(self, vcpu: int) -> Mapping[str, int] | None:
        """Registers by name; None for a vCPU without state."""
        with self._stopped():
            cpu = self._cpu(vcpu)
            return None if cpu is None else names.flat(cpu.save())

    def set_registers(self, vcpu: int, values: Mapping[str, int]) -> bool:
        """Change registers, if all of them can be."""
        with self._stopped():
            cpu = self._cpu(vcpu)
            if cpu is None:
                return False
            others = {name: value for name, value in values.items() if name not in _BY_WRITE}
            if others and not _reload(cpu, others):
                return False
            for name in values.keys() & _BY_WRITE:
                cpu.write(name, values[name])
            return True

    def read_memory(self, vcpu: int, linear: int, size: int) -> bytes:
        """Guest memory, private or not, as far as it goes."""
        with self._stopped():
            found = b""
            for address, count in self._ranges(vcpu, linear, size):
                if address is None:
                    break
                found += ctypes.string_at(address, count)
            return found

    def write_memory(self, vcpu: int, linear: int, data: bytes) -> bool:
        """Change guest memory, read-only or not: all or nothing."""
        with self._stopped():
            ranges = list(self._ranges(vcpu, linear, len(data)))
            at = 0
            if any(address is None for address, _ in ranges):
                return False
            for address, count in ranges:
                assert address is not None
                self._vm.machine().write(address, data[at : at + count])
                at += count
            return True

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        with self._vm.host.gate.stopped(), self._vm.host.lock:
            self._vm.flush_if_changed()
            yield

    def _cpu(self, vcpu: int) -> SoftCpu | None:
        """The vCPU's CPU with its state; None where there is none, or no engine."""
        running = self._vm.vcpus[vcpu].running
        if running.cpu is not None and self._vm.vcpus[vcpu].run.exit_reason == _SHUTDOWN:
            return running.cpu  # what a plain guest ended with, though KVM has reset it since
        try:
            return running.live_cpu if running.load() else None
        except KvmLaunchError:
            return None

    def _ranges(self, vcpu: int, linear: int, size: int) -> Iterator[tuple[int | None, int]]:
        """Host address and size of each part in one page; None where nothing is."""
        cpu = self._cpu(vcpu)
        while size > 0:
            count = min(size, PAGE_SIZE - linear % PAGE_SIZE)
            found = None if cpu is None else cpu.translate(linear)
            yield None if found is None else self._host_address(*found), count
            linear, size = linear + count, size - count

    def _host_address(self, gpa: int, private: bool) -> int | None:
        """As VmMemory.resolve(), but a page that isn't there stays away."""
        gfn, offset = divmod(gpa, PAGE_SIZE)
        slot = self._vm.slots.find(gfn)
        if slot is None:
            return None
        at = gfn - slot.base_gfn
        try:
            if not private:
                return self._vm.host.user.pin(slot.hva + at * PAGE_SIZE) + offset
            index = slot.gmem_first + at
            if slot.gmem is None or index not in slot.gmem.present:
                return None
            return slot.gmem.address(index) + offset
        except OSError:
            return None

    # Breakpoints and steps

    def set_breakpoints(self, places: Collection[int]) -> None:
        """Stop before the instructions at these linear addresses."""
        with self._stopped():
            self._places = frozenset(places)
            self._watch()

    def resume(self, steps: Collection[int]) -> None:
        """The vCPUs will go on, those in ``steps`` for one instruction."""
        with self._stopped():
            self._steps = frozenset(steps)
            self._passing.clear()
            for vcpu in range(len(self._vm.vcpus)):
                cpu = self._cpu(vcpu)
                if cpu is not None:
                    self._passing[vcpu] = cpu.linear_rip
            self._watch()

    def _watch(self) -> None:
        every = bool(self._steps) or "insn" in self._kinds
        wanted = every or bool(self._places)
        try:
            self._vm.machine().watch(self._ask if wanted else None, None if every else self._places)
        except KvmLaunchError:
            return  # no engine: KVM_RUN will say so

    def _ask(self, address: int, size: int) -> bool:
        """Before an instruction of the vCPU that runs; the guest is in the middle of it all."""
        vcpu = self._vm.running
        assert vcpu is not None
        at = self._index(vcpu)
        passing = self._passing.pop(at, None) == address
        stop = not passing and (at in self._steps or address in self._places)
        if not stop and "insn" in self._kinds:
            code = self._vm.machine().code(address, min(size, _MAX_INSTRUCTION))
            self._tell("insn", at, address, "insn", code.hex(), bytes=code.hex())
        return stop

    # Trace

    def trace(self, kinds: Collection[str], sink: Callable[[TraceEvent], object]) -> None:
        """Hand what happens to ``sink``; no kinds ends it."""
        with self._stopped():
            vm = self._vm
            self._kinds, self._sink = frozenset(kinds), sink
            pages = "pages" in kinds
            vm.host.rmp.on_change = self._rmp_changed if pages else None
            vm.attributes.on_change = self._attributes_changed if pages else None
            for vcpu in vm.vcpus:
                self.new_cpu(vcpu)
            self._watch()

    def new_cpu(self, vcpu: Vcpu) -> None:
        """A vCPU has got its CPU."""
        cpu = vcpu.running.cpu
        if cpu is not None:
            pages = "pages" in self._kinds
            cpu.on_exception = (lambda *what: self._exception(vcpu, *what)) if pages else None

    def saw(self, vcpu: Vcpu, event: Event) -> None:
        """A CPU came back from the guest; KVM hasn't dealt with it yet."""
        at, rip = self._index(vcpu), vcpu.running.live_cpu.linear_rip
        if isinstance(event, NestedFault):
            self._passing[at] = rip  # the instruction is tried again
            if "pages" in self._kinds:
                side = "private" if event.private else "shared"
                detail = f"gpa={event.gpa:#x} {event.access.value} {side}: {event.reason.value}"
                where = {"gpa": event.gpa, "access": event.access.value, "side": side}
                self._tell("pages", at, rip, "nested-fault", detail, **where)
        elif "exits" in self._kinds:
            found = self._describe(event)
            if found is not None:
                self._tell("exits", at, rip, *found)

    def _describe(self, event: Event) -> tuple[str, str] | None:
        """Name and detail of an exit that KVM handles by itself, or hides something of."""
        if isinstance(event, VmgExit):
            return self._describe_vmgexit(event.ghcb)
        if isinstance(event, Shutdown):
            return "SHUTDOWN", f"exceptions {', '.join(map(str, event.vectors))}, last one first"
        if isinstance(event, InvalidState):
            return "INVALID", event.rule
        if isinstance(event, MsrRead):
            return "MSR", f"read index={event.index:#x}"
        if isinstance(event, MsrWrite):
            return "MSR", f"write index={event.index:#x} value={event.value:#x}"
        if isinstance(event, Halt):
            return "HLT", ""
        return ("VMMCALL", "") if isinstance(event, Vmmcall) else None

    def _describe_vmgexit(self, value: int) -> tuple[str, str]:
        if value & 0xFFF:
            name, detail = describe_msr(value)
            return f"VMGEXIT msr {name}", detail

        def field(name: str) -> int:
            return int.from_bytes(self._vm.memory.read(value + FIELDS[name], 8), "little")

        try:
            event = field("exit_code"), field("exit_info_1"), field("exit_info_2")
            name, detail = describe_event(*event, {name: field(name) for name in EVENT_REGISTERS})
        except OSError:
            name, detail = "GHCB", f"gpa={value:#x}: no shared memory"
        return f"VMGEXIT {name}", detail

    def _exception(self, vcpu: Vcpu, vector: int, code: int | None) -> None:
        if (vector, code) == (_VC, _PAGE_NOT_VALIDATED):
            rip = vcpu.running.live_cpu.linear_rip
            self._tell("pages", self._index(vcpu), rip, "#VC 0x404", "page not validated")

    def _rmp_changed(self, old: RmpEntry, new: RmpEntry) -> None:
        if self._vm.sev.asid not in (old.asid, new.asid) or old == new:
            return
        entry = new if new.asid else old
        detail = f"gpa={entry.gpa:#x} {old.state} -> {new.state}"
        if old.perms[1:] != new.perms[1:]:
            detail += f" perms={'/'.join(f'{bits:x}' for bits in new.perms)}"
        first = not old.assigned and new.assigned
        self._tell(
            "pages",
            *self._here(),
            "assigned" if first else "rmp",
            detail + (" VMSA" if new.vmsa else ""),
            gpa=entry.gpa,
            old=str(old.state),
            new=str(new.state),
        )

    def _attributes_changed(self, gpa: int, size: int, private: bool) -> None:
        to = "private" if private else "shared"
        where = {"gpa": gpa, "pages": size // PAGE_SIZE, "to": to}
        detail = f"gpa={gpa:#x} pages={size // PAGE_SIZE} to={to}"
        self._tell("pages", None, None, "page-state", detail, **where)

    def _here(self) -> tuple[int | None, int | None]:
        """The vCPU that ran last, which whatever happens now is most likely for."""
        vcpu = self._vm.running
        if vcpu is None or vcpu.running.cpu is None:
            return None, None
        return self._index(vcpu), vcpu.running.cpu.linear_rip

    def _index(self, vcpu: Vcpu) -> int:
        return self._vm.vcpus.index(vcpu)

    def _tell(
        self, kind: str, vcpu: int | None, rip: int | None, name: str, detail: str, **fields: Any
    ) -> None:
        self._sink(TraceEvent(kind, vcpu, rip, name, detail, fields))


_SHUTDOWN = lib.KVM_EXIT_SHUTDOWN


def _reload(cpu: SoftCpu, values: Mapping[str, int]) -> bool:
    """Change what only a whole state can carry."""
    vmsa = cpu.save()
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("fs_base", "gs_base"):
            old: Segment = getattr(vmsa, name[:2])
            changes[name[:2]] = Segment(old.selector, old.attrib, old.limit, value)
        elif name in names.SYSTEM:
            changes[name] = value
        elif values[name] != names.flat(vmsa).get(name):
            return False  # selectors, x87 and SSE: to be read only
    if not changes:
        return True
    ghcb = cpu.ghcb
    if cpu.load(vmsa.replace(**changes)) is not None:
        cpu.load(vmsa)
    done = all(names.flat(cpu.save())[name] == values[name] for name in values)
    cpu.ghcb = ghcb
    return done
