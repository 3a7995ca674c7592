"""VMGEXIT: the GHCB MSR protocol and the events of the GHCB page (sev.c: sev_handle_vmgexit)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmlaunch.abi.ghcb import GhcbError, GhcbExit, MsrRequest, PageOperation, ioio_size
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim import (
    ap_creation,
    apic_id_list,
    exits,
    ghcb_io,
    ghcb_requests,
    intercepts,
    psc,
)
from kvmlaunch.sim.ghcb import Ghcb, refused
from kvmlaunch.sim.profiles import KernelProfile
from kvmlaunch.sim.sev_es import Hold, SevEsState
from kvmlaunch.sim.uaccess import refuse
from kvmlaunch.uapi import lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["HV_FEATURES", "HV_FEATURE_APIC_ID_LIST", "HV_FEATURE_MULTI_VMPL", "handle"]

HV_FEATURES = 0x3
"""GHCB_HV_FT_SUPPORTED: SNP and AP creation."""
HV_FEATURE_APIC_ID_LIST = 1 << 4
"""What a host with the event of that name has besides."""
HV_FEATURE_MULTI_VMPL = 1 << 5
"""What a host with several VMPLs has besides."""

_INFO = 0xFFF
_NO_PREFERRED_GFN = (1 << 52) - 1
_PSC_ERROR = 1 << 63  # GHCB_MSR_PSC_RESP_ERROR
_RUN_VMPL_ERROR = 1 << 32
_GET_TABLE, _SET_TABLE = 1, 0


def handle(vcpu: Vcpu, value: int) -> int:
    """One VMGEXIT with this value of the GHCB MSR."""
    if value & _INFO:
        return _msr_protocol(vcpu, _state(vcpu), value)
    if not value:
        return 1
    try:
        ghcb = Ghcb(vcpu.vm.memory, value)
    except OSError:
        return 1  # there is nowhere to put an error code
    state = _state(vcpu)
    state.ghcb = ghcb
    if ghcb.xcr0 is not None:
        vcpu.state.xcr0 = ghcb.xcr0
    if state.registered_gpa != value:
        refuse(errno.EINVAL)
    error = refused(ghcb, _lacking(vcpu.vm.host.profile))
    if error is not None:
        return ghcb.refuse(error)
    ghcb.put("exit_info_1", 0)
    ghcb.put("exit_info_2", 0)
    event = _EVENTS.get(ghcb.exit_code)
    return intercepts.handle(vcpu, ghcb) if event is None else event(vcpu, ghcb)


def _lacking(profile: KernelProfile) -> set[GhcbExit]:
    """Events that only other kernels have."""
    lacking = set()
    if not profile.apic_id_list:
        lacking.add(GhcbExit.APIC_ID_LIST)
    if profile.vmpls == 1:
        lacking.add(GhcbExit.RUN_VMPL)
    return lacking


def _state(vcpu: Vcpu) -> SevEsState:
    assert vcpu.sev_es is not None
    return vcpu.sev_es


# The MSR protocol


def _msr_protocol(vcpu: Vcpu, state: SevEsState, value: int) -> int:
    """sev_handle_vmgexit_msr_protocol(): what isn't known leaves the MSR as it is."""
    request, data = value & _INFO, value >> 12
    if request == MsrRequest.SEV_INFO:
        state.set_msr(state.reset_msr)
    elif request == MsrRequest.CPUID:
        answers = intercepts.cpuid(vcpu, value >> 32, 0)
        register = value >> 30 & 3
        answer = value & 0xFFFFF000 | MsrRequest.CPUID + 1
        state.set_msr(answers[register] << 32 | answer)
    elif request == MsrRequest.AP_RESET_HOLD:
        state.hold = Hold.MSR
        done = vcpu.running.halt(lib.KVM_MP_STATE_AP_RESET_HOLD, lib.KVM_EXIT_AP_RESET_HOLD)
        state.set_msr(MsrRequest.AP_RESET_HOLD + 1)
        return done
    elif request == MsrRequest.HV_FEATURES:
        state.set_msr(_features(vcpu) << 12 | MsrRequest.HV_FEATURES + 1)
    elif request == MsrRequest.PREFERRED_GPA:
        state.set_msr(_NO_PREFERRED_GFN << 12 | MsrRequest.PREFERRED_GPA + 1)
    elif request == MsrRequest.REGISTER_GPA:
        state.registered_gpa = data * PAGE_SIZE
        state.set_msr(data << 12 | MsrRequest.REGISTER_GPA + 1)
    elif request == MsrRequest.PSC:
        return _psc_msr(vcpu, state, value)
    elif request == MsrRequest.RUN_VMPL and vcpu.vm.host.profile.vmpls > 1:
        state.set_msr(MsrRequest.RUN_VMPL + 1)
        if not state.run_vmpl(value >> 32 & 0xFF):
            state.set_msr(_RUN_VMPL_ERROR | MsrRequest.RUN_VMPL + 1)
    elif request == MsrRequest.TERMINATE:
        exits.sev_term(vcpu.run, value)
        return 0
    return 1


