"""The simulator's generic half against this machine's /dev/kvm, call by call: system and VMs."""

from __future__ import annotations

import mmap

import pytest

from kvmlaunch.uapi import ffi, lib

from .differential import differences, names_of_steps, this_kernel
from .driver import PAGE, RW, struct

TOP = 1 << 64

# Step -> why this machine's answer may differ from that of an SNP host, see this_kernel().
PVM = {
    "create_vm type 2": "PVM has no SEV",
    "create_vm type 3": "the same",
    "create_vm type 4": "PVM has no SNP",
    "set attributes": "PVM is built without memory attributes: ENOTTY",
    "set attributes flags": "the same",
    "set attributes private": "the same",
    "set attributes null": "the same",
    "encrypt op null": "no memory encryption: ENOTTY before anything is looked at",
    "encrypt op unreadable": "the same",
    "encrypt op init2": "the same",
    "attr sev": "no SEV-capable vendor module: ENXIO",
    "attr sev null": "the same",
    "slot second address space": "no SMM, so one address space",
    "slot gpa 2^48": "PVM walks shadow pages: any 52-bit frame is fine",
    "cap X86_SMM": "no SMM",
    "cap MEMORY_ATTRIBUTES": "built without",
    "cap PRE_FAULT_MEMORY": "no two-dimensional paging",
    "cap TSC_CONTROL": "no TSC scaling",
    "cap VM_TSC_CONTROL": "no TSC scaling",
    "cap VM_TYPES": "type 0 only",
    "cap NR_VCPUS": "number of CPUs of the machine",
    "cap MULTI_ADDRESS_SPACE": "no SMM",
    "cap X86_DISABLE_EXITS": "no MWAIT on the machine that was tried",
    "vm cap X86_SMM": "no SMM",
    "vm cap MULTI_ADDRESS_SPACE": "no SMM",
    "vm cap X86_DISABLE_EXITS": "no MWAIT on the machine that was tried",
    "vm cap PRE_FAULT_MEMORY": "no two-dimensional paging",
    "vm cap TSC_CONTROL": "no TSC scaling",
    "vm cap VM_TSC_CONTROL": "no TSC scaling",
    "vm cap VM_TYPES": "type 0 only",
    "vm cap NR_VCPUS": "number of CPUs of the machine",
}


def system_calls(run):
    for name in ("KVM_GET_API_VERSION", "KVM_GET_VCPU_MMAP_SIZE"):
        run.call(f"{name} 0", run.kvm, name)
        run.call(f"{name} 1", run.kvm, name, 1)
    for request in (0xAE41, 0xAE80, 0xAEFF, 0x1234):
        run.call(f"unknown {request:#x}", run.kvm, request)
    for vm_type in (0, 1, 2, 3, 4, 5, 31, 32, 64, 1 << 32):
        run.call(f"create_vm type {vm_type}", run.kvm, "KVM_CREATE_VM", vm_type, makes_fd=True)
    run.call("unknown cap", run.kvm, "KVM_CHECK_EXTENSION", 99999)


def capabilities(run):
    vm = run.vm()
    proposals = ("KVM_CAP_SNP_DIRECT_VMSA", "KVM_CAP_SNP_VCPU_STATE")
    for name in sorted(n for n in dir(lib) if n.startswith("KVM_CAP_") and n not in proposals):
        short = name.removeprefix("KVM_CAP_")
        number = getattr(lib, name)
        run.call(f"cap {short}", run.kvm, "KVM_CHECK_EXTENSION", number)
        run.call(f"vm cap {short}", vm, "KVM_CHECK_EXTENSION", number)


