"""A VM on the way to its launch, driven at the ioctl line: every field of every command."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any, TypeVar

from kvmlaunch.abi.digest import LaunchDigest
from kvmlaunch.abi.idblock import IdAuth, IdBlock
from kvmlaunch.abi.kvm_sync import synced
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.policy import DEFAULT_POLICY
from kvmlaunch.abi.reset import kvm_untouched
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images.plan import SYNC_VMSA_GPA
from kvmlaunch.kvm import GuestMemfd, HostMemory, Vcpu
from kvmlaunch.selftest.answer import Answer, issue
from kvmlaunch.selftest.case import Case, Unprepared
from kvmlaunch.selftest.idblock import id_auth, id_block
from kvmlaunch.uapi import MeasuredPage, address_of, ffi, lib, peek

__all__ = ["GPA", "UNMAPPED", "LaunchVm", "described", "must", "read_only"]

GPA = 0x100000
"""Where the memory of a `LaunchVm` begins; not at its start, so that GPA and offset differ."""

UNMAPPED = 0x1000
"""An address of this process where nothing is mapped (mmap_min_addr is above)."""

_Self = TypeVar("_Self", bound="LaunchVm")


class LaunchVm:
    """One VM of a running case, closed with it. Commands return an Answer and raise nothing.

    Attributes: ``vm``, ``vcpus``, ``memfd`` (of slot 0), ``source`` (a page of host memory for
    each page of slot 0, filled with its number from 1 up) and ``pages`` (what has been measured,
    as predicted).
    """

    def __init__(self, case: Case, *, vm_type: int = lib.KVM_X86_SNP_VM) -> None:
        self._case = case
        self.host = case.host
        self._enter = case.stack.enter_context
        self.vm = self._enter(self.host.kvm.create_vm(vm_type))
        self.vcpus: list[Vcpu] = []
        self.memfd: GuestMemfd | None = None
        self.pages: list[MeasuredPage] = []
        self._digest = LaunchDigest()
        self._features = 0
        self._slots = 0

    # Steps to get somewhere. Those that are checked elsewhere must succeed here.

    @classmethod
    def ready(
        cls: type[_Self], case: Case, *, pages: int = 4, vcpus: int = 0, features: int = 0
    ) -> _Self:
        """An initialised SNP VM with ``pages`` private pages at GPA, and vCPUs."""
        vm = cls(case)
        must(vm.init2(vmsa_features=features))
        if pages:
            vm.add_memory(pages)
        for vcpu in range(vcpus):
            vm.add_vcpu(vcpu)
        return vm

    @classmethod
    def started(
        cls: type[_Self], case: Case, *, pages: int = 4, vcpus: int = 0, features: int = 0
    ) -> _Self:
        """The same after SNP_LAUNCH_START."""
        vm = cls.ready(case, pages=pages, vcpus=vcpus, features=features)
        must(vm.start())
        return vm

    def add_memory(self, pages: int, gpa: int = GPA) -> None:
        """A slot with a guest_memfd, all private."""
        size = pages * PAGE_SIZE
        memory = self._enter(HostMemory(self.host.platform, size))
        memfd = self._enter(self.vm.create_guest_memfd(size))
        self.vm.set_user_memory_region2(self._slots, gpa, size, memory.address, memfd=memfd)
        self.vm.set_memory_attributes(gpa, size, private=True)
        if not self._slots:
            self.memfd = memfd
            self.source = self._enter(HostMemory(self.host.platform, size))
            view = self.source.view
            for page in range(pages):
                view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([page + 1]) * PAGE_SIZE
        self._slots += 1

    def add_shared_memory(self, pages: int, gpa: int) -> None:
        """A slot without guest_memfd."""
        memory = self._enter(HostMemory(self.host.platform, pages * PAGE_SIZE))
        self.vm.set_user_memory_region(self._slots, gpa, memory.size, memory.address)
        self._slots += 1

    def add_vcpu(self, vcpu_id: int) -> Vcpu:
        """A vCPU that nobody has touched."""
        vcpu = self._enter(self.vm.create_vcpu(vcpu_id))
        self.vcpus.append(vcpu)
        return vcpu

    # Commands.

    def command(
        self, name: str, struct: str, fields: dict[str, Any], sev_fd: int | None, note: str = ""
    ) -> Answer:
        """A command by its name without KVM_SEV_; ``at`` among the fields is the address that
        is passed instead of that of a struct.
        """
        at = fields.pop("at", None)
        data = ffi.new(f"struct {struct} *", fields)
        return issue(
            self.vm,
            f"{name}{note}",
            getattr(lib, f"KVM_SEV_{name}"),
            address_of(data) if at is None else at,
            self.host.sev.fd if sev_fd is None else sev_fd,
            data,
        )

    def init2(self, **fields: Any) -> Answer:
        """KVM_SEV_INIT2; fields are those of struct kvm_sev_init."""
        answer = self.command("INIT2", "kvm_sev_init", dict(fields), None, described(fields))
        if answer.ok:
            self._features = fields.get("vmsa_features", 0) | 1
        return answer

    def start(self, *, sev_fd: int | None = None, **fields: Any) -> Answer:
        """KVM_SEV_SNP_LAUNCH_START with policy 0x30000 unless told otherwise."""
        given = {"policy": DEFAULT_POLICY, **fields}
        return self.command(
            "SNP_LAUNCH_START", "kvm_sev_snp_launch_start", given, sev_fd, described(fields)
        )

    def update(
        self,
        page: int = 0,
        npages: int = 1,
        *,
        type: int = PageType.NORMAL,
        sev_fd: int | None = None,
        note: str = "",
        **fields: Any,
    ) -> Answer:
        """KVM_SEV_SNP_LAUNCH_UPDATE of pages of slot 0; a CPUID page's source is filled in."""
        asked = fields
        if "uaddr" not in fields:
            if type == PageType.CPUID:
                self.fill(page, self.host.cpuid_page)
            fields = {**fields, "uaddr": self.source.address + page * PAGE_SIZE}
        given = {
            "gfn_start": GPA // PAGE_SIZE + page,
            "len": npages * PAGE_SIZE,
            "type": type,
            **fields,
        }
        source = given["uaddr"]
        note = described({"type": type, **asked}) + note
        answer = self.command("SNP_LAUNCH_UPDATE", "kvm_sev_snp_launch_update", given, sev_fd, note)
        if answer.ok and "at" not in fields:
            kind = PageType.VMSA if type == self.host.proposal.page_type_vmsa else type
            self._measure(kind, given["gfn_start"], source, (given["len"] - answer.data.len))
        return answer

    def finish(self, *, sev_fd: int | None = None, **fields: Any) -> Answer:
        """KVM_SEV_SNP_LAUNCH_FINISH."""
        return self.command(
            "SNP_LAUNCH_FINISH",
            "kvm_sev_snp_launch_finish",
            dict(fields),
            sev_fd,
            described(fields),
        )

    def fill(self, page: int, data: bytes) -> None:
        """Put these 4096 bytes into a source page."""
        self.source.view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = data

    # Prediction.

    @property
    def digest(self) -> bytes:
        """The predicted launch digest of what UPDATE took so far, 48 bytes."""
        return self._digest.value

    def _measure(self, kind: int, gfn: int, source: int, size: int) -> None:
        for offset in range(0, size, PAGE_SIZE):
            data = None
            if PageType(kind).measures_contents:
                try:
                    data = peek(source + offset, PAGE_SIZE)
                except OSError:
                    return  # the kernel took what it can't have read: the case will say so
            self._add(kind, gfn * PAGE_SIZE + offset, data)

    def _add(self, kind: int, gpa: int, data: bytes | None) -> None:
        contents = self._digest.update(kind, gpa, data)
        self.pages.append(MeasuredPage(int(kind), gpa, contents, self._digest.value))

    def check_measured(self) -> None:
        """Firmware measured what was predicted, where the host can be asked."""
        measured = self.host.measured(self.vm.fd)
        if measured is None:
            return
        for seq in range(max(len(measured), len(self.pages))):
            got = measured[seq] if seq < len(measured) else None
            expected = self.pages[seq] if seq < len(self.pages) else None
            self._case.equal(f"page {seq} as measured", _page(got), _page(expected))
        if measured:
            self._case.equal("launch digest", measured[-1].digest, self.digest)

    def confirm(self) -> None:
        """FINISH under an ID block with the predicted digest: firmware confirms it."""
        self._case.taken(self.finish_expecting(self.digest))
        self.check_measured()

    def finish_expecting(self, digest: bytes) -> Answer:
        """FINISH under an ID block with this digest."""
        block = id_block(digest)
        return self.finish_with(block, id_auth(block))

    def finish_with(self, block: IdBlock, auth: IdAuth, **fields: int) -> Answer:
        """FINISH with an ID block."""
        parts = ffi.from_buffer(block.encode()), ffi.from_buffer(auth.encode())
        block_at, auth_at = map(address_of, parts)
        given = {"id_block_en": 1, "id_block_uaddr": block_at, "id_auth_uaddr": auth_at, **fields}
        return self.finish(**given)

    def expect_vmsas(self, states: Sequence[Vmsa] | None = None) -> bytes:
        """Add the VMSAs that KVM makes at FINISH; the predicted digest then.

        ``states``: those of the vCPUs in creation order, by default untouched ones.
        """
        features = self._features
        if states is None:
            states = [kvm_untouched(sev_features=features)] * len(self.vcpus)
        for state in states:
            page = synced(state, sev_features=features).encode()
            self._add(PageType.VMSA, SYNC_VMSA_GPA, page)
        return self.digest


