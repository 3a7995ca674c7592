"""What may differ between a launch as it was asked for and one as it was: a table.

A row has the key that :class:`~.variants.Variants` knows, a name, the values to try, and the
words for one of them; sources of the whys are those of the VMM profiles, and
snp-firmware-abi.md, sections 3 and 11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

from kvmlaunch.abi.kernel_hashes import HASHES_SIZE, KernelHashes, hash_cmdline
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.reset import VCPU_TYPES
from kvmlaunch.abi.vmsa import SEV_FEATURES, Vmsa
from kvmlaunch.images import LaunchPlan, PageRange, VmmProfile, VmsaMode, load_vmm
from kvmlaunch.images.options import PlanOptions
from kvmlaunch.images.ovmf_table import SECTION_TYPES
from kvmlaunch.images.plan import SYNC_VMSA_GPA
from kvmlaunch.images.vmm import BUILT_IN
from kvmlaunch.launch.variants import FIRMWARE, NOT_LAUNCHED, asked_profile

__all__ = [
    "VMM",
    "Asked",
    "Cause",
    "Dimension",
    "KernelChange",
    "dimensions",
    "vcpu_counts",
    "vcpus_cause",
]

VMM = "VMM"
"""Name of the cause that another VMM is."""

_VMSA_GPA_52 = 0xF_FFFF_FFFF_F000
_COUNTS = (*range(1, 65), 96, 128, 192, 256, 512)
_ORDERS = (
    *(("firmware", "metadata"), ("metadata", "firmware")),
    *(("firmware", "metadata", "cpuid"), ("firmware", "cpuid", "metadata")),
)
_FPU = {
    (0x1F80, 0x37F): "as mainline Linux since 6.10",
    (0, 0): "older kernels measured no FPU state",
    (0x1F80, 0): "sev-snp-measure's VMSA of an SVSM",
}
_CBITS = (47, 51)
_KVM_RDX = 0x600
_HELPERS = ("page-tables", "start-info")

_SNP_ACTIVE = 1 << SEV_FEATURES["snp_active"]
_DEBUG_SWAP = 1 << SEV_FEATURES["debug_swap"]
_LIKELY = tuple(
    1 << SEV_FEATURES[name]
    for name in (
        *("debug_swap", "restricted_injection", "alternate_injection", "prevent_host_ibs"),
        *("secure_tsc", "smt_protection"),
    )
)
"""Features that are tried in pairs."""


class Cause(NamedTuple):
    """One input that differs.

    ``name`` of the input, ``found`` and ``asked`` values in words, ``why`` one comes by it
    ("" where that is plain), ``option`` of `kvmlaunch measure` that gives it, and ``profile``,
    keys of a VMM profile's file that do; both are empty where nothing does.
    """

    name: str
    found: str
    asked: str
    why: str = ""
    option: str = ""
    profile: Mapping[str, Any] = {}

    def __str__(self) -> str:
        """A sentence without its full stop."""
        why = f" ({self.why})" if self.why else ""
        return f"{self.name}: {self.found}, not {self.asked}{why}"


class Dimension(NamedTuple):
    """A row: ``values`` other than the one asked for, and ``cause``, the words for one.

    ``vmsa``: it changes VMSA pages. ``costly``: whatever is launched behind the VMSAs is
    added anew for each state, so it is tried alone and with one other change.
    """

    key: str
    values: Callable[[Asked], Iterable[Any]]
    cause: Callable[[Asked, Any], Cause]
    vmsa: bool = False
    costly: bool = False


class KernelChange(NamedTuple):
    """Another page of kernel hashes, None for none: what it is in words, and its option."""

    page: bytes | None
    words: str
    option: str


@dataclass(frozen=True)
class Asked:
    """What was asked for, in the terms of the table."""

    plan: LaunchPlan
    options: PlanOptions

    @cached_property
    def profile(self) -> VmmProfile | None:
        """The VMM profile, where one counts."""
        return asked_profile(self.plan, self.options)

    @cached_property
    def steps(self) -> tuple[PageRange, ...]:
        """The launch's steps without VMSAs."""
        return self.plan.without_vmsas

    @cached_property
    def state(self) -> Vmsa:
        """The first VMSA."""
        first = next(iter(self.plan.vmsas), None)
        return Vmsa.decode(first.page(0)) if first else self.plan.vcpus[0]

    @property
    def firmware(self) -> bool:
        """Whether there are firmware's pages, which an order can put elsewhere."""
        return any(step.label in FIRMWARE for step in self.steps)

    def profiled(self, **keys: Any) -> dict[str, Any]:
        """These keys for a VMM profile's file; {} where no profile counts."""
        if self.profile is None:
            return {}
        name = self.profile.name
        return {**({"base": name} if name in BUILT_IN else {}), **keys}

    @property
    def hashes(self) -> PageRange | None:
        """The page of kernel hashes."""
        return next((s for s in self.steps if s.label == "kernel-hashes" and s.pieces), None)

    @property
    def order(self) -> tuple[str, ...]:
        """The order of firmware and metadata."""
        return self.profile.pages if self.profile else _ORDERS[0]

    @property
    def features(self) -> int:
        """SEV_FEATURES of the VMSAs."""
        return self.plan.sev_features if self.synced else self.state.sev_features

    @property
    def behind(self) -> bool:
        """Whether pages follow a VMSA, as an IGVM file may have them."""
        kinds = [step.type for step in self.plan.steps]
        return PageType.VMSA in kinds[:-1] and kinds[-1] is not PageType.VMSA

    @property
    def synced(self) -> bool:
        """Whether KVM makes the VMSAs."""
        return self.plan.vmsa_mode is VmsaMode.SYNC


