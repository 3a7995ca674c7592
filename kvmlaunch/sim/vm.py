"""A virtual machine and its fd: the VM ioctls (kvm_main.c, x86.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvmlaunch.sim import caps, dirty_log, intercepts, irq
from kvmlaunch.sim.coalesced import CoalescedZones
from kvmlaunch.sim.enable_cap import enable_cap
from kvmlaunch.sim.eventfds import Ioeventfds, Irqfds
from kvmlaunch.sim.fdtable import File
from kvmlaunch.sim.guest_memfd import GuestMemfd
from kvmlaunch.sim.guest_memory import VmMemory
from kvmlaunch.sim.host import Host
from kvmlaunch.sim.kvmclock import Kvmclock
from kvmlaunch.sim.msr_filter import MsrFilter, set_filter
from kvmlaunch.sim.scheduler import Scheduler
from kvmlaunch.sim.sev import SevVm, encrypt_op, register_region, unregister_region
from kvmlaunch.sim.slots import Attributes, Slots
from kvmlaunch.sim.tsc import MAX_KHZ, TscMatching
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.sim.vcpu import Vcpu, VcpuFile
from kvmlaunch.softcpu import CpuOptions, Machine
from kvmlaunch.uapi import ffi, ioctl_name, lib

if TYPE_CHECKING:
    from threading import RLock

    from kvmlaunch.sim.inspector import Inspector

__all__ = ["Vm", "VmFile"]

_TSS_PAGES = 3 * 4096
_MIN_ALLOC_MMU_PAGES = 64


class Vm:
    """What the kernel keeps of one VM (struct kvm); alive while anything refers to it."""

    def __init__(self, host: Host, vm_type: int) -> None:
        self.host = host
        self.type = vm_type
        self.mm = host.user.mm
        self.dead = False
        self.irq = irq.Irqchips()
        self.ioeventfds = Ioeventfds(self)
        self.irqfds = Irqfds(self)
        self.bsp_id = 0
        self.max_vcpu_ids = 0
        self.disabled_quirks = 0
        self.hypercall_exits = 0
        self.wall_clock = 0
        self.msr_exits = 0
        """KVM_CAP_X86_USER_SPACE_MSR: reasons to ask user space."""
        self.msr_filter: MsrFilter | None = None
        self.platform_info_readable = True
        self.hlt_in_guest = False
        self.exit_on_emulation_failure = False
        self.tsc = TscMatching()
        self.tsc_khz = host.tsc_khz
        self.pre_fault_allowed = not self.is_snp_type
        self.vcpus: list[Vcpu] = []
        self.running: Vcpu | None = None
        self.slots = Slots(self)
        self.coalesced = CoalescedZones()
        self.clock = Kvmclock(self)
        self.attributes = Attributes(self)
        self.sev = SevVm(self)
        self.memory = VmMemory(self)
        self.scheduler = Scheduler(host.seed, self.skip_idle_time)
        self.inspector: Inspector | None = None
        self._machine: Machine | None = None
        self._memory_seen, self._code_seen = host.memory_generation, host.code_generation
        self._references = 0

    @property
    def is_snp_type(self) -> bool:
        """Created as an SNP VM: private memory and protected state."""
        return bool(self.type == lib.KVM_X86_SNP_VM)

    @property
    def has_protected_state(self) -> bool:
        """Created so that its registers will be encrypted (kvm->arch.has_protected_state)."""
        return self.type in (lib.KVM_X86_SEV_ES_VM, lib.KVM_X86_SNP_VM)

    @property
    def address_spaces(self) -> int:
        """Memory slot address spaces: the second one is SMM's."""
        return 1 if self.is_snp_type else 2

    @property
    def sync_regs(self) -> int:
        """KVM_CAP_SYNC_REGS of this VM."""
        if self.has_protected_state:
            return 0
        return caps.system_capability(self.host, lib.KVM_CAP_SYNC_REGS)

    @property
    def memory_attributes(self) -> int:
        """Attributes that this VM takes."""
        return int(lib.KVM_MEMORY_ATTRIBUTE_PRIVATE) if self.is_snp_type else 0

    @property
    def guest_memfd_slots(self) -> bool:
        """Whether a slot may have a guest_memfd."""
        return self.is_snp_type or self.host.profile.guest_memfd_on_default_vm

    @property
    def guest_memfd_flags(self) -> int:
        """Flags of KVM_CREATE_GUEST_MEMFD."""
        profile = self.host.profile
        return profile.guest_memfd_flags_private if self.is_snp_type else profile.guest_memfd_flags

    def memory_changed(self, *, code: bool = False) -> None:
        """Pages have moved or changed sides: CPUs must look again before they run.

        ``code``: what they hold is another as well.
        """
        self.host.memory_changed(code=code)

    def sync_user_memory(self) -> None:
        """Where CPUs work on copies of user memory: see what user space made of it."""
        if self.host.user.sync():
            self.memory_changed(code=True)

    def flush_if_changed(self) -> None:
        """Let the CPUs forget what they know of memory, where that has changed.

        Before anything that reaches memory through them: it may be unmapped by now.
        """
        host = self.host
        if self._machine is None:
            return
        if self._code_seen != host.code_generation:
            self._machine.flush_code()
        elif self._memory_seen != host.memory_generation:
            self._machine.flush()
        self._memory_seen, self._code_seen = host.memory_generation, host.code_generation

    def machine(self) -> Machine:
        """The CPUs' engine, made for the first of them. Raises MissingCapability."""
        if self._machine is None:
            cpu, snp = self.host.cpu, self.is_snp_type
            options = CpuOptions(
                snp=snp,
                c_bit=cpu.c_bit,
                asid=self.sev.asid,
                physical_bits=self.host.phys_bits - (cpu.phys_bits_reduction if snp else 0),
                cpuid=self._running_cpuid,
                patches_vmcall=self._patches_vmcall,
                exit_on_pause=len(self.vcpus) > 1,
            )
            self._machine = self.host.machine(self.memory, options)
            self.update_msr_intercepts()
        return self._machine

    def msr_allowed(self, index: int, kind: int) -> bool:
        """kvm_msr_allowed()."""
        return self.msr_filter is None or self.msr_filter.allows(index, kind)

    def update_msr_intercepts(self) -> None:
        """svm_msr_filter_changed(): what the filter forbids isn't for a plain CPU to answer."""
        if self._machine is not None and self.msr_filter is not None and not self.is_snp_type:
            self._machine.intercept_msrs(self._intercepts_msr)

    def _intercepts_msr(self, index: int, write: bool) -> bool:
        kind = lib.KVM_MSR_FILTER_WRITE if write else lib.KVM_MSR_FILTER_READ
        return not self.msr_allowed(index, kind)

    @property
    def guest_ticks(self) -> int:
        """What all vCPUs have executed, and the time when all waited: the TSC."""
        return 0 if self._machine is None else self._machine.ticks

    def _running_cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        """CPUID of a plain guest, asked by the one CPU that runs."""
        with self.host.lock:
            assert self.running is not None
            return intercepts.cpuid(self.running, function, index)

    def _patches_vmcall(self) -> bool:
        """emulator_fix_hypercall(): unless user space disabled the quirk."""
        return not self.disabled_quirks & lib.KVM_X86_QUIRK_FIX_HYPERCALL_INSN

    def skip_idle_time(self) -> bool:
        """Every vCPU waits: the clock goes on to the next timer. False if none is set."""
        timers = (vcpu.apic.wakes_at() for vcpu in self.vcpus if vcpu.running.takes_interrupts)
        times = [time for time in timers if time is not None and time > self.guest_ticks]
        if self._machine is None or not times:
            return False
        self._machine.ticks = min(times)
        return True

    def get(self) -> None:
        """Take a reference."""
        self._references += 1

    def let_go(self, *, last: bool) -> bool:
        """Drop a reference, the last one only if ``last`` says so; whether that was done."""
        if self._references == 1 and not last:
            return False
        self.put()
        return True

    def put(self) -> None:
        """Drop a reference; the last one ends the VM."""
        self._references -= 1
        if not self._references:
            self.irqfds.close()  # of a call that its descriptor's end overtook
            self.ioeventfds.close()
            self.slots.remove_all()
            for vcpu in self.vcpus:
                vcpu.destroy()
            self.sev.destroy()
            self.host.user.forget_dead()
            self.memory_changed(code=True)

    def check_alive(self) -> None:
        """EIO from another process, or once the VM is dead (KVM_BUG)."""
        if self.host.user.mm != self.mm or self.dead:
            refuse(errno.EIO)


