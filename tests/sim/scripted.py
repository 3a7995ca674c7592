"""A stand-in for the software CPU: events come from a script, nothing is executed.

A script is a generator function: it gets the CPU and yields events; when it goes on, the
hypervisor has dealt with the last one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from typing import Any

from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.sim import KernelProfile, SimPlatform
from kvmlaunch.softcpu import Budget, CpuOptions, Event, GuestMemory, Halt, InvalidState, VmgExit
from kvmlaunch.uapi import ffi, lib
from tests.sim.driver import PAGE, Guest
from tests.sim.driver import struct as struct_

GHCB_GPA = Guest.GPA + 8 * PAGE
"""A page of the guest's RAM that is shared."""

# Offsets and numbers of the GHCB: AMD 56421, and struct ghcb of Linux asm/svm.h.
RAX, RBX, RCX, RDX, RSI, CPL = 0x1F8, 0x318, 0x308, 0x310, 0x330, 0xCB
EXIT_CODE, INFO_1, INFO_2, SCRATCH, XCR0, VALID = 0x390, 0x398, 0x3A0, 0x3A8, 0x3E8, 0x3F0
BUFFER = 0x800
IN_BUFFER = GHCB_GPA + BUFFER
SHARED_PAGE = Guest.GPA + 9 * PAGE
INVALID_SCRATCH, MISSING_INPUT, INVALID_INPUT, INVALID_EVENT = 3, 4, 5, 6

Script = Generator[Event, None, None]


class ScriptedCpu:
    """One CPU. Attributes are public for scripts and tests."""

    def __init__(self, machine: ScriptedMachine) -> None:
        self.machine = machine
        self.ghcb = 0
        self.want_window = self.stop_at_cr8 = False
        self.interruptible = False
        self.nmi_blocked = self.shadow = self.unfinished = False
        self.ticks = self.tsc_offset = 0
        self.vmsa = Vmsa()
        self.loads = 0
        self.registers: dict[str, int] = {}
        self.answers: list[int | None] = []
        self.injected: list[tuple[str, int, int | None]] = []
        self.script: Script | None = None

    def load(self, vmsa: Vmsa, *, keep_waiting: bool = False) -> InvalidState | None:
        self.vmsa, self.loads, self.ghcb = vmsa, self.loads + 1, 0
        return self.machine.invalid

    def save(self) -> Vmsa:
        known = {name: value for name, value in self.registers.items() if name != "cr8"}
        return self.vmsa.replace(**known)

    def run(self, ticks: int) -> Event:
        assert ticks > 0
        if self.script is None:
            self.script = self.machine.script(self)
        event = next(self.script, None) or Halt()  # without an APIC: KVM_EXIT_HLT
        spent = ticks if isinstance(event, Budget) else 4
        self.ticks += spent
        self.machine.ticks += spent
        return event

    def complete(self, value: int = 0) -> None:
        self.answers.append(value)

    def refuse(self) -> None:
        self.answers.append(None)

    def read(self, name: str) -> int:
        return self.registers.get(name, 0)

    def write(self, name: str, value: int) -> None:
        self.registers[name] = value

    def inject_interrupt(self, vector: int) -> None:
        self.injected.append(("interrupt", vector, None))

    def inject_nmi(self) -> None:
        self.injected.append(("nmi", 2, None))

    def inject_exception(
        self, vector: int, error_code: int | None = None, address: int = 0
    ) -> None:
        self.injected.append(("exception", vector, error_code))


class ScriptedMachine:
    """The CPUs of one VM, and a count of flushes."""

    def __init__(
        self, script: Callable[[ScriptedCpu], Script], memory: GuestMemory, options: CpuOptions
    ) -> None:
        self.script = script
        self.memory = memory
        self.options = options
        self.cpus: list[ScriptedCpu] = []
        self.flushes = self.code_flushes = self.ticks = 0
        self.invalid: InvalidState | None = None

    def new_cpu(self) -> ScriptedCpu:
        self.cpus.append(ScriptedCpu(self))
        return self.cpus[-1]

    def flush(self) -> None:
        self.flushes += 1

    def flush_code(self) -> None:
        self.code_flushes += 1