def read_only(case: Case, data: bytes) -> int:
    """Address of a page of this process that can only be read and begins with ``data``."""
    fd = os.memfd_create("kvmlaunch-selftest")
    try:
        os.write(fd, data.ljust(PAGE_SIZE, b"\0"))
        page = case.stack.enter_context(mmap.mmap(fd, PAGE_SIZE, prot=mmap.PROT_READ))
    finally:
        os.close(fd)
    return address_of(case.stack.enter_context(ffi.from_buffer(page)))


def must(answer: Answer) -> None:
    """A step before what is checked. Raises Unprepared if it failed."""
    if not answer.ok:
        raise Unprepared(f"{answer.what}: {answer}, which should have led to what is checked")


def _page(page: MeasuredPage | None) -> str:
    if page is None:
        return "no page"
    return f"type {page.type} at {page.gpa:#x} contents {page.contents.hex()[:16]}"


def described(fields: dict[str, Any]) -> str:
    """The fields of a command, for its name in a sentence."""
    shown = [
        f"{name}={_value(value)}"
        for name, value in fields.items()
        # Where things lie in this process tells nothing, unless they lie nowhere.
        if name != "at" and not (name.endswith("uaddr") and value > UNMAPPED)
    ]
    return f" with {' '.join(shown)}" if shown else ""


def _value(value: Any) -> str:
    if isinstance(value, PageType):
        return value.name
    if isinstance(value, bytes):
        return value.hex()
    return f"{value:#x}" if isinstance(value, int) else str(value)
