"""A guest from its plan: built, launched step by step, and closed again.

guest = Guest(plan, platform)       # VM, memory, vCPUs with their registers
guest.start()                       # SNP_LAUNCH_START
for record in guest.update(): ...   # SNP_LAUNCH_UPDATE, a record per page
for record in guest.finish(): ...   # SNP_LAUNCH_FINISH, a record per VMSA that KVM makes
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from kvmlaunch.abi.page import PAGE_SIZE, Buffer, PageType
from kvmlaunch.errors import (
    ClosedError,
    FormatError,
    IoctlError,
    KvmLaunchError,
    LaunchStateError,
    MissingCapability,
)
from kvmlaunch.images.options import SNP_ACTIVE, lacks_snp_active
from kvmlaunch.images.plan import LaunchPlan, MemoryRegion, PageRange, VmsaMode
from kvmlaunch.kvm import GuestMemfd, HostMemory, Kvm, SevDevice, Vcpu, Vm, apply_state, cbitpos
from kvmlaunch.launch.cpuid import guest_cpuid, snp_cpuid_page
from kvmlaunch.launch.measure import Predictor, finish_batches
from kvmlaunch.launch.records import PageRecord, RecordBatch
from kvmlaunch.launch.registers import read_registers
from kvmlaunch.snp import CpuidRejected, Finished, New, Started
from kvmlaunch.snp.req_certs import enable_req_certs
from kvmlaunch.snp.vcpu_state import VcpuState, enable_direct_vmsa, get_vcpu_state, set_vcpu_state
from kvmlaunch.uapi import Inspector, Platform, Proposal, address_of, default_proposal, ffi, lib

__all__ = ["Guest", "Witness", "WitnessReport"]

_CHUNK_PAGES = 256
_NEEDED_CAPS = ("KVM_CAP_GUEST_MEMFD", "KVM_CAP_MEMORY_ATTRIBUTES", "KVM_CAP_USER_MEMORY2")


class Witness(NamedTuple):
    """One page of two witnesses that don't agree; None where one has no such page."""

    seq: int
    predicted: PageRecord | None
    host: str | None


class WitnessReport(NamedTuple):
    """Prediction against host: ``agrees`` is None where the host can't be asked."""

    agrees: bool | None
    pages: int
    first_difference: Witness | None

    def __str__(self) -> str:
        if self.agrees is None:
            return "the host can't be asked what it measured; an ID block makes it confirm"
        if self.agrees:
            return f"prediction and host agree on all {self.pages} pages"
        assert self.first_difference is not None
        seq, predicted, host = self.first_difference
        return (
            f"prediction and host differ first at page {seq}: "
            f"predicted {predicted or 'no page'}; host {host or 'no page'}"
        )


class _Backing(NamedTuple):
    """A memory region, its shared side, and its private side if it has one."""

    region: MemoryRegion
    memory: HostMemory
    memfd: GuestMemfd | None


