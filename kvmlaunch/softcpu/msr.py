"""MSRs that the processor answers without the hypervisor.

For an SNP guest these are the ones that KVM doesn't intercept, all others are #VC; a plain
guest's others go to its owner. FS, GS and kernel GS base, STAR, LSTAR, CSTAR and SFMASK only
get here if the owner has an eye on MSRs: otherwise the engine has them.

Sources: Linux svm.c, direct_access_msrs, and sev.c, sev_es_init_vmcb; AMD APM volume 2, 3.1.7
(EFER) and 15.34.10 (SEV_STATUS).
"""

from __future__ import annotations

from kvmlaunch.abi.vmsa import Vmsa

from .core import Core
from .engine import FS, GS
from .faults import GP, GuestFault

__all__ = ["GHCB", "SEV_STATUS", "NativeMsrs"]

GHCB, SEV_STATUS = 0xC0010130, 0xC0010131
_EFER, _PAT, _TSC = 0xC0000080, 0x277, 0x10
_PRED_CMD, _FLUSH_CMD = 0x49, 0x10B
_XSS, _DEBUGCTL = 0xDA0, 0x1D9

_STORED = {
    0x174: ("sysenter_cs", 0xFFFF),
    0x175: ("sysenter_esp", (1 << 64) - 1),
    0x176: ("sysenter_eip", (1 << 64) - 1),
    0xC0000103: ("tsc_aux", 0xFFFFFFFF),
    0x48: ("spec_ctrl", 0xFFFF),
}
_ENGINES = {
    0xC0000081: "star",
    0xC0000082: "lstar",
    0xC0000083: "cstar",
    0xC0000084: "sfmask",
    0xC0000102: "kernel_gs_base",
}
_BASES = {0xC0000100: FS, 0xC0000101: GS}
_SCE, _LME, _LMA, _NXE, _SVME = 1 << 0, 1 << 8, 1 << 10, 1 << 11, 1 << 12
# SCE LME LMA NXE SVME LMSLE FFXSR TCE MCOMMIT INTWB UAIE AIBRSE.
EFER_KNOWN = 0x37FD01 & ~0x10000
_PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))
_CANONICAL = (0x175, 0x176, *_BASES, 0xC0000082, 0xC0000083, 0xC0000102)


class NativeMsrs:
    """The MSRs of one CPU that are neither the engine's nor the hypervisor's."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.ghcb = 0
        self.xss = 0
        self.debugctl = 0
        self.branches = [0, 0, 0, 0]
        """BR_FROM, BR_TO, LAST_EXCP_FROM, LAST_EXCP_TO."""
        self.sev_features = 0

    def load(self, vmsa: Vmsa) -> None:
        """Take the MSRs of a VMSA; the GHCB MSR isn't in there."""
        self.ghcb = 0
        self.xss, self.debugctl = vmsa.xss, vmsa.dbgctl
        self.branches = [vmsa.br_from, vmsa.br_to, vmsa.last_excp_from, vmsa.last_excp_to]
        self.sev_features = vmsa.sev_features

    def save(self, vmsa: Vmsa) -> Vmsa:
        """Return the VMSA with these MSRs."""
        return vmsa.replace(xss=self.xss, dbgctl=self.debugctl)

    def read(self, index: int, tsc: int) -> int | None:
        """Return the value, or None for an MSR that the hypervisor has to answer."""
        state, snp = self._core.state, self._core.options.snp
        if index in _STORED:
            return state.get(_STORED[index][0])
        if index in _ENGINES:
            return state.get(_ENGINES[index])
        if index in _BASES:
            return state.base(_BASES[index])
        if index == _EFER:
            return state.efer
        if index == _PAT:
            return state.get("g_pat")
        if index == _TSC and not snp:
            return tsc
        if not snp:
            return None
        if index == GHCB:
            return self.ghcb
        if index == SEV_STATUS:
            return 3 | self.sev_features << 2
        if index == _XSS:
            return self.xss
        if index == _DEBUGCTL:
            return self.debugctl
        if 0x1DB <= index <= 0x1DE:
            return self.branches[index - 0x1DB]
        if index in (_PRED_CMD, _FLUSH_CMD):
            raise GuestFault(GP, 0)
        return None

    def write(self, index: int, value: int) -> bool:
        """Write, or return False for an MSR that is the hypervisor's.

        Raises:
            GuestFault: #GP.
        """
        state, snp = self._core.state, self._core.options.snp
        if index in _CANONICAL and value + (1 << 47) & 0xFFFF000000000000:
            raise GuestFault(GP, 0)
        if index in _STORED:
            name, mask = _STORED[index]
            state.put(name, value & mask)
        elif index in _ENGINES:
            state.put(_ENGINES[index], value)
        elif index in _BASES:
            segment = _BASES[index]
            rights = state.selector(segment), state.attrib(segment), state.limit(segment)
            state.set_segment(segment, *rights, value)
        elif index == _EFER:
            self._write_efer(value)
        elif index == _PAT:
            if any(part & 0xFF not in _PAT_TYPES for part in value.to_bytes(8, "little")):
                raise GuestFault(GP, 0)
            state.put("g_pat", value)
        elif index in (_PRED_CMD, _FLUSH_CMD):
            if value & ~1:
                raise GuestFault(GP, 0)
        elif not snp:
            return False
        elif index == GHCB:
            self.ghcb = value
        elif index == _DEBUGCTL:
            self.debugctl = value & 0x3F
        elif index == _XSS:
            if value:  # no supervisor state components
                raise GuestFault(GP, 0)
        elif index == SEV_STATUS or 0x1DB <= index <= 0x1DE:
            raise GuestFault(GP, 0)
        else:
            return False
        return True

    def _write_efer(self, value: int) -> None:
        state = self._core.state
        old = state.efer
        paging = state.cr[0] >> 31 & 1
        if value & ~EFER_KNOWN or (paging and (old ^ value) & _LME):
            raise GuestFault(GP, 0)
        # LMA follows from LME and paging. Without SVME an SNP guest could not be entered again.
        value = value & ~_LMA | old & _LMA
        if self._core.options.snp:
            value |= old & _SVME
        state.set_efer(value)
        if (old ^ value) & _NXE:
            self._core.engine.flush_tlb()
