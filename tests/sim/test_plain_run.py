"""Guests without encrypted state: registers go in and come out, and every kind of exit."""

from __future__ import annotations

import errno
from struct import pack

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Memory, struct
from .plain_vm import CODE, Vm
from .scripted import io_data

OK = (0, 0)
MAP_GPA_RANGE = 12


def test_registers_go_in_and_come_out():
    vm = Vm(bytes.fromhex("01d8 89c1 f4"))  # add ax, bx; mov cx, ax; hlt
    vm.set_regs(rax=0x1200, rbx=0x34)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, vm.regs.rcx, vm.regs.rip) == (0x1234, 0x1234, CODE + 5)


def test_registers_that_user_space_sets_between_runs_count():
    vm = Vm(bytes.fromhex("f4 40 f4"))  # hlt; inc ax; hlt
    vm.enter()
    vm.set_regs(rax=7)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rax == 8


def test_code_that_user_space_changes_between_runs_counts():
    vm = Vm(bytes.fromhex("b80100 f4"))  # mov ax, 1; hlt
    vm.enter()
    vm.ram.write(b"\x02", CODE + 1)
    vm.set_regs(rip=CODE)
    vm.enter()
    assert vm.regs.rax & 0xFFFF == 2


def test_segment_and_control_registers_come_out():
    # mov ax, 0x123; mov ds, ax; mov eax, cr0; or al, 1; mov cr0, eax; hlt
    vm = Vm(bytes.fromhex("b82301 8ed8 0f20c0 0c01 0f22c0 f4"))
    vm.enter()
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    assert (sregs.ds.selector, sregs.ds.base, sregs.cr0 & 1) == (0x123, 0x1230, 1)


def test_sse_registers_come_out():
    # 32 bits: mov eax, cr4; or ah, 2; mov cr4, eax; mov ebx, 0x11223344; movd xmm1, ebx; hlt
    vm = Vm(bytes.fromhex("0f20e0 80cc02 0f22e0 bb44332211 660f6ecb f4"), code32=True)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    fpu = vm.get(vm.vcpu, lib.KVM_GET_FPU)
    assert bytes(ffi.buffer(fpu.xmm))[16:32] == b"\x44\x33\x22\x11".ljust(16, b"\0")


@pytest.mark.parametrize("quirk", [True, False])
def test_vmcall_is_patched_unless_the_quirk_is_off(quirk):
    # vmcall; hlt
    vm = Vm(bytes.fromhex("0f01c1 f4"))
    vm.ram.write(pack("<HH", 0x2000, 0), 6 * 4)  # #UD, in real mode
    vm.ram.write(b"\xf4", 0x2000)
    if not quirk:
        cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_DISABLE_QUIRKS2)
        cap.args[0] = lib.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
        vm.ok(vm.ioctl(vm.vm, lib.KVM_ENABLE_CAP, cap))
    vm.set_regs(rax=11, rsp=0x8000)  # KVM_HC_SCHED_YIELD
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    expected = (0, CODE + 4, b"\x0f\x01\xd9") if quirk else (11, 0x2001, b"\x0f\x01\xc1")
    assert (vm.regs.rax, vm.regs.rip, vm.ram.read(3, CODE)) == expected


def test_out_exits_with_its_bytes():
    vm = Vm(bytes.fromhex("b83412 baf803 ef f4"))  # mov ax, 0x1234; mov dx, 0x3f8; out dx, ax
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    io = vm.run.io
    assert (io.direction, io.size, io.port, io.count) == (1, 2, 0x3F8, 1)
    assert io_data(vm.run, 2) == b"\x34\x12"
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)


def test_in_gets_its_answer():
    vm = Vm(bytes.fromhex("e460 f4"))  # in al, 0x60
    vm.set_regs(rax=0x5500)
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    ffi.buffer(ffi.cast("char *", vm.run) + 0x1000, 1)[:] = b"\xab"
    vm.enter()
    assert vm.regs.rax == 0x55AB


def test_in_when_user_space_changes_registers_is_answered_once():
    """complete_fast_pio_in(): an IN isn't done a second time, and other registers count."""
    vm = Vm(bytes.fromhex("e460 f4"))
    vm.enter()
    vm.set_regs(rax=0x2200, rbx=5)
    ffi.buffer(ffi.cast("char *", vm.run) + 0x1000, 1)[:] = b"\x11"
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, vm.regs.rbx, vm.regs.rip) == (0x2211, 5, CODE + 3)


