"""The simulator's generic half against this machine's /dev/kvm, call by call: vCPUs.

No guest code is ever run: KVM_RUN only in ways that return before the entry.
"""

from __future__ import annotations

import mmap

import pytest

from kvmlaunch.uapi import ffi, lib

from .differential import differences, names_of_steps, this_kernel
from .driver import PAGE, RW, struct

# Step -> why this machine's answer may differ from that of an SNP host, see this_kernel().
PVM = {
    "pre-fault no slot": "no two-dimensional paging: ENOSPC here, before the slot is looked for",
    "set msrs pat wrong": "PVM stores PAT without a look at it",
}


def registers(run):
    vcpu = run.vcpu(run.vm())
    for name in ("REGS", "SREGS", "SREGS2", "DEBUGREGS", "XCRS", "FPU", "XSAVE", "VCPU_EVENTS"):
        args = struct(f"kvm_{name.lower()}")
        for verb in ("GET", "SET"):
            run.call(f"{verb} {name} null", vcpu, f"KVM_{verb}_{name}")
        run.call(f"GET {name}", vcpu, f"KVM_GET_{name}", args)
        run.call(f"SET {name}", vcpu, f"KVM_SET_{name}", args)
    for label, fields in (
        ("efer lma", {"efer": 0x400}),
        ("pg without pe", {"cr0": 0x80000000}),
        ("nw without cd", {"cr0": 0x20000011}),
        ("cr0 high", {"cr0": 1 << 32 | 1}),
        ("cr4 high", {"cr4": 1 << 63}),
        ("lme and pg without lma", {"efer": 0x100, "cr0": 0x80000011, "cr4": 0x20}),
        ("long mode without pae", {"efer": 0x500, "cr0": 0x80000011}),
        ("cr3 high", {"efer": 0x500, "cr0": 0x80000011, "cr4": 0x20, "cr3": 1 << 52}),
        ("apic reserved", {"apic_base": 0xFEE00901}),
        ("x2apic alone", {"apic_base": 0xFEE00400}),
        ("long mode", {"efer": 0x500, "cr0": 0x80000011, "cr4": 0x20, "cr3": 0x1000}),
        ("real mode again", {"efer": 0, "cr0": 0x60000010, "cr4": 0, "cr3": 0}),
    ):
        sregs = run.driver.get(vcpu, lib.KVM_GET_SREGS)
        for field, value in fields.items():
            setattr(sregs, field, value)
        run.call(f"sregs {label}", vcpu, "KVM_SET_SREGS", sregs)
    sregs = run.driver.get(vcpu, lib.KVM_GET_SREGS)
    sregs.cs.l = 1
    run.call("sregs cs.l", vcpu, "KVM_SET_SREGS", sregs)
    for flags in (1, 2):
        sregs2 = run.driver.get(vcpu, lib.KVM_GET_SREGS2)
        sregs2.flags = flags
        run.call(f"sregs2 flags {flags}", vcpu, "KVM_SET_SREGS2", sregs2)
    for fields in ({"flags": 1}, {"dr6": 1 << 32}, {"dr7": 1 << 32}, {"dr7": 0x400}):
        debugregs = struct("kvm_debugregs", **fields)
        run.call(f"debugregs {fields}", vcpu, "KVM_SET_DEBUGREGS", debugregs)
    for number, flags, value in ((1, 0, 0), (1, 0, 1), (1, 0, 3), (1, 0, 7), (17, 0, 1), (1, 1, 1)):
        xcrs = struct("kvm_xcrs", nr_xcrs=number, flags=flags)
        xcrs.xcrs[0].value = value
        run.call(f"xcrs {number} {flags} {value}", vcpu, "KVM_SET_XCRS", xcrs)
    for flags in (0x10, 0x20, 0x40):
        events = struct("kvm_vcpu_events", flags=flags)
        run.call(f"events {flags:#x}", vcpu, "KVM_SET_VCPU_EVENTS", events)
    for vector in (2, 14, 32):
        events = struct("kvm_vcpu_events")
        events.exception.injected, events.exception.nr = 1, vector
        run.call(f"exception {vector}", vcpu, "KVM_SET_VCPU_EVENTS", events)


