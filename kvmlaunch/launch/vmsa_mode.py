"""Which VMSA mode a launch takes: what the kernel offers, and what keeps the digest."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError, IoctlError, KvmLaunchError, MissingCapability
from kvmlaunch.images import LaunchPlan, VmsaMode, to_sync
from kvmlaunch.kvm import HostMemory, Kvm, SevDevice, Vcpu, Vm
from kvmlaunch.launch.sync_fallback import describe_fallback
from kvmlaunch.snp import New
from kvmlaunch.snp.vcpu_state import enable_direct_vmsa, get_vcpu_state
from kvmlaunch.uapi import Platform, Proposal, default_proposal, lib

__all__ = ["Offer", "Settled", "probe_vmsa_mode", "settle_vmsa_mode"]

_SNP_ACTIVE = 1 << 0


class Offer(NamedTuple):
    """The best VMSA mode of a host, and the sentence that says how it was found."""

    mode: VmsaMode
    why: str


class Settled(NamedTuple):
    """The plan in the mode that it will be launched in, why, and what that mode changes."""

    plan: LaunchPlan
    why: str
    changes: tuple[str, ...] = ()


def probe_vmsa_mode(platform: Platform, proposal: Proposal | None = None) -> Offer:
    """Ask a host by trying, in VMs that are thrown away: capability numbers mean nothing.

    Raises MissingCapability where there is no SNP, and IoctlError.
    """
    numbers = default_proposal() if proposal is None else proposal
    with Kvm.open(platform) as kvm, SevDevice.open(platform) as sev:
        kvm.require_snp()
        refused = _try_direct(kvm, sev, numbers)
        if refused is None:
            return Offer(VmsaMode.DIRECT, "KVM_CAP_SNP_DIRECT_VMSA and vCPU state commands work")
        return _try_page(kvm, sev, numbers, refused)


def settle_vmsa_mode(
    plan: LaunchPlan,
    platform: Platform,
    asked: VmsaMode | str | None = None,
    *,
    proposal: Proposal | None = None,
    allow_digest_change: bool = False,
) -> Settled:
    """The mode that was asked for, else the best that keeps the predicted digest.

    A plan without VMSAs of its own stays in mode ``sync``, as it was predicted. Raises
    MissingCapability (or FormatError, if ``sync`` was asked for) where VMSAs would have to be
    left to KVM and that changes the digest, unless it is allowed; IoctlError of the probe.
    """
    if not plan.confidential:
        return Settled(plan, "a plain VM has no VMSAs")
    if plan.vmsa_mode is VmsaMode.SYNC:
        why = "as asked" if asked else f"{plan.image} has no VMSA of its own, KVM makes them"
        return Settled(plan, f"VMSA mode sync: {why}")
    if asked == VmsaMode.SYNC:
        return _fall_back(plan, "as asked", host_lacks=False, allowed=allow_digest_change)
    if asked is not None:
        return Settled(plan, f"VMSA mode {plan.vmsa_mode}: as asked")
    offer = probe_vmsa_mode(platform, proposal)
    if offer.mode is VmsaMode.DIRECT:
        return Settled(replace(plan, vmsa_mode=offer.mode), f"VMSA mode direct: {offer.why}")
    if offer.mode is VmsaMode.PAGE:
        try:
            taken = replace(plan, vmsa_mode=offer.mode)
        except FormatError as error:
            offer = Offer(VmsaMode.SYNC, f"{offer.why}, but {error.rule}")
        else:
            return Settled(taken, f"VMSA mode page: {offer.why}")
    return _fall_back(plan, offer.why, host_lacks=True, allowed=allow_digest_change)


def _fall_back(plan: LaunchPlan, why: str, *, host_lacks: bool, allowed: bool) -> Settled:
    fallback = to_sync(plan)
    changes, changed = describe_fallback(plan, fallback)
    if changed and not allowed:
        rule = "--allow-digest-change leaves the VMSAs to KVM all the same"
        if not host_lacks:
            raise FormatError("\n".join((f"mode sync changes the launch digest; {rule}", *changes)))
        raise MissingCapability(
            f"VMSAs of user space ({why})",
            "\n".join((f"this image's launch digest; {rule}", *changes)),
        )
    return Settled(fallback.plan, f"VMSA mode sync: {why}", changes)


def _try_direct(kvm: Kvm, sev: SevDevice, numbers: Proposal) -> str | None:
    """None if mode ``direct`` works, else what doesn't."""
    with kvm.create_vm(lib.KVM_X86_SNP_VM) as vm:
        launch = New.init(vm, sev)
        try:
            enable_direct_vmsa(vm, numbers)
        except IoctlError:
            return f"KVM_CAP_SNP_DIRECT_VMSA ({numbers.direct_vmsa}) can't be enabled"
        with vm.create_vcpu(0) as vcpu:
            launch.start(DEFAULT_POLICY)
            if not _has_state(vcpu, numbers):
                return f"KVM_SEV_SNP_GET_VCPU_STATE ({numbers.get_vcpu_state}) doesn't work"
    return None


def _try_page(kvm: Kvm, sev: SevDevice, numbers: Proposal, refused: str) -> Offer:
    with ExitStack() as stack:
        vm = stack.enter_context(kvm.create_vm(lib.KVM_X86_SNP_VM))
        launch = New.init(vm, sev)
        memory = _one_page(stack, kvm.platform, vm)
        vcpu = stack.enter_context(vm.create_vcpu(0))
        started = launch.start(DEFAULT_POLICY)
        memory.view[:] = Vmsa(sev_features=_SNP_ACTIVE).encode()
        result, done = started.update_raw(
            PAGE_SIZE, numbers.page_type_vmsa, memory.address, PAGE_SIZE
        )
        if not done:
            code = errno.errorcode.get(result.errno, str(result.errno))
            return Offer(VmsaMode.SYNC, f"{refused}, and KVM_SEV_SNP_PAGE_TYPE_VMSA gives {code}")
        if _has_state(vcpu, numbers):
            # A kernel of proposal v2: without its capability KVM makes the VMSAs as well.
            return Offer(VmsaMode.SYNC, f"{refused}: another number may do (--proposal-cap)")
    return Offer(VmsaMode.PAGE, "KVM_SEV_SNP_PAGE_TYPE_VMSA is taken, vCPUs have no state commands")


def _one_page(stack: ExitStack, platform: Platform, vm: Vm) -> HostMemory:
    memory = HostMemory(platform, PAGE_SIZE)
    stack.callback(memory.close)
    memfd = stack.enter_context(vm.create_guest_memfd(PAGE_SIZE))
    vm.set_user_memory_region2(0, PAGE_SIZE, PAGE_SIZE, memory.address, memfd=memfd)
    vm.set_memory_attributes(PAGE_SIZE, PAGE_SIZE, private=True)
    return memory


def _has_state(vcpu: Vcpu, numbers: Proposal) -> bool:
    try:
        get_vcpu_state(vcpu, numbers)
    except KvmLaunchError:
        return False
    return True
