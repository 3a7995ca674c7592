"""VMSA to registers and back, and the states that VMRUN refuses.

Sources: AMD APM volume 2, 15.5.1 (canonicalization and consistency checks), 15.36.
"""

from __future__ import annotations

from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import SEV_FEATURES, Vmsa

from .control import CR4_SUPPORTED
from .engine import GPR_NAMES, SEGMENT_NAMES, TR, WORD_NAMES, EngineState
from .msr import EFER_KNOWN
from .options import CpuOptions

__all__ = ["Loaded", "broken_rule", "load", "save"]

_PG, _PE, _NW, _CD = 1 << 31, 1, 1 << 29, 1 << 30
_LME, _LMA, _SVME = 1 << 8, 1 << 10, 1 << 12
_CR4_LATER = 0x00C01000  # LA57, PKE, CET
_PAE = 1 << 5
_KNOWN_FEATURES = 1 << SEV_FEATURES["snp_active"] | 1 << SEV_FEATURES["debug_swap"]
_FPU = (
    *("mxcsr", "x87_ftw", "x87_fsw", "x87_fcw", "x87_fop", "x87_cs", "x87_ds", "x87_rip"),
    *("x87_dp", "fpreg_x87", "fpreg_xmm"),
)

# The engine must find a TSS in TR whenever it looks; this one has no stacks (#TS).
_NO_TSS = Segment(0, 0x8B, 0, 0)


def broken_rule(vmsa: Vmsa, options: CpuOptions) -> str | None:
    """Return the first rule that the state breaks, so that VMRUN fails with VMEXIT_INVALID."""
    efer, cr0, cr4, cs = vmsa.efer, vmsa.cr0, vmsa.cr4, vmsa.cs.attrib
    paged_long = efer & _LME and cr0 & _PG
    rules = (
        (not efer & _SVME and options.snp, "EFER.SVME is 0"),
        (efer & ~EFER_KNOWN, "EFER has reserved bits"),
        (cr0 & _NW and not cr0 & _CD, "CR0.NW is 1 and CR0.CD is 0"),
        (cr0 >> 32, "CR0 has bits above 31"),
        (cr4 & _CR4_LATER, "CR4 has LA57, PKE or CET, which this CPU lacks"),
        (cr4 & ~CR4_SUPPORTED, "CR4 has reserved bits"),
        (vmsa.cr3 >> 52, "CR3 has bits above 51"),
        (vmsa.dr6 >> 32, "DR6 has bits above 31"),
        (vmsa.dr7 >> 32, "DR7 has bits above 31"),
        (cr0 & _PG and not cr0 & _PE, "CR0.PG is 1 and CR0.PE is 0"),
        (paged_long and not cr4 & _PAE, "long mode without CR4.PAE"),
        (paged_long and not cr0 & _PE, "long mode without CR0.PE"),
        (paged_long and cs & 0x600 == 0x600, "CS.L and CS.D are both 1"),
        (vmsa.rflags & 1 << 17 and paged_long, "RFLAGS.VM in long mode"),
        (vmsa.vmpl > 3, "VMPL above 3"),
        (vmsa.cpl > 3, "CPL above 3"),
        (vmsa.cpl and not cr0 & _PE, "CPL isn't 0 in real mode"),
        (options.snp and not vmsa.sev_features & 1, "SEV_FEATURES lacks SNPActive"),
        (
            options.snp and vmsa.sev_features & ~_KNOWN_FEATURES,
            "SEV_FEATURES has features that this CPU lacks",
        ),
    )
    return next((text for broken, text in rules if broken), None)


class Loaded:
    """The VMSA that a state came from: what the engine doesn't know is kept there."""

    def __init__(self, vmsa: Vmsa) -> None:
        self.vmsa = vmsa
        self.tr_replaced = not _is_tss(vmsa.tr)


def _is_tss(tr: Segment) -> bool:
    return bool(tr.attrib & 0x80) and tr.attrib & 0x17 in (1, 3)


def _put_segment(state: EngineState, number: int, value: Segment) -> None:
    state.set_segment(number, value.selector, value.attrib, value.limit, value.base)


def load(state: EngineState, vmsa: Vmsa) -> Loaded:
    """Load a state that breaks no rule."""
    loaded = Loaded(vmsa)
    state.set_efer(vmsa.efer & ~_LMA)
    state.set_cr4(vmsa.cr4)
    state.set_cr0(vmsa.cr0 & ~_PG)
    state.set_cr0(vmsa.cr0)
    state.cr[2], state.cr[3] = vmsa.cr2, vmsa.cr3
    state.rflags = vmsa.rflags & 0x3F7FD7 & ~0x28
    for number, name in enumerate(SEGMENT_NAMES):
        _put_segment(state, number, getattr(vmsa, name))
    if loaded.tr_replaced:
        _put_segment(state, TR, _NO_TSS)
    state.cpl = vmsa.cpl
    state.rip = vmsa.rip
    for number, name in enumerate(GPR_NAMES):
        state.gpr[number] = getattr(vmsa, name)
    for name in WORD_NAMES:
        state.put(name, getattr(vmsa, name))
    for number in range(4):
        state.dr[number] = getattr(vmsa, f"dr{number}")
    # Hardware breakpoints have no effect; the engine must not see them.
    state.dr[6], state.dr[7] = vmsa.dr6, vmsa.dr7
    state.put_fpu({name: getattr(vmsa, name) for name in _FPU})
    state.shadow = False
    state.catch_iret = False
    return loaded


def save(state: EngineState, loaded: Loaded) -> Vmsa:
    """Return the VMSA of the present state."""
    changes: dict[str, object] = {
        name: state.segment(number) for number, name in enumerate(SEGMENT_NAMES)
    }
    if loaded.tr_replaced and state.segment(TR) == _NO_TSS:
        changes["tr"] = loaded.vmsa.tr
    changes.update((name, state.gpr[number]) for number, name in enumerate(GPR_NAMES))
    changes.update((name, state.get(name)) for name in WORD_NAMES)
    changes.update((f"dr{number}", state.dr[number]) for number in (0, 1, 2, 3, 6, 7))
    changes.update(state.get_fpu())
    return loaded.vmsa.replace(
        **changes,
        cr0=state.cr[0],
        cr2=state.cr[2],
        cr3=state.cr[3],
        cr4=state.cr[4],
        efer=state.efer,
        rflags=state.rflags,
        rip=state.rip,
        cpl=state.cpl,
    )
