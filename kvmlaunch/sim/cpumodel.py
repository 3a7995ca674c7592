"""CPUs that can be simulated: identity, and CPUID as the bare CPU and as KVM answer it.

Values are in `cpuid_tables`; here is what KVM makes of them. KVM's own features are those of
6.12 with its usual options, as far as they matter to a launch, and kvm_amd.nested=0: guests of
guests are not simulated.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Callable, Iterator

from kvmlaunch.uapi._ext import lib

from .cpuid_tables import INDEXED, XSAVE_COMPONENTS, Registers, Table, flags, tables

__all__ = ["CPU_MODELS", "CpuModel", "Leaf", "cpu_model", "xsave_size"]

_SME = 0x8000001F
_XSAVE_HEADER_END = 0x240
_KVM_FEATURES = 0x01007EFB  # KVM_FEATURE_*, as QEMU and others see on a 6.x host
_KVM_SIGNATURE = struct.unpack("<3I", b"KVMKVMKVM\0\0\0")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One CPUID answer; `flags` as in `struct kvm_cpuid_entry2`."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int

    def __repr__(self) -> str:
        regs = " ".join(f"{n}={getattr(self, n):#x}" for n in ("eax", "ebx", "ecx", "edx"))
        return f"<Leaf {self.function:#x}.{self.index:#x} {regs}>"


def xsave_size(components: int, *, compacted: bool) -> int:
    """Return the size of an XSAVE area with these state components (bit mask)."""
    chosen = [place for n, place in XSAVE_COMPONENTS.items() if components >> n & 1]
    if compacted:
        return _XSAVE_HEADER_END + sum(size for size, _ in chosen)
    return max((size + offset for size, offset in chosen), default=_XSAVE_HEADER_END)


@dataclasses.dataclass(frozen=True)
class CpuModel:
    """A simulated CPU: 'Milan', 'Genoa' or 'Turin', family and model as CPUID combines them."""

    name: str
    family: int
    model: int
    stepping: int

    @property
    def signature(self) -> int:
        """EAX of leaf 1."""
        extended = self.family - 0xF
        high, low = self.model >> 4, self.model & 0xF
        return extended << 20 | high << 16 | 0xF << 8 | low << 4 | self.stepping

    @functools.cached_property
    def table(self) -> Table:
        """CPUID answers by (function, index)."""
        return tables(self.name, self.signature)

    @property
    def c_bit(self) -> int:
        """Bit of a page table entry that makes the page private."""
        return self.table[_SME, 0][1] & 0x3F

    @property
    def phys_bits_reduction(self) -> int:
        """Physical address bits lost to memory encryption."""
        return self.table[_SME, 0][1] >> 6 & 0x3F

    @property
    def max_snp_asid(self) -> int:
        """Highest ASID of SEV-ES and SNP guests, the lowest is 1; SEV guests have those above."""
        return self.table[_SME, 0][3] - 1

    @property
    def max_asid(self) -> int:
        """Highest ASID."""
        return self.table[_SME, 0][2]

    def hardware_cpuid(self, function: int, index: int = 0) -> Registers | None:
        """Return EAX, EBX, ECX, EDX as the bare CPU answers; None for a leaf it lacks.

        `index` counts for indexed leaves only. EBX of leaf 0xD is the size with everything
        enabled, see `xsave_size`.
        """
        if function not in INDEXED:
            return self.table.get((function, 0))
        found = self.table.get((function, index))
        if found is None and (function, 0) in self.table:
            # An index too high: no data, but leaf 0xB returns the index.
            return (0, 0, index & 0xFF if function == 0xB else 0, 0)
        return found

    def supported_cpuid(self) -> tuple[Leaf, ...]:
        """Return what KVM_GET_SUPPORTED_CPUID answers on this CPU."""
        return self._supported

    @functools.cached_property
    def _supported(self) -> tuple[Leaf, ...]:
        return tuple(self._kvm_leaves())

    def _kvm_leaves(self) -> Iterator[Leaf]:
        for (function, index), registers in sorted(self.table.items()):
            if function == 0xD and index > 1 and not _KVM_XCR0 >> index & 1:
                continue  # no CET in 6.12
            if function == 0xB and index:
                continue  # KVM tells nothing of the host's topology
            change = _KVM_CHANGES.get(function, _unchanged)
            significant = lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX if function in INDEXED else 0
            yield Leaf(function, index, significant, *change(self, index, registers))
        yield Leaf(0x40000000, 0, 0, 0x40000001, *_KVM_SIGNATURE)
        yield Leaf(0x40000001, 0, 0, _KVM_FEATURES, 0, 0, 0)


def _unchanged(_model: CpuModel, _index: int, registers: Registers) -> Registers:
    return registers


def _zero(_model: CpuModel, _index: int, _registers: Registers) -> Registers:
    return (0, 0, 0, 0)


def _masked(
    *masks: int, add: Registers = (0, 0, 0, 0)
) -> Callable[[CpuModel, int, Registers], Registers]:
    """KVM keeps these bits of the hardware's answer and emulates those of `add`."""

    def change(_model: CpuModel, _index: int, registers: Registers) -> Registers:
        eax, ebx, ecx, edx = (r & m | a for r, m, a in zip(registers, masks, add, strict=True))
        return (eax, ebx, ecx, edx)

    return change


