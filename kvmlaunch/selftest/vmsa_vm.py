"""A LaunchVm with what the proposals for VMSAs from user space add."""

from __future__ import annotations

from typing import Any

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.selftest.answer import Answer, issue
from kvmlaunch.selftest.case import Case
from kvmlaunch.selftest.vm import GPA, LaunchVm, described, must
from kvmlaunch.uapi import address_of, ffi, lib

__all__ = ["VmsaVm", "a_vmsa"]

_VMSA_VALID = lib.KVM_SEV_SNP_VCPU_STATE_VMSA_VALID
_GHCB_VALID = lib.KVM_SEV_SNP_VCPU_STATE_GHCB_VALID


def a_vmsa(**fields: Any) -> bytes:
    """A VMSA page in 32-bit mode without paging, flat segments; ``fields`` replace some."""
    data = Segment(0x10, 0xC93, 0xFFFF_FFFF, 0)
    values = {
        **dict.fromkeys(("es", "ss", "ds", "fs", "gs"), data),
        "cs": Segment(0x8, 0xC9B, 0xFFFF_FFFF, 0),
        "tr": Segment(0x18, 0x8B, 0x67, 0),
        "ldtr": Segment(0, 0x82, 0xFFFF, 0),
        "efer": 0x1000,  # SVME
        "cr0": 0x11,
        "cr4": 0x40,
        "dr6": 0xFFFF_0FF0,
        "dr7": 0x400,
        "rflags": 2,
        "rip": GPA,
        "g_pat": 0x0007_0406_0007_0406,
        "xcr0": 1,
        "mxcsr": 0x1F80,
        "x87_fcw": 0x37F,
        "sev_features": 1,
    }
    return Vmsa(**{**values, **fields}).encode()


class VmsaVm(LaunchVm):
    """The same, with KVM_CAP_SNP_DIRECT_VMSA, VMSA pages, and commands on vCPUs."""

    @classmethod
    def with_pages(cls, case: Case, *, vcpus: int = 0, pages: int = 4) -> VmsaVm:
        """A started VM whose VMSAs come from user space, by whichever proposal the host has.

        Raises Skip where it has none.
        """
        case.needs("page", "direct")
        vm = cls.ready(case, pages=pages)
        if case.host.vmsa_mode == "direct":
            must(vm.enable())
        for vcpu in range(vcpus):
            vm.add_vcpu(vcpu)
        must(vm.start())
        return vm

    @classmethod
    def direct(cls, case: Case, *, vcpus: int = 1, pages: int = 4, start: bool = True) -> VmsaVm:
        """A VM of proposal v2 with the capability. Raises Skip where the host hasn't."""
        case.needs("direct")
        vm = cls.ready(case, pages=pages)
        must(vm.enable())
        for vcpu in range(vcpus):
            vm.add_vcpu(vcpu)
        if start:
            must(vm.start())
        return vm

    @property
    def vmsa_type(self) -> int:
        """The page type of VMSAs."""
        return self.host.proposal.page_type_vmsa

    def enable(self, *args: int, flags: int = 0) -> Answer:
        """KVM_ENABLE_CAP of KVM_CAP_SNP_DIRECT_VMSA."""
        values = {"cap": self.host.proposal.direct_vmsa, "flags": flags, "args": list(args)}
        request = ffi.new("struct kvm_enable_cap *", values)
        result = self.vm.ioctl_raw("KVM_ENABLE_CAP", request)
        what = f"KVM_ENABLE_CAP KVM_CAP_SNP_DIRECT_VMSA with args={list(args)} flags={flags:#x}"
        return Answer(what, result.errno if result.ret < 0 else 0)

    def update_vmsa(
        self, page: int, data: bytes | None = None, *, note: str = "", **fields: Any
    ) -> Answer:
        """KVM_SEV_SNP_LAUNCH_UPDATE of a VMSA page with these contents."""
        self.fill(page, a_vmsa() if data is None else data)
        return self.update(page, type=self.vmsa_type, note=note, **fields)

    def set_state(self, vcpu: int = 0, **fields: Any) -> Answer:
        """KVM_SEV_SNP_SET_VCPU_STATE."""
        return self._state("SET", vcpu, fields)

    def bind(self, page: int, vcpu: int = 0, **fields: Any) -> Answer:
        """The same with the GPA of a page of slot 0, valid, and no GHCB."""
        given = {"valid_fields": _VMSA_VALID, "vmsa_gpa": GPA + page * PAGE_SIZE, **fields}
        return self.set_state(vcpu, **given)

    def get_state(self, vcpu: int = 0, **fields: Any) -> Answer:
        """KVM_SEV_SNP_GET_VCPU_STATE; ``data`` holds the state."""
        return self._state("GET", vcpu, fields)

    def check_state(self, vcpu: int, *, vmsa: int | None, ghcb: int | None) -> None:
        """GET tells these GPAs, None for those that aren't valid."""
        state = self.check_vmsa(vcpu, vmsa)
        got = int(state.ghcb_gpa) if state.valid_fields & _GHCB_VALID else None
        self._case.equal("GPA of the GHCB by GET_VCPU_STATE", got, ghcb)

    def check_vmsa(self, vcpu: int, gpa: int | None) -> Any:
        """GET tells this GPA of a VMSA, None for no VMSA; the whole state."""
        answer = self.get_state(vcpu)
        self._case.taken(answer)
        state = answer.data
        got = int(state.vmsa_gpa) if state.valid_fields & _VMSA_VALID else None
        self._case.equal("GPA of the VMSA by GET_VCPU_STATE", got, gpa)
        return state

    def _state(self, verb: str, vcpu: int, fields: dict[str, Any]) -> Answer:
        given = dict(fields)
        at = given.pop("at", None)
        data = ffi.new("struct kvm_sev_snp_vcpu_state *", given)
        return issue(
            self.vcpus[vcpu],
            f"SNP_{verb}_VCPU_STATE{described(given)}",
            getattr(self.host.proposal, f"{verb.lower()}_vcpu_state"),
            address_of(data) if at is None else at,
            self.host.sev.fd,
            data,
        )
