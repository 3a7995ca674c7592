"""Every public method of kvmlaunch.kvm's classes, with arguments that a simulated host takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from kvmlaunch.kvm import GuestMemfd, HostMemory, Kvm, SevDevice, Vcpu, Vm
from kvmlaunch.kvm.descriptor import Descriptor
from kvmlaunch.uapi import Platform, ffi, lib
from tests.kvm.machines import PAGE, machine

CLASSES: tuple[type[Descriptor], ...] = (Kvm, Vm, Vcpu, GuestMemfd, SevDevice)


class World(NamedTuple):
    """One open object of each class; ``bare`` is a VM without vCPUs."""

    kvm: Kvm
    vm: Vm
    bare: Vm
    vcpu: Vcpu
    memfd: GuestMemfd
    sev: SevDevice
    memory: HostMemory


def world(platform: Platform, stack: ExitStack) -> World:
    """Open one object of each class on a simulated SNP host."""
    made = machine(platform, stack, lib.KVM_X86_SNP_VM)
    return World(
        kvm=made.kvm,
        vm=made.vm,
        bare=stack.enter_context(made.kvm.create_vm(lib.KVM_X86_SNP_VM)),
        vcpu=made.vcpu,
        memfd=stack.enter_context(made.vm.create_guest_memfd(4 * PAGE)),
        sev=stack.enter_context(SevDevice.open(platform)),
        memory=made.memory,
    )


class Method(NamedTuple):
    """A method, a call of it, and the calls that the kernel sees (its own first)."""

    kind: type[Descriptor]
    name: str
    call: Callable[[World], Any]
    sees: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind.__name__}.{self.name}"


METHODS = (
    Method(Kvm, "fileno", lambda w: w.kvm.fileno()),
    Method(Kvm, "fd", lambda w: w.kvm.fd),
    Method(
        Kvm, "ioctl_raw", lambda w: w.kvm.ioctl_raw("KVM_GET_API_VERSION"), ("KVM_GET_API_VERSION",)
    ),
    Method(Kvm, "ioctl", lambda w: w.kvm.ioctl("KVM_GET_API_VERSION"), ("KVM_GET_API_VERSION",)),
    Method(Kvm, "api_version", lambda w: w.kvm.api_version(), ("KVM_GET_API_VERSION",)),
    Method(Kvm, "check_extension", lambda w: w.kvm.check_extension(3), ("KVM_CHECK_EXTENSION",)),
    Method(Kvm, "vm_types", lambda w: w.kvm.vm_types(), ("KVM_CHECK_EXTENSION",)),
    Method(Kvm, "supports_snp", lambda w: w.kvm.supports_snp(), ("KVM_CHECK_EXTENSION",)),
    Method(Kvm, "require_snp", lambda w: w.kvm.require_snp(), ("KVM_CHECK_EXTENSION",)),
    Method(Kvm, "vcpu_mmap_size", lambda w: w.kvm.vcpu_mmap_size(), ("KVM_GET_VCPU_MMAP_SIZE",)),
    Method(Kvm, "create_vm", lambda w: w.kvm.create_vm(), ("KVM_CREATE_VM",)),
    Method(Kvm, "supported_cpuid", lambda w: w.kvm.supported_cpuid(), ("KVM_GET_SUPPORTED_CPUID",)),
    Method(Kvm, "device_attr", lambda w: w.kvm.device_attr(0, 0), ("KVM_GET_DEVICE_ATTR",)),
    Method(Kvm, "vmsa_features", lambda w: w.kvm.vmsa_features(), ("KVM_GET_DEVICE_ATTR",)),
    Method(Vm, "is_dead", lambda w: w.vm.is_dead(), ("KVM_CHECK_EXTENSION",)),
    Method(Vm, "check_extension", lambda w: w.vm.check_extension(3), ("KVM_CHECK_EXTENSION",)),
    Method(
        Vm,
        "enable_cap",
        lambda w: w.vm.enable_cap(lib.KVM_CAP_EXIT_HYPERCALL, 1 << lib.KVM_HC_MAP_GPA_RANGE),
        ("KVM_ENABLE_CAP",),
    ),
    Method(Vm, "create_irqchip", lambda w: w.bare.create_irqchip(), ("KVM_CREATE_IRQCHIP",)),
    Method(Vm, "split_irqchip", lambda w: w.bare.split_irqchip(), ("KVM_ENABLE_CAP",)),
    Method(
        Vm,
        "create_vcpu",
        lambda w: w.vm.create_vcpu(1),
        ("KVM_CREATE_VCPU", "KVM_GET_VCPU_MMAP_SIZE", "mmap"),
    ),
    Method(
        Vm,
        "create_guest_memfd",
        lambda w: w.vm.create_guest_memfd(PAGE),
        ("KVM_CREATE_GUEST_MEMFD",),
    ),
    Method(
        Vm,
        "set_user_memory_region",
        lambda w: w.vm.set_user_memory_region(1, 0x10000, PAGE, w.memory.address),
        ("KVM_SET_USER_MEMORY_REGION",),
    ),
    Method(
        Vm,
        "set_user_memory_region2",
        lambda w: w.vm.set_user_memory_region2(1, 0x10000, PAGE, w.memory.address, memfd=w.memfd),
        ("KVM_SET_USER_MEMORY_REGION2",),
    ),
    Method(
        Vm,
        "set_memory_attributes",
        lambda w: w.vm.set_memory_attributes(0, PAGE, private=True),
        ("KVM_SET_MEMORY_ATTRIBUTES",),
    ),
    Method(
        Vm,
        "sev_command_raw",
        lambda w: w.bare.sev_command_raw(lib.KVM_SEV_INIT2, ffi.new("struct kvm_sev_init *")),
        ("KVM_MEMORY_ENCRYPT_OP",),
    ),
    Method(Vcpu, "kvm_run", lambda w: w.vcpu.kvm_run),
    Method(Vcpu, "map_run", lambda w: w.vcpu.map_run(PAGE), ("mmap", "munmap")),
    Method(Vcpu, "run", lambda w: w.vcpu.run(), ("KVM_RUN",)),
    Method(Vcpu, "clear_exit_request", lambda w: w.vcpu.clear_exit_request()),
    Method(Vcpu, "complete_io", lambda w: w.vcpu.complete_io(b"")),
    Method(Vcpu, "complete_mmio", lambda w: w.vcpu.complete_mmio(b"")),
    Method(Vcpu, "complete_hypercall", lambda w: w.vcpu.complete_hypercall(0)),
    Method(Vcpu, "complete_req_certs", lambda w: w.vcpu.complete_req_certs(0)),
    Method(Vcpu, "get_regs", lambda w: w.vcpu.get_regs(), ("KVM_GET_REGS",)),
    Method(Vcpu, "set_regs", lambda w: w.vcpu.set_regs({"rip": 1}), ("KVM_SET_REGS",)),
    Method(Vcpu, "get_sregs", lambda w: w.vcpu.get_sregs(), ("KVM_GET_SREGS",)),
    Method(Vcpu, "set_sregs", lambda w: w.vcpu.set_sregs({"cr0": 0x10}), ("KVM_SET_SREGS",)),
    Method(Vcpu, "get_debugregs", lambda w: w.vcpu.get_debugregs(), ("KVM_GET_DEBUGREGS",)),
    Method(Vcpu, "set_debugregs", lambda w: w.vcpu.set_debugregs({}), ("KVM_SET_DEBUGREGS",)),
    Method(Vcpu, "set_guest_debug", lambda w: w.vcpu.set_guest_debug(0), ("KVM_SET_GUEST_DEBUG",)),
    Method(Vcpu, "translate", lambda w: w.vcpu.translate(0), ("KVM_TRANSLATE",)),
    Method(Vcpu, "get_fpu", lambda w: w.vcpu.get_fpu(), ("KVM_GET_FPU",)),
    Method(Vcpu, "set_fpu", lambda w: w.vcpu.set_fpu({}), ("KVM_SET_FPU",)),
    Method(Vcpu, "get_xsave", lambda w: w.vcpu.get_xsave(), ("KVM_GET_XSAVE",)),
    Method(Vcpu, "set_xsave", lambda w: w.vcpu.set_xsave(bytes(4096)), ("KVM_SET_XSAVE",)),
    Method(Vcpu, "get_xcrs", lambda w: w.vcpu.get_xcrs(), ("KVM_GET_XCRS",)),
    Method(Vcpu, "set_xcr0", lambda w: w.vcpu.set_xcr0(1), ("KVM_SET_XCRS",)),
    Method(Vcpu, "get_msrs", lambda w: w.vcpu.get_msrs([0x277]), ("KVM_GET_MSRS",)),
    Method(Vcpu, "set_msrs", lambda w: w.vcpu.set_msrs({0x277: 0}), ("KVM_SET_MSRS",)),
    Method(Vcpu, "set_cpuid", lambda w: w.vcpu.set_cpuid([]), ("KVM_SET_CPUID2",)),
    Method(Vcpu, "get_mp_state", lambda w: w.vcpu.get_mp_state(), ("KVM_GET_MP_STATE",)),
    Method(
        Vcpu, "sev_command_raw", lambda w: w.vcpu.sev_command_raw(0), ("KVM_MEMORY_ENCRYPT_OP",)
    ),
    Method(Vcpu, "set_mp_state", lambda w: w.vcpu.set_mp_state(0), ("KVM_SET_MP_STATE",)),
    Method(GuestMemfd, "allocate", lambda w: w.memfd.allocate(0, PAGE), ("fallocate",)),
    Method(GuestMemfd, "punch_hole", lambda w: w.memfd.punch_hole(0, PAGE), ("fallocate",)),
    Method(SevDevice, "platform_status", lambda w: w.sev.platform_status(), ("SEV_ISSUE_CMD",)),
    Method(
        SevDevice, "snp_platform_status", lambda w: w.sev.snp_platform_status(), ("SEV_ISSUE_CMD",)
    ),
    Method(SevDevice, "set_config", lambda w: w.sev.set_config(), ("SEV_ISSUE_CMD",)),
    Method(SevDevice, "commit", lambda w: w.sev.commit(), ("SEV_ISSUE_CMD",)),
    Method(SevDevice, "load_vlek", lambda w: w.sev.load_vlek(bytes(432)), ("SEV_ISSUE_CMD",)),
)

HARMLESS_WHEN_CLOSED = {"close", "closed", "request_exit", "dead_error", "open"}
"""What may be used after close(): it issues no call on the descriptor."""


def public_names(kind: type[Descriptor]) -> set[str]:
    """Public methods and properties of a class, those of Descriptor counted for Kvm only."""
    found = {name: value for base in kind.__mro__ for name, value in vars(base).items()}
    names = {
        name
        for name, value in found.items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, (property, classmethod)))
    }
    return names if kind is Kvm else names - set(vars(Descriptor))