def system_tables(run):
    buffer = ffi.new("char[]", 8 + 256 * 40)
    header = ffi.cast("struct kvm_cpuid2 *", buffer)
    for name in ("KVM_GET_SUPPORTED_CPUID", "KVM_GET_EMULATED_CPUID"):
        run.call(f"{name} null", run.kvm, name)
        for nent in (0, 1, 256, 1000, 0xFFFFFFFF):
            ffi.memmove(buffer, bytes(len(buffer)), len(buffer))
            header.nent = nent
            if not (name == "KVM_GET_EMULATED_CPUID" and nent == 1):
                run.call(f"{name} {nent}", run.kvm, name, header)
    words = ffi.new("uint32_t[]", 1024)
    for name in ("KVM_GET_MSR_INDEX_LIST", "KVM_GET_MSR_FEATURE_INDEX_LIST"):
        words[0] = 0
        run.call(f"{name} null", run.kvm, name)
        run.call(f"{name} no room", run.kvm, name, words)
        run.call(f"{name} room", run.kvm, name, words)
    msrs = ffi.new("uint32_t[]", [1, 0, 0xDEADBEEF, 0, 0, 0])
    run.call("feature msr unknown", run.kvm, "KVM_GET_MSRS", msrs)
    msrs[0] = 256
    run.call("feature msrs too many", run.kvm, "KVM_GET_MSRS", msrs)
    run.call("feature msrs null", run.kvm, "KVM_GET_MSRS")


def device_attributes(run):
    value = ffi.new("uint64_t *")
    address = int(ffi.cast("uintptr_t", value))
    for label, group, attr, addr in (
        ("attr xcomp", 0, 0, address),
        ("attr xcomp null", 0, 0, 0),
        ("attr unknown", 0, 99, address),
        ("attr group", 77, 0, address),
        ("attr group null", 77, 0, 0),
        ("attr sev", 1, 0, address),
        ("attr sev null", 1, 0, 0),
    ):
        args = struct("kvm_device_attr", group=group, attr=attr, addr=addr)
        run.call(label, run.kvm, "KVM_GET_DEVICE_ATTR", args)
        if group != 1:
            run.call(f"has {label}", run.kvm, "KVM_HAS_DEVICE_ATTR", args)
    run.call("attr null", run.kvm, "KVM_GET_DEVICE_ATTR")


def slots(run):
    vm, hva = run.vm(), run.memory()
    base = {"guest_phys_addr": 0x100000, "userspace_addr": hva}
    gmem, log, ro = lib.KVM_MEM_GUEST_MEMFD, lib.KVM_MEM_LOG_DIRTY_PAGES, lib.KVM_MEM_READONLY
    run.call("slot null", vm, "KVM_SET_USER_MEMORY_REGION2")
    run.call("slot v1 null", vm, "KVM_SET_USER_MEMORY_REGION")
    for flags in (4, 8):
        old = struct("kvm_userspace_memory_region", flags=flags, memory_size=PAGE)
        run.call(f"slot v1 flags {flags}", vm, "KVM_SET_USER_MEMORY_REGION", old)
    for flags in (8, 1 << 31, gmem | log, gmem | ro):
        run.region(f"slot flags {flags:#x}", vm, flags=flags, **base)
    run.region("slot size", vm, **{**base, "memory_size": 1})
    run.region("slot gpa", vm, **{**base, "guest_phys_addr": 1})
    run.region("slot hva", vm, **{**base, "userspace_addr": hva + 1})
    run.region("slot hva kernel", vm, **{**base, "userspace_addr": 1 << 63})
    run.region("slot offset", vm, flags=gmem, guest_memfd_offset=1, **base)
    run.region("slot offset wrap", vm, flags=gmem, guest_memfd_offset=TOP - PAGE, **base)
    run.region("slot id 32764", vm, slot=32764, **base)
    run.region("slot id 32763", vm, slot=32763, **{**base, "guest_phys_addr": 0x900000})
    run.region("slot second address space", vm, slot=1 << 16, **base)
    run.region("slot third address space", vm, slot=2 << 16, **base)
    run.region("slot gpa wrap", vm, **{**base, "guest_phys_addr": TOP - PAGE})
    run.region("slot gpa 2^48", vm, slot=9, **{**base, "guest_phys_addr": 1 << 48})
    run.region("slot gpa 2^53", vm, slot=9, **{**base, "guest_phys_addr": 1 << 53})
    run.region("slot too many pages", vm, memory_size=PAGE << 31, guest_phys_addr=0)
    run.region("slot delete missing", vm, memory_size=0)
    run.region("slot create", vm, **base)
    run.region("slot repeat", vm, **base)
    run.region("slot log", vm, flags=log, **base)
    run.region("slot read-only later", vm, flags=ro, **base)
    run.region("slot private later", vm, flags=gmem, **base)
    run.region("slot resize", vm, **{**base, "memory_size": 8 * PAGE})
    run.region("slot other hva", vm, **{**base, "userspace_addr": hva + PAGE})
    run.region("slot overlap", vm, slot=1, **{**base, "guest_phys_addr": 0x103000})
    run.region("slot adjacent", vm, slot=1, **{**base, "guest_phys_addr": 0x104000})
    run.region("slot move onto", vm, slot=1, **base)
    run.region("slot move", vm, slot=1, **{**base, "guest_phys_addr": 0x200000})
    run.region("slot read-only", vm, slot=2, flags=ro, guest_phys_addr=0x300000)
    run.region("slot delete", vm, memory_size=0)
    run.region("slot delete again", vm, memory_size=0)


