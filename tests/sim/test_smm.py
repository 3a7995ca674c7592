"""System management mode of plain guests (arch/x86/kvm/smm.c; the selftest smm_test)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Memory, simulated, struct
from .one_vcpu import EINVAL, Machine
from .plain_vm import CODE, Vm
from .test_tsc import get_msr, msr_entry, set_msr

OK = (0, 0)
SMBASE, SMRAM, AREA = 0x100000, 0x10000, 0xFE00
HANDLER = bytes.fromhex("b0fe e40e 0faa")  # mov al, 0xfe; in al, 0x0e; rsm
LONG_MODE = (0x80000001, 0, 0, 0, 0, 0, 1 << 29)
# Offsets from 0xFE00 (CHECK_SMRAM64_OFFSET and CHECK_SMRAM32_OFFSET of smm.c).
LAYOUT_64 = {"rip": 0x178, "rflags": 0x170, "cr0": 0x158, "rax": 0x1F8, "rbx": 0x1E0}
LAYOUT_64 |= {"smbase": 0x100, "revision": 0xFC}
LAYOUT_32 = {"rip": 0x1F0, "rflags": 0x1F4, "cr0": 0x1FC, "rax": 0x1D0, "rbx": 0x1DC}
LAYOUT_32 |= {"smbase": 0xF8, "revision": 0xFC}


class SmmVm(Vm):
    """A plain VM whose SMM has memory of its own, with a handler that asks user space."""

    def __init__(self, code="4040f4", *, long=True, handler=HANDLER):
        super().__init__(bytes.fromhex(code))
        self.call = lambda name, args=0: self.ioctl(self.vcpu, getattr(lib, name), args)
        if long:
            self.ok(Machine.set_cpuid(self, LONG_MODE))
        self.smram = Memory(SMRAM)
        self.smram.write(handler, 0x8000)
        region = struct(
            "kvm_userspace_memory_region",
            slot=1 << 16,
            guest_phys_addr=SMBASE,
            memory_size=SMRAM,
            userspace_addr=self.smram.address,
        )
        self.ok(self.ioctl(self.vm, lib.KVM_SET_USER_MEMORY_REGION, region))
        set_msr(self, 0x9E, SMBASE)

    def saved(self, offset):
        return int.from_bytes(self.smram.read(4, AREA + offset), "little")

    @property
    def events(self):
        return self.get(self.vcpu, lib.KVM_GET_VCPU_EVENTS)

    def enter_smm(self):
        self.ok(self.call("KVM_SMI"))
        assert self.enter() == (OK, lib.KVM_EXIT_IO)


@pytest.mark.parametrize(
    ("long", "layout", "revision"), [(True, LAYOUT_64, 0x20064), (False, LAYOUT_32, 0x20000)]
)
def test_smi_saves_the_state_and_rsm_brings_it_back(long, layout, revision):
    vm = SmmVm(long=long)
    vm.set_regs(rax=0x1234, rbx=0x77, rflags=0x46)
    vm.enter_smm()
    saved = {name: vm.saved(offset) for name, offset in layout.items()}
    assert saved.pop("cr0") == vm.get(vm.vcpu, lib.KVM_GET_SREGS).cr0
    assert saved == {
        **{"rip": CODE, "rflags": 0x46, "rax": 0x1234, "rbx": 0x77},
        **{"smbase": SMBASE, "revision": revision},
    }
    assert (vm.regs.rax, vm.regs.rip) == (0x12FE, 0x8002)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, vm.regs.rbx, vm.regs.rip) == (0x1236, 0x77, CODE + 3)


def test_smm_shows_in_the_run_page_and_in_events():
    vm = SmmVm()
    vm.enter_smm()
    smi = vm.events.smi
    assert (vm.run.flags, smi.smm, smi.pending, smi.smm_inside_nmi) == (1, 1, 0, 0)
    assert vm.events.nmi.masked == 1
    vm.enter()
    assert (vm.run.flags, vm.events.smi.smm, vm.events.nmi.masked) == (0, 0, 0)
    assert get_msr(vm, 0x34) == 1  # SMI_COUNT


@pytest.mark.parametrize(("long", "layout"), [(True, LAYOUT_64), (False, LAYOUT_32)])
def test_rsm_takes_what_the_handler_left(long, layout):
    vm = SmmVm(long=long)
    vm.enter_smm()
    vm.smram.write((0x40).to_bytes(4, "little"), AREA + layout["rax"])
    vm.smram.write((SMBASE + 0x1000).to_bytes(4, "little"), AREA + layout["smbase"])
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, get_msr(vm, 0x9E)) == (0x42, SMBASE + 0x1000)


@pytest.mark.parametrize("long", [True, False])
def test_rsm_brings_back_what_changed_in_smm(long):
    """Segments, tables, control and debug registers, whatever the handler makes of them."""
    vm = SmmVm(long=long)
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    for n, name in enumerate(("ds", "es", "fs", "gs", "ss", "ldt", "tr"), 1):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.selector = 0x1000 * n, 0x8000 + n, 0x100 * n
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = 0x2000, 0x7F, 0x3000, 0x3FF
    sregs.cr3, sregs.cr4 = 0x5000, 1 << 9
    vm.ok(vm.call("KVM_SET_SREGS", sregs))
    debug = struct("kvm_debugregs", dr6=0xFFFF4FF0, dr7=0x700)
    vm.ok(vm.call("KVM_SET_DEBUGREGS", debug))
    before = bytes(ffi.buffer(vm.get(vm.vcpu, lib.KVM_GET_SREGS)))
    vm.enter_smm()
    inside = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    assert (inside.ds.base, inside.idt.limit, inside.cr4) == (0, 0, 0)
    for name in ("ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt"):
        getattr(inside, name).base, getattr(inside, name).limit = 0x9000, 0x99
    inside.cr3 = 0x9000
    vm.ok(vm.call("KVM_SET_SREGS", inside))
    vm.ok(vm.call("KVM_SET_DEBUGREGS", struct("kvm_debugregs", dr6=0xFFFF0FF0, dr7=0x400)))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert bytes(ffi.buffer(vm.get(vm.vcpu, lib.KVM_GET_SREGS))) == before
    after = vm.get(vm.vcpu, lib.KVM_GET_DEBUGREGS)
    assert (after.dr6, after.dr7) == (0xFFFF4FF0, 0x700)


@pytest.mark.parametrize("long", [True, False])
@pytest.mark.parametrize("shadow", [0, 1])
def test_rsm_brings_back_the_interrupt_shadow(long, shadow):
    vm = SmmVm(long=long)
    vm.ram.write(b"\xf4", 0x2000)
    vm.ram.write((0x2000).to_bytes(4, "little"), 4 * 0x30)
    vm.set_regs(rflags=0x202, rsp=0x3000)
    events = vm.events
    events.interrupt.shadow, events.flags = shadow, lib.KVM_VCPUEVENT_VALID_SHADOW
    vm.ok(vm.call("KVM_SET_VCPU_EVENTS", events))
    vm.enter_smm()
    assert vm.events.interrupt.shadow == 0
    vm.ok(vm.call("KVM_INTERRUPT", struct("kvm_interrupt", irq=0x30)))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rip == 0x2001
    assert vm.ram.read(2, 0x2FFA) == (CODE + shadow).to_bytes(2, "little")


@pytest.mark.parametrize(("long", "inside"), [(True, 0), (False, 1)])
def test_efer_comes_back_although_the_32_bit_area_lacks_it(long, inside):
    """enter_smm() and emulator_leave_smm() clear it for guests with long mode only."""
    vm = SmmVm(long=long)
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    sregs.efer = 1  # SCE
    vm.ok(vm.call("KVM_SET_SREGS", sregs))
    vm.enter_smm()
    assert vm.get(vm.vcpu, lib.KVM_GET_SREGS).efer == inside
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.get(vm.vcpu, lib.KVM_GET_SREGS).efer == 1


def test_smi_count_begins_anew_behind_64_bits():
    vm = SmmVm()
    set_msr(vm, 0x34, (1 << 64) - 1)
    vm.enter_smm()
    assert get_msr(vm, 0x34) == 0


def test_rsm_when_the_state_cannot_be_is_a_shutdown():
    vm = SmmVm()
    vm.enter_smm()
    vm.smram.write((1 << 31).to_bytes(8, "little"), AREA + LAYOUT_64["cr0"])  # PG without PE
    assert vm.enter() == (OK, lib.KVM_EXIT_SHUTDOWN)
    assert vm.events.smi.smm == 0


def test_rsm_outside_smm_is_an_undefined_opcode():
    vm = SmmVm("0faa f4")
    vm.ram.write(b"\xf4", 0x2000)
    vm.ram.write((0x2000).to_bytes(4, "little"), 4 * 6)
    vm.set_regs(rsp=0x3000)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rip == 0x2001


def test_handler_has_memory_of_its_own():
    """mov ax, [0x1000] in SMM: there is nothing; the guest outside has no SMRAM."""
    vm = SmmVm(handler=bytes.fromhex("a10010 0faa"))
    vm.ok(vm.call("KVM_SMI"))
    assert vm.enter() == (OK, lib.KVM_EXIT_MMIO)
    assert (vm.run.mmio.phys_addr, vm.run.mmio.len) == (0x1000, 2)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)


def test_second_smi_waits_for_the_end_of_the_first():
    vm = SmmVm()
    vm.enter_smm()
    vm.ok(vm.call("KVM_SMI"))
    assert vm.events.smi.pending == 1
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    assert (vm.saved(LAYOUT_64["rip"]), vm.events.smi.pending) == (CODE, 0)


def test_smi_waits_for_the_end_of_an_instruction_that_accesses_a_device():
    """movsb from one device to another; what comes between its halves isn't done again."""
    vm = SmmVm("a4 40 f4")
    vm.set_regs(rsi=0xF000, rdi=0xF100)
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    for segment in (sregs.ds, sregs.es):
        segment.base, segment.selector = 0x10000, 0x1000  # behind the guest's memory
    vm.ok(vm.call("KVM_SET_SREGS", sregs))
    assert vm.enter() == (OK, lib.KVM_EXIT_MMIO)
    vm.run.mmio.data[0] = 0x5A
    vm.ok(vm.call("KVM_SMI"))
    assert vm.enter() == (OK, lib.KVM_EXIT_MMIO)
    assert (vm.run.mmio.is_write, vm.run.mmio.phys_addr, vm.run.mmio.data[0]) == (1, 0x1F100, 0x5A)
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    assert vm.saved(LAYOUT_64["rip"]) == CODE + 1
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)


