"""Where interrupts go: destinations and delivery modes (lapic.c, irq_comm.c)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu
    from kvmlaunch.sim.vm import Vm

__all__ = ["Interrupt", "Mode", "accept", "most_nmis", "pend_nmi", "send", "send_message"]

_LOGICAL, _ASSERT, _LEVEL = 1 << 11, 1 << 14, 1 << 15
_SHORTHAND = 3 << 18
_TO_SELF, _TO_ALL, _TO_OTHERS = 1 << 18, 2 << 18, 3 << 18
_BROADCAST, _X2APIC_BROADCAST = 0xFF, 0xFFFFFFFF


class Mode(enum.IntEnum):
    """Delivery mode: bits 10:8 of ICR, LVT entries and MSI data."""

    FIXED = 0x000
    LOWEST = 0x100
    SMI = 0x200
    REMOTE_READ = 0x300
    NMI = 0x400
    INIT = 0x500
    STARTUP = 0x600
    EXTINT = 0x700


class Interrupt(NamedTuple):
    """A message to an APIC."""

    vector: int
    mode: Mode
    level: bool = False
    asserted: bool = True


def send(source: Vcpu, low: int, destination: int) -> None:
    """kvm_apic_send_ipi(): ``low`` is the lower half of the ICR. Doesn't fail, as in hardware."""
    what = Interrupt(low & 0xFF, Mode(low & 0x700), bool(low & _LEVEL), bool(low & _ASSERT))
    shorthand, logical = low & _SHORTHAND, bool(low & _LOGICAL)
    vm = source.vm
    if shorthand == _TO_SELF:
        accept(source, what)
        vm.scheduler.wake()
    elif shorthand:
        targets = [vcpu for vcpu in vm.vcpus if vcpu is not source or shorthand == _TO_ALL]
        _deliver_to(vm, targets, what, destination, logical, bits=0)
    else:
        targets = [vcpu for vcpu in vm.vcpus if _matches(vcpu, destination, logical)]
        _deliver_to(vm, targets, what, destination, logical)


def send_message(vm: Vm, address: int, data: int) -> int:
    """KVM_SIGNAL_MSI: the number of APICs that took it, or -1 (kvm_set_msi)."""
    destination, logical = address >> 12 & 0xFF, bool(address >> 2 & 1)
    what = Interrupt(data & 0xFF, Mode(data & 0x700), bool(data & _LEVEL))
    targets = []
    for vcpu in vm.vcpus:
        everyone = destination == _BROADCAST and vcpu.apic.x2apic
        if _matches(vcpu, _X2APIC_BROADCAST if everyone else destination, logical):
            targets.append(vcpu)
    hint = bool(address >> 3 & 1)
    bits = 0 if destination == _BROADCAST else None
    taken = _deliver_to(vm, targets, what, destination, logical, hint=hint, bits=bits)
    # KVM looks the APIC up in a map where it can, and doesn't mind if there is none.
    mapped = vm.vcpus and destination != _BROADCAST
    return max(taken, 0) if mapped else taken


def _deliver_to(
    vm: Vm,
    targets: list[Vcpu],
    what: Interrupt,
    destination: int,
    logical: bool,
    *,
    hint: bool = False,
    bits: int | None = None,
) -> int:
    """Deliver to all ``targets``, or to one of them: the lowest priority, or as MSIs hint."""
    if not hint and what.mode != Mode.LOWEST:
        return _deliver(vm, targets, what, None)
    if not logical and destination == _BROADCAST:
        # The lowest priority of everyone is a fixed interrupt to KVM, whatever it was.
        what = what._replace(mode=Mode.FIXED)
        if not hint:
            return _deliver(vm, targets, what, None)
    if bits is None:
        masked = logical and targets and destination != _broadcast(targets[0])
        bits = destination & _logical_mask(targets[0]) if masked else 0
    return _deliver(vm, targets, what, bits)


def _deliver(vm: Vm, targets: list[Vcpu], what: Interrupt, one: int | None) -> int:
    """kvm_irq_delivery_to_apic(); -1 where nobody is there. ``one``: see `_choose`."""
    targets = [vcpu for vcpu in targets if vcpu.apic.present]
    if one is not None:
        targets = _choose(targets, what.vector, one)
    if not targets:
        return -1
    taken = sum([accept(vcpu, what) for vcpu in targets])
    vm.scheduler.wake()
    return taken


def _choose(targets: list[Vcpu], vector: int, bits: int) -> list[Vcpu]:
    """Vector hashing, KVM's way to find the lowest priority.

    Among ``bits`` of a logical destination, whoever they stand for; among the APICs that are on
    where that is 0.
    """
    if not bits:
        awake = [vcpu for vcpu in targets if vcpu.apic.software_enabled]
        return [awake[vector % len(awake)]] if awake else []
    numbers = [n for n in range(bits.bit_length()) if bits >> n & 1]
    chosen = numbers[vector % len(numbers)]
    return [vcpu for vcpu in targets if _logical_bits(vcpu) >> chosen & 1][:1]


def _broadcast(vcpu: Vcpu) -> int:
    return _X2APIC_BROADCAST if vcpu.apic.x2apic else _BROADCAST


def _logical_mask(vcpu: Vcpu) -> int:
    """The part of a logical destination that has a bit for each APIC."""
    if vcpu.apic.x2apic:
        return 0xFFFF
    return 0xFF if vcpu.apic.is_flat else 0xF


def _logical_bits(vcpu: Vcpu) -> int:
    mine = vcpu.apic.logical_id
    return (mine if vcpu.apic.x2apic else mine >> 24) & _logical_mask(vcpu)


def accept(vcpu: Vcpu, what: Interrupt) -> bool:
    """__apic_accept_irq(): whether the APIC takes the message."""
    if what.mode in (Mode.FIXED, Mode.LOWEST):
        if what.level and not what.asserted:
            return False
        return vcpu.apic.accept(what.vector, level=what.level)
    if what.mode == Mode.NMI:
        pend_nmi(vcpu)
    elif what.mode == Mode.SMI:
        vcpu.pend_smi()
    elif what.mode == Mode.INIT:
        if what.level and not what.asserted:
            return False
        vcpu.init_pending, vcpu.sipi_pending = True, False
    elif what.mode == Mode.STARTUP:
        vcpu.sipi_vector, vcpu.sipi_pending = what.vector, True
    else:
        # Nothing waits for a remote read; EXTINT is LINT0's business.
        return what.mode == Mode.REMOTE_READ
    return True


def pend_nmi(vcpu: Vcpu) -> None:
    """kvm_inject_nmi(): one NMI more."""
    vcpu.nmi_pending = min(vcpu.nmi_pending + 1, most_nmis(blocked=vcpu.nmis_blocked))


def most_nmis(*, blocked: bool) -> int:
    """process_nmi(): how many may wait."""
    return 1 if blocked else 2


def _matches(vcpu: Vcpu, destination: int, logical: bool) -> bool:
    """kvm_apic_match_dest(), without a shorthand."""
    apic = vcpu.apic
    if destination == _broadcast(vcpu):
        return True
    if not logical:
        is_wide = apic.x2apic or destination > 0xFF
        return destination == (vcpu.id if is_wide else apic.xapic_id)
    mine = apic.logical_id
    if apic.x2apic:
        return mine >> 16 == destination >> 16 and bool(mine & destination & 0xFFFF)
    mine >>= 24
    if not apic.software_enabled:
        return False  # not in kvm_recalculate_logical_map()
    if apic.is_flat:
        return bool(mine & destination)
    return mine >> 4 == destination >> 4 and bool(mine & destination & 0xF)