def guest_memfd(run):
    vm, other, hva = run.vm(), run.vm(), run.memory()
    run.call("gmem null", vm, "KVM_CREATE_GUEST_MEMFD")
    for flags in (4, 1 << 63):
        run.gmem(f"gmem flags {flags:#x}", vm, flags=flags)
    run.gmem("gmem flags and size", vm, flags=4, size=1)
    for size in (0, 1, PAGE + 1, 1 << 63, TOP - PAGE):
        run.gmem(f"gmem size {size:#x}", vm, size=size)
    run.gmem("gmem big", vm, size=1 << 40)
    fd, foreign = run.gmem("gmem", vm), run.gmem("gmem other", other)
    run.call("gmem ioctl", fd, "KVM_GET_API_VERSION")
    run.note("gmem mmap", run.platform.mmap(fd, PAGE, RW, mmap.MAP_SHARED))
    for mode in (0, 1, 2, 3, 4, 8, 9, 0x10, 0x13, 0x41):
        for at, size in ((0, PAGE), (1, PAGE), (0, 1), (0, 0), (16 * PAGE, PAGE), (0, 32 * PAGE)):
            label = f"fallocate {mode} {at} {size}"
            run.note(label, run.platform.fallocate(fd, mode, at, size))
    base = {"flags": lib.KVM_MEM_GUEST_MEMFD, "guest_phys_addr": 0, "userspace_addr": hva}
    run.region("bind no fd", vm, guest_memfd=0xFFFFFFFF, **base)
    run.region("bind kvm fd", vm, guest_memfd=run.kvm, **base)
    run.region("bind vm fd", vm, guest_memfd=vm, **base)
    run.region("bind foreign", vm, guest_memfd=foreign, **base)
    run.region("bind beyond", vm, guest_memfd=fd, guest_memfd_offset=13 * PAGE, **base)
    run.region("bind", vm, guest_memfd=fd, **base)
    run.region("bind again", vm, guest_memfd=fd, **base)
    run.region("bind modify shared", vm, guest_phys_addr=0, userspace_addr=hva)
    moved = {**base, "guest_phys_addr": 0x100000}
    run.region("bind twice", vm, slot=1, guest_memfd=fd, guest_memfd_offset=3 * PAGE, **moved)
    run.region("bind overlap no fd", vm, slot=1, guest_memfd=0xFFFFFFFF, **base)
    run.region("bind beside", vm, slot=1, guest_memfd=fd, guest_memfd_offset=4 * PAGE, **moved)
    run.region("bind delete", vm, memory_size=0)
    run.region("bind back", vm, guest_memfd=fd, **base)
    run.note("gmem close", run.platform.close(fd))
    run.region("bind delete closed", vm, memory_size=0)