def test_smi_by_events_is_as_good_as_the_ioctl():
    vm = SmmVm()
    events = vm.events
    events.smi.pending, events.flags = 1, lib.KVM_VCPUEVENT_VALID_SMM
    vm.ok(vm.call("KVM_SET_VCPU_EVENTS", events))
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    assert vm.regs.rip == 0x8002


@pytest.mark.parametrize("mode", [0x200, 0x245])
def test_smi_by_message_reaches_the_vcpu(mode):
    with simulated() as platform:
        machine = Machine(platform, split=True)
        message = struct("kvm_msi", address_lo=0xFEE00000, data=mode)
        assert machine.ioctl(machine.vm, lib.KVM_SIGNAL_MSI, message) == (1, 0)
        assert machine.get(machine.vcpu, lib.KVM_GET_VCPU_EVENTS).smi.pending == 1


def test_smm_by_events_changes_memory():
    vm = SmmVm()
    vm.enter_smm()
    events, regs = vm.events, vm.regs
    events.smi.smm, events.flags = 0, lib.KVM_VCPUEVENT_VALID_SMM
    vm.ok(vm.call("KVM_SET_VCPU_EVENTS", events))
    assert vm.enter() == (OK, lib.KVM_EXIT_INTERNAL_ERROR)
    # exit_info_2: nothing is there outside, where the handler would go on
    assert vm.run.internal.data[3] == SMBASE + 0x8004
    assert regs.rip == 0x8002


