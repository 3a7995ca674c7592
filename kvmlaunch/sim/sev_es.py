"""What KVM keeps of a vCPU with encrypted state (sev.c: struct vcpu_sev_es_state)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from kvmlaunch.abi.ghcb import MsrRequest
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.sim.ghcb import Ghcb, ScratchArea
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["GHCB_VERSION_MIN", "Hold", "SevEsState"]

GHCB_VERSION_MIN = 1
"""Of KVM, not of the VM."""

_SEV_INFO_ANSWER = MsrRequest.SEV_INFO - 1


class Hold(enum.Enum):
    """Which kind of AP reset hold a vCPU is in."""

    NONE = "none"
    MSR = "GHCB MSR protocol"
    EVENT = "GHCB event"


class _Vmpl(NamedTuple):
    """A VMPL of a vCPU that isn't the one that runs."""

    has_guest_vmsa: bool
    guest_vmsa_gpa: int | None
    ghcb_msr: int
    registered_gpa: int | None


class SevEsState:
    """GHCB, VMSA and reset hold of one vCPU.

    Attributes: ``ghcb`` and ``scratch`` between a VMGEXIT and the next entry;
    ``registered_gpa`` of the GHCB; ``hold``; ``guest_vmsa_gpa``, the guest's own VMSA page once
    the launch or AP creation gave one; ``has_guest_vmsa``, since when KVM's own isn't used;
    ``pending_vmsa_gpa`` for the next INIT where ``waiting_for_reset``, None for no VMSA; ``vmpl``
    that runs, where the host has several.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.ghcb: Ghcb | None = None
        self.scratch: ScratchArea | None = None
        self.registered_gpa: int | None = None
        self.hold = Hold.NONE
        self.received_first_sipi = False
        self.waiting_for_reset = False
        self.pending_vmsa_gpa: int | None = None
        self.has_guest_vmsa = False
        self.guest_vmsa_gpa: int | None = None
        self._loaded_spa: int | None = None
        self._first_msr: int | None = None
        self.vmpl = 0
        self._vmpls: dict[int, _Vmpl] = {}

    @property
    def reset_msr(self) -> int:
        """Reset value of the GHCB MSR: the answer to SEV_INFO."""
        vm = self._vcpu.vm
        versions = vm.sev.ghcb_version << 48 | GHCB_VERSION_MIN << 32
        return versions | vm.host.cpu.c_bit << 24 | _SEV_INFO_ANSWER

    @property
    def msr(self) -> int:
        """The GHCB MSR."""
        cpu = self._vcpu.running.cpu
        if cpu is not None:
            return cpu.ghcb
        return self.reset_msr if self._first_msr is None else self._first_msr

    def set_msr(self, value: int) -> None:
        """Give the guest its answer; before the first entry, what it finds there."""
        cpu = self._vcpu.running.cpu
        if cpu is None:
            self._first_msr = value
        else:
            cpu.ghcb = value

    def unmap_ghcb(self) -> None:
        """sev_es_unmap_ghcb(): before each entry, also from an exit without a GHCB page."""
        self.hold = Hold.NONE
        if self.ghcb is None:
            return
        if self.scratch is not None:
            self.scratch.finish()
        # What the guest didn't ask for goes to it as well.
        for name in ("rax", "rbx", "rcx", "rdx"):
            self.ghcb.put(name, self.ghcb.registers[name])
        self.ghcb = self.scratch = None

    def deliver_sipi(self) -> None:
        """sev_vcpu_deliver_sipi_vector(): the first one starts what the launcher set up."""
        if not self.received_first_sipi:
            self.received_first_sipi = True
        elif self.hold is Hold.EVENT:
            if self.ghcb is not None:
                self.ghcb.put("exit_info_2", 1)
        elif self.hold is Hold.MSR:
            self.set_msr(1 << 12 | MsrRequest.AP_RESET_HOLD + 1)

    def init_event(self) -> None:
        """sev_snp_init_protected_guest_state(): an INIT takes the VMSA that waits for it."""
        if not self.waiting_for_reset:
            return
        vcpu = self._vcpu
        self.waiting_for_reset = False
        vcpu.mp_state = lib.KVM_MP_STATE_HALTED
        gpa, self.pending_vmsa_gpa = self.pending_vmsa_gpa, None
        self._reload_vmsa(gpa)
        if self.guest_vmsa_gpa is not None and vcpu.vm.host.profile.vmsa.ap_create_protects:
            vcpu.protected = True
        if gpa is not None:
            # Also where it can't be had, so that KVM_RUN fails instead of waiting.
            vcpu.mp_state = lib.KVM_MP_STATE_RUNNABLE

    def bind(self, gpa: int | None) -> None:
        """sev_snp_install_guest_vmsa() before the launch ends: a page to start from, or none.

        Raises OSError where there is no such page; then nothing has changed.
        """
        if gpa is not None:
            self._vcpu.vm.memory.guest_page(gpa)
        self.has_guest_vmsa, self.guest_vmsa_gpa = True, gpa

    def set_vmpl(self, vmpl: int, gpa: int | None) -> None:
        """AP creation at another VMPL: its VMSA, which waits until it is asked for; or none."""
        self._vmpls.pop(vmpl, None)
        if gpa is not None:
            self._vmpls[vmpl] = _Vmpl(True, gpa, self.reset_msr, None)

    def run_vmpl(self, vmpl: int) -> bool:
        """Go on at another VMPL, with the GHCB MSR that it has; False where it has no VMSA."""
        if vmpl == self.vmpl:
            return True
        if vmpl not in self._vmpls:
            return False
        cpu = self._vcpu.running.live_cpu
        here = _Vmpl(self.has_guest_vmsa, self.guest_vmsa_gpa, cpu.ghcb, self.registered_gpa)
        self._write_back()
        self._vcpu.running.unload()
        self._vmpls[self.vmpl], self.vmpl = here, vmpl
        self.has_guest_vmsa, self.guest_vmsa_gpa, msr, self.registered_gpa = self._vmpls.pop(vmpl)
        self.set_msr(msr)
        return True

    def vmsa(self) -> Vmsa | None:
        """The VMSA that VMRUN loads; None where the processor doesn't take it."""
        vcpu = self._vcpu
        host = vcpu.vm.host
        if self.has_guest_vmsa:
            # A guess: hardware might take it before SNP_LAUNCH_FINISH, once it is measured.
            if self.guest_vmsa_gpa is None or not vcpu.vm.pre_fault_allowed:
                return None
            spa = vcpu.vm.memory.private_page(self.guest_vmsa_gpa)
        else:
            spa = vcpu.vmsa_spa if vcpu.protected else None
        if spa is None:
            return None
        entry = host.rmp.lookup(spa)
        if not entry.vmsa or entry.asid != vcpu.vm.sev.asid or entry.page_size:
            return None
        self._loaded_spa = spa
        return Vmsa.decode(host.memory.page(spa))

    def _reload_vmsa(self, gpa: int | None) -> None:
        """sev_snp_reload_vmsa(): the guest's page, or none.

        A vCPU that never had a page of the guest's keeps the VMSA that KVM made (init_vmcb).
        """
        self._write_back()
        self._vcpu.running.unload()
        self.guest_vmsa_gpa = None
        if gpa is not None and self._vcpu.vm.memory.private_page(gpa) is not None:
            self.has_guest_vmsa, self.guest_vmsa_gpa = True, gpa

    def _write_back(self) -> None:
        """The processor has the guest's registers in the VMSA page whenever it isn't running."""
        vmsa, spa = self._vcpu.running.save(), self._loaded_spa
        host = self._vcpu.vm.host
        if vmsa is not None and spa is not None and host.rmp.lookup(spa).vmsa:
            host.memory.page(spa)[:PAGE_SIZE] = vmsa.encode()
        self._loaded_spa = None
