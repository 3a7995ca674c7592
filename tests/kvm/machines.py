"""Small VMs for the tests of kvmlaunch.kvm, real and simulated."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from kvmlaunch.kvm import HostMemory, Kvm, SevDevice, Vcpu, Vm
from kvmlaunch.kvm.exits import Exit
from kvmlaunch.uapi import ARGUMENT, Platform, Recorder, Result, ffi, ioctl_name, lib, peek

PAGE = 4096
TIMEOUT_SECONDS = 5
PERIOD_SECONDS = 0.01


class Denying:
    """A platform in front of another: ``deny`` gives the errno of a call, or 0.

    Its argument is the ioctl's name, or mmap, munmap, close, open, fallocate.
    """

    def __init__(self, inner: Any, deny: Callable[[str], int]) -> None:
        self._inner = inner
        self._deny = deny
        self.name = inner.name
        self.profile = inner.profile

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)

        def checked(*args: Any) -> Any:
            errno = self._deny(ioctl_name(args[1]) if name == "ioctl" else name)
            return Result(-1, errno) if errno else call(*args)

        return checked


class Captured:
    """A platform that keeps what each ioctl was given, by name, and takes everything."""

    name = "fake"
    profile = ""

    def __init__(self) -> None:
        self.args: dict[str, Any] = {}
        self.values: dict[str, int] = {}
        self.msrs: dict[int, int] = {}
        self.msrs_taken = 2**31

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        name = ioctl_name(request)
        if not ARGUMENT[name]:
            self.values[name] = arg
            return Result(0, 0)
        kind = f"struct {ARGUMENT[name]}"
        value = ffi.new(f"{kind} *")
        ffi.buffer(value)[:] = peek(arg, ffi.sizeof(kind))
        self.args[name] = value
        if name not in ("KVM_SET_MSRS", "KVM_GET_MSRS"):
            return Result(0, 0)
        entries = ffi.cast("struct kvm_msrs *", arg).entries
        self.msrs = {entries[i].index: entries[i].data for i in range(value.nmsrs)}
        return Result(min(value.nmsrs, self.msrs_taken), 0)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Result:
        self.args["fallocate"] = (mode, offset, length)
        return Result(0, 0)


class Machine(NamedTuple):
    """The objects of one VM."""

    kvm: Kvm
    vm: Vm
    vcpu: Vcpu
    memory: HostMemory


def machine(platform: Platform, stack: ExitStack, vm_type: int = 0) -> Machine:
    """A VM with a page of memory at 0 and a vCPU; an SNP VM is initialised first."""
    kvm = stack.enter_context(Kvm.open(platform))
    vm = stack.enter_context(kvm.create_vm(vm_type))
    if vm_type == lib.KVM_X86_SNP_VM:
        assert vm.sev_command_raw(lib.KVM_SEV_INIT2, ffi.new("struct kvm_sev_init *")).ret == 0
    memory = stack.enter_context(HostMemory(platform, PAGE))
    vm.set_user_memory_region(0, 0, PAGE, memory.address)
    vcpu = stack.enter_context(vm.create_vcpu(0))
    return Machine(kvm, vm, vcpu, memory)


def started(platform: Platform, stack: ExitStack) -> tuple[Machine, SevDevice]:
    """An SNP machine after SNP_LAUNCH_START, and its /dev/sev."""
    made = machine(platform, stack, lib.KVM_X86_SNP_VM)
    sev = stack.enter_context(SevDevice.open(platform))
    start = ffi.new("struct kvm_sev_snp_launch_start *", {"policy": 0x30000})
    result = made.vm.sev_command_raw(lib.KVM_SEV_SNP_LAUNCH_START, start, sev_fd=sev.fd)
    assert result == (0, 0, 0)
    return made, sev


def recorded(platform: Platform) -> tuple[Recorder, list[str]]:
    """The platform behind a Recorder, and the names of the calls that it sees."""
    names: list[str] = []
    return Recorder(platform, lambda call: names.append(call.name)), names


def load(made: Machine, code: bytes, **regs: int) -> None:
    """Put real-mode ``code`` at 0, where the vCPU starts."""
    made.memory.view[: len(code)] = code
    sregs = made.vcpu.get_sregs()
    sregs["cs"].update(base=0, selector=0)
    made.vcpu.set_sregs(sregs)
    made.vcpu.set_regs({"rip": 0, "rflags": 2, "rsp": 0x800, **regs})


def run(vcpu: Vcpu, uart: Any = ffi.NULL) -> Exit | None:
    """Vcpu.run() with a watchdog: a guest that doesn't exit is kicked out of KVM_RUN."""
    number = lib.kl_kick_signal()
    thread = threading.get_ident()
    done = threading.Event()

    def watch() -> None:
        if not done.wait(TIMEOUT_SECONDS):
            while not done.is_set():
                vcpu.request_exit()
                signal.pthread_kill(thread, number)
                time.sleep(PERIOD_SECONDS)

    watchdog = threading.Thread(target=watch, daemon=True)
    watchdog.start()
    try:
        return vcpu.run(uart)
    finally:
        done.set()
        watchdog.join()