def dimensions(asked: Asked) -> list[tuple[Dimension, list[Any]]]:
    """The rows that apply, each with its values."""
    rows = [(row, list(row.values(asked))) for row in (*_TABLE, *_section_types(asked))]
    return [(row, values) for row, values in rows if values]


# The number of vCPUs: a row of its own kind, since all numbers are one chain.


def vcpu_counts(asked: Asked, most: int | None = None) -> list[int]:
    """Numbers of vCPUs to try, with the one asked for; ``most`` leaves larger others out."""
    counts = {count for count in _COUNTS if most is None or count <= most}
    return sorted(counts | {len(asked.plan.vcpus)})


def vcpus_cause(asked: Asked, count: int) -> Cause:
    """The words for another number of vCPUs."""
    return Cause("vCPUs", str(count), str(len(asked.plan.vcpus)), option=f"--vcpus {count}")


# SEV_FEATURES


def _features(asked: Asked) -> Iterable[int]:
    bits = [1 << bit for bit in SEV_FEATURES.values()]
    tried = [_SNP_ACTIVE | _DEBUG_SWAP, asked.features ^ _DEBUG_SWAP, _SNP_ACTIVE]
    tried += [_SNP_ACTIVE | bit for bit in bits]
    tried += [_SNP_ACTIVE | one | other for one, other in combinations(_LIKELY, 2)]
    tried += [asked.features ^ bit for bit in bits]
    return [value for value in dict.fromkeys(tried) if value != asked.features]


def _features_cause(asked: Asked, value: int) -> Cause:
    before = asked.features
    changes = [
        f"{'with' if value >> bit & 1 else 'without'} {name}"
        for name, bit in SEV_FEATURES.items()
        if (value ^ before) >> bit & 1
    ]
    why = ", ".join(changes)
    if (value ^ before) & _DEBUG_SWAP:
        why += "; Linux 6.6 and 6.7 and some vendors' kernels set debug_swap by themselves"
    option = f"--guest-features {value:#x}"
    return Cause("SEV_FEATURES", f"{value:#x}", f"{before:#x}", why, option)


# The CPU


def _signatures(asked: Asked) -> Iterable[int]:
    if any(step.label in _HELPERS for step in asked.steps) or asked.plan.image_type == "igvm":
        return []  # only a reset puts it into RDX
    tried = dict.fromkeys((*VCPU_TYPES.values(), _KVM_RDX, 0))
    return [value for value in tried if value != asked.options.signature]


def _signature_cause(asked: Asked, value: int) -> Cause:
    name = next((name for name, known in VCPU_TYPES.items() if known == value), None)
    option = f"--vcpu-type {name}" if name else f"--vcpu-sig {value:#x}"
    why = {_KVM_RDX: "KVM's, for a VMM that sets no RDX", 0: "a VMM that sets RDX to 0"}.get(value)
    found = f"{value:#x}" + (f" ({name})" if name else "")
    return Cause("CPU signature", found, f"{asked.options.signature:#x}", why or "", option)


def _fpu(asked: Asked) -> Iterable[tuple[int, int]]:
    return [value for value in _FPU if value != (asked.state.mxcsr, asked.state.x87_fcw)]


def _fpu_cause(asked: Asked, value: tuple[int, int]) -> Cause:
    option = ""
    if value == (0x1F80, 0) and asked.options.svsm is not None:
        option = "--compat sev-snp-measure"
    elif value == (0, 0) and asked.plan.vmm == "QEMU":
        option = "--vmm-type QEMU-before-6.10"
    registers = {"mxcsr": f"{value[0]:#x}", "x87_fcw": f"{value[1]:#x}"}
    profile = asked.profiled(registers=registers)
    before = f"{asked.state.mxcsr:#x}, {asked.state.x87_fcw:#x}"
    found = f"{value[0]:#x}, {value[1]:#x}"
    return Cause("MXCSR and X87_FCW", found, before, _FPU[value], option, profile)


