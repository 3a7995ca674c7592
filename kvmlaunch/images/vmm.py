"""VMM profiles: what a virtual machine monitor makes of firmware, as data.

Profiles that come with the package are the JSON files in ``vmms/``, each with the source
of its values; :mod:`~.vmm_file` describes the format.
"""

from __future__ import annotations

from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.record import Record
from kvmlaunch.abi.reset import BSP_EIP, qemu_reset
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError
from kvmlaunch.images.ovmf_table import SECTION_TYPES
from kvmlaunch.images.plan import SYNC_VMSA_GPA

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BUILT_IN", "VcpuStart", "VmmProfile", "default_vmm", "is_profile_path", "load_vmm"]

BUILT_IN = (
    *("QEMU", "QEMU-before-6.10", "alioth", "ec2", "ec2-rdx0", "gce", "gce-genoa", "krun", "kvm"),
)
"""Names of the profiles in the package."""


class VcpuStart(Record):
    """A vCPU's state before its start address and its CPU's signature are known.

    Attributes: ``registers``; ``eip``, the start address, or None for that of the
    firmware's SEV-ES reset block; ``signature``: RDX holds the CPU's.
    """

    registers: Vmsa
    eip: int | None = None
    signature: bool = False

    def at(self, eip: int, *, signature: int, sev_features: int) -> Vmsa:
        """The state in real mode at ``eip`` (32 bits)."""
        return self.registers.replace(
            cs=self.registers.cs.replace(base=eip & 0xFFFF0000),
            rip=eip & 0xFFFF,
            rdx=signature if self.signature else self.registers.rdx,
            sev_features=sev_features,
        )


class VmmProfile(Record, unshown=("bsp", "ap", "sources"), unhashed=("sections", "sources")):
    """How a VMM launches firmware.

    Attributes:
        name, description: for people.
        bsp, ap: start of the boot processor, and of the others; ``ap`` is None where it
            isn't known.
        pages: ``firmware``, ``metadata`` and perhaps ``cpuid`` (CPUID sections, which then
            aren't among the others) in the order in which they are launched.
        sections: section name (``other`` for types without one) -> page type.
        kernel_hashes: the VMM launches a page of kernel hashes.
        svsm: the VMM launches an SVSM below the firmware.
        vmsa_gpa: GPA at which VMSAs are measured.
        as_given: VMSAs are measured as they are; else mainline KVM makes them of the states.
        sources: key of the profile's file -> where its values come from.
    """

    name: str
    description: str
    bsp: VcpuStart
    ap: VcpuStart | None
    pages: tuple[str, ...]
    sections: Mapping[str, PageType]
    kernel_hashes: bool
    svsm: bool
    vmsa_gpa: int
    as_given: bool
    sources: Mapping[str, str]

    def page_type(self, section: str) -> PageType:
        """How a metadata section of that name is launched."""
        return self.sections.get(section, self.sections["other"])

    def states(
        self, count: int, *, signature: int, sev_features: int, reset_eip: int | None
    ) -> tuple[Vmsa, ...]:
        """Start states of ``count`` vCPUs.

        ``reset_eip``: start address in the firmware's SEV-ES reset block, if it has one.
        Raises FormatError where a state isn't known.
        """

        def state(start: VcpuStart) -> Vmsa:
            eip = reset_eip if start.eip is None else start.eip
            if eip is None:
                raise FormatError("the firmware has no SEV-ES reset block to start vCPUs at")
            return start.at(eip, signature=signature, sev_features=sev_features)

        if count == 1:
            return (state(self.bsp),)
        if self.ap is None:
            raise FormatError(
                f"the VMM profile {self.name} knows one vCPU only: what others start with is "
                "not documented"
            )
        return (state(self.bsp), *(state(self.ap),) * (count - 1))

    @property
    def needs_reset_block(self) -> bool:
        """Whether vCPUs other than the first start where the firmware says."""
        return self.ap is not None and self.ap.eip is None


def default_vmm() -> VmmProfile:
    """QEMU's profile, as `load_vmm` has it but without description and sources.

    To read a file of JSON takes longer than to measure firmware.
    """
    registers = qemu_reset(0, signature=0, sev_features=0)
    sections = dict.fromkeys((*SECTION_TYPES.values(), "other"), PageType.ZERO)
    return VmmProfile(
        name="QEMU",
        description="",
        bsp=VcpuStart(registers, BSP_EIP, True),
        ap=VcpuStart(registers, None, True),
        pages=("firmware", "metadata"),
        sections={**sections, "secrets": PageType.SECRETS, "cpuid": PageType.CPUID},
        kernel_hashes=True,
        svsm=True,
        vmsa_gpa=SYNC_VMSA_GPA,
        as_given=False,
        sources={},
    )


def is_profile_path(name: str) -> bool:
    """Whether `load_vmm` takes it for a file: ``….json``, or a path with ``/``."""
    return name.lower().endswith(".json") or "/" in name


def load_vmm(name: str) -> VmmProfile:
    """A profile by its name, in any case, or from a file (see `is_profile_path`).

    Raises FormatError for a name that isn't known, ImageError for a file that breaks a rule.
    """
    from kvmlaunch.images.vmm_file import built_in, read_vmm  # QEMU's is there without

    if is_profile_path(name):
        return read_vmm(name, name)
    known = {each.lower(): each for each in BUILT_IN}
    if found := known.get(name.lower()):
        return built_in(found)
    import difflib  # only here

    close = [known[near] for near in difflib.get_close_matches(name.lower(), known)]
    hint = f"; near to it: {', '.join(close)}" if close else ""
    raise FormatError(
        f"unknown VMM {name!r}{hint}; known are {', '.join(BUILT_IN)}, or a file NAME.json"
    )
