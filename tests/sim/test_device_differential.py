"""Eventfds, routes and MSRs of the simulated host against this machine's /dev/kvm, call by call."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from kvmlaunch.uapi import ffi, lib
from tests.host import require_kvm

from .differential import Script, differences
from .driver import PAGE, struct
from .irqchips import route_table

TOP = 1 << 64
ONES = TOP - 1
CAP, STATUS, CTL, MC0_CTL, MC0_CTL2 = 0x179, 0x17A, 0x17B, 0x400, 0x280
WALL_CLOCK, SYSTEM_TIME = 0x4B564D00, 0x4B564D01
ASYNC_PF_EN, STEAL_TIME, PV_EOI, POLL, ASYNC_PF_INT, ASYNC_PF_ACK, MIGRATION = range(
    0x4B564D02, 0x4B564D09
)


class Devices(Script):
    """Eventfds of its own, and short calls."""

    def __init__(self, platform: object) -> None:
        super().__init__(platform)
        self.events = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3)]
        self.no_event = os.open("/dev/null", os.O_RDONLY)

    def close_all(self) -> None:
        super().close_all()
        for fd in (*self.events, self.no_event):
            os.close(fd)

    def split_vm(self) -> int:
        vm = self.vm()
        self.enable("split", vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
        return vm

    def full_vm(self) -> int:
        vm = self.vm()
        self.call("full", vm, "KVM_CREATE_IRQCHIP")
        return vm

    def ioeventfd(self, label: str, vm: int, **fields: int) -> None:
        self.call(label, vm, "KVM_IOEVENTFD", struct("kvm_ioeventfd", **fields))

    def irqfd(self, label: str, vm: int, **fields: int) -> None:
        self.call(label, vm, "KVM_IRQFD", struct("kvm_irqfd", **fields))

    def route(self, label: str, vm: int, *entries: dict[str, int], flags: int = 0) -> None:
        table = route_table(*entries, flags=flags)
        self.call(label, vm, "KVM_SET_GSI_ROUTING", table)

    def msr(self, vcpu: int, index: int, value: int | None = None) -> None:
        """Set it where there is a value, and get it."""
        words = ffi.new("uint64_t[]", [1, index, value or 0])
        if value is not None:
            self.call(f"set {index:#x} {value:#x}", vcpu, "KVM_SET_MSRS", words)
        self.call(f"get {index:#x}", vcpu, "KVM_GET_MSRS", words)
        self.steps.append((f"{index:#x} is", words[2], 0))


def ioeventfds(run: Devices) -> None:
    vm = run.vm()
    first, second, _ = run.events
    match, pio, off = (
        lib.KVM_IOEVENTFD_FLAG_DATAMATCH,
        lib.KVM_IOEVENTFD_FLAG_PIO,
        lib.KVM_IOEVENTFD_FLAG_DEASSIGN,
    )
    run.call("null", vm, "KVM_IOEVENTFD")
    for length in (3, 5, 9, 16, 0xFFFFFFFF):
        run.ioeventfd(f"length {length}", vm, fd=-1, len=length, addr=TOP - 1, flags=0x80)
    run.ioeventfd("end", vm, fd=-1, len=8, addr=TOP - 8)
    run.ioeventfd("before the end", vm, fd=first, len=8, addr=TOP - 9)
    for bit in range(3, 32):
        run.ioeventfd(f"flag {bit}", vm, fd=first, len=4, addr=0x5000, flags=1 << bit)
    run.ioeventfd("match without length", vm, fd=-1, flags=match)
    for fd in (-1, run.no_event, 0x7FFFFFFF):
        shown = "null" if fd == run.no_event else fd
        run.ioeventfd(f"fd {shown}", vm, fd=fd, len=4)
        run.ioeventfd(f"off fd {shown}", vm, fd=fd, len=4, flags=off)
    place = {"addr": 0x1000, "len": 4}
    run.ioeventfd("any", vm, fd=first, **place)
    run.ioeventfd("again", vm, fd=first, **place)
    run.ioeventfd("other event", vm, fd=second, **place)
    run.ioeventfd("match there", vm, fd=second, flags=match, datamatch=1, **place)
    run.ioeventfd("port", vm, fd=first, flags=pio, **place)
    run.ioeventfd("other length", vm, fd=first, addr=0x1000, len=2)
    run.ioeventfd("no length", vm, fd=first, addr=0x1000)
    run.ioeventfd("no length elsewhere", vm, fd=first, addr=0x2000)
    run.ioeventfd("length there", vm, fd=first, addr=0x2000, len=8)
    for value in (1, 2, 1, 1 << 40):
        fields = {"addr": 0x3000, "len": 2, "flags": match, "datamatch": value}
        run.ioeventfd(f"match {value}", vm, fd=first, **fields)
    run.ioeventfd("any where matches are", vm, fd=first, addr=0x3000, len=2)
    run.ioeventfd("off other event", vm, fd=second, flags=off, **place)
    run.ioeventfd("off other length", vm, fd=first, flags=off, addr=0x1000, len=8)
    run.ioeventfd("off match", vm, fd=first, flags=off | match, **place)
    run.ioeventfd("off other match", vm, fd=first, flags=off | match, addr=0x3000, len=2)
    run.ioeventfd("off", vm, fd=first, flags=off, **place)
    run.ioeventfd("off twice", vm, fd=first, flags=off, **place)
    run.ioeventfd("off port", vm, fd=first, flags=off | pio | 1 << 20, **place)
    run.ioeventfd("off no length", vm, fd=first, flags=off, addr=0x2000)
    run.ioeventfd("back", vm, fd=second, **place)


def irqfds(run: Devices) -> None:
    first, second, third = run.events
    for name, vm in (("none", run.vm()), ("split", run.split_vm()), ("full", run.full_vm())):
        run.call(f"{name} null", vm, "KVM_IRQFD")
        run.irqfd(f"{name} flags", vm, fd=0xFFFFFFFF, flags=4)
        run.irqfd(f"{name} fd", vm, fd=0xFFFFFFFF)
        run.irqfd(f"{name} no eventfd", vm, fd=run.no_event)
        if name != "full":
            run.irqfd(f"{name} resample", vm, fd=0xFFFFFFFF, flags=2)
        run.irqfd(f"{name} off fd", vm, fd=0xFFFFFFFF, flags=1)
        run.irqfd(f"{name} off no eventfd", vm, fd=run.no_event, flags=1)
        run.irqfd(f"{name} off nothing", vm, fd=third, flags=1)
        run.irqfd(f"{name} on", vm, fd=first, gsi=5)
        run.irqfd(f"{name} twice", vm, fd=first, gsi=6)
        same = os.dup(first)
        run.irqfd(f"{name} twice by another descriptor", vm, fd=same, gsi=6)
        os.close(same)
        run.irqfd(f"{name} same gsi", vm, fd=second, gsi=5)
        run.irqfd(f"{name} gsi without end", vm, fd=third, gsi=0xFFFFFFFF)
        run.irqfd(f"{name} off other gsi", vm, fd=first, gsi=6, flags=1)
        run.irqfd(f"{name} still on", vm, fd=first, gsi=6)
        run.irqfd(f"{name} off", vm, fd=first, gsi=5, flags=1)
        run.irqfd(f"{name} on again", vm, fd=first, gsi=6)
        run.irqfd(f"{name} off with resample", vm, fd=first, gsi=6, flags=3)
        run.irqfd(f"{name} off third", vm, fd=third, gsi=0xFFFFFFFF, flags=1)
        run.irqfd(f"{name} off second", vm, fd=second, gsi=5, flags=1)


def routes(run: Devices) -> None:
    chip, msi = lib.KVM_IRQ_ROUTING_IRQCHIP, lib.KVM_IRQ_ROUTING_MSI
    for name, vm in (("none", run.vm()), ("split", run.split_vm()), ("full", run.full_vm())):
        run.call(f"{name} null", vm, "KVM_SET_GSI_ROUTING")
        run.route(f"{name} nothing", vm)
        run.route(f"{name} table's flags", vm, flags=1)
        header = ffi.new("uint32_t[]", [4097, 0])
        run.call(f"{name} too many", vm, "KVM_SET_GSI_ROUTING", header)
        message = {"type": msi, "address_lo": 0xFEE00000, "data": 0x30}
        run.route(f"{name} gsi 4095", vm, {"gsi": 4095, **message})
        run.route(f"{name} gsi 4096", vm, {"gsi": 4096, **message})
        for flags in (1, 2, 3):
            run.route(f"{name} message's flags {flags}", vm, {"flags": flags, **message})
            run.route(f"{name} pin's flags {flags}", vm, {"flags": flags, "type": chip})
        for kind in (0, 3, 6, 99):
            run.route(f"{name} type {kind}", vm, {"type": kind})
        run.route(f"{name} two gsis", vm, message, {"gsi": 1, **message})
        run.route(f"{name} one gsi twice", vm, message, message)
        run.route(f"{name} message and pin", vm, message, {"type": chip})
        run.route(f"{name} pin and message", vm, {"type": chip}, message)
        run.route(f"{name} same chip", vm, {"type": chip}, {"type": chip, "pin": 1})
        run.route(f"{name} two chips", vm, {"type": chip}, {"type": chip, "irqchip": 2})
        for number, pin in ((0, 7), (0, 8), (1, 7), (1, 8), (2, 23), (2, 24), (3, 0)):
            place = {"type": chip, "irqchip": number, "pin": pin}
            run.route(f"{name} chip {number} pin {pin}", vm, place)
        run.route(f"{name} high address", vm, {**message, "address_hi": 0xFFFFFFFF})


def lines(run: Devices) -> None:
    for name, vm in (("none", run.vm()), ("split", run.split_vm())):
        for routed in (False, True):
            if routed:
                message = {"type": lib.KVM_IRQ_ROUTING_MSI, "address_lo": 0xFEE00000}
                run.route(f"{name} routed", vm, {"gsi": 5, "data": 0x30, **message})
            for gsi, level in ((5, 1), (5, 0), (5, 7), (6, 1), (4096, 1), (0xFFFFFFFF, 1)):
                line = struct("kvm_irq_level", irq=gsi, level=level)
                label = f"{name} {routed} {gsi} {level}"
                run.call(f"line {label}", vm, "KVM_IRQ_LINE", line)
                run.steps.append((f"kept {label}", line.irq, 0))
                run.call(f"status {label}", vm, "KVM_IRQ_LINE_STATUS", line)
                run.steps.append((f"came {label}", line.irq, 0))
        for flags in (0, 1, 2):
            message = struct("kvm_msi", address_lo=0xFEE00000, data=0x30, flags=flags)
            run.call(f"{name} msi {flags}", vm, "KVM_SIGNAL_MSI", message)
        if name == "split":
            vcpu = run.vcpu(vm)
            # A local APIC that is off takes nothing.
            line = struct("kvm_irq_level", irq=5, level=1)
            run.call("line to a vCPU", vm, "KVM_IRQ_LINE_STATUS", line)
            run.steps.append(("came to a vCPU", line.irq, 0))
            page = struct("kvm_lapic_state")
            run.call("lapic", vcpu, "KVM_GET_LAPIC", page)
            ffi.buffer(page)[0xF0:0xF2] = b"\xff\x01"
            run.call("lapic on", vcpu, "KVM_SET_LAPIC", page)
            for times in range(2):
                line.irq = 5
                run.call(f"line {times}", vm, "KVM_IRQ_LINE_STATUS", line)
                run.steps.append((f"came {times}", line.irq, 0))


def machine_check(run: Devices) -> None:
    run.call("supported null", run.kvm, "KVM_X86_GET_MCE_CAP_SUPPORTED")
    vcpu = run.vcpu(run.vm())
    run.call("null", vcpu, "KVM_X86_SETUP_MCE")
    for at in (0, 1):
        if at:
            for cap in (0, 33, 0xFF, 32 | 1 << 9, 32 | 1 << 63, 1 << 8, 5 | 1 << 8, 0xFF0003, 3):
                run.call(f"cap {cap:#x}", vcpu, "KVM_X86_SETUP_MCE", ffi.new("uint64_t *", cap))
                run.msr(vcpu, CAP)
                run.msr(vcpu, CTL)
        for index in (0, 1, CAP, STATUS, CTL):
            run.msr(vcpu, index)
            for value in (0, 1, ONES):
                run.msr(vcpu, index, value)
        for bank in (0, 2, 3, 31, 32):
            run.msr(vcpu, MC0_CTL2 + bank)
            for value in (0, 1, 1 << 30):
                run.msr(vcpu, MC0_CTL2 + bank, value)
            for register in range(4):
                run.msr(vcpu, MC0_CTL + 4 * bank + register)
                for value in (0, 5, ONES, ONES ^ 1, ONES ^ 1 << 10, ONES ^ 2):
                    run.msr(vcpu, MC0_CTL + 4 * bank + register, value)


def mtrrs(run: Devices) -> None:
    vcpu = run.vcpu(run.vm())
    table = ffi.new("char[]", 8 + 2 * 40)
    header = ffi.cast("struct kvm_cpuid2 *", table)
    for width in (36, 40):
        header.nent = 2 if width == 40 else 0
        header.entries[0].function, header.entries[0].eax = 0x80000000, 0x80000008
        header.entries[1].function, header.entries[1].eax = 0x80000008, 0x3000 | width
        run.call(f"cpuid {width}", vcpu, "KVM_SET_CPUID2", header)
        for index in (0xFE, 0x200, 0x201, 0x20F, 0x250, 0x258, 0x26F, 0x2FF):
            run.msr(vcpu, index)
            for value in (0, 0x806, 0xC06, 2, 7, 0x100, 0x1000, 1 << 35, 1 << 36, 1 << 40):
                run.msr(vcpu, index, value)
            run.msr(vcpu, index, 0x0605040100060504)
        for index in (0x210, 0x24F, 0x251, 0x25A, 0x267, 0x270):
            run.msr(vcpu, index)


def kvms_own_msrs(run: Devices) -> None:
    for name, vm in (("none", run.vm()), ("split", run.split_vm())):
        memory = run.memory()
        run.region(f"{name} slot", vm, guest_phys_addr=0x10000, userspace_addr=memory)
        run.region(
            f"{name} read-only",
            vm,
            slot=1,
            flags=lib.KVM_MEM_READONLY,
            guest_phys_addr=0x20000,
            userspace_addr=memory,
        )
        vcpu, other = run.vcpu(vm), run.vcpu(vm, 1)
        for index, value in ((0x11, 0x10010), (0x12, 0x10021)):
            run.msr(vcpu, index, value)
            run.msr(vcpu, index & 1 ^ 1 | WALL_CLOCK)
            run.msr(other, index)
        for index in (WALL_CLOCK, SYSTEM_TIME):
            run.msr(vcpu, index, 0x10000 | index & 1)
            run.msr(vcpu, 0x11 + (index & 1))
        for index in range(ASYNC_PF_EN, MIGRATION + 1):
            run.msr(other, index)
            for value in (0, 1, 2, 3, 4, 8, 0x10, 0x20, 0x3E, 0x40, 0xFF, 0x100, 1 << 63):
                run.msr(vcpu, index, value)
            for address in (0x10000, 0x13FF8, 0x14000, 0x20000, ONES ^ 0x3F):
                for flags in (1, 9):
                    run.msr(vcpu, index, address | flags)


def task_priority(run: Devices) -> None:
    for name, vm in (("none", run.vm()), ("split", run.split_vm())):
        vcpu, memory = run.vcpu(vm), run.memory()
        for label, fields in (("off", {}), ("on", {"enabled": 1}), ("flags", {"flags": 1})):
            control = struct("kvm_tpr_access_ctl", **fields)
            run.call(f"{name} tpr {label}", vcpu, "KVM_TPR_ACCESS_REPORTING", control)
        run.call(f"{name} tpr null", vcpu, "KVM_TPR_ACCESS_REPORTING")
        run.call(f"{name} vapic null", vcpu, "KVM_SET_VAPIC_ADDR")
        run.region(f"{name} slot", vm, guest_phys_addr=0x10000, userspace_addr=memory)
        for address in (0, 0x10000, 0x10000 + 4 * PAGE - 4, 0x10000 + 4 * PAGE - 3, 0, TOP - 1):
            place = struct("kvm_vapic_addr", vapic_addr=address)
            run.call(f"{name} vapic {address:#x}", vcpu, "KVM_SET_VAPIC_ADDR", place)


SCRIPTS: list[Callable[[Devices], None]] = [
    ioeventfds,
    irqfds,
    routes,
    lines,
    machine_check,
    mtrrs,
    kvms_own_msrs,
    task_priority,
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_devices_when_called_answer_as_this_kernels(script: Callable[[Devices], None]) -> None:
    assert differences(script, require_kvm(), Devices) == []
