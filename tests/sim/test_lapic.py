"""The local APIC by itself: timer, priorities, what guests can do to it."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlaunch.sim.irq import Irqchips
from kvmlaunch.sim.lapic import LocalApic
from kvmlaunch.uapi import lib

KHZ = 2_000_000
TICKS_PER_NS = 2
PERIODIC, MASKED = 0x20000, 0x10000
LEAF_1 = struct.pack("<10I", 1, *[0] * 9)  # kvm_cpuid_entry2, without the TSC deadline
MIN_PERIOD_NS = 200_000  # min_timer_period_us of lapic.c


def vm_of(count: int = 1, *, x2apic: bool = True) -> Any:
    """vCPUs with APICs, of a VM whose clock is what the test says."""
    vm = SimpleNamespace(
        irq=Irqchips(split=True), disabled_quirks=0, bsp_id=0, vcpus=[], guest_ticks=1000
    )
    vm.scheduler = SimpleNamespace(wake=lambda: None)
    for number in range(count):
        guest = SimpleNamespace(x2apic=True)
        state = SimpleNamespace(apic_base=0xFEE00800, guest=guest, apic_base_valid=lambda _: True)
        vcpu = SimpleNamespace(vm=vm, id=number, state=state, cpuid=LEAF_1, tsc_khz=KHZ)
        vcpu.nmi_pending, vcpu.nmis_blocked, vcpu.sipi_vector = 0, False, 0
        vcpu.init_pending = vcpu.sipi_pending = False
        vcpu.apic = LocalApic(vcpu)
        if x2apic:
            assert vcpu.apic.guest_sets_base(0xFEE00C00)
        vm.vcpus.append(vcpu)
    return vm


def write(apic: LocalApic, offset: int, value: int) -> None:
    assert apic.write_msr(0x800 + offset // 16, value)


def started(entry: int, count: int, divide: int = 0xB) -> tuple[Any, LocalApic]:
    """A VM, and an APIC whose timer was just started."""
    vm = vm_of()
    apic = vm.vcpus[0].apic
    write(apic, 0xF0, 0x1FF)
    write(apic, 0x3E0, divide)
    write(apic, 0x320, entry)
    write(apic, 0x380, count)
    return vm, apic


def taken(apic: LocalApic) -> list[int]:
    found = []
    while apic.has_interrupt():
        found.append(apic.accept_interrupt())
    return found


@pytest.mark.parametrize(
    ("divide", "by"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1)],
)
def test_timer_when_divided_takes_that_many_cycles(divide: int, by: int) -> None:
    vm, apic = started(0x40, 1000, divide)
    end = 1000 + 1000 * by * TICKS_PER_NS
    vm.guest_ticks = end - 1
    assert not apic.has_interrupt()
    assert apic.wakes_at() == end
    vm.guest_ticks = end
    assert taken(apic) == [0x40]
    assert apic.wakes_at() is None


def test_timer_when_half_over_counts_half() -> None:
    vm, apic = started(0x40, 1000)
    vm.guest_ticks += 500 * TICKS_PER_NS
    assert apic.read_msr(0x839) == 500
    assert apic.read_msr(0x838) == 1000


def test_timer_when_the_tsc_is_made_slower_has_no_more_left_than_its_count() -> None:
    vm, apic = started(0x40, 0xFFFFFFFF)
    vm.vcpus[0].tsc_khz = 1
    assert apic.read_msr(0x839) == 0xFFFFFFFF
    assert apic.get_state()[0x390:0x394] == b"\xff" * 4


def test_timer_when_bus_cycles_are_longer_is_slower() -> None:
    vm = vm_of()
    vm.irq.bus_cycle_ns = 10
    apic = vm.vcpus[0].apic
    write(apic, 0xF0, 0x1FF)
    write(apic, 0x320, 0x40)
    write(apic, 0x380, 100)
    assert apic.wakes_at() == 1000 + 100 * 2 * 10 * TICKS_PER_NS


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_timer_when_period_is_tiny_is_slowed_down(count: int) -> None:
    vm, apic = started(PERIODIC | 0x40, count)
    period = MIN_PERIOD_NS * TICKS_PER_NS
    for number in range(1, 4):
        assert apic.wakes_at() == 1000 + number * period
        vm.guest_ticks = 1000 + number * period
        assert taken(apic) == [0x40]
        write(apic, 0xB0, 0)


def test_timer_when_many_periods_have_passed_interrupts_once() -> None:
    vm, apic = started(PERIODIC | 0x40, 1_000_000)
    vm.guest_ticks = 1000 + 10_500_000 * TICKS_PER_NS
    assert taken(apic) == [0x40]
    write(apic, 0xB0, 0)
    assert taken(apic) == []
    assert apic.wakes_at() == 1000 + 11_000_000 * TICKS_PER_NS


def test_timer_when_unmasked_too_late_makes_up_for_it() -> None:
    """KVM's way: apic_has_pending_timer() looks at the mask."""
    vm, apic = started(MASKED | 0x40, 1000)
    assert apic.wakes_at() is None
    vm.guest_ticks = 100_000
    assert not apic.has_interrupt()
    write(apic, 0x320, 0x40)
    assert taken(apic) == [0x40]


