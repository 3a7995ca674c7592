"""The simulator's local APIC against this machine's /dev/kvm: its state, without guest code."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import ffi, lib
from tests.host import require_kvm

from .driver import Driver, struct

TMCCT = slice(0x390, 0x394)
# Other vendors' x2APIC keeps the upper half of the ICR there too (x2apic_icr_is_split).
ELSEWHERE = (0x304,)
X2APIC = 1 << 10
# STAR to SFMASK, KERNEL_GS_BASE, SYSENTER_CS, _ESP and _EIP, TSC_AUX.
KEPT_AT_INIT = (*range(0xC0000081, 0xC0000085), 0xC0000102, 0x174, 0x175, 0x176, 0xC0000103)

Script = Callable[["Rig"], list[Any]]


class Rig:
    """vCPUs 0 to 2 of a VM with in-kernel APICs, and what was seen of them."""

    def __init__(self, platform: Any, *, full: bool = False) -> None:
        self.driver = driver = Driver(platform)
        self.platform = platform
        self.fds = [driver.open_kvm()]
        self.vm = driver.create_vm(0, self.fds[0])
        self.fds.append(self.vm)
        if full:
            driver.ok(driver.ioctl(self.vm, lib.KVM_CREATE_IRQCHIP))
        else:
            cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_SPLIT_IRQCHIP)
            cap.args[0] = 24
            driver.ok(driver.ioctl(self.vm, lib.KVM_ENABLE_CAP, cap))
        self.vcpus = [
            driver.ok(driver.ioctl(self.vm, lib.KVM_CREATE_VCPU, number)) for number in range(3)
        ]
        self.fds += self.vcpus

    def close(self) -> None:
        for fd in reversed(self.fds):
            self.platform.close(fd)

    def set_cpuid(self, ecx: int) -> None:
        """A guest with these features in leaf 1 ECX."""
        table = ffi.new("char[]", 8 + 40)
        ffi.cast("struct kvm_cpuid2 *", table).nent = 1
        entry = ffi.cast("struct kvm_cpuid_entry2 *", table + 8)
        entry.function, entry.ecx, entry.edx = 1, ecx, 1 << 9
        for vcpu in self.vcpus:
            self.driver.ok(self.driver.ioctl(vcpu, lib.KVM_SET_CPUID2, table))

    def set_base(self, number: int, value: int) -> int:
        """How many MSRs were set."""
        buffer = ffi.new("char[]", 8 + 16)
        ffi.cast("struct kvm_msrs *", buffer).nmsrs = 1
        entry = ffi.cast("struct kvm_msr_entry *", buffer + 8)
        entry.index, entry.data = 0x1B, value
        return self.driver.ioctl(self.vcpus[number], lib.KVM_SET_MSRS, buffer).ret

    def set_msr(self, number: int, index: int, value: int) -> int:
        """How many MSRs were set."""
        buffer = ffi.new("char[]", 8 + 16)
        ffi.cast("struct kvm_msrs *", buffer).nmsrs = 1
        entry = ffi.cast("struct kvm_msr_entry *", buffer + 8)
        entry.index, entry.data = index, value
        return self.driver.ioctl(self.vcpus[number], lib.KVM_SET_MSRS, buffer).ret

    def get_msr(self, number: int, index: int) -> tuple[int, int]:
        """How many MSRs were read, and the value."""
        buffer = ffi.new("char[]", 8 + 16)
        ffi.cast("struct kvm_msrs *", buffer).nmsrs = 1
        entry = ffi.cast("struct kvm_msr_entry *", buffer + 8)
        entry.index = index
        return self.driver.ioctl(self.vcpus[number], lib.KVM_GET_MSRS, buffer).ret, entry.data

    def lapic(self, number: int = 0) -> dict[str, str]:
        """KVM_GET_LAPIC: what isn't zero, without the current count, which runs."""
        state = self.driver.get(self.vcpus[number], lib.KVM_GET_LAPIC)
        page = bytearray(ffi.buffer(state.regs))
        page[TMCCT] = bytes(4)
        words = {at: int.from_bytes(page[at : at + 4], "little") for at in range(0, 1024, 4)}
        return {hex(at): hex(word) for at, word in words.items() if word and at not in ELSEWHERE}

    def is_counting(self, number: int = 0) -> bool:
        """Whether the current count isn't zero."""
        state = self.driver.get(self.vcpus[number], lib.KVM_GET_LAPIC)
        return any(bytes(ffi.buffer(state.regs))[TMCCT])

    def set_lapic(self, page: bytes, number: int = 0) -> tuple[int, int]:
        state = struct("kvm_lapic_state")
        ffi.buffer(state.regs)[:] = page
        return tuple(self.driver.ioctl(self.vcpus[number], lib.KVM_SET_LAPIC, state))

    def mp_state(self, number: int = 0) -> int:
        return int(self.driver.get(self.vcpus[number], lib.KVM_GET_MP_STATE).mp_state)

    def set_mp_state(self, state: int, number: int = 0) -> tuple[int, int]:
        value = struct("kvm_mp_state", mp_state=state)
        return tuple(self.driver.ioctl(self.vcpus[number], lib.KVM_SET_MP_STATE, value))

    def msi(self, address: int, data: int) -> tuple[int, int]:
        message = struct("kvm_msi", address_lo=address, data=data)
        return tuple(self.driver.ioctl(self.vm, lib.KVM_SIGNAL_MSI, message))