def attributes(run):
    vm = run.vm()
    for label, fields in (
        ("set attributes", {"size": PAGE}),
        ("set attributes flags", {"size": PAGE, "flags": 1}),
        ("set attributes private", {"size": PAGE, "attributes": 8}),
    ):
        args = struct("kvm_memory_attributes", **fields)
        run.call(label, vm, "KVM_SET_MEMORY_ATTRIBUTES", args)
    run.call("set attributes null", vm, "KVM_SET_MEMORY_ATTRIBUTES")
    run.call("encrypt op null", vm, "KVM_MEMORY_ENCRYPT_OP")
    run.call("encrypt op unreadable", vm, "KVM_MEMORY_ENCRYPT_OP", 8)
    command = struct("kvm_sev_cmd", id=lib.KVM_SEV_INIT2)
    run.call("encrypt op init2", vm, "KVM_MEMORY_ENCRYPT_OP", command)
    region = struct("kvm_enc_region", addr=PAGE, size=PAGE)
    run.call("encrypt reg region", vm, "KVM_MEMORY_ENCRYPT_REG_REGION", region)


def vm_calls(run):
    vm = run.vm()
    for request in (0xAE00, 0xAE80, 0xAEFF, 0x1234):
        run.call(f"vm unknown {request:#x}", vm, request)
    run.call("enable null", vm, "KVM_ENABLE_CAP")
    run.enable("enable unknown", vm, 9999)
    run.enable("enable flags", vm, lib.KVM_CAP_EXIT_HYPERCALL, 1 << 12, flags=1)
    run.enable("enable hypercall", vm, lib.KVM_CAP_EXIT_HYPERCALL, 1 << 12)
    run.enable("enable hypercall wrong", vm, lib.KVM_CAP_EXIT_HYPERCALL, 1)
    run.enable("enable msr exits", vm, lib.KVM_CAP_X86_USER_SPACE_MSR, 7)
    run.enable("enable msr exits wrong", vm, lib.KVM_CAP_X86_USER_SPACE_MSR, 8)
    for bit in range(12):
        run.enable(f"quirk {bit}", vm, lib.KVM_CAP_DISABLE_QUIRKS2, 1 << bit)
    run.enable("max id too high", vm, lib.KVM_CAP_MAX_VCPU_ID, 4097)
    run.enable("max id none", vm, lib.KVM_CAP_MAX_VCPU_ID, 0)
    run.enable("max id", vm, lib.KVM_CAP_MAX_VCPU_ID, 8)
    run.enable("max id none later", vm, lib.KVM_CAP_MAX_VCPU_ID, 0)
    for number in (8, 9, 1 << 32):
        run.call(f"boot id {number}", vm, "KVM_SET_BOOT_CPU_ID", number)
    run.enable("max id again", vm, lib.KVM_CAP_MAX_VCPU_ID, 8)
    run.enable("max id other", vm, lib.KVM_CAP_MAX_VCPU_ID, 9)
    run.call("create id 8", vm, "KVM_CREATE_VCPU", 8, makes_fd=True)
    run.enable("bus cycles 0", vm, lib.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 0)
    run.enable("bus cycles no apic", vm, lib.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10)
    run.call("tss", vm, "KVM_SET_TSS_ADDR", 0xFFFBD000)
    run.call("tss high", vm, "KVM_SET_TSS_ADDR", 0xFFFFFFFF)
    run.call("identity null", vm, "KVM_SET_IDENTITY_MAP_ADDR")
    run.call("identity", vm, "KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", 0xFFFBC000))
    run.call("boot id", vm, "KVM_SET_BOOT_CPU_ID", 1)
    for name, argument in (
        ("KVM_IRQ_LINE", "kvm_irq_level"),
        ("KVM_IRQ_LINE_STATUS", "kvm_irq_level"),
        ("KVM_SET_GSI_ROUTING", "kvm_irq_routing"),
        ("KVM_SIGNAL_MSI", "kvm_msi"),
        ("KVM_CREATE_PIT2", "kvm_pit_config"),
        ("KVM_GET_CLOCK", "kvm_clock_data"),
    ):
        run.call(name, vm, name, struct(argument))
        run.call(f"{name} null", vm, name)
    run.call("create id 0", vm, "KVM_CREATE_VCPU", 0, makes_fd=True)
    run.call("boot id late", vm, "KVM_SET_BOOT_CPU_ID", 1)
    run.call("identity late", vm, "KVM_SET_IDENTITY_MAP_ADDR")
    run.call("tsc late", vm, "KVM_SET_TSC_KHZ", 1000000)
    run.call("irqchip late", vm, "KVM_CREATE_IRQCHIP")
    run.enable("split late", vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    run.enable("split late and wrong", vm, lib.KVM_CAP_SPLIT_IRQCHIP, 4097)


def create_vcpus(run):
    vm = run.vm()
    for number in (4096, 1 << 32, TOP - 1):
        run.call(f"vcpu id {number}", vm, "KVM_CREATE_VCPU", number, makes_fd=True)
    for number in (4095, 0, 0, 7):
        run.call(f"vcpu {number}", vm, "KVM_CREATE_VCPU", number, makes_fd=True)


def irqchips(run):
    split, full = run.vm(), run.vm()
    run.enable("split wrong", split, lib.KVM_CAP_SPLIT_IRQCHIP, 4097)
    run.enable("split", split, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    run.enable("split twice", split, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    run.call("full after split", split, "KVM_CREATE_IRQCHIP")
    run.call("pit with split", split, "KVM_CREATE_PIT2", struct("kvm_pit_config"))
    run.enable("bus cycles split", split, lib.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10)
    run.call("full", full, "KVM_CREATE_IRQCHIP")
    run.call("full twice", full, "KVM_CREATE_IRQCHIP")
    run.enable("split after full", full, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    run.call("pit", full, "KVM_CREATE_PIT2", struct("kvm_pit_config"))
    run.call("pit twice", full, "KVM_CREATE_PIT2", struct("kvm_pit_config"))
    for name, vm in (("split", split), ("full", full)):
        first, second = run.vcpu(vm, 0), run.vcpu(vm, 1)
        for at, vcpu in enumerate((first, second)):
            state = run.driver.get(vcpu, lib.KVM_GET_MP_STATE).mp_state
            run.steps.append((f"{name} mp_state of {at}", state, 0))
        for value in (0, 1, 2, 3, 4, 5, 9, 77):
            args = struct("kvm_mp_state", mp_state=value)
            run.call(f"{name} set mp_state {value}", second, "KVM_SET_MP_STATE", args)
            state = run.driver.get(second, lib.KVM_GET_MP_STATE).mp_state
            run.steps.append((f"{name} mp_state after {value}", state, 0))
        run.call(f"{name} get lapic", first, "KVM_GET_LAPIC", struct("kvm_lapic_state"))
        run.call(f"{name} lapic null", first, "KVM_GET_LAPIC")
        irq = struct("kvm_interrupt", irq=32)
        run.call(f"{name} interrupt", first, "KVM_INTERRUPT", irq)
        irq.irq = 256
        run.call(f"{name} interrupt 256", first, "KVM_INTERRUPT", irq)


def closed(run):
    vm = run.driver.create_vm(0, run.kvm)
    vcpu = run.vcpu(vm)
    run.note("close vm", run.platform.close(vm))
    run.note("close vm twice", run.platform.close(vm))
    run.call("closed vm", vm, "KVM_CHECK_EXTENSION", 3)
    run.call("vcpu of closed vm", vcpu, "KVM_GET_REGS", struct("kvm_regs"))
    run.note("mmap kvm", run.platform.mmap(run.kvm, PAGE, RW, mmap.MAP_SHARED))
    run.note("fallocate vcpu", run.platform.fallocate(vcpu, 1, 0, PAGE))


SCRIPTS = [
    system_calls,
    capabilities,
    system_tables,
    device_attributes,
    slots,
    guest_memfd,
    attributes,
    vm_calls,
    create_vcpus,
    irqchips,
    closed,
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_simulator_answers_as_this_kernel(script):
    wrong = [(real, sim) for real, sim in differences(script, this_kernel()) if real[0] not in PVM]
    assert wrong == []


def test_every_named_difference_is_a_step():
    assert sorted(set(PVM) - names_of_steps(SCRIPTS)) == []
