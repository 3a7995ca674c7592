"""VMSAs that KVM makes at the end of a launch."""

from __future__ import annotations

from kvmlaunch.abi.kvm_sync import synced
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images.plan import LaunchPlan, VmsaMode

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["finish_vmsas"]


def finish_vmsas(plan: LaunchPlan) -> Iterator[tuple[int, Vmsa]]:
    """(vCPU, VMSA) that SNP_LAUNCH_FINISH measures: in mode ``sync`` one per vCPU, else none.

    Raises FormatError for a state that KVM would refuse.
    """
    if plan.vmsa_mode is not VmsaMode.SYNC:
        return
    before = vmsa = None
    for vcpu, state in enumerate(plan.vcpus):
        if vmsa is None or state is not before:
            made = state if plan.as_given else synced(state, sev_features=plan.sev_features)
            # A SEV_FEATURES word that no KVM measures (bit 0 is clear) was asked for as it is.
            before, vmsa = state, made.replace(sev_features=plan.sev_features)
        yield vcpu, vmsa