def test_in_when_user_space_moves_rip_is_forgotten():
    vm = Vm(bytes.fromhex("e460 f4"))
    vm.enter()
    vm.set_regs(rax=0x2200, rip=CODE + 2)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, vm.regs.rip) == (0x2200, CODE + 3)


def test_mmio_read_when_user_space_changes_registers_is_answered_once():
    vm = Vm(bytes.fromhex("a100400500 f4"), code32=True)  # mov eax, [0x54000]; hlt
    assert vm.enter() == (OK, lib.KVM_EXIT_MMIO)
    ffi.buffer(vm.run.mmio.data)[:4] = b"\x44\x33\x22\x11"
    vm.set_regs(rbx=6)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, vm.regs.rbx) == (0x11223344, 6)


def test_repeated_string_in_reads_ahead_within_its_page():
    """pio_in_emulated(): at most 1024 bytes, and as many items as there are bytes in the page."""
    # mov di, 0x4ffe; mov cx, 5; mov dx, 0x3f8; cld; rep insb; hlt
    vm = Vm(bytes.fromhex("bffe4f b90500 baf803 fc f36c f4"))
    sizes = []
    while vm.enter() == (OK, lib.KVM_EXIT_IO):
        io = vm.run.io
        sizes.append((io.size, io.count))
        ffi.buffer(ffi.cast("char *", vm.run) + 0x1000, io.count)[:] = b"abc"[: io.count]
    assert sizes == [(1, 2), (1, 3)]
    assert vm.ram.read(5, 0x4FFE) == b"ababc"
    assert vm.regs.rcx & 0xFFFF == 0


@pytest.mark.parametrize(
    ("rdi", "rflags", "counts"),
    [(0x4FFE, 2, [2, 3]), (0x4FFC, 2, [4, 1]), (0x5002, 0x402, [2, 3])],
)
def test_repeated_string_in_of_words_counts_items_by_bytes_of_the_page(rdi, rflags, counts):
    """So did the /dev/kvm of a 6.18."""
    vm = Vm(bytes.fromhex("f36d f4"))
    vm.set_regs(rdi=rdi, rcx=5, rdx=0x3F8, rflags=rflags)
    seen = []
    while vm.enter() == (OK, lib.KVM_EXIT_IO):
        assert vm.run.io.size == 2
        seen.append(vm.run.io.count)
    assert seen == counts


@pytest.mark.parametrize(("left", "stored"), [(1, b"a\0"), (0, b"\0\0")])
def test_repeated_string_in_when_user_space_changes_the_count_fills_only_that(left, stored):
    """userspace_io_test: the kernel doesn't overflow its buffer."""
    vm = Vm(bytes.fromhex("bf0050 b90200 baf803 fc f36c f4"))
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    ffi.buffer(ffi.cast("char *", vm.run) + 0x1000, 2)[:] = b"ab"
    vm.set_regs(rcx=left)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.ram.read(2, 0x5000) == stored
    assert vm.regs.rcx & 0xFFFF == 0


def test_in_is_answered_although_the_run_is_to_end_at_once():
    """immediate_exit completes the exit, and runs nothing (x86.c)."""
    vm = Vm(bytes.fromhex("e460 f4"))
    vm.enter()
    ffi.buffer(ffi.cast("char *", vm.run) + 0x1000, 1)[:] = b"\xab"
    vm.run.immediate_exit = 1
    assert vm.enter()[0] == (-1, errno.EINTR)
    assert (vm.regs.rax & 0xFF, vm.regs.rip) == (0xAB, CODE + 2)


def test_string_out_exits_for_each_item():
    # mov si, 0x1100; mov cx, 3; mov dx, 0x3f8; cld; rep outsb; hlt
    vm = Vm(bytes.fromhex("be0011 b90300 baf803 fc f36e f4"))
    vm.ram.write(b"xyz", 0x1100)
    seen = b""
    while vm.enter() == (OK, lib.KVM_EXIT_IO):
        seen += io_data(vm.run, vm.run.io.size * vm.run.io.count)
    assert seen == b"xyz"


def test_mmio_write_and_read():
    # 32 bits: mov eax, 0x11223344; mov [0xd0000000], eax; mov ebx, [0xd0000008]; hlt
    vm = Vm(bytes.fromhex("b844332211 a3000000d0 8b1d080000d0 f4"), code32=True)
    assert vm.enter() == (OK, lib.KVM_EXIT_MMIO)
    mmio = vm.run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0xD0000000, 4, 1)
    assert bytes(ffi.buffer(mmio.data))[:4] == b"\x44\x33\x22\x11"
    assert vm.enter() == (OK, lib.KVM_EXIT_MMIO)
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0xD0000008, 4, 0)
    ffi.buffer(mmio.data)[:4] = b"\x01\x02\x03\x04"
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rbx == 0x04030201