def registers(**values: int) -> bytes:
    """An APIC page that is enabled, with these registers (``r300=...``)."""
    page = bytearray(1024)
    page[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
    page[0xE0:0xE4] = b"\xff" * 4
    for name, value in values.items():
        at = int(name[1:], 16)
        page[at : at + 4] = value.to_bytes(4, "little")
    return bytes(page)


def fresh(rig: Rig) -> list[Any]:
    return [(rig.lapic(n), rig.mp_state(n)) for n in range(3)]


def versions(rig: Rig) -> list[Any]:
    seen: list[Any] = []
    for ecx in (0, 1 << 21, 1 << 24):
        rig.set_cpuid(ecx)
        seen.append(rig.lapic())
    return seen


def random_pages(rig: Rig) -> list[Any]:
    rig.set_cpuid(1 << 21)
    numbers, seen = random.Random(7), []
    for turn in range(60):
        page = bytearray(numbers.randbytes(1024))
        page[0x380:0x384] = bytes(4)  # no timer: it would run by another clock
        # Twice: KVM works out the priority before it has counted what is in service.
        seen += [(turn, rig.set_lapic(bytes(page))) for _ in range(2)] + [rig.lapic()]
    return seen


def modes(rig: Rig) -> list[Any]:
    rig.set_cpuid(1 << 21)
    seen: list[Any] = []
    for base in (
        0xFEE00C00,
        0xFEE00D00,
        0xFEE00900,
        0xFEE00000,
        0xFEE00400,
        0xFEE00C00,
        0xFEE00800,
    ):
        seen.append((base, rig.set_base(2, base), rig.lapic(2)))
        seen.append((rig.set_lapic(registers(r20=0x77000000, rD0=0x5000000), 2), rig.lapic(2)))
    return seen


def x2apic_msrs(rig: Rig) -> list[Any]:
    rig.set_cpuid(1 << 21)
    seen: list[Any] = [rig.get_msr(1, 0x802)]
    assert rig.set_base(1, 0xFEE00C00) == 1
    rig.set_lapic(registers(r300=0x4500, r310=7, r20=5), 1)
    for index in range(0x800, 0x900):
        seen.append((hex(index), rig.get_msr(1, index)))
    values = (0, 1, 0x31, 0x1FF, 0x10031, 0x20031, 0x1000, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1)
    for index in range(0x800, 0x840):
        if index == 0x838:
            continue  # no timer
        for value in values:
            seen.append((hex(index), hex(value), rig.set_msr(1, index, value), rig.lapic(1)))
    return seen


def own_interrupts(rig: Rig) -> list[Any]:
    """IPIs by the ICR of vCPU 0, from user space, to all the others."""
    rig.set_cpuid(1 << 21)
    for number in range(3):
        rig.set_base(number, 0xFEE00C00 | (0x100 if not number else 0))
    seen: list[Any] = []
    everyone = (1, 2, 5, 0xFF, 0xFFFFFFFF, 0x10001, 3, 7)
    for shorthand in (0, 1 << 18, 2 << 18, 3 << 18):
        for logical in (0, 1 << 11):
            for destination in everyone:
                for mode in (0, 0x100):
                    low = shorthand | logical | mode | 0x4000 | 0x40 + destination % 0x20
                    for number in range(3):
                        rig.set_lapic(registers(), number)
                    done = rig.set_msr(0, 0x830, destination << 32 | low)
                    seen.append((hex(low), destination, done, [rig.lapic(n) for n in range(3)]))
    return seen


def starts(rig: Rig) -> list[Any]:
    """INIT and SIPI between xAPICs can't be sent from user space: x2APIC."""
    rig.set_cpuid(1 << 21)
    rig.set_base(0, 0xFEE00D00)
    rig.set_lapic(registers(), 0)
    kept = {0xC0000080: 1, 0x277: 0x0007040600070405, **dict.fromkeys(KEPT_AT_INIT, 3)}
    for index, value in kept.items():
        assert rig.set_msr(1, index, value) == 1
    seen: list[Any] = []
    for low in (0x4500, 0x8500, 0xC500, 0x4608, 0x4500, 0x4609):
        seen.append((hex(low), rig.set_msr(0, 0x830, 1 << 32 | low), rig.mp_state(1)))
    seen += [rig.get_msr(1, index) for index in kept]
    for state in (0, 1, 2, 3, 4, 9, 5, 0):
        seen.append((state, rig.set_mp_state(state, 2), rig.mp_state(2)))
    return seen


def messages(rig: Rig) -> list[Any]:
    """But SMIs: the kernel that was tried has no SMM, and doesn't take them."""
    seen: list[Any] = [rig.msi(0, 0), rig.msi(0xFEE00000, 0x41)]
    for destination in (0, 1, 2, 3, 5, 0xFF):
        for low in (0, 4, 8, 0xC):
            for data in (0x41, 0x8042, 0x143, 0x444):
                for number in range(3):
                    rig.set_lapic(registers(r20=number << 24, rD0=1 << 24 + number), number)
                answer = rig.msi(0xFEE00000 | destination << 12 | low, data)
                seen.append((destination, low, hex(data), answer, [rig.lapic(n) for n in range(3)]))
    return seen


def messages_to_apics_that_are_off(rig: Rig) -> list[Any]:
    """INITs by logical destinations, some of which the spurious vector register has disabled."""
    seen: list[Any] = []
    off = {"rF0": 0xFF}
    for turned_off in ((), (1,), (0, 1, 2)):
        for destination in (1, 2, 4, 7, 0xFF):
            for number in range(3):
                spiv = off if number in turned_off else {}
                page = registers(r20=number << 24, rD0=1 << 24 + number, **spiv)
                rig.set_lapic(page, number)
                rig.set_mp_state(0, number)
            answer = rig.msi(0xFEE00004 | destination << 12, 0x500)
            seen.append((turned_off, destination, answer, [rig.mp_state(n) for n in range(3)]))
    return seen


def models(rig: Rig) -> list[Any]:
    """Logical destinations in clusters: KVM takes whatever isn't the flat model for that."""
    seen: list[Any] = []
    for model in (0x0FFFFFFF, 0x8FFFFFFF, 0):
        for destination in (0x11, 0x12, 0x13, 0x21, 0x31, 0xFF):
            for number in range(3):
                logical = (0x11, 0x12, 0x21)[number] << 24
                page = registers(r20=number << 24, rD0=logical, rE0=model)
                rig.set_lapic(page, number)
            answers = [rig.msi(0xFEE00004 | destination << 12, data) for data in (0x41, 0x142)]
            seen.append((hex(model), destination, answers, [rig.lapic(n) for n in range(3)]))
    return seen


def timer_modes(rig: Rig) -> list[Any]:
    """Nine minutes that are over: only a periodic timer begins anew. The mode needs CPUID."""
    seen: list[Any] = []
    for ecx in (None, 0, 1 << 24):
        if ecx is not None:
            rig.set_cpuid(ecx)
        for mode in (0, 1 << 17, 2 << 17, 3 << 17):
            page = registers(r320=mode | 0x10040, r380=0xFFFFFFFF, r3E0=0xA)
            seen.append((ecx, hex(mode), rig.set_lapic(page), rig.is_counting(), rig.lapic()))
    return seen


def deadlines(rig: Rig) -> list[Any]:
    """The TSC deadline, far away, when the page is set that doesn't hold it."""
    never, deadline, one_shot = 1 << 62, 0x50040, 0x10040
    seen: list[Any] = []
    rig.set_cpuid(1 << 24)
    for entry in (deadline, deadline, one_shot, deadline, 0x70040):
        seen += [rig.set_lapic(registers(r320=entry)), rig.get_msr(0, 0x6E0)]
        seen += [rig.set_msr(0, 0x6E0, never), rig.get_msr(0, 0x6E0)]
        seen += [rig.set_lapic(registers(r320=entry)), rig.get_msr(0, 0x6E0), rig.lapic()]
    return seen


SCRIPTS = [
    fresh,
    versions,
    random_pages,
    modes,
    x2apic_msrs,
    own_interrupts,
    starts,
    messages,
    messages_to_apics_that_are_off,
    models,
    timer_modes,
    deadlines,
]


@contextmanager
def rig_on(platform: Any, *, full: bool) -> Iterator[Rig]:
    rig = Rig(platform, full=full)
    try:
        yield rig
    finally:
        rig.close()


@pytest.mark.parametrize("full", [False, True], ids=["split", "full"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_apic_when_asked_the_same_answers_as_the_kernel(script: Script, full: bool) -> None:
    with rig_on(require_kvm(), full=full) as rig:
        expected = script(rig)
    with SimPlatform("6.18") as platform, rig_on(platform, full=full) as rig:
        found = script(rig)
    for step, (real, simulated) in enumerate(zip(expected, found, strict=True)):
        assert simulated == real, step
