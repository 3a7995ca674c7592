"""Guest messages through the GHCB: between the event and the secure processor (sev.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlaunch.sim import exits
from kvmlaunch.sim.ghcb import Ghcb
from kvmlaunch.sim.guest_request import CertificatesWanted, GuestRequests, Reply

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["extended_request", "request"]


def request(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """snp_handle_guest_req()."""
    return _answer(ghcb, _requests(vcpu).handle(vcpu.vm.memory, ghcb.info_1, ghcb.info_2))


def extended_request(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """snp_handle_ext_guest_req(): from 7.0 on, user space may add certificates first."""
    requests, memory = _requests(vcpu), vcpu.vm.memory
    found = requests.handle_extended(
        memory, ghcb.info_1, ghcb.info_2, rax=ghcb.register("rax"), rbx=ghcb.register("rbx")
    )
    if not isinstance(found, CertificatesWanted):
        return _answer(ghcb, found)
    exits.req_certs(vcpu.run, found.gpa, found.npages)

    def complete() -> int:
        ret, npages = exits.req_certs_answer(vcpu.run)
        return _answer(
            ghcb,
            requests.finish_extended(memory, ghcb.info_1, ghcb.info_2, ret=ret, npages=npages),
        )

    vcpu.running.complete = complete
    return 0


def _requests(vcpu: Vcpu) -> GuestRequests:
    found = vcpu.vm.sev.requests
    assert found is not None  # made by INIT2, without which nothing runs
    return found


def _answer(ghcb: Ghcb, reply: Reply) -> int:
    ghcb.put("exit_info_1", reply.exit_info_1)
    ghcb.put("exit_info_2", reply.exit_info_2)
    if reply.rbx is not None:
        ghcb.registers["rbx"] = reply.rbx
    return 1