class VmFile(File):
    """A VM fd."""

    name = "VM"

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._user = vm.host.user
        vm.get()
        self._handlers: dict[int, Callable[[int], int]] = {
            lib.KVM_CHECK_EXTENSION: self._check_extension,
            lib.KVM_ENABLE_CAP: self._enable_cap,
            lib.KVM_CREATE_VCPU: self._create_vcpu,
            lib.KVM_SET_USER_MEMORY_REGION: self._set_region_v1,
            lib.KVM_SET_USER_MEMORY_REGION2: self._set_region_v2,
            lib.KVM_SET_MEMORY_ATTRIBUTES: self._set_attributes,
            lib.KVM_GET_DIRTY_LOG: self._get_dirty_log,
            lib.KVM_CLEAR_DIRTY_LOG: self._clear_dirty_log,
            lib.KVM_REGISTER_COALESCED_MMIO: self._register_coalesced,
            lib.KVM_UNREGISTER_COALESCED_MMIO: self._unregister_coalesced,
            lib.KVM_CREATE_GUEST_MEMFD: self._create_guest_memfd,
            lib.KVM_MEMORY_ENCRYPT_OP: self._encrypt_op,
            lib.KVM_MEMORY_ENCRYPT_REG_REGION: self._register_region,
            lib.KVM_MEMORY_ENCRYPT_UNREG_REGION: self._unregister_region,
            lib.KVM_SET_BOOT_CPU_ID: self._set_boot_cpu_id,
            lib.KVM_SET_NR_MMU_PAGES: self._set_nr_mmu_pages,
            lib.KVM_SET_TSS_ADDR: self._set_tss_addr,
            lib.KVM_SET_IDENTITY_MAP_ADDR: self._set_identity_map_addr,
            lib.KVM_SET_TSC_KHZ: self._set_tsc_khz,
            lib.KVM_GET_TSC_KHZ: self._get_tsc_khz,
            lib.KVM_GET_CLOCK: self._get_clock,
            lib.KVM_SET_CLOCK: self._set_clock,
            lib.KVM_X86_SET_MSR_FILTER: partial(set_filter, vm),
            lib.KVM_IRQFD: self.vm.irqfds.command,
            lib.KVM_IOEVENTFD: self.vm.ioeventfds.command,
            lib.KVM_GET_STATS_FD: self._unsimulated,
        }
        for request, handler in irq.HANDLERS.items():
            self._handlers[request] = partial(handler, vm)

    def ioctl_names(self, request: int, arg: int) -> tuple[str, ...]:
        """Name of a VM ioctl, and of the command behind KVM_MEMORY_ENCRYPT_OP."""
        if request != lib.KVM_MEMORY_ENCRYPT_OP:
            return (ioctl_name(request),)
        return (ioctl_name(request), self.vm.sev.command_name(arg))

    def locks(self, request: int, arg: int) -> Sequence[RLock]:
        """Newer kernels hold every vCPU's lock in SNP_LAUNCH_FINISH."""
        if not self.vm.host.profile.finish_locks_vcpus:
            return ()
        if "SNP_LAUNCH_FINISH" not in self.ioctl_names(request, arg):
            return ()
        return [vcpu.mutex for vcpu in self.vm.vcpus]

    def ioctl(self, request: int, arg: int) -> int:
        """One VM ioctl; an unknown one is ENOTTY."""
        self.vm.check_alive()
        handler = self._handlers.get(request)
        if handler is None:
            refuse(errno.ENOTTY)
        return handler(arg)

    def hold(self) -> None:
        """A call begins."""
        self.vm.get()

    def let_go(self, *, last: bool) -> bool:
        """It has ended."""
        return self.vm.let_go(last=last)

    def release(self) -> None:
        """The VM lives on while vCPU fds, guest_memfds or mappings do, but its irqfds end."""
        self.vm.irqfds.close()
        self.vm.put()

    def _check_extension(self, arg: int) -> int:
        return caps.vm_capability(self.vm, arg)

    def _enable_cap(self, arg: int) -> int:
        return enable_cap(self.vm, copy_in(self._user, "kvm_enable_cap", arg))

    def _create_vcpu(self, arg: int) -> int:
        vm = self.vm
        if arg >= caps.MAX_VCPU_ID or len(vm.vcpus) >= caps.MAX_VCPUS:
            refuse(errno.EINVAL)
        if not vm.max_vcpu_ids:
            vm.max_vcpu_ids = caps.MAX_VCPU_ID
        if arg >= vm.max_vcpu_ids:
            refuse(errno.EINVAL)
        if any(vcpu.id == arg for vcpu in vm.vcpus):
            refuse(errno.EEXIST)
        vcpu = Vcpu(vm, arg)
        vm.vcpus.append(vcpu)
        try:
            return vm.host.fds.install(VcpuFile(vcpu))
        except OSError:  # no descriptor for it, no vCPU
            vm.vcpus.remove(vcpu)
            vm.scheduler.remove(vcpu.seat)
            vcpu.destroy()
            raise

    def _set_region_v1(self, arg: int) -> int:
        old = copy_in(self._user, "kvm_userspace_memory_region", arg)
        region = ffi.new("struct kvm_userspace_memory_region2 *")
        ffi.memmove(region, old, ffi.sizeof(old[0]))
        self.vm.slots.set_region(region, v1=True)
        return 0

    def _set_region_v2(self, arg: int) -> int:
        self.vm.slots.set_region(copy_in(self._user, "kvm_userspace_memory_region2", arg))
        return 0

    def _set_attributes(self, arg: int) -> int:
        self.vm.attributes.set(copy_in(self._user, "kvm_memory_attributes", arg))
        return 0

    def _get_dirty_log(self, arg: int) -> int:
        dirty_log.get_dirty_log(self.vm, copy_in(self._user, "kvm_dirty_log", arg))
        return 0

    def _clear_dirty_log(self, arg: int) -> int:
        dirty_log.clear_dirty_log(self.vm, copy_in(self._user, "kvm_clear_dirty_log", arg))
        return 0

    def _register_coalesced(self, arg: int) -> int:
        self.vm.coalesced.register(copy_in(self._user, "kvm_coalesced_mmio_zone", arg))
        return 0

    def _unregister_coalesced(self, arg: int) -> int:
        self.vm.coalesced.unregister(copy_in(self._user, "kvm_coalesced_mmio_zone", arg))
        return 0

    def _create_guest_memfd(self, arg: int) -> int:
        create = copy_in(self._user, "kvm_create_guest_memfd", arg)
        file = GuestMemfd(self.vm, create.size, create.flags)
        return self.vm.host.fds.install(file)

    def _encrypt_op(self, arg: int) -> int:
        return encrypt_op(self.vm, arg)

    def _register_region(self, arg: int) -> int:
        return register_region(self.vm, copy_in(self._user, "kvm_enc_region", arg))

    def _unregister_region(self, arg: int) -> int:
        return unregister_region(self.vm, copy_in(self._user, "kvm_enc_region", arg))

    def _set_boot_cpu_id(self, arg: int) -> int:
        if self.vm.vcpus:
            refuse(errno.EBUSY)
        if arg > (self.vm.max_vcpu_ids or caps.MAX_VCPU_ID):
            refuse(errno.EINVAL)
        self.vm.bsp_id = arg
        return 0

    def _set_nr_mmu_pages(self, arg: int) -> int:
        """How many page tables KVM keeps, which nobody sees."""
        if arg < _MIN_ALLOC_MMU_PAGES:
            refuse(errno.EINVAL)
        return 0

    def _set_tss_addr(self, arg: int) -> int:
        if arg > 0xFFFFFFFF - _TSS_PAGES + 1:
            refuse(errno.EINVAL)
        return 0

    def _set_identity_map_addr(self, arg: int) -> int:
        if self.vm.vcpus:
            refuse(errno.EINVAL)
        self._user.read(arg, 8)
        return 0

    def _set_tsc_khz(self, arg: int) -> int:
        if arg & 0xFFFFFFFF >= MAX_KHZ:
            refuse(errno.EINVAL)
        if self.vm.vcpus and not self.vm.host.profile.vm_tsc_khz_after_vcpu:
            refuse(errno.EINVAL)
        self.vm.tsc_khz = arg & 0xFFFFFFFF or self.vm.host.tsc_khz
        return 0

    def _get_tsc_khz(self, arg: int) -> int:
        return self.vm.tsc_khz

    def _get_clock(self, arg: int) -> int:
        copy_out(self._user, arg, self.vm.clock.get())
        return 0

    def _set_clock(self, arg: int) -> int:
        self.vm.clock.set(copy_in(self._user, "kvm_clock_data", arg))
        return 0

    def _unsimulated(self, arg: int) -> int:
        """A kernel never says ENOSYS: it means that the simulator has nothing behind it."""
        refuse(errno.ENOSYS)