def test_timer_when_stopped_never_comes() -> None:
    vm, apic = started(0x40, 1000)
    write(apic, 0x380, 0)
    vm.guest_ticks = 1 << 40
    assert taken(apic) == []


def test_timer_when_vector_is_reserved_is_never_heard() -> None:
    vm, apic = started(0x0F, 1000)
    vm.guest_ticks = 1 << 40
    assert apic.wakes_at() is None
    assert taken(apic) == []


def test_state_when_saved_and_restored_goes_on() -> None:
    vm, apic = started(0x40, 1000)
    vm.guest_ticks += 600 * TICKS_PER_NS
    page = apic.get_state()
    other = vm_of()
    restored = other.vcpus[0].apic
    restored.set_state(page)
    assert restored.wakes_at() == 1000 + 400 * TICKS_PER_NS


def test_state_when_saved_at_once_has_the_whole_count() -> None:
    _, apic = started(0x40, 1000)
    assert apic.get_state()[0x390:0x394] == (1000).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("x2apic", "kept"),
    [(False, {}), (True, {0x20: 0x2000000, 0xD0: 1 << 2})],
    ids=["xapic", "x2apic"],
)
def test_registers_when_reset_are_those_of_an_init(x2apic: bool, kept: dict[int, int]) -> None:
    """kvm_lapic_reset(): the mode stays, and with it the ID and what follows from it."""
    apic = vm_of(3, x2apic=x2apic).vcpus[2].apic
    apic.set_state(b"\x77" * 1024)
    apic.reset()
    page = apic.get_state()
    words = {at: int.from_bytes(page[at : at + 4], "little") for at in range(0, 1024, 16)}
    reset = {0x30: 0x1050014, 0xE0: 0xFFFFFFFF, 0xF0: 0xFF}
    masked = dict.fromkeys(range(0x320, 0x380, 0x10), MASKED)
    known = {at for at, word in words.items() if word != 0x77777777}  # the rest is reserved
    assert {at: words[at] for at in known if words[at]} == reset | masked | kept
    assert {
        0x80,
        0xA0,
        0xD0,
        0x100,
        0x180,
        0x200,
        0x270,
        0x280,
        0x300,
        0x310,
        0x380,
        0x3E0,
    } <= known


def test_timer_when_reset_is_stopped_for_good() -> None:
    """An INIT clears the count; what ran until then is not made up for."""
    vm, apic = started(0x40, 1000)
    apic.reset()
    write(apic, 0xF0, 0x1FF)
    write(apic, 0x320, 0x40)
    vm.guest_ticks += 100_000
    assert apic.wakes_at() is None
    assert taken(apic) == []


