"""Which VMSA mode a launch takes: what the kernel offers, and what keeps the digest."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from kvmlaunch.abi.digest import LaunchDigest
from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.idblock import ID_AUTH_SIZE, IdBlock
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError, IoctlError, MissingCapability
from kvmlaunch.images import LaunchPlan, VmsaMode, to_sync
from kvmlaunch.images.options import SNP_ACTIVE
from kvmlaunch.kvm import HostMemory, Kvm, SevDevice, Vm
from kvmlaunch.launch.sync_fallback import describe_fallback
from kvmlaunch.snp import New, Started
from kvmlaunch.snp.vcpu_state import enable_direct_vmsa, get_vcpu_state
from kvmlaunch.uapi import Platform, Proposal, default_proposal, lib

__all__ = ["Offer", "Settled", "probe_vmsa_mode", "settle_vmsa_mode"]


class Offer(NamedTuple):
    """The best VMSA mode of a host, and the sentence that says how it was found."""

    mode: VmsaMode
    why: str


class Settled(NamedTuple):
    """The plan in the mode that it will be launched in, and what that mode changes.

    ``why`` is a sentence, "" for a plain VM, which has no VMSAs.
    """

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
        return Settled(plan, "")
    if plan.vmsa_mode is VmsaMode.SYNC:
        why = f"{plan.image} has no VMSA of its own, KVM makes them"
        return Settled(plan, f"VMSA mode sync: {'as asked' if asked == VmsaMode.SYNC else why}")
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
            try:
                get_vcpu_state(vcpu, numbers)
            except IoctlError:
                return f"KVM_SEV_SNP_GET_VCPU_STATE ({numbers.get_vcpu_state}) doesn't work"
    return None


def _try_page(kvm: Kvm, sev: SevDevice, numbers: Proposal, refused: str) -> Offer:
    page = Vmsa(sev_features=SNP_ACTIVE).encode()
    with ExitStack() as stack:
        vm = stack.enter_context(kvm.create_vm(lib.KVM_X86_SNP_VM))
        launch = New.init(vm, sev)
        memory = _one_page(stack, kvm.platform, vm)
        stack.enter_context(vm.create_vcpu(0))
        started = launch.start(DEFAULT_POLICY)
        memory.view[:] = page
        result, done = started.update_raw(
            PAGE_SIZE, numbers.page_type_vmsa, memory.address, PAGE_SIZE
        )
        if not done:
            code = errno.errorcode.get(result.errno, str(result.errno))
            return Offer(VmsaMode.SYNC, f"{refused}, and KVM_SEV_SNP_PAGE_TYPE_VMSA gives {code}")
        if not _measured_only(started, page):
            return Offer(
                VmsaMode.SYNC,
                f"{refused}, and KVM measures VMSAs of its own beside KVM_SEV_SNP_PAGE_TYPE_VMSA: "
                "other numbers may do (--proposal-cap)",
            )
    return Offer(VmsaMode.PAGE, "KVM_SEV_SNP_PAGE_TYPE_VMSA is taken for vCPU 0")


def _measured_only(launch: Started, page: bytes) -> bool:
    """Whether firmware measured this VMSA and nothing else.

    An ID block without a signature is refused in any case, but first if the digest differs
    (snp-firmware-abi 6.4; not confirmed on hardware).
    """
    digest = LaunchDigest()
    digest.update(PageType.VMSA, PAGE_SIZE, page)
    block = IdBlock(ld=digest.value, policy=DEFAULT_POLICY).encode()
    try:
        launch.finish(id_block=block, id_auth=bytes(ID_AUTH_SIZE))
    except IoctlError as error:
        return error.fw_error in (FwStatus.INVALID_PARAM, FwStatus.BAD_SIGNATURE)
    return False


def _one_page(stack: ExitStack, platform: Platform, vm: Vm) -> HostMemory:
    memory = HostMemory(platform, PAGE_SIZE)
    stack.callback(memory.close)
    memfd = stack.enter_context(vm.create_guest_memfd(PAGE_SIZE))
    vm.set_user_memory_region2(0, PAGE_SIZE, PAGE_SIZE, memory.address, memfd=memfd)
    vm.set_memory_attributes(PAGE_SIZE, PAGE_SIZE, private=True)
    return memory