# The VMM


def _vmms(asked: Asked) -> Iterable[str]:
    if asked.profile is None:
        return []
    names = [name for name in BUILT_IN if name != asked.profile.name]
    return [name for name in names if asked.firmware or load_vmm(name).pages[0] == "firmware"]


def _vmm_cause(asked: Asked, name: str) -> Cause:
    vmm = load_vmm(name)
    option = f"--vmm-type {name}"
    if asked.hashes and not vmm.kernel_hashes:
        option += " without --kernel"
    return Cause(VMM, name, asked.plan.vmm, vmm.description, option, {"base": name})


# VMSAs


def _vmsa_gpas(asked: Asked) -> Iterable[int]:
    return [gpa for gpa in (SYNC_VMSA_GPA, _VMSA_GPA_52) if gpa != asked.plan.vmsa_gpa]


def _vmsa_gpa_cause(asked: Asked, gpa: int) -> Cause:
    why = f"the last page of {gpa.bit_length()} address bits"
    profile = asked.profiled(vmsa_gpa=f"{gpa:#x}")
    before = f"{asked.plan.vmsa_gpa:#x}"
    return Cause("GPA of the VMSAs", f"{gpa:#x}", before, why, profile=profile)


def _modes(asked: Asked) -> Iterable[str]:
    return ("first", "each", "none") if asked.synced else ("sync", "none")


def _mode_cause(asked: Asked, mode: str) -> Cause:
    words = {
        "sync": (
            f"one per vCPU at GPA {SYNC_VMSA_GPA:#x}, made by KVM at SNP_LAUNCH_FINISH",
            "--vmsa-mode sync",
        ),
        "first": ("one page of the launcher's, for vCPU 0", "--vmsa-mode direct"),
        "each": (
            "a page of the launcher's for each vCPU",
            "--vmsa-mode direct with --vmsa :N for each vCPU N",
        ),
        "none": ("none are measured", ""),
    }
    found, option = words[mode]
    before = words["sync"][0] if asked.synced else f"mode {asked.plan.vmsa_mode}"
    return Cause("VMSAs", found, before, option=option)


def _places(asked: Asked) -> Iterable[str]:
    # Nothing can be before pages that only a digest is known of.
    first = [] if any(asked.plan.start_digest) else ["first"]
    if asked.plan.image_type == "igvm":
        return [*first, "last"] if asked.behind else first
    return first + ["before-metadata"] * (asked.plan.image_type == "ovmf")


def _place_cause(asked: Asked, place: str) -> Cause:
    found = "behind firmware, before metadata" if place == "before-metadata" else place
    return Cause("place of the VMSAs", found, "the file's" if asked.behind else "last")


# Pages


def _orders(asked: Asked) -> Iterable[tuple[str, ...] | str]:
    if asked.plan.image_type == "ovmf":
        return [order for order in _ORDERS if asked.firmware and order != asked.order]
    gpas = [step.gpa for step in asked.steps]
    orders = {"ascending": sorted(gpas)}
    if asked.steps and asked.steps[0].label in _HELPERS:
        orders["image-first"] = [*gpas[1:], *gpas[:1]]
    found: dict[tuple[int, ...], str] = {}
    for name, order in orders.items():
        if order != gpas:
            found.setdefault(tuple(order), name)
    return found.values()


def _order_cause(asked: Asked, order: tuple[str, ...] | str) -> Cause:
    if isinstance(order, str):
        found = {"ascending": "ascending GPAs", "image-first": "the image, then what it needs"}
        before = "the file's" if asked.plan.image_type == "igvm" else "those it needs, then others"
        return Cause("order of pages", found[order], before)
    profile = asked.profiled(pages=list(order))
    before = ", ".join(asked.order)
    return Cause("order of pages", ", ".join(order), before, profile=profile)


def _zero_types(asked: Asked) -> Iterable[int]:
    zero = {step.label for step in asked.steps if step.type is PageType.ZERO}
    # With one label that is the row of this label.
    return (PageType.NORMAL, PageType.UNMEASURED, NOT_LAUNCHED) if len(zero) > 1 else ()


def _zero_cause(asked: Asked, kind: int) -> Cause:
    labels = dict.fromkeys(step.label for step in asked.steps if step.type is PageType.ZERO)
    sections = dict.fromkeys(map(_section, labels), _named(kind)) if kind else {}
    profile = asked.profiled(sections=sections) if kind else {}
    return Cause("all ZERO pages", _type_words(kind), "ZERO", _type_why(kind), profile=profile)


