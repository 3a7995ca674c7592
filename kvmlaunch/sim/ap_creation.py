"""AP creation: a vCPU gets a VMSA of the guest's own making (sev.c: sev_snp_ap_creation)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlaunch.abi.ghcb import ApRequest, GhcbError
from kvmlaunch.sim.ghcb import Ghcb
from kvmlaunch.sim.rmp import LARGE_PAGE_SIZE

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["create"]

_INJECTION_MODES = 1 << 3 | 1 << 4  # SEV_FEATURES: restricted and alternate injection


def create(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """The AP_CREATION event. KVM knows VMPL0 only: the VMPL is part of the request word."""
    if not _request(vcpu, ghcb):
        ghcb.refuse(GhcbError.INVALID_INPUT)
    return 1


def _request(vcpu: Vcpu, ghcb: Ghcb) -> bool:
    vm = vcpu.vm
    request, apic_id = ghcb.info_1 & 0xFFFFFFFF, ghcb.info_1 >> 32
    vmpl = request >> 16 & 0xF
    if vmpl < vm.host.profile.vmpls:
        request &= ~(0xF << 16)
    target = next((other for other in vm.vcpus if other.id == apic_id), None)
    if target is None:
        return False
    if request < ApRequest.DESTROY:
        features = ghcb.registers["rax"] ^ vm.sev.features
        exact = vm.host.profile.ap_create_exact_features
        if features and (exact or features & _INJECTION_MODES):
            return False
    gpa = ghcb.info_2
    if request in (ApRequest.CREATE_ON_INIT, ApRequest.CREATE):
        # An erratum makes a 2 MiB aligned VMSA unsafe.
        if not vcpu.state.is_page_address(gpa) or not gpa % LARGE_PAGE_SIZE:
            return False
    elif request != ApRequest.DESTROY:
        return False
    state = target.sev_es
    assert state is not None
    if vmpl:
        state.set_vmpl(vmpl, None if request == ApRequest.DESTROY else gpa)
        return True
    state.pending_vmsa_gpa = None if request == ApRequest.DESTROY else gpa
    state.waiting_for_reset = True
    if request != ApRequest.CREATE_ON_INIT:
        target.update_state = True
        vm.scheduler.wake()
    return True