def _leaf_7(_model: CpuModel, index: int, registers: Registers) -> Registers:
    if index:
        return registers
    eax, ebx, ecx, edx = registers
    emulated = flags("SPEC_CTRL:26 STIBP:27 ARCH_CAPABILITIES:29 SSBD:31")
    hidden = flags("OSPKE:4 CET_SS:7")
    return (eax, ebx | flags("TSC_ADJUST:1"), ecx & ~hidden, edx | emulated)


def _leaf_d(_model: CpuModel, index: int, registers: Registers) -> Registers:
    eax, ebx, ecx, edx = registers
    if index == 0:
        xcr0 = eax & _KVM_XCR0
        size = xsave_size(xcr0, compacted=False)
        return (xcr0, size, size, edx)
    if index == 1:
        return (eax, xsave_size(_model.table[0xD, 0][0] & _KVM_XCR0, compacted=True), 0, 0)
    return (eax, ebx, ecx, 0)


def _leaf_8000_0008(_model: CpuModel, _index: int, registers: Registers) -> Registers:
    eax, ebx, _, _ = registers
    # With NPT memory encryption takes no bit of a GPA; five levels are for those beyond 48.
    addressable = eax & 0xFF if (eax >> 8 & 0xFF) > 48 else min(eax & 0xFF, 48)
    # Bits of another VM's business (INVLPGB, RDPRU, ...) go; VIRT_SSBD is emulated.
    kept = ebx & ~flags("INSTRETCNT:1 INVLPGB:3 RDPRU:4 MCOMMIT:8") | flags("VIRT_SSBD:25")
    return (addressable << 16 | eax & 0xFFFF, kept, 0, 0)


def _leaf_8000_001f(_model: CpuModel, _index: int, registers: Registers) -> Registers:
    eax, ebx, ecx, edx = registers
    return (eax & flags("SEV:1 ES:3 SNP:4 COHERENT:10"), ebx & 0x3F, ecx, edx)


_ALL = 0xFFFF_FFFF
_KVM_XCR0 = 0x2E7  # x87, SSE, AVX, AVX-512, PKRU

# What KVM changes, by function; the rest it hands on. Features that KVM adds although the
# CPU lacks them are emulated for ordinary guests: SNP firmware refuses them.
_KVM_CHANGES: dict[int, Callable[[CpuModel, int, Registers], Registers]] = {
    0x1: _masked(
        _ALL,
        _ALL,
        _ALL & ~flags("MONITOR:3 OSXSAVE:27"),
        _ALL,
        add=(0, 0, flags("TSC_DEADLINE:24 HYPERVISOR:31"), 0),
    ),
    0x5: _zero,
    0x6: _masked(flags("ARAT:2"), 0, 0, 0),
    0x7: _leaf_7,
    0xB: _zero,
    0xD: _leaf_d,
    0x80000001: _masked(
        _ALL,
        0,
        flags(
            "LAHF:0 CMP_LEGACY:1 CR8_LEGACY:4 ABM:5 SSE4A:6 MISALIGNSSE:7 "
            "3DNOWPREFETCH:8 OSVW:9 TOPOEXT:22 PERFCTR_CORE:23"
        ),
        _ALL,
    ),
    0x80000007: _masked(0, 0, 0, flags("INVARIANT_TSC:8")),
    0x80000008: _leaf_8000_0008,
    0x8000000A: _zero,
    0x80000019: _masked(_ALL, _ALL, 0, 0),
    0x8000001B: _zero,
    0x8000001E: _zero,
    0x8000001F: _leaf_8000_001f,
    0x80000021: _masked(_ALL, 0, 0, 0, add=(flags("NO_SMM_CTL_MSR:9"), 0, 0, 0)),
}

CPU_MODELS: dict[str, CpuModel] = {
    model.name: model
    for model in (
        CpuModel("Milan", 0x19, 0x01, 1),
        CpuModel("Genoa", 0x19, 0x11, 1),
        CpuModel("Turin", 0x1A, 0x02, 1),
    )
}
"""The models by product name."""


def cpu_model(name: str) -> CpuModel:
    """Return the model 'Milan', 'Genoa' or 'Turin'; KeyError for another name."""
    return CPU_MODELS[name]