def test_code_in_a_device_can_not_be_emulated():
    vm = Vm(b"\xf4")
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    sregs.cs.base = 0xD0000000
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, sregs))
    assert vm.enter() == (OK, lib.KVM_EXIT_INTERNAL_ERROR)
    assert vm.run.internal.suberror == lib.KVM_INTERNAL_ERROR_EMULATION


def test_memory_that_is_not_mapped_is_efault():
    vm = Vm(b"\xf4")
    region = struct(
        "kvm_userspace_memory_region", slot=1, guest_phys_addr=0x100000, memory_size=PAGE
    )
    vm.ok(vm.ioctl(vm.vm, lib.KVM_SET_USER_MEMORY_REGION, region))
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    sregs.cs.base = 0x100000 - CODE
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, sregs))
    assert vm.enter()[0] == (-1, errno.EFAULT)


def test_triple_fault_is_a_shutdown_and_the_vcpu_starts_anew():
    vm = Vm(bytes.fromhex("0f0b"), code32=True)  # ud2, without an IDT to speak of
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    sregs.idt.limit = 0
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, sregs))
    assert vm.enter() == (OK, lib.KVM_EXIT_SHUTDOWN)
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    assert (vm.regs.rip, sregs.cs.base, sregs.cr0 & 1) == (0xFFF0, 0xFFFF0000, 0)


def test_msr_that_kvm_keeps_is_the_one_of_the_ioctls():
    # 32 bits: mov ecx, 0xc0000103 (TSC_AUX); mov eax, 0x42; xor edx, edx; wrmsr; hlt
    vm = Vm(bytes.fromhex("b9030100c0 b842000000 31d2 0f30 f4"), code32=True)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    msrs = ffi.new("struct kvm_msrs *", {"nmsrs": 1, "entries": [{"index": 0xC0000103}]})
    assert vm.ioctl(vm.vcpu, lib.KVM_GET_MSRS, msrs).ret == 1
    assert msrs.entries[0].data == 0x42


def test_cpuid_is_what_user_space_set():
    vm = Vm(bytes.fromhex("66b834120000 0fa2 f4"))  # mov eax, 0x1234; cpuid
    entry = {"function": 0x1234, "eax": 0xA1, "ebx": 0xB2, "ecx": 0xC3, "edx": 0xD4}
    table = ffi.new("struct kvm_cpuid2 *", {"nent": 1, "entries": [entry]})
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_CPUID2, table))
    vm.enter()
    regs = vm.regs
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (0xA1, 0xB2, 0xC3, 0xD4)


@pytest.mark.parametrize(("nr", "answer"), [(1, 0), (3, -1000 & 0xFFFFFFFF)])
def test_hypercall_in_the_kernel_is_answered_in_eax(nr, answer):
    vm = Vm(bytes.fromhex("0f01d9 f4"))  # vmmcall
    vm.set_regs(rax=nr)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rax == answer


def test_hypercall_for_user_space_exits():
    vm = Vm(bytes.fromhex("0f01d9 f4"))
    cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_EXIT_HYPERCALL)
    cap.args[0] = 1 << MAP_GPA_RANGE
    vm.ok(vm.ioctl(vm.vm, lib.KVM_ENABLE_CAP, cap))
    vm.set_regs(rax=MAP_GPA_RANGE, rbx=0x4000, rcx=2, rdx=0x10)
    assert vm.enter() == (OK, lib.KVM_EXIT_HYPERCALL)
    hypercall = vm.run.hypercall
    assert (hypercall.nr, list(hypercall.args)[:3], hypercall.flags) == (12, [0x4000, 2, 16], 0)
    hypercall.ret = 5
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rax == 5


def test_interrupt_of_user_space_is_delivered():
    # 0x1000: sti; hlt   0x1100: mov bx, 0x77; hlt, by vector 0x20 of the real-mode table
    vm = Vm(bytes.fromhex("fb f4"))
    vm.ram.write(bytes.fromhex("bb7700 f4"), 0x1100)
    vm.ram.write(bytes.fromhex("00110000"), 0x20 * 4)
    vm.set_regs(rsp=0x8000)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.run.if_flag, vm.run.ready_for_interrupt_injection) == (1, 1)
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_INTERRUPT, struct("kvm_interrupt", irq=0x20)))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rbx == 0x77