class Rig:
    """A launched guest whose CPUs run ``script``; page 8 of its RAM is shared, for a GHCB.

    ``enable``: capabilities without arguments, before the vCPUs; ``prepare`` comes between
    SNP_LAUNCH_START and SNP_LAUNCH_FINISH.
    """

    def __init__(
        self,
        script: Callable[[ScriptedCpu], Script],
        *,
        profile: str | KernelProfile = "6.12",
        vcpus: int = 1,
        ghcb_version: int = 0,
        hypercalls: bool = True,
        split: bool = False,
        req_certs: bool = False,
        enable: tuple[int, ...] = (),
        prepare: Callable[[Guest], object] = lambda guest: None,
        **options: Any,
    ) -> None:
        self.machine: Any = None

        def make(memory: GuestMemory, cpu_options: CpuOptions) -> Any:
            self.machine = ScriptedMachine(script, memory, cpu_options)
            return self.machine

        self.platform = SimPlatform(profile, machine=make, **options)  # type: ignore[arg-type]
        self.guest = Guest(self.platform, init=False)
        guest = self.guest
        guest.ok(guest.init2(ghcb_version=ghcb_version)[0])
        if req_certs:
            guest.ok(guest.sev(guest.vm, lib.KVM_SEV_SNP_ENABLE_REQ_CERTS, 0, guest.sev_fd)[0])
        for number in enable:
            cap = struct_("kvm_enable_cap", cap=number)
            guest.ok(guest.ioctl(guest.vm, lib.KVM_ENABLE_CAP, cap))
        if split:
            cap = struct_("kvm_enable_cap", cap=lib.KVM_CAP_SPLIT_IRQCHIP)
            guest.ok(guest.ioctl(guest.vm, lib.KVM_ENABLE_CAP, cap))
        if hypercalls:
            cap = struct_("kvm_enable_cap", cap=lib.KVM_CAP_EXIT_HYPERCALL)
            cap.args[0] = 1 << lib.KVM_HC_MAP_GPA_RANGE
            guest.ok(guest.ioctl(guest.vm, lib.KVM_ENABLE_CAP, cap))
        guest.add_ram()
        self.vcpus = [guest.add_vcpu(number) for number in range(vcpus)]
        guest.ok(guest.start()[0])
        prepare(guest)
        guest.ok(guest.finish()[0])
        guest.ok(guest.set_attributes(GHCB_GPA, PAGE, 0))
        self.runs = [guest.mmap_run(vcpu) for vcpu in self.vcpus]

    @property
    def run(self) -> Any:
        """The first vCPU's ``struct kvm_run *``."""
        return self.runs[0]

    def enter(self, index: int = 0) -> tuple[int, int]:
        """KVM_RUN: (ret, errno)."""
        return tuple(self.guest.ioctl(self.vcpus[index], lib.KVM_RUN))

    # What a guest does to its GHCB page

    def shared(self, offset: int, size: int = 8) -> bytes:
        """Bytes of the shared side of the GHCB's page."""
        return self.guest.ram.read(size, GHCB_GPA - Guest.GPA + offset)

    def put(self, offset: int, data: bytes) -> None:
        self.guest.ram.write(data, GHCB_GPA - Guest.GPA + offset)

    def field(self, offset: int) -> int:
        """A field of the answer, which must be marked as valid."""
        assert self.is_valid(offset), hex(offset)
        return int.from_bytes(self.shared(offset), "little")

    def is_valid(self, offset: int) -> bool:
        return bool(self.shared(VALID + offset // 64, 1)[0] >> offset // 8 % 8 & 1)

    def request(self, code: int, info_1: int = 0, info_2: int = 0, **fields: int) -> None:
        """Write an event with exactly these fields valid; names are those of this module."""
        self.put(0, bytes(PAGE))
        self.put(0xFFA, struct.pack("<HI", 2, 0))
        offsets = {EXIT_CODE: code, INFO_1: info_1, INFO_2: info_2}
        offsets.update((globals()[name.upper()], value) for name, value in fields.items())
        bitmap = 0
        for offset, value in offsets.items():
            size = 1 if offset == CPL else 8
            self.put(offset, value.to_bytes(size, "little"))
            bitmap |= 1 << offset // 8
        self.put(VALID, bitmap.to_bytes(16, "little"))

    @property
    def error(self) -> tuple[int, int]:
        """SW_EXITINFO1 and 2 of the answer."""
        return self.field(INFO_1), self.field(INFO_2)


def io_data(run: Any, size: int) -> bytes:
    """What is in the data page of a KVM_EXIT_IO."""
    return bytes(ffi.buffer(ffi.cast("char *", run) + 0x1000, size))


def register_ghcb(cpu: ScriptedCpu) -> Script:
    """The MSR protocol's registration of the GHCB."""
    cpu.ghcb = GHCB_GPA | 0x12
    yield VmgExit(cpu.ghcb)
    assert cpu.ghcb == GHCB_GPA | 0x13


def asks(*requests: dict[str, int], **options: Any) -> Rig:
    """A guest that registers its GHCB, makes these requests (Rig.request) and halts."""

    def script(cpu: ScriptedCpu) -> Script:
        yield from register_ghcb(cpu)
        for request in requests:
            rig.request(**request)
            cpu.ghcb = GHCB_GPA
            yield VmgExit(GHCB_GPA)

    rig = Rig(script, **options)
    return rig


def answered(rig: Rig) -> Rig:
    """The guest went on after its request, to its HLT."""
    assert (rig.enter(), rig.run.exit_reason) == ((0, 0), lib.KVM_EXIT_HLT)
    return rig


def ioio(
    port: int,
    size: int,
    *,
    is_in: bool = False,
    string: bool = False,
    count: int = 0,
    **fields: int,
) -> dict[str, int]:
    """A request for port I/O (SVM_EXIT_IOIO)."""
    info = port << 16 | size << 4 | string << 2 | is_in
    return {"code": 0x7B, "info_1": info, "info_2": count, **fields}
