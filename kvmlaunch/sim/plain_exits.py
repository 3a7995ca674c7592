"""Exits of a guest without encrypted state: the CPU hands over one access at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim import exits, hypercalls, intercepts, io_bus
from kvmlaunch.softcpu import (
    IoRead,
    IoWrite,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    Vmmcall,
)

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu_run import VcpuRun

__all__ = ["handlers"]


_UD = 6
_PREFIXES = frozenset(b"\x66\x67\xf0\xf2\xf3\x2e\x36\x3e\x26\x64\x65")
_REX = range(0x40, 0x50)
_X87 = range(0xD8, 0xE0)


def _kvm_lacks(code: bytes, bits: int) -> bool:
    """Whether KVM's emulator has no such instruction: x87 that reads memory.

    It lacks others, which this CPU executes.
    """
    at = 0
    while at < len(code) and (code[at] in _PREFIXES or (bits == 64 and code[at] in _REX)):
        at += 1
    return at < len(code) and code[at] in _X87


def handlers(running: VcpuRun) -> dict[type[Any], Callable[[Any], int]]:
    """Event -> what KVM makes of it, for one vCPU."""
    vcpu = running.vcpu

    def wait_for_read(answer: Callable[[], bytes]) -> int:
        at = running.live_cpu.linear_rip
        running.complete = lambda: complete_read(answer(), at)
        return 0

    def complete_read(data: bytes, at: int) -> int:
        if running.is_still_at(at):
            running.live_cpu.complete(int.from_bytes(data, "little"))
        return 1

    def io_read(event: IoRead) -> int:
        total = event.size * event.count
        exits.put_io_data(vcpu.run, bytes(total))
        exits.io(vcpu.run, is_in=True, port=event.port, size=event.size, count=event.count)
        return wait_for_read(lambda: exits.io_data(vcpu.run, total))

    def io_write(event: IoWrite) -> int:
        data = event.value.to_bytes(event.size, "little")
        if io_bus.write(vcpu, event.port, data, pio=True):
            return 1
        exits.put_io_data(vcpu.run, data)
        exits.io(vcpu.run, is_in=False, port=event.port, size=event.size, count=1)
        return 0

    def not_emulated(gpa: int) -> int:
        """handle_emulation_failure(): #UD, which an exit tells of where CPL is 0."""
        cpu = running.live_cpu
        code, cpl = cpu.code(), cpu.read("cpl")
        vcpu.pull_state()
        running.unload()
        always = vcpu.vm.exit_on_emulation_failure
        if not always:
            running.exception = (_UD, None)
        if not always and cpl:
            return 1
        exits.emulation_failure(vcpu.run, exits.NESTED_FAULT, exits.FAULT_USER, gpa, code)
        return 0

    def mmio_read(event: MmioRead) -> int:
        if _kvm_lacks(running.live_cpu.code(), running.live_cpu.code_bits):
            return not_emulated(event.gpa)
        answer = vcpu.apic.read_mmio(event.gpa, event.size)
        if answer is not None:
            running.live_cpu.complete(int.from_bytes(answer, "little"))
            return 1
        exits.mmio(vcpu.run, event.gpa, event.size, None)
        return wait_for_read(lambda: exits.mmio_data(vcpu.run, event.size))

    def mmio_write(event: MmioWrite) -> int:
        data = event.value.to_bytes(event.size, "little")
        if io_bus.write(vcpu, event.gpa, data, pio=False):
            return 1
        exits.mmio(vcpu.run, event.gpa, event.size, data)
        return 0

    def msr_read(event: MsrRead) -> int:
        at = running.live_cpu.linear_rip

        def finish(value: int | None) -> int:
            if running.is_still_at(at):
                if value is None:
                    running.live_cpu.refuse()
                else:
                    running.live_cpu.complete(value)
            return 1

        return intercepts.rdmsr(vcpu, event.index, finish)

    def msr_write(event: MsrWrite) -> int:
        at = running.live_cpu.linear_rip

        def finish(done: bool) -> int:
            if running.is_still_at(at):
                if done:
                    running.live_cpu.complete()
                else:
                    running.live_cpu.refuse()
            return 1

        return intercepts.wrmsr(vcpu, event.index, event.value, finish)

    return {
        IoRead: io_read,
        IoWrite: io_write,
        MmioRead: mmio_read,
        MmioWrite: mmio_write,
        MsrRead: msr_read,
        MsrWrite: msr_write,
        Vmmcall: lambda event: hypercalls.from_cpu(vcpu),
    }
