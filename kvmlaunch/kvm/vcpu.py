"""One virtual CPU."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvmlaunch.errors import ClosedError
from kvmlaunch.kvm.calls import dead_error, ioctl_error
from kvmlaunch.kvm.descriptor import Descriptor
from kvmlaunch.kvm.exits import (
    Exit,
    InterruptedExit,
    MemoryFaultExit,
    RetryExit,
    decode_exit,
    req_certs,
)
from kvmlaunch.kvm.sev_command import SevResult, sev_command
from kvmlaunch.uapi import Platform, ffi, lib

__all__ = ["Vcpu"]


class Vcpu(Descriptor):
    """A vCPU descriptor and its run page (KVM_CREATE_VCPU).

    Register values are mappings with the kernel's field names. Synchronization:
    one thread per Vcpu; request_exit() may come from any.
    """

    def __init__(self, platform: Platform, fd: int, vcpu_id: int) -> None:
        super().__init__(platform, fd, f"vCPU {vcpu_id}")
        self.vcpu_id = vcpu_id
        self.runs = 0
        self._run_address = 0
        self._run_size = 0

    def map_run(self, size: int) -> None:
        """Map the run page, ``size`` bytes, in place of an earlier mapping (mmap, munmap)."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        result = self.platform.mmap(self.fd, size, protection, mmap.MAP_SHARED)
        if result.ret < 0:
            raise ioctl_error("mmap of the run page", result.errno, fields={"vcpu": self.vcpu_id})
        self._unmap_run()
        self._run_address, self._run_size = result.ret, size

    def close(self) -> None:
        """Unmap the run page and close the descriptor."""
        self._unmap_run()
        super().close()

    def _unmap_run(self) -> None:
        address, self._run_address = self._run_address, 0
        if address:
            self.platform.munmap(address, self._run_size)

    @property
    def kvm_run(self) -> Any:
        """The run page as ``struct kvm_run *``. Raises ClosedError."""
        if not self._run_address:
            raise ClosedError(self._what)
        return ffi.cast("struct kvm_run *", self._run_address)

    def _failed(self, name: str, err: int, fields: Mapping[str, Any] | None) -> Exception:
        fields = {"vcpu": self.vcpu_id, **(fields or {})}
        if err == errno.EIO and self._is_dead():
            return dead_error(name, fields)
        return ioctl_error(name, err, fields=fields)

    def _is_dead(self) -> bool:
        """True after KVM_BUG: a call that can't fail gives EIO (KVM_GET_MP_STATE)."""
        probe = self.ioctl_raw("KVM_GET_MP_STATE", ffi.new("struct kvm_mp_state *"))
        return probe.ret < 0 and probe.errno == errno.EIO

    def run(self, uart: Any = ffi.NULL) -> Exit | None:
        """Run the guest until it exits (KVM_RUN).

        ``uart`` is a ``struct kl_uart *`` whose ports need no Python; None comes
        back when it has text to show. Raises IoctlError; a memory fault, a signal
        and EAGAIN are exits.
        """
        result = self.platform.run(self.fd, self.kvm_run, uart)
        self.runs += result.runs
        if result.handled:
            return None
        if result.ret >= 0:
            return decode_exit(self.kvm_run)
        if result.errno == errno.EINTR:
            return InterruptedExit()
        if result.errno == errno.EAGAIN:
            return RetryExit()
        if result.errno in (errno.EFAULT, lib.KL_EHWPOISON):
            exit_ = decode_exit(self.kvm_run)
            if isinstance(exit_, MemoryFaultExit):
                return replace(exit_, errno=result.errno)
        raise self._failed("KVM_RUN", result.errno, None)

    def sev_command_raw(self, command: int, data: Any = None, *, sev_fd: int = 0) -> SevResult:
        """Issue a SEV command of this vCPU, unchecked (KVM_MEMORY_ENCRYPT_OP; see `sev_command`).

        Mainline has none for SNP.
        """
        return sev_command(self, command, data, sev_fd)

    def request_exit(self) -> None:
        """Make the next KVM_RUN, or the present one once it is signalled, return EINTR.

        Nothing happens after close(), since it may come from any thread.
        """
        if self._run_address:
            self.kvm_run.immediate_exit = 1

    def clear_exit_request(self) -> None:
        """Undo request_exit()."""
        self.kvm_run.immediate_exit = 0

    def complete_io(self, data: bytes) -> None:
        """Answer an IN of the last exit, all its items; the guest gets it with the next run()."""
        run = self.kvm_run
        start = ffi.cast("char *", run) + run.io.data_offset
        ffi.buffer(start, run.io.size * run.io.count)[:] = data

    def complete_mmio(self, data: bytes) -> None:
        """Answer an MMIO read of the last exit (up to 8 bytes)."""
        ffi.buffer(self.kvm_run.mmio.data)[: len(data)] = data

    def complete_hypercall(self, ret: int) -> None:
        """Answer a hypercall; written always, since kernels before 6.14 don't preset it."""
        self.kvm_run.hypercall.ret = ret

    def complete_req_certs(self, ret: int, *, npages: int | None = None) -> None:
        """Answer a `ReqCertsExit`: 0, or an errno that the guest gets as an error.

        ENOSPC with ``npages`` says how many pages it takes; EAGAIN is busy, EIO any other error,
        and all else lets the next run() fail with EINVAL.
        """
        exit_ = req_certs(self.kvm_run)
        exit_.ret = ret
        if npages is not None:
            exit_.npages = npages

    def get_regs(self) -> dict[str, Any]:
        """General registers (KVM_GET_REGS)."""
        return self._get("KVM_GET_REGS", "kvm_regs")

    def set_regs(self, values: Mapping[str, Any]) -> None:
        """Set all general registers; those left out become 0 (KVM_SET_REGS)."""
        self._set("KVM_SET_REGS", "kvm_regs", values)

    def get_sregs(self) -> dict[str, Any]:
        """Segment and control registers (KVM_GET_SREGS)."""
        return self._get("KVM_GET_SREGS", "kvm_sregs")

    def set_sregs(self, values: Mapping[str, Any]) -> None:
        """Set all segment and control registers (KVM_SET_SREGS)."""
        self._set("KVM_SET_SREGS", "kvm_sregs", values)

    def get_debugregs(self) -> dict[str, Any]:
        """Debug registers (KVM_GET_DEBUGREGS)."""
        return self._get("KVM_GET_DEBUGREGS", "kvm_debugregs")

    def set_debugregs(self, values: Mapping[str, Any]) -> None:
        """Set the debug registers (KVM_SET_DEBUGREGS)."""
        self._set("KVM_SET_DEBUGREGS", "kvm_debugregs", values)

    def set_guest_debug(self, control: int, debugregs: Sequence[int] = ()) -> None:
        """Ask for KVM_EXIT_DEBUG: KVM_GUESTDBG_* bits, DR0 to DR7 (KVM_SET_GUEST_DEBUG)."""
        values = {"control": control, "arch": {"debugreg": list(debugregs)}}
        self._set("KVM_SET_GUEST_DEBUG", "kvm_guest_debug", values)

    def translate(self, linear: int) -> int | None:
        """GPA of a linear address by the vCPU's page tables; None if unmapped (KVM_TRANSLATE)."""
        value = ffi.new("struct kvm_translation *", {"linear_address": linear})
        self.ioctl("KVM_TRANSLATE", value)
        return int(value.physical_address) if value.valid else None

    def get_fpu(self) -> dict[str, Any]:
        """Legacy FPU state (KVM_GET_FPU)."""
        return self._get("KVM_GET_FPU", "kvm_fpu")

    def set_fpu(self, values: Mapping[str, Any]) -> None:
        """Set the legacy FPU state (KVM_SET_FPU)."""
        self._set("KVM_SET_FPU", "kvm_fpu", values)

    def get_xsave(self) -> bytes:
        """The 4096-byte XSAVE area (KVM_GET_XSAVE)."""
        area = ffi.new("struct kvm_xsave *")
        self.ioctl("KVM_GET_XSAVE", area)
        return bytes(ffi.buffer(area))

    def set_xsave(self, area: bytes) -> None:
        """Set the XSAVE area, 4096 bytes in standard format (KVM_SET_XSAVE)."""
        value = ffi.new("struct kvm_xsave *")
        ffi.buffer(value)[:] = area
        self.ioctl("KVM_SET_XSAVE", value)

    def get_xcrs(self) -> dict[int, int]:
        """Extended control registers by number (KVM_GET_XCRS)."""
        value = ffi.new("struct kvm_xcrs *")
        self.ioctl("KVM_GET_XCRS", value)
        return {int(x.xcr): int(x.value) for x in value.xcrs[0 : value.nr_xcrs]}

    def set_xcr0(self, value: int) -> None:
        """Set XCR0 (KVM_SET_XCRS)."""
        self._set("KVM_SET_XCRS", "kvm_xcrs", {"nr_xcrs": 1, "xcrs": [{"xcr": 0, "value": value}]})

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Read MSRs; the dict ends before the first that KVM refuses (KVM_GET_MSRS)."""
        msrs = _msrs([(index, 0) for index in indices])
        done = self.ioctl("KVM_GET_MSRS", msrs)
        return {int(msrs.entries[i].index): int(msrs.entries[i].data) for i in range(done)}

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """Write MSRs; returns how many KVM took, in order (KVM_SET_MSRS)."""
        return self.ioctl("KVM_SET_MSRS", _msrs(list(values.items())))

    def set_cpuid(self, leaves: Iterable[Mapping[str, int]]) -> None:
        """Set what CPUID gives the guest (KVM_SET_CPUID2)."""
        entries = [dict(leaf) for leaf in leaves]
        table = ffi.new("struct kvm_cpuid2 *", {"nent": len(entries), "entries": entries})
        self.ioctl("KVM_SET_CPUID2", table, fields={"nent": len(entries)})

    def get_mp_state(self) -> int:
        """The KVM_MP_STATE_* number (KVM_GET_MP_STATE)."""
        return int(self._get("KVM_GET_MP_STATE", "kvm_mp_state")["mp_state"])

    def set_mp_state(self, state: int) -> None:
        """Set the KVM_MP_STATE_* number (KVM_SET_MP_STATE)."""
        self._set("KVM_SET_MP_STATE", "kvm_mp_state", {"mp_state": state})


def _msrs(values: Sequence[tuple[int, int]]) -> Any:
    entries = [{"index": index, "data": data} for index, data in values]
    return ffi.new("struct kvm_msrs *", {"nmsrs": len(entries), "entries": entries})