def _section_types(asked: Asked) -> Iterable[Dimension]:
    """A row for each label whose pages have no contents."""
    kinds = {step.label: step.type for step in asked.steps if not step.pieces}
    return [_section_row(label, kind) for label, kind in kinds.items()]


def _section_row(label: str, asked_type: PageType) -> Dimension:
    def values(asked: Asked) -> Iterable[int]:
        tried = [PageType.ZERO, PageType.UNMEASURED, NOT_LAUNCHED]
        if asked_type in (PageType.ZERO, PageType.UNMEASURED):
            tried.append(PageType.NORMAL)
        return [kind for kind in tried if kind != asked_type]

    def cause(asked: Asked, kind: int) -> Cause:
        profile = asked.profiled(sections={_section(label): _named(kind)}) if kind else {}
        name, before = f"page type of {label}", asked_type.name
        return Cause(name, _type_words(kind), before, _type_why(kind), profile=profile)

    return Dimension(f"type of {label}", values, cause)


def _section(label: str) -> str:
    """The name that a VMM profile has for sections with that label."""
    return label if label in SECTION_TYPES.values() else "other"


def _named(kind: int) -> str:
    return PageType(kind).name


def _type_words(kind: int) -> str:
    return "not launched" if kind == NOT_LAUNCHED else _named(kind)


def _type_why(kind: int) -> str:
    return {int(PageType.NORMAL): "zeros that are hashed"}.get(int(kind), "")


def _kernels(asked: Asked) -> Iterable[KernelChange]:
    step = asked.hashes
    if step is None:
        return []
    page, append = bytes(step.page(0)), asked.options.append or ""
    at = PAGE_SIZE - len(page.lstrip(b"\0"))  # the table begins with a GUID, before it are zeros
    hashes = KernelHashes.decode(page[at : at + HASHES_SIZE])
    nothing = KernelHashes(hashes.kernel)
    others = (
        (replace(hashes, initrd=nothing.initrd), "without the initrd's", "without --initrd"),
        (
            replace(hashes, cmdline=nothing.cmdline),
            "without the command line's",
            "without --append",
        ),
        (
            replace(hashes, cmdline=hash_cmdline(append.strip())),
            "of the command line without outer blanks",
            "",
        ),
        (
            replace(hashes, cmdline=hash_cmdline(append + "\n")),
            "of the command line and a newline",
            "",
        ),
    )
    return [
        KernelChange(None, "none", "without --kernel"),
        *(KernelChange(made.page(at), *words) for made, *words in others if made != hashes),
    ]


def _kernel_cause(asked: Asked, change: KernelChange) -> Cause:
    return Cause("kernel hashes", change.words, "as asked", option=change.option)


def _cbits(asked: Asked) -> Iterable[int]:
    if not any(step.label == "page-tables" for step in asked.steps):
        return []
    return [bit for bit in _CBITS if bit != asked.plan.cbitpos]


def _cbit_cause(asked: Asked, bit: int) -> Cause:
    why = "the host's is in the page tables"
    option = f"--cbitpos {bit}"
    return Cause("position of the C-bit", str(bit), str(asked.plan.cbitpos), why, option)


def _native_zero(asked: Asked) -> Iterable[bool]:
    return [not asked.options.native_zero] if asked.plan.image_type == "igvm" else []


def _native_zero_cause(asked: Asked, native: bool) -> Cause:
    found, before = ("ZERO", "NORMAL") if native else ("NORMAL", "ZERO")
    why = "loaders differ in what they make of them"
    option = "--native-zero" if native else "without --native-zero"
    return Cause("pages without data", found, before, why, option)


# What is asked after most goes first.
_TABLE = (
    Dimension("sev_features", _features, _features_cause, vmsa=True),
    Dimension("signature", _signatures, _signature_cause, vmsa=True),
    Dimension("fpu", _fpu, _fpu_cause, vmsa=True),
    Dimension("vmm", _vmms, _vmm_cause, vmsa=True),
    Dimension("vmsa_gpa", _vmsa_gpas, _vmsa_gpa_cause),
    Dimension("kernel", _kernels, _kernel_cause),
    Dimension("cbit", _cbits, _cbit_cause, vmsa=True),
    Dimension("native_zero", _native_zero, _native_zero_cause),
    Dimension("mode", _modes, _mode_cause),
    Dimension("zero", _zero_types, _zero_cause),
    Dimension("order", _orders, _order_cause),
    Dimension("place", _places, _place_cause, costly=True),
)