def reset_state(run):
    """What a new vCPU reports, where no vendor's habits show."""
    vcpu = run.vcpu(run.vm())
    sregs = run.driver.get(vcpu, lib.KVM_GET_SREGS)
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"):
        run.steps.append((f"reset {name}", getattr(sregs, name), 0))
    for name in ("cs", "ds", "ss", "tr", "ldt"):
        segment = getattr(sregs, name)
        shown = (segment.selector, segment.base, segment.limit, segment.present, segment.s)
        run.steps.append((f"reset {name}", shown, 0))
    for name in ("REGS", "DEBUGREGS", "XCRS", "FPU", "VCPU_EVENTS"):
        value = run.driver.get(vcpu, getattr(lib, f"KVM_GET_{name}"))
        run.steps.append((f"reset {name}", bytes(ffi.buffer(value)).hex(), 0))
    xsave = bytes(ffi.buffer(run.driver.get(vcpu, lib.KVM_GET_XSAVE)))
    # Not the MXCSR mask and the software bytes: both name the host's features.
    run.steps.append(("reset XSAVE", (xsave[:28] + xsave[32:464] + xsave[512:]).hex(), 0))


def vcpu_calls(run):
    vcpu = run.vcpu(run.vm())
    for request in (0xAE00, 0xAE41, 0xAEFF, 0x1234):
        run.call(f"vcpu unknown {request:#x}", vcpu, request)
    for value in (0, 1, 2, 3, 4, 5, 9, 77):
        args = struct("kvm_mp_state", mp_state=value)
        run.call(f"set mp_state {value}", vcpu, "KVM_SET_MP_STATE", args)
    run.call("get lapic", vcpu, "KVM_GET_LAPIC", struct("kvm_lapic_state"))
    run.call("set lapic", vcpu, "KVM_SET_LAPIC", struct("kvm_lapic_state"))
    run.call("signal mask none", vcpu, "KVM_SET_SIGNAL_MASK")
    run.call("signal mask 4", vcpu, "KVM_SET_SIGNAL_MASK", struct("kvm_signal_mask", len=4))
    run.call("nmi", vcpu, "KVM_NMI")
    translation = struct("kvm_translation", linear_address=0x1234)
    run.call("translate", vcpu, "KVM_TRANSLATE", translation)
    run.steps.append(("translated", (translation.physical_address, translation.valid), 0))
    for label, fields in (
        ("flags", {"flags": 1, "size": PAGE}),
        ("gpa", {"gpa": 1, "size": PAGE}),
        ("empty", {}),
        ("no slot", {"size": PAGE}),
    ):
        args = struct("kvm_pre_fault_memory", **fields)
        run.call(f"pre-fault {label}", vcpu, "KVM_PRE_FAULT_MEMORY", args)
    run.call("pre-fault null", vcpu, "KVM_PRE_FAULT_MEMORY")
    for group in (0, 5):
        args = struct("kvm_device_attr", group=group)
        run.call(f"vcpu attr {group}", vcpu, "KVM_GET_DEVICE_ATTR", args)
        run.call(f"vcpu has attr {group}", vcpu, "KVM_HAS_DEVICE_ATTR", args)