class Guest:
    """A guest under construction, launched, or running. A context manager.

    Attributes: ``plan``, ``platform``, ``certificates``, ``kvm``, ``vm``, ``sev`` (None for a plain
    VM), ``vcpus``, ``records`` (so far), ``state`` (New, Started, Finished; None for a
    plain VM) and ``corrections`` (refused CPUID pages whose correction was taken).
    """

    def __init__(
        self,
        plan: LaunchPlan,
        platform: Platform,
        *,
        ghcb_version: int = 0,
        proposal: Proposal | None = None,
        certificates: bytes | None = None,
    ) -> None:
        """Build everything up to the vCPUs. Raises MissingCapability and IoctlError.

        FormatError where the plan's page tables have another C-bit than the host tells, and
        for a plan that only predicts. VMSAs of another VMM are those that this KVM makes.
        A plan that isn't confidential makes a plain VM, whose pages are loaded at once.
        ``ghcb_version`` is for KVM_SEV_INIT2; 0 leaves it to the kernel. ``proposal``: numbers
        of the VMSA modes ``page`` and ``direct`` (else `default_proposal`). ``certificates`` is
        the table for extended guest requests (`kvmlaunch.abi.cert_table`), which needs a kernel
        that asks for it.
        """
        _check_launchable(plan)
        self.plan = plan = plan.on_kvm()
        self.platform = platform
        self.certificates = certificates
        self._proposal = default_proposal() if proposal is None else proposal
        self.records: list[PageRecord] = []
        self.corrections: list[CpuidRejected] = []
        self.state: New | Started | Finished | None = None
        self.sev: SevDevice | None = None
        self.vcpus: list[Vcpu] = []
        self._predictor = Predictor()
        self._backing: list[_Backing] = []
        with ExitStack() as stack:
            self.kvm = stack.enter_context(Kvm.open(platform))
            self.vm = self._create_vm(stack, ghcb_version)
            for slot, region in enumerate(plan.memory):
                self._add_memory(stack, slot, region)
            self._share()
            if plan.apic:
                self.vm.split_irqchip()
            self._add_vcpus(stack)
            if not plan.confidential:
                self._load()
            self._stack = stack.pop_all()

    def __repr__(self) -> str:
        state = self.state.state if self.state else "plain"
        return f"<Guest {self.plan.image} {state} platform={self.platform.name}>"

    def _create_vm(self, stack: ExitStack, ghcb_version: int) -> Vm:
        if not self.plan.confidential:
            return stack.enter_context(self.kvm.create_vm(lib.KVM_X86_DEFAULT_VM))
        self.kvm.require_snp()
        for cap in _NEEDED_CAPS:
            if not self.kvm.check_extension(getattr(lib, cap)):
                raise MissingCapability(cap, "the private memory of an SNP guest")
        self.sev = stack.enter_context(SevDevice.open(self.platform))
        vm = stack.enter_context(self.kvm.create_vm(lib.KVM_X86_SNP_VM))
        # Without it KVM answers every page state change of the guest with an error.
        vm.enable_cap(lib.KVM_CAP_EXIT_HYPERCALL, 1 << lib.KVM_HC_MAP_GPA_RANGE)
        features = self.plan.sev_features & ~1
        self.state = New.init(vm, self.sev, vmsa_features=features, ghcb_version=ghcb_version)
        if self.certificates is not None:
            enable_req_certs(vm)
        if self.plan.vmsa_mode is VmsaMode.DIRECT:
            self._enable_direct_vmsa(vm)
        return vm

    def _enable_direct_vmsa(self, vm: Vm) -> None:
        try:
            enable_direct_vmsa(vm, self._proposal)
        except IoctlError as error:
            if error.errno != errno.EINVAL:
                raise
            raise MissingCapability(
                f"KVM_CAP_SNP_DIRECT_VMSA (number {self._proposal.direct_vmsa}: --proposal-cap)",
                "VMSA mode direct",
            ) from error

    def _add_memory(self, stack: ExitStack, slot: int, region: MemoryRegion) -> None:
        memory = HostMemory(self.platform, region.size)
        stack.callback(memory.close)
        memfd = None
        if self.plan.confidential:
            memfd = stack.enter_context(self.vm.create_guest_memfd(region.size))
            self.vm.set_user_memory_region2(
                slot, region.gpa, region.size, memory.address, memfd=memfd
            )
            self.vm.set_memory_attributes(region.gpa, region.size, private=True)
        else:
            self.vm.set_user_memory_region(slot, region.gpa, region.size, memory.address)
        self._backing.append(_Backing(region, memory, memfd))

    def _share(self) -> None:
        for part in self.plan.shared:
            if self.plan.confidential:
                self.vm.set_memory_attributes(part.gpa, part.size, private=False)
            for piece in part.pieces:
                self.memory_view(part.gpa + piece.offset, len(piece.data))[:] = piece.data

    def _add_vcpus(self, stack: ExitStack) -> None:
        supported = self.kvm.supported_cpuid()
        self._check_cbitpos(cbitpos(supported))
        self._bsp_cpuid = guest_cpuid(
            supported, 0, confidential=self.plan.confidential, vcpus=len(self.plan.vcpus)
        )
        for index, state in enumerate(self.plan.vcpus):
            vcpu = stack.enter_context(self.vm.create_vcpu(index))
            cpuid = guest_cpuid(
                supported,
                index,
                confidential=self.plan.confidential,
                vcpus=len(self.plan.vcpus),
            )
            if self.plan.vmsa_mode is VmsaMode.SYNC:
                apply_state(vcpu, state, cpuid, bsp=index == 0)
            else:
                vcpu.set_cpuid(cpuid)
            if self._is_parked(index):
                # As KVM leaves them, waiting for INIT, it never notices GHCB AP creation.
                vcpu.set_mp_state(lib.KVM_MP_STATE_AP_RESET_HOLD)
            self.vcpus.append(vcpu)

    def _is_parked(self, vcpu: int) -> bool:
        """A vCPU that the guest starts itself, on a kernel that needs help to see that."""
        plan = self.plan
        return (
            bool(vcpu)
            and plan.apic
            and plan.confidential
            and (plan.vmsa_mode is not VmsaMode.DIRECT)
        )

    def _check_cbitpos(self, host: int | None) -> None:
        planned = self.plan.cbitpos
        if planned is not None and host is not None and planned != host:
            raise FormatError(
                f"the page tables of {self.plan.image} have the C-bit at bit {planned}, but on "
                f"this host it is bit {host}: plan for that (--cbitpos, PlanOptions.cbitpos)"
            )

    def _load(self) -> None:
        for step in self.plan.steps:
            for offset, piece in ((piece.offset, piece.data) for piece in step.pieces):
                self.memory_view(step.gpa + offset, len(piece))[:] = piece

    def memory_view(self, gpa: int, size: int) -> memoryview:
        """The shared side of guest memory; what a plain guest sees there.

        Raises FormatError where the range isn't inside one memory region.
        """
        backing = self._backing_of(gpa, size)
        offset = gpa - backing.region.gpa
        return backing.memory.view[offset : offset + size]

    def _backing_of(self, gpa: int, size: int) -> _Backing:
        for backing in self._backing:
            if backing.region.gpa <= gpa and gpa + size <= backing.region.end:
                return backing
        raise FormatError(f"GPA {gpa:#x}..{gpa + size:#x} is not inside the guest's memory")

    @property
    def digest(self) -> bytes:
        """The predicted launch digest of what has been launched so far."""
        return self._predictor.digest

    def start(self) -> None:
        """SNP_LAUNCH_START with the plan's policy."""
        self.state = self._in_state("start").start(self.plan.policy)

    def update(self, *, retry_cpuid: bool = False) -> Iterator[PageRecord]:
        """SNP_LAUNCH_UPDATE for every page of the plan; yields a record per page done.

        ``retry_cpuid``: where the firmware refuses the CPUID page, take its
        correction and try once more; otherwise CpuidRejected shows the difference.
        """
        for batch in self.update_batches(retry_cpuid=retry_cpuid):
            yield from batch.records

    def update_batches(self, *, retry_cpuid: bool = False) -> Iterator[RecordBatch]:
        """The same; yields the records in batches, as soon as a call has launched their pages."""
        for step in self.plan.steps:
            yield from self._update_step(self._in_state("update"), step, retry_cpuid)

    def finish(self) -> list[PageRecord]:
        """SNP_LAUNCH_FINISH; returns a record per VMSA that KVM made and measured.

        In mode ``direct`` each vCPU gets its VMSA before (SNP_SET_VCPU_STATE).
        """
        state = self._in_state("finish")
        # A step in the wrong state must leave the prediction as it is.
        predictor = self._predictor.copy()
        batches = finish_batches(self.plan, predictor)
        records = [record for batch in batches for record in batch.records]
        self._finish(state, predictor.digest)
        self._predictor = predictor
        self.records += records
        return records

    def _finish(self, state: Started, digest: bytes | None) -> None:
        if self.plan.vmsa_mode is VmsaMode.DIRECT:
            self._bind()
        self.state = state.finish(
            host_data=self.plan.host_data,
            id_block=self.plan.id_block,
            id_auth=self.plan.id_auth,
            auth_key=self.plan.author_key_enabled,
            vcek_disabled=self.plan.vcek_disabled,
            digest=digest,
            kvm_vmsas=self.plan.vmsa_mode is VmsaMode.SYNC,
        )

    def _bind(self) -> None:
        for index, gpa in self.plan.bindings.items():
            vcpu = self.vcpus[index]
            # The GHCB MSR keeps its value: what isn't given here is taken away.
            wanted = get_vcpu_state(vcpu, self._proposal)._replace(vmsa_gpa=gpa)
            set_vcpu_state(vcpu, wanted, self._proposal)
            bound = get_vcpu_state(vcpu, self._proposal)
            if bound != wanted:
                raise KvmLaunchError(
                    f"vCPU {index} was given {_state_text(wanted)}, "
                    f"but KVM says that it has {_state_text(bound)}"
                )

    def launch(self, *, retry_cpuid: bool = False) -> Guest:
        """start(), update() and finish() in one call; returns the guest."""
        self.start()
        for _ in self.update(retry_cpuid=retry_cpuid):
            pass
        self.finish()
        return self

    def launch_blind(self, *, retry_cpuid: bool = False) -> None:
        """The same without records and prediction, where the digest is known already."""
        self.start()
        state = self._in_state("update")
        for step in self.plan.steps:
            for _ in self._launch_step(state, step, retry_cpuid):
                pass
        self._finish(state, None)

    def _in_state(self, step: str) -> Any:
        """The state, whatever it is: a step it doesn't have raises LaunchStateError itself."""
        if self.state is None:
            raise LaunchStateError(step, have="plain (no SNP guest)", need="New or Started")
        return self.state

    def _update_step(
        self, state: Started, step: PageRange, retry_cpuid: bool
    ) -> Iterator[RecordBatch]:
        vcpu = self.plan.vcpu_at(step)
        for pages in self._launch_step(state, step, retry_cpuid):
            # All that the kernel took is recorded before anyone looks at it.
            batches = list(self._predictor.batches(step, pages.start, len(pages), vcpu))
            for batch in batches:
                self.records += batch.records
            yield from batches

    def _launch_step(self, state: Started, step: PageRange, retry_cpuid: bool) -> Iterator[range]:
        """Launch a range; yields the pages done by each call."""
        index = 0
        with HostMemory(self.platform, _CHUNK_PAGES * PAGE_SIZE) as staging:
            while index < step.npages:
                count = min(_CHUNK_PAGES, step.npages - index)
                address = self._source(step, index, count, staging)
                for done in self._send(state, step, index, address, count, retry_cpuid):
                    index += done
                    yield range(index - done, index)

    def _send(
        self,
        state: Started,
        step: PageRange,
        first: int,
        address: int,
        count: int,
        retry_cpuid: bool,
    ) -> Iterator[int]:
        """Launch ``count`` pages from page ``first``; yields the number done by each call."""

        def what(gpa: int) -> str:
            index = (gpa - step.gpa) // PAGE_SIZE
            return f"page {index} of {step.label} ({step.origin_of(index)})"

        gpa, size = step.gpa + first * PAGE_SIZE, count * PAGE_SIZE
        kind = self._proposal.page_type_vmsa if step.type is PageType.VMSA else int(step.type)
        sent, corrected = 0, -1
        while sent < size:
            source = address + sent if address else 0
            try:
                for done in state.update_all(gpa + sent, kind, source, size - sent, what=what):
                    sent += done
                    yield done // PAGE_SIZE
            except CpuidRejected as error:
                if not retry_cpuid or corrected == sent:
                    raise
                # The source page holds the firmware's correction now.
                self.corrections.append(error)
                corrected = sent

    def _source(self, step: PageRange, index: int, count: int, staging: HostMemory) -> int:
        """Address of the source of ``count`` pages: the mapped file, or the staging memory."""
        if step.type is PageType.ZERO:
            return 0
        direct = step.span(index, count)
        if direct is not None:
            address = address_of(ffi.from_buffer(direct))
            if address % PAGE_SIZE == 0:
                return address
        pages: Iterable[Buffer] = step.runs(index, count)
        if step.type is PageType.CPUID:
            pages = [snp_cpuid_page(self._bsp_cpuid)] * count
        at = 0
        for data in pages:
            staging.view[at : at + len(data)] = data
            at += len(data)
        return staging.address

    def witness(self) -> WitnessReport:
        """Hold the prediction against what the host's firmware measured, page by page."""
        host = self.platform.measured_pages(self.vm.fd)
        if host is None:
            return WitnessReport(None, len(self.records), None)
        for seq in range(max(len(host), len(self.records))):
            predicted = self.records[seq] if seq < len(self.records) else None
            measured = host[seq] if seq < len(host) else None
            if predicted and measured:
                ours = (predicted.type, predicted.gpa, predicted.contents, predicted.digest)
                if ours == tuple(measured):
                    continue
            text = None
            if measured:
                text = (
                    f"{measured.gpa:#x} type {measured.type} contents "
                    f"{measured.contents.hex()[:16]} digest {measured.digest.hex()[:16]}"
                )
            return WitnessReport(False, len(self.records), Witness(seq, predicted, text))
        return WitnessReport(True, len(self.records), None)

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """Make guest memory private or shared, and free the side that is left.

        Raises FormatError outside the guest's memory or for parts of pages, and IoctlError.
        """
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise FormatError(f"{size:#x} bytes at GPA {gpa:#x}: not whole pages")
        backing = self._backing_of(gpa, size)
        self.vm.set_memory_attributes(gpa, size, private=private)
        offset = gpa - backing.region.gpa
        if private:
            backing.memory.discard(offset, size)
        elif backing.memfd is not None:
            backing.memfd.punch_hole(offset, size)

    @property
    def inspector(self) -> Inspector | None:
        """What looks inside the guest without system calls; on a simulated host only."""
        return self.platform.inspector(self.vm.fd)

    def registers(self, vcpu: int = 0) -> dict[str, int] | None:
        """Registers of a vCPU that isn't running (names: :mod:`kvmlaunch.abi.registers`).

        None where they can't be read: on a real host those of a protected guest. Raises IoctlError.
        """
        inspector = self.inspector
        if inspector is not None:
            found = inspector.registers(vcpu)
            return None if found is None else dict(found)
        return None if self.state is not None else read_registers(self.vcpus[vcpu])

    def close(self) -> None:
        """Close every descriptor and unmap all memory; nothing happens the second time."""
        self._stack.close()

    def __enter__(self) -> Guest:
        if self.vm.closed:
            raise ClosedError("guest")
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_launchable(plan: LaunchPlan) -> None:
    if any(plan.start_digest):
        raise FormatError(
            "a plan that goes on from a digest lacks what gave it: it can't be launched"
        )
    if plan.confidential and not plan.sev_features & SNP_ACTIVE:
        raise FormatError(lacks_snp_active(plan.sev_features))


def _state_text(state: VcpuState) -> str:
    vmsa, ghcb = ("none" if gpa is None else f"GPA {gpa:#x}" for gpa in state)
    return f"VMSA {vmsa} and GHCB {ghcb}"