@pytest.mark.parametrize(
    ("mode", "nmis", "init"), [(0x400, 1, False), (0x500, 0, True), (0x700, 0, False)]
)
def test_timer_when_user_space_gave_it_another_mode_is_no_interrupt(
    mode: int, nmis: int, init: bool
) -> None:
    vm, apic = started(0x40, 1000)
    page = bytearray(apic.get_state())
    struct.pack_into("<I", page, 0x320, mode | 0x40)
    apic.set_state(bytes(page))
    assert apic.wakes_at() is None
    vm.guest_ticks = 100_000
    assert taken(apic) == []
    apic.get_state()
    assert (vm.vcpus[0].nmi_pending, vm.vcpus[0].init_pending) == (nmis, init)


def test_deadline_when_mode_is_off_is_dropped() -> None:
    _, apic = started(0x40000 | 0x40, 1000)  # without the CPUID bit this is one-shot
    assert apic.write_msr(0x6E0, 5000)
    assert apic.read_msr(0x6E0) == 0
    assert apic.wakes_at() == 1000 + 1000 * TICKS_PER_NS


def test_base_when_left_out_of_order_is_refused() -> None:
    vm = vm_of(x2apic=False)
    apic = vm.vcpus[0].apic
    assert apic.guest_sets_base(0xFEE00C00)
    assert not apic.guest_sets_base(0xFEE00800), "only through disabled"
    assert apic.guest_sets_base(0xFEE00000)
    assert not apic.guest_sets_base(0xFEE00C00), "only from xAPIC"
    assert apic.guest_sets_base(0xFEE00800)


def test_base_when_user_space_has_the_apic_is_refused_as_well() -> None:
    vm = vm_of()
    vm.irq = Irqchips()
    assert not vm.vcpus[0].apic.guest_sets_base(0xFEE00800)
    assert vm.vcpus[0].apic.guest_sets_base(0xFEE00000)
    assert not vm.vcpus[0].apic.guest_sets_base(0xFEE00C00)


def test_id_when_the_mode_stays_is_the_one_that_the_guest_wrote() -> None:
    apic = vm_of(x2apic=False).vcpus[0].apic
    assert apic.write_mmio(0xFEE00020, b"\0\0\0\x77")
    assert apic.guest_sets_base(0xFEE00900)
    assert apic.xapic_id == 0x77
    assert apic.guest_sets_base(0xFEE00000)
    assert apic.guest_sets_base(0xFEE00800)
    assert apic.xapic_id == 0


@pytest.mark.parametrize(
    ("offset", "bits"),
    [
        (0x20, 0xFF000000),
        (0x30, 0),
        (0x80, 0xFF),
        (0xA0, 0),
        (0xD0, 0xFF000000),
        (0xF0, 0x13FF),
        (0x100, 0),
        (0x280, 0),
        (0x310, 0xFF000000),
        (0x320, 0x310FF),
        (0x330, 0x117FF),
        (0x340, 0x117FF),
        (0x350, 0x1F7FF),
        (0x360, 0x1F7FF),
        (0x370, 0x110FF),
        (0x390, 0),
        (0x3E0, 0xB),
    ],
)
def test_register_when_written_in_xapic_mode_has_its_bits(offset: int, bits: int) -> None:
    """Those that kvm_lapic_reg_write() lets through."""
    apic = vm_of(x2apic=False).vcpus[0].apic
    assert apic.write_mmio(0xFEE000F0, (0x1FF).to_bytes(4, "little"))
    before = apic.read_mmio(0xFEE00000 + offset, 4)
    for value in (0xFFFFFFFF, 0):
        assert apic.write_mmio(0xFEE00000 + offset, value.to_bytes(4, "little"))
        expected = (value & bits).to_bytes(4, "little") if bits else before
        assert apic.read_mmio(0xFEE00000 + offset, 4) == expected


def test_destination_format_when_written_has_its_four_bits() -> None:
    apic = vm_of(x2apic=False).vcpus[0].apic
    assert apic.write_mmio(0xFEE000E0, bytes(4))
    assert apic.read_mmio(0xFEE000E0, 4) == b"\xff\xff\xff\x0f"