def _psc_msr(vcpu: Vcpu, state: SevEsState, value: int) -> int:
    """snp_begin_psc_msr(): one page, by user space."""
    gfn, operation = value >> 12 & (1 << 40) - 1, value >> 52 & 0xF
    answer = MsrRequest.PSC + 1
    possible = operation in (PageOperation.PRIVATE, PageOperation.SHARED)
    if not possible or not psc.is_exit_enabled(vcpu.vm):
        state.set_msr(_PSC_ERROR | answer)
        return 1
    attributes = lib.KVM_MAP_GPA_RANGE_PAGE_SZ_4K | psc.attribute(operation)
    clear = vcpu.vm.host.profile.hypercall_ret_cleared
    exits.hypercall(vcpu.run, (gfn * PAGE_SIZE, 1, attributes), flags=None, clear_ret=clear)

    def complete() -> int:
        state.set_msr(answer | (_PSC_ERROR if vcpu.run.hypercall.ret else 0))
        return 1

    vcpu.running.complete = complete
    return 0


# Events


def _ioio(vcpu: Vcpu, ghcb: Ghcb) -> int:
    return ghcb_io.port_io(vcpu, ghcb) if ioio_size(ghcb.info_1) else 1


def _nmi_complete(vcpu: Vcpu, ghcb: Ghcb) -> int:
    vcpu.nmi_masked = False
    return 1


def _ap_reset_hold(vcpu: Vcpu, ghcb: Ghcb) -> int:
    _state(vcpu).hold = Hold.EVENT
    return vcpu.running.halt(lib.KVM_MP_STATE_AP_RESET_HOLD, lib.KVM_EXIT_AP_RESET_HOLD)


def _ap_jump_table(vcpu: Vcpu, ghcb: Ghcb) -> int:
    sev = vcpu.vm.sev
    if ghcb.info_1 == _SET_TABLE:
        sev.ap_jump_table = ghcb.info_2
    elif ghcb.info_1 == _GET_TABLE:
        ghcb.put("exit_info_2", sev.ap_jump_table)
    else:
        ghcb.refuse(GhcbError.INVALID_INPUT)
    return 1


def _hv_features(vcpu: Vcpu, ghcb: Ghcb) -> int:
    ghcb.put("exit_info_2", _features(vcpu))
    return 1


def _features(vcpu: Vcpu) -> int:
    profile = vcpu.vm.host.profile
    features = HV_FEATURES
    if profile.apic_id_list:
        features |= HV_FEATURE_APIC_ID_LIST
    if profile.vmpls > 1:
        features |= HV_FEATURE_MULTI_VMPL
    return features


def _run_vmpl(vcpu: Vcpu, ghcb: Ghcb) -> int:
    if not _state(vcpu).run_vmpl(ghcb.info_1):
        ghcb.refuse(GhcbError.INVALID_INPUT)
    return 1


def _terminate(vcpu: Vcpu, ghcb: Ghcb) -> int:
    """The reason stays in the kernel's log: user space gets the MSR, which is the page's GPA."""
    exits.sev_term(vcpu.run, ghcb.gpa)
    return 0


def _unsupported(vcpu: Vcpu, ghcb: Ghcb) -> int:
    refuse(errno.EINVAL)


_EVENTS: Mapping[int, Callable[[Vcpu, Ghcb], int]] = MappingProxyType(
    {
        GhcbExit.MMIO_READ: ghcb_io.mmio_read,
        GhcbExit.MMIO_WRITE: ghcb_io.mmio_write,
        GhcbExit.NMI_COMPLETE: _nmi_complete,
        GhcbExit.AP_RESET_HOLD: _ap_reset_hold,
        GhcbExit.AP_JUMP_TABLE: _ap_jump_table,
        GhcbExit.HV_FEATURES: _hv_features,
        GhcbExit.TERMINATE: _terminate,
        GhcbExit.PSC: psc.begin,
        GhcbExit.AP_CREATION: ap_creation.create,
        GhcbExit.APIC_ID_LIST: apic_id_list.write,
        GhcbExit.GUEST_REQUEST: ghcb_requests.request,
        GhcbExit.EXT_GUEST_REQUEST: ghcb_requests.extended_request,
        GhcbExit.UNSUPPORTED: _unsupported,
        GhcbExit.RUN_VMPL: _run_vmpl,
        GhcbExit.IOIO: _ioio,
    }
)