def cpuid_and_msrs(run):
    vcpu = run.vcpu(run.vm())
    buffer = ffi.new("char[]", 8 + 300 * 40)
    header = ffi.cast("struct kvm_cpuid2 *", buffer)
    run.call("set cpuid null", vcpu, "KVM_SET_CPUID2")
    for count in (0, 256, 257, 0xFFFFFFFF):
        header.nent = count
        run.call(f"set cpuid {count}", vcpu, "KVM_SET_CPUID2", header)
    for eax in (0x2F30, 0x3030, 0x3930, 0x30):
        header.nent = 1
        header.entries[0].function, header.entries[0].eax = 0x80000008, eax
        run.call(f"set cpuid width {eax:#x}", vcpu, "KVM_SET_CPUID2", header)
    for count in (0, 1, 9):
        header.nent = count
        run.call(f"get cpuid {count}", vcpu, "KVM_GET_CPUID2", header)
        run.steps.append((f"got cpuid {count}", header.nent, 0))
    header.nent = 1
    header.entries[0].function, header.entries[0].eax = 0xD, 7
    header.entries[0].flags = lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    run.call("set cpuid 0xd", vcpu, "KVM_SET_CPUID2", header)
    for value in (1, 3, 7, 5, 0):
        xcrs = struct("kvm_xcrs", nr_xcrs=1)
        xcrs.xcrs[0].value = value
        run.call(f"xcrs with 0xd {value}", vcpu, "KVM_SET_XCRS", xcrs)
    for verb in ("GET", "SET"):
        run.call(f"{verb} msrs null", vcpu, f"KVM_{verb}_MSRS")
        for count in (256, 0xFFFFFFFF):
            header.nent = count
            run.call(f"{verb} msrs {count}", vcpu, f"KVM_{verb}_MSRS", header)
    star, lstar, efer, pat, unknown = 0xC0000081, 0xC0000082, 0xC0000080, 0x277, 0xDEADBEEF
    for label, entries in (
        ("none", []),
        ("two", [(star, 1), (lstar, 2)]),
        ("unknown first", [(unknown, 0), (star, 1)]),
        ("unknown second", [(star, 1), (unknown, 0), (lstar, 1)]),
        ("pat", [(pat, 0x0007040600070406)]),
        ("pat wrong", [(pat, 2)]),
        ("efer wrong", [(efer, 1 << 40)]),
    ):
        words = ffi.new("uint32_t[]", [len(entries), 0])
        for index, data in entries:
            words = [*words, index, 0, data & 0xFFFFFFFF, data >> 32]
        words = ffi.new("uint32_t[]", [*words])
        run.call(f"set msrs {label}", vcpu, "KVM_SET_MSRS", words)
        run.call(f"get msrs {label}", vcpu, "KVM_GET_MSRS", words)


def run_without_entry(run):
    vm = run.vm()
    run.enable("split", vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    size = run.driver.ok(run.driver.ioctl(run.kvm, lib.KVM_GET_VCPU_MMAP_SIZE))
    for number in (0, 1):
        vcpu = run.vcpu(vm, number)
        address = run.driver.ok(run.platform.mmap(vcpu, size, RW, mmap.MAP_SHARED))
        page = ffi.cast("struct kvm_run *", address)
        run.call(f"run {number} with argument", vcpu, "KVM_RUN", 1)
        page.immediate_exit, page.exit_reason = 1, 99
        run.call(f"run {number} immediate exit", vcpu, "KVM_RUN")
        run.steps.append((f"exit reason {number}", page.exit_reason, 0))
        for field in ("kvm_valid_regs", "kvm_dirty_regs"):
            setattr(page, field, 8)
            run.call(f"run {number} {field}", vcpu, "KVM_RUN")
            setattr(page, field, 0)
        result = run.platform.run(vcpu, page, ffi.NULL)
        run.steps.append((f"run {number} loop", result.ret, result.errno))
        run.platform.munmap(address, size)


SCRIPTS = [registers, reset_state, vcpu_calls, cpuid_and_msrs, run_without_entry]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_simulator_answers_as_this_kernel(script):
    wrong = [(real, sim) for real, sim in differences(script, this_kernel()) if real[0] not in PVM]
    assert wrong == []


def test_every_named_difference_is_a_step():
    assert sorted(set(PVM) - names_of_steps(SCRIPTS)) == []