class MovingTables(Vm):
    """32 bits with page tables in a slot of their own, which can be replaced.

    They map the first 16 pages to themselves, but 0x7000 elsewhere.
    """

    TABLES, IDT, GDT = 0x100000, 0x2000, 0x3000

    def __init__(self, code: bytes, *, moved_to: int) -> None:
        super().__init__(code, code32=True)
        self.ram.write(b"\xf4", 0x1100)
        self.ram.write(pack("<HHHH", 0x1100, 8, 0x8E00, 0), self.IDT + 8 * 0x20)
        self.ram.write(pack("<QQ", 0, 0x00CF9B000000FFFF), self.GDT)
        self.tables: Memory | None = None
        self.move(moved_to)
        sregs = self.get(self.vcpu, lib.KVM_GET_SREGS)
        sregs.cr0 |= 1 << 31
        sregs.cr3 = self.TABLES
        sregs.idt.base, sregs.idt.limit = self.IDT, 0x7FF
        sregs.gdt.base, sregs.gdt.limit = self.GDT, 0xF
        self.ok(self.ioctl(self.vcpu, lib.KVM_SET_SREGS, sregs))
        self.set_regs(rsp=0x8000, rdi=0x7FF8)

    def move(self, to: int) -> None:
        """Put other tables in the place of the present ones."""
        if self.tables is not None:
            self._set_slot(self.tables, 0)
        self.tables = Memory(2 * PAGE)
        self.tables.write(pack("<I", self.TABLES + PAGE | 3), 0)
        pages = [to if n == 7 else n * PAGE for n in range(16)]
        self.tables.write(pack("<16I", *(page | 3 for page in pages)), PAGE)
        self._set_slot(self.tables, 2 * PAGE)

    def _set_slot(self, memory: Memory, size: int) -> None:
        region = struct(
            "kvm_userspace_memory_region",
            slot=1,
            guest_phys_addr=self.TABLES,
            memory_size=size,
            userspace_addr=memory.address,
        )
        self.ok(self.ioctl(self.vm, lib.KVM_SET_USER_MEMORY_REGION, region))


# What the CPU knows of memory must not outlive it: user space may have unmapped it.


def test_interrupt_goes_through_the_page_tables_of_the_present_slot():
    vm = MovingTables(bytes.fromhex("fb f4"), moved_to=0xA000)  # sti; hlt
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    vm.move(0xB000)
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_INTERRUPT, struct("kvm_interrupt", irq=0x20)))
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.regs.rip == 0x1101
    assert vm.ram.read(4, 0xBFF4) == pack("<I", CODE + 2)
    assert vm.ram.read(4, 0xAFF4) == bytes(4)


def test_answer_to_ins_goes_through_the_page_tables_of_the_present_slot():
    vm = MovingTables(bytes.fromhex("6c f4"), moved_to=0xA000)  # insb; hlt
    assert vm.enter() == (OK, lib.KVM_EXIT_IO)
    ffi.buffer(ffi.cast("char *", vm.run) + 0x1000, 1)[:] = b"\x42"
    vm.move(0xB000)
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert vm.ram.read(1, 0xBFF8) == b"\x42"
    assert vm.ram.read(1, 0xAFF8) == b"\0"


def test_interrupt_window_is_an_exit_when_asked_for():
    vm = Vm(bytes.fromhex("90 fb 90 90 ebfe"))  # nop; sti; nop; nop; jmp .
    vm.run.request_interrupt_window = 1
    assert vm.enter() == (OK, lib.KVM_EXIT_IRQ_WINDOW_OPEN)
    assert vm.run.ready_for_interrupt_injection == 1


def test_task_priority_goes_in_and_comes_out():
    # 32 bits: mov eax, cr8 is `lock mov eax, cr0`; add eax, 1; lock mov cr0, eax; hlt
    vm = Vm(bytes.fromhex("f00f20c0 83c001 f00f22c0 f4"), code32=True)
    vm.run.cr8 = 4
    assert vm.enter() == (OK, lib.KVM_EXIT_HLT)
    assert (vm.regs.rax, vm.run.cr8) == (5, 5)


def test_task_priority_that_can_not_be_is_einval():
    vm = Vm(b"\xf4")
    vm.run.cr8 = 16
    assert vm.enter()[0] == (-1, errno.EINVAL)