def test_smm_of_one_vcpu_leaves_the_others_their_memory():
    vm = SmmVm()
    other = vm.ok(vm.ioctl(vm.vm, lib.KVM_CREATE_VCPU, 1))
    sregs, regs = vm.get(vm.vcpu, lib.KVM_GET_SREGS), vm.regs
    vm.enter_smm()
    vm.ok(vm.ioctl(other, lib.KVM_SET_SREGS, sregs))
    vm.ok(vm.ioctl(other, lib.KVM_SET_REGS, regs))
    assert tuple(vm.ioctl(other, lib.KVM_RUN)) == OK
    assert vm.get(other, lib.KVM_GET_REGS).rip == CODE + 3  # behind HLT
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)


@pytest.mark.parametrize(("gpa", "taken"), [(CODE, 1), (SMBASE, 0)])
def test_structures_of_kvm_are_outside_smm(gpa, taken):
    vm = SmmVm()
    vm.enter_smm()
    keep, header = msr_entry(0x4B564D04, gpa | 1)  # PV_EOI_EN
    assert vm.call("KVM_SET_MSRS", header) == (taken, 0)
    del keep


def test_smm_by_events_of_one_vcpu_leaves_the_one_that_runs_its_memory():
    vm = SmmVm()
    other = vm.ok(vm.ioctl(vm.vm, lib.KVM_CREATE_VCPU, 1))
    events = vm.get(other, lib.KVM_GET_VCPU_EVENTS)
    events.smi.smm, events.flags = 1, lib.KVM_VCPUEVENT_VALID_SMM
    vm.ok(vm.ioctl(other, lib.KVM_SET_VCPU_EVENTS, events))
    slots = vm.platform._host.fds.get(vm.vm).vm.slots
    assert (slots.find(CODE // PAGE) is None, slots.find(SMBASE // PAGE) is None) == (False, True)


@pytest.mark.parametrize("by_events", [False, True], ids=["pending", "inside"])
@pytest.mark.parametrize("state", ["INIT_RECEIVED", "SIPI_RECEIVED"])
def test_vcpu_does_not_wait_for_its_start_in_smm(by_events, state):
    """kvm_arch_vcpu_ioctl_set_mpstate(): INITs are latched, and an SMI comes first."""
    with simulated() as platform:
        machine = Machine(platform, split=True)
        wanted = struct("kvm_mp_state", mp_state=getattr(lib, f"KVM_MP_STATE_{state}"))
        events = machine.get(machine.vcpu, lib.KVM_GET_VCPU_EVENTS)
        if by_events:
            events.smi.smm = 1
            machine.ok(machine.call("KVM_SET_VCPU_EVENTS", events))
        else:
            machine.ok(machine.call("KVM_SMI"))
        assert machine.call("KVM_SET_MP_STATE", wanted) == EINVAL
        halted = struct("kvm_mp_state", mp_state=lib.KVM_MP_STATE_HALTED)
        assert machine.call("KVM_SET_MP_STATE", halted) == OK


def test_smi_without_memory_kills_the_vm():
    vm = SmmVm()
    set_msr(vm, 0x9E, 0x900000)
    vm.ok(vm.call("KVM_SMI"))
    assert vm.enter()[0] == (-1, errno.EIO)
    assert vm.call("KVM_GET_REGS", struct("kvm_regs")) == (-1, errno.EIO)


def test_smi_of_a_guest_with_encrypted_state_is_dropped():
    with simulated() as platform:
        machine = Machine(platform, vm_type=4)
        assert machine.call("KVM_SMI") == OK
        assert machine.get(machine.vcpu, lib.KVM_GET_VCPU_EVENTS).smi.pending == 0


def test_address_spaces_are_two_but_one_for_snp():
    vm = SmmVm()
    cap = lib.KVM_CAP_MULTI_ADDRESS_SPACE
    assert vm.ioctl(vm.vm, lib.KVM_CHECK_EXTENSION, cap) == (2, 0)
    with simulated() as platform:
        machine = Machine(platform, vm_type=4)
        assert machine.ioctl(machine.vm, lib.KVM_CHECK_EXTENSION, cap) == (1, 0)