@pytest.mark.parametrize(
    ("gpa", "size"), [(0xFEE00080, 1), (0xFEE00080, 2), (0xFEE00080, 8), (0xFEE00084, 4)]
)
def test_page_when_not_written_by_aligned_words_stays(gpa: int, size: int) -> None:
    apic = vm_of(x2apic=False).vcpus[0].apic
    assert apic.write_mmio(gpa, b"\x55" * size)
    assert apic.cr8 == 0
    assert apic.write_mmio(0xFEE00080, b"\x55\0\0\0")
    assert apic.cr8 == 5


def test_interrupt_when_below_the_task_priority_waits_for_it() -> None:
    apic = vm_of().vcpus[0].apic
    write(apic, 0xF0, 0x1FF)
    assert not apic.blocked_by_priority()
    write(apic, 0x3F0, 0x51)
    assert not apic.blocked_by_priority()
    write(apic, 0x80, 0x50)
    assert apic.blocked_by_priority()
    write(apic, 0x80, 0x4F)
    assert taken(apic) == [0x51]


def test_page_when_in_x2apic_mode_is_a_hole() -> None:
    vm = vm_of()
    apic = vm.vcpus[0].apic
    assert apic.read_mmio(0xFEE00020, 4) == b"\xff" * 4
    assert apic.write_mmio(0xFEE000F0, bytes(4))
    vm.disabled_quirks = lib.KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    assert apic.read_mmio(0xFEE00020, 4) is None
    assert not apic.write_mmio(0xFEE000F0, bytes(4))


@pytest.mark.parametrize(
    ("gpa", "size", "found"),
    [
        (0xFEE00030, 4, b"\x14\0\5\1"),
        (0xFEE00031, 1, b"\0"),
        (0xFEE00032, 2, b"\5\1"),
        (0xFEE00033, 2, b"\0\0"),  # over the end of the register
        (0xFEE00030, 8, bytes(8)),
        (0xFEE000B0, 4, bytes(4)),  # EOI is for writing
        (0xFEE00FF0, 4, bytes(4)),
        (0xFEE01000, 4, None),
        (0xFEDFFFF0, 4, None),
    ],
)
def test_page_when_read_in_parts(gpa: int, size: int, found: bytes | None) -> None:
    apic = vm_of(x2apic=False).vcpus[0].apic
    apic.set_version()
    assert apic.read_mmio(gpa, size) == found


numbers = st.one_of(
    st.sampled_from([0, 1, 0x1FF, 0xB, PERIODIC | 0x40, 0x4500, 0x4608, 0xC4400, 0x80041, 0x40041]),
    st.integers(0, (1 << 64) - 1),
)
accesses = st.tuples(
    st.sampled_from(["msr", "read", "page", "base", "state", "time", "take", "reset"]),
    st.integers(0, 2),
    st.integers(0x7F0, 0x90F),
    numbers,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(st.lists(accesses, max_size=60))
def test_apics_when_guest_does_anything_stay_sound(steps: list[tuple[str, int, int, int]]) -> None:
    vm = vm_of(3, x2apic=False)
    for what, number, index, value in steps:
        vcpu = vm.vcpus[number]
        apic = vcpu.apic
        if what == "msr":
            apic.write_msr(index, value)
        elif what == "read":
            found = apic.read_msr(index)
            assert found is None or 0 <= found < 1 << 64
        elif what == "page":
            apic.write_mmio(
                0xFEE00000 + (index & 0x3F) * 16, (value & 0xFFFFFFFF).to_bytes(4, "little")
            )
        elif what == "base":
            apic.guest_sets_base(0xFEE00000 | value & 0xC00)
        elif what == "state":
            apic.set_state(value.to_bytes(8, "little") * 128)
        elif what == "time":
            vm.guest_ticks += value & (1 << 40) - 1
        elif what == "take":
            assert len(taken(apic)) <= 256, "each vector once, by falling priority"
        else:
            apic.reset()
        assert len(apic.regs) == 1024
        assert vcpu.nmi_pending <= 2
        at = apic.wakes_at()
        if at is not None and at > vm.guest_ticks:
            vm.guest_ticks = at
            assert apic.has_interrupt(), "or a VM that waits would never go on"
